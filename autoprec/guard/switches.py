"""FP8 layers on and off in place: one attribute of the module, and nothing else of it.

A layer in FP8 O1 stores what it stores in BF16 O2, so `fp8_active = False` makes its GEMMs BF16
with the same parameters, masters, optimizer state and state_dict. torch.compile guards on the
attribute: a switch compiles once, and switching back finds what was compiled before.
"""

from collections.abc import Mapping, Set
from typing import Any

from torch import nn

from autoprec.common.text import first_and_more
from autoprec.errors import PlanMismatchError
from autoprec.model.layers import plain_name, unwrapped
from autoprec.records import Phase, Plan


def fp8_layers(model: nn.Module, plan: Plan) -> dict[str, Any]:  # Any: torchao ships no types
    """Return the modules of the plan's FP8 layers by name, in plan order.

    Raises:
        PlanMismatchError: the model's FP8 layers are not those of the plan.
    """
    found = {
        plain_name(name): module
        for name, module in unwrapped(model, parallel=True).named_modules()
        if "fp8_active" in vars(module)
    }
    wanted = [layer.name for layer in plan.layers if layer.option.is_fp8]
    differing = sorted(set(found) ^ set(wanted))
    if differing:
        raise PlanMismatchError(
            f"a guard watches a model to which the plan was applied, but they differ in the FP8 "
            f"layers {first_and_more(differing)}; call autoprec.apply with this plan first"
        )
    return {name: found[name] for name in wanted}


def is_fp8_phase(schedule: tuple[Phase, ...], step: int) -> bool:
    """Whether a precision schedule has FP8 on at a step; before its first phase it is on."""
    return next((p.fp8 for p in reversed(schedule) if p.start_step <= step), True)


def set_active(layers: Mapping[str, Any], *, demoted: Set[str], fp8: bool) -> None:
    """Run in FP8 the layers that are not demoted, if `fp8`, and all others in BF16."""
    for name, layer in layers.items():
        wanted = fp8 and name not in demoted
        if layer.fp8_active is not wanted:
            layer.fp8_active = wanted
