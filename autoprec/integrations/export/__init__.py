"""A plan in the words of the frameworks that people train with. Data only; needs no torch."""

from autoprec.integrations.export.targets import TARGETS, export_plan
