"""The optimizers of a script: what they train, and one copied to another copy of its model."""

import copy
import gc
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoprec.device.ranks import sharded_tensor
from autoprec.workload.optimizers import twin_of

PEAKS = ("max_lr", "initial_lr")  # what torch's schedulers note of the rate that they start from


def copy_optimizer(optimizer: Optimizer, source: nn.Module, target: nn.Module) -> Optimizer:
    """Return an optimizer of `source`'s parameters and no others, over those of `target`.

    State comes along, on the device of each parameter.
    """
    pairs = zip(source.parameters(), target.parameters(), strict=True)
    other = twin_of(optimizer, {id(one): another for one, another in pairs})
    for parameter, state in other.state.items():
        for name, value in state.items():
            if isinstance(value, sharded_tensor()):
                value = value.full_tensor()
            if isinstance(value, Tensor) and value.dim() > 0:
                state[name] = value.to(parameter.device)
    return other


def set_peak_rates(optimizer: Optimizer, seen: Sequence[float]) -> None:
    """Set the learning rates that a schedule starts from or rises to, and forget the schedule.

    Those of a warm-up's first step may be zero. `seen` has the largest one of each group so far,
    where a script sets them by hand.
    """
    for group, largest in zip(optimizer.param_groups, seen, strict=True):
        peaks = [float(group.pop(name)) for name in PEAKS if name in group]
        rate, is_tensor = (peaks or [largest])[0], isinstance(group["lr"], Tensor)
        group["lr"] = torch.full_like(group["lr"], rate) if is_tensor else rate


def copy_schedule(scheduler: LRScheduler, optimizer: Optimizer) -> LRScheduler:
    """Return a copy of a schedule for another optimizer with the same groups."""
    its = vars(scheduler)["optimizer"]
    memo = {id(its): optimizer, id(getattr(its, "optimizer", its)): optimizer}
    copied: LRScheduler = copy.deepcopy(scheduler, memo)
    return copied


def find_schedule(optimizer: Optimizer, other: Optimizer) -> tuple[LRScheduler, LRScheduler] | None:
    """Return the scheduler of a script's optimizer, if any, and a copy for that one's, `other`."""
    found = [s for s in gc.get_objects() if issubclass(type(s), LRScheduler)]
    parts = [part for whole in found for part in vars(whole).get("_schedulers", ())]
    for scheduler in found:
        its = vars(scheduler).get("optimizer")
        its = getattr(its, "optimizer", its)  # Accelerate's is around the script's
        if its is optimizer and scheduler not in parts and not hasattr(scheduler, "num_bad_epochs"):
            return scheduler, copy_schedule(scheduler, other)
    return None


def was_stepped(own: LRScheduler, first: LRScheduler, steps: int) -> bool:
    """Whether a script stepped a schedule once for each optimizer step but maybe the last."""
    return _position(own) - _position(first) >= max(steps - 1, 1)


def _position(scheduler: LRScheduler) -> int:
    parts = vars(scheduler).get("_schedulers", ())  # ChainedScheduler itself counts nothing
    return int(vars(scheduler).get("last_epoch", 0)) or sum(map(_position, parts))


class SeenOptimizer:
    """An optimizer of a script, before its first step, over a copy of its model."""

    def __init__(self, optimizer: Optimizer, source: nn.Module, target: nn.Module) -> None:
        """Copy it, and its schedule if it has one."""
        self.first = copy_optimizer(optimizer, source, target)
        self.schedule = find_schedule(optimizer, self.first)
        self.rates: list[float] = []  # the largest of each group so far; 0 where it has none

    def see_rates(self, optimizer: Optimizer) -> None:
        """Note the learning rates of a step."""
        own = [float(group.get("lr", 0.0)) for group in optimizer.param_groups]
        self.rates = list(map(max, own, self.rates or own))
