"""What each option does to the gradient, per layer: the gradient perturbation e.

measure         the stage: workload -> Sensitivity
layerwise       the exact mode, one layer x option at a time
joint           the measured e of a whole assignment
reference       warmed-up weights, batches and reference gradients
preconditioner  how the optimizer weighs a gradient
projection      short sketches of gradients
estimates       per-batch numbers -> estimates with standard errors

Importing this package imports no torch: `explain` can be had without it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoprec.sensitivity.joint import JointMeter
    from autoprec.sensitivity.measure import measure_sensitivity
    from autoprec.sensitivity.reference import Reference, prepare_reference

__all__ = ["JointMeter", "Reference", "measure_sensitivity", "prepare_reference"]

_HOMES = {
    "JointMeter": "joint",
    "measure_sensitivity": "measure",
    "Reference": "reference",
    "prepare_reference": "reference",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
