"""Which layers of a model a guard may switch, and whose gradients it looks at."""

from typing import Any

from torch import nn

from autoprec.common.text import first_and_more
from autoprec.errors import PlanMismatchError
from autoprec.model.layers import plain_name, unwrapped
from autoprec.records import Plan


def fp8_layers(model: nn.Module, plan: Plan) -> dict[str, Any]:  # Any: torchao ships no types
    """Return the modules of the plan's FP8 layers by name, in plan order."""
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


def trained_parameters(model: nn.Module, plan: Plan) -> tuple[tuple[str, ...], list[nn.Parameter]]:
    """Return the trained parameters, and the name of each one's layer ("" if none has it)."""
    layers = {layer.name for layer in plan.layers}
    owners, parameters = [], []
    for name, parameter in unwrapped(model, parallel=True).named_parameters():
        if parameter.requires_grad:
            owner = plain_name(name)
            while owner not in layers and owner:
                owner = owner.rpartition(".")[0]
            owners.append(owner)
            parameters.append(parameter)
    if not parameters:
        raise PlanMismatchError(
            "a guard watches a model that trains, but no parameter requires a gradient; "
            "unfreeze parameters before making the guard"
        )
    return tuple(owners), parameters
