"""The optimizers of a script: what they train, and one copied to another copy of its model."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoprec.runtime.attach import HOOKS

PEAKS = ("max_lr", "initial_lr")  # what torch's schedulers note of the rate that they start from


def trained_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer has a parameter of a model."""
    return not set(model.parameters()).isdisjoint(trained_by(optimizer))


def has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of an optimizer's step hook say that it was given a closure."""
    return any(callable(value) for value in (*args[1:], *kwargs.values()))


def copy_optimizer(optimizer: Optimizer, source: nn.Module, target: nn.Module) -> Optimizer:
    """Return an optimizer of `source`'s parameters and no others, over those of `target`.

    Any subclass of `Optimizer` works, whatever its constructor wants: its attributes are copied,
    but no hooks and patched methods. State comes along, on the device of each parameter.
    """
    # deepcopy takes what its memo has under an object's id for that object's copy
    pairs = zip(source.parameters(), target.parameters(), strict=True)
    memo: dict[int, Any] = {id(one): other for one, other in pairs}
    own = {k: v for k, v in vars(optimizer).items() if k not in HOOKS and not callable(v)}
    other: Optimizer = object.__new__(type(optimizer))
    vars(other).update(copy.deepcopy(own, memo))
    other.__setstate__({})  # makes hooks and the profiled step, as after unpickling
    for parameter, state in other.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                state[name] = value.to(parameter.device)
    return other


def set_peak_rates(optimizer: Optimizer) -> None:
    """Set the learning rates that a schedule starts from or rises to, and forget the schedule.

    Those of a warm-up's first step may be zero.
    """
    for group in optimizer.param_groups:
        peaks = [group.pop(name) for name in PEAKS if name in group]
        if peaks:
            rate, is_tensor = float(peaks[0]), isinstance(group["lr"], Tensor)
            group["lr"] = torch.full_like(group["lr"], rate) if is_tensor else rate
