"""An optimizer -> a recipe that builds the same one for another copy of the model.

Any subclass of `torch.optim.Optimizer` works, whatever its constructor wants: its attributes are
copied with a placeholder for each parameter, hooks and patched methods left out.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoprec.runtime.attach import HOOKS

Attributes = dict[str, Any]  # Any: an optimizer's own
PEAKS = ("max_lr", "initial_lr")  # what torch's schedulers note of the rate that they start from


class Place:
    """Stands for one parameter of the model."""


@dataclass(frozen=True)
class OptimizerRecipe:
    """An optimizer's class and attributes, with places instead of parameters."""

    cls: type[Optimizer]
    attributes: Attributes
    places: tuple[Place, ...]

    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer over the parameters of `model`, with the state that it had."""
        parameters = zip(self.places, model.parameters(), strict=True)
        memo: dict[int, Any] = {id(place): parameter for place, parameter in parameters}
        optimizer: Optimizer = object.__new__(self.cls)
        vars(optimizer).update(copy.deepcopy(self.attributes, memo))
        optimizer.__setstate__({})  # hooks and the profiled step, as after unpickling
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    state[name] = value.to(parameter.device)
        return optimizer


def take_apart(optimizer: Optimizer, model: nn.Module) -> OptimizerRecipe:
    """Return the recipe of an optimizer that trains parameters of `model` and no others.

    Learning rates are those that a schedule starts from or rises to, not those of a warm-up's first
    step, which may be zero.
    """
    places = tuple(Place() for _ in model.parameters())
    pairs = zip(model.parameters(), places, strict=True)
    memo: dict[int, Any] = {id(parameter): place for parameter, place in pairs}
    kept = {
        name: value
        for name, value in vars(optimizer).items()
        if name not in HOOKS and not callable(value)
    }
    attributes: Attributes = copy.deepcopy(kept, memo)
    for group in attributes["param_groups"]:
        peaks = [group.pop(name) for name in PEAKS if name in group]
        if peaks:
            rate = float(peaks[0])
            group["lr"] = torch.full_like(group["lr"], rate) if _is_tensor(group) else rate
    return OptimizerRecipe(type(optimizer), attributes, places)


def _is_tensor(group: dict[str, Any]) -> bool:  # Any: as above
    return isinstance(group["lr"], Tensor)
