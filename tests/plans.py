"""Plans for any model, without a search: every layer one option, some of them another."""

from collections.abc import Mapping

from torch import nn

from autoprec.records import BF16_O2, Option, Plan
from autoprec.runtime import uniform_plan


def plan_for(
    model: nn.Module, option: Option = BF16_O2, others: Mapping[str, Option] | None = None
) -> Plan:
    """Return a plan with `option` wherever it can be, BF16 O2 elsewhere, and `others` by name."""
    return uniform_plan(model, option, others)
