"""One training step as the user makes it: accumulation, clipping and the schedule included.

    zero_grad; of each of `accumulation_steps` batches: loss / accumulation_steps, backward;
    clip_grad_norm_(clip_norm); optimizer.step; scheduler.step

The stages train for tens of steps, most schedules rise over hundreds. A rise that would not be over
within half of a stage's warm-up is climbed in that half, several steps of the schedule at a time:
what happens at the peak is what is asked about. From there on one step is one step.
"""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoprec.common.text import error_line
from autoprec.errors import WorkloadError
from autoprec.workload.functions import Batch, UserCode, Workload
from autoprec.workload.optimizers import rated_groups, trained_by

LONGEST_SCHEDULE = 100_000  # steps that are looked ahead, about a second
Seen = dict[tuple[object, ...], tuple[int, int | None]]  # a schedule's start: its peak and end
LossFn = Callable[[nn.Module, Batch], Tensor]
NEARLY_ZERO = 1e-6  # of the peak rate, where a schedule is over


@dataclass
class Training:
    """A model in training: what a step of it takes, and its state.

    >>> import torch
    >>> from autoprec.workload.functions import workload_from
    >>> workload = workload_from({
    ...     "build_model": lambda: torch.nn.Linear(4, 1),
    ...     "train_batches": lambda seed: iter([torch.ones(2, 4)] * 4),
    ...     "loss_fn": lambda model, x: model(x).square().mean(),
    ...     "accumulation_steps": 2, "clip_norm": 1.0,
    ... })
    >>> training = start_training(workload, workload.build_model())
    >>> [len(batches) for batches in step_batches(workload, workload.train_batches(0), count=3)]
    [2, 2, 2]
    >>> training.step([torch.ones(2, 4)] * 2).shape
    torch.Size([])
    """

    workload: Workload
    model: nn.Module
    optimizer: Optimizer
    schedule: "Schedule | None" = None
    norm: Tensor | None = None  # of the last step's gradient before it was clipped
    # whether the optimizer leaves gradients as they are; unknown before its first step
    keeps_gradients: bool | None = None

    @property
    def clip_scale(self) -> float:
        """What clipping multiplied the last step's gradient by."""
        most = self.workload.clip_norm
        if most is None or self.norm is None:
            return 1.0
        return min(most / max(float(self.norm), 1e-30), 1.0)

    def step(
        self,
        batches: Sequence[Batch],
        *,
        rate: float = 1.0,
        loss_fn: LossFn | None = None,
        leave_gradients: bool = False,
    ) -> Tensor:
        """Train on the batches of one optimizer step and return their mean loss, detached.

        `rate` is a factor on the learning rates, of this step alone; `loss_fn` is run in place of
        the workload's. With `leave_gradients` they are there behind it as the optimizer got them.

        Raises:
            WorkloadError: backward left no gradients, or the optimizer cannot step them.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses, own = [], loss_fn or self.workload.loss_fn
        for batch in batches:
            loss = own(self.model, batch)
            with nullcontext() if loss_fn else self.workload.plainly():
                torch.autograd.backward(loss if len(batches) == 1 else loss / len(batches))
            losses.append(loss.detach())
        if all(parameter.grad is None for parameter in trained_by(self.optimizer)):
            raise WorkloadError(
                f"backward must leave gradients for {type(self.optimizer).__name__}, but there are "
                "none after it: the loss must depend on the parameters, and the optimizer step "
                "after backward, not within it in hooks at gradients"
            )
        self.update(rate=rate, leave_gradients=leave_gradients)
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def update(self, *, rate: float = 1.0, leave_gradients: bool = False) -> None:
        """Clip the gradients, step the optimizer, then the schedule."""
        if self.workload.clip_norm is not None:
            self.norm = clip_gradients(self.model, self.workload.clip_norm)
        given = [
            (p, p.grad, p.grad._version) for p in trained_by(self.optimizer) if p.grad is not None
        ]
        kept = (
            [g.clone() for _, g, _ in given] if leave_gradients and not self.keeps_gradients else []
        )
        self._step_optimizer(rate)
        # schedule-free ones normalise gradients in place, heavyball's drop them
        self.keeps_gradients = all(p.grad is g and g._version == made for p, g, made in given)
        for (parameter, _, _), gradient in zip(given, kept, strict=False):
            parameter.grad = gradient
        if self.schedule is not None:
            self.schedule.step()

    def _step_optimizer(self, rate: float) -> None:
        """Step at so many times its learning rates."""
        groups = rated_groups(self.optimizer) if rate != 1.0 else []
        rates = [_rate(group) for group in groups]
        for group, own in zip(groups, rates, strict=True):
            _set_rate(group, own * rate)
        kind = type(self.optimizer).__name__
        with UserCode(f"{kind}.step()", "a step of gradients as loss_fn leaves them"):
            try:
                self.optimizer.step()
            except TypeError as error:
                raise WorkloadError(
                    "build_optimizer(model) must return an optimizer whose step() takes no "
                    f"closure, but {kind} refused ({error}); use a first-order one"
                ) from error
            except RuntimeError as error:
                if "harding" not in str(error):  # DTensor's: no such propagation, or no strategy
                    raise
                raise WorkloadError(
                    "build_optimizer(model) must return an optimizer that can step sharded "
                    f"parameters, but torch's DTensor refused what {kind} does "
                    f"({error_line(error)}); use AdamW, or DDP in place of fully_shard"
                ) from error
        for group, own in zip(groups, rates, strict=True):
            _set_rate(group, own)  # many schedules go on from the rate that they find


class Schedule:
    """The user's scheduler, stepped once for each optimizer step, or faster while it rises.

    `position` is its step, `pace` how many of them are made at a time up to its `peak`, and
    `length` its last step, if that is known.
    """

    def __init__(
        self, scheduler: LRScheduler, *, warmup_steps: int = 0, seen: Seen | None = None
    ) -> None:
        """Take a scheduler at its start, and over how many steps the caller warms up.

        `seen` keeps what looking ahead found: a second where a schedule has no end.
        """
        self.scheduler, self.position, self.pace = scheduler, 0, 1
        seen = {} if seen is None else seen
        start = type(scheduler), *map(_rate, scheduler.optimizer.param_groups)
        if start not in seen:
            seen[start] = _look_ahead(scheduler)
        self.peak, self.length = seen[start]
        if warmup_steps:
            self.pace = max(math.ceil(self.peak / max(warmup_steps // 2, 1)), 1)

    def step(self) -> None:
        """Go on by one optimizer step."""
        left = self.peak - self.position
        self.go_to(self.position + (min(self.pace, left) if left > 0 else 1))

    def go_to(self, position: int) -> None:
        """Go on to a later step of the scheduler."""
        with _unwarned():
            for _ in range(position - self.position):
                _step(self.scheduler)
        self.position = position


def start_training(workload: Workload, model: nn.Module, *, warmup_steps: int = 0) -> Training:
    """Return a model with a fresh optimizer and schedule of the user's."""
    optimizer = workload.build_optimizer(model)
    scheduler = workload.build_scheduler(optimizer)
    schedule = None
    if scheduler is not None:
        schedule = Schedule(scheduler, warmup_steps=warmup_steps, seen=workload.schedules)
    return Training(workload, model, optimizer, schedule)


def step_batches(
    workload: Workload, stream: Iterator[Batch], *, count: int
) -> Iterator[list[Batch]]:
    """Yield the batches of each of `count` optimizer steps from the stream of all."""
    for _ in range(count):
        yield list(islice(stream, workload.accumulation_steps))


def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale the gradients so that their norm is at most this, as torch does; return what it was.

    Parameters of several meshes of ranks are added up by mesh, which torch's own function is not
    made for.
    """
    meshes: defaultdict[object, list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.grad is not None:
            meshes[getattr(parameter, "device_mesh", None)].append(parameter)
    norms = []
    for parameters in meshes.values():
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    total = nn.utils.get_total_norm(norms)
    for parameters in meshes.values():
        nn.utils.clip_grads_with_norm_(parameters, most, total)
    return total


def _look_ahead(scheduler: LRScheduler) -> tuple[int, int | None]:
    """Return the step at which the rates are highest, and the last one, where it is told.

    It is where the rates are zero or the scheduler refuses to go on; None where that is not within
    LONGEST_SCHEDULE steps. A copy is stepped.
    """
    shell = object.__new__(type(scheduler.optimizer))  # copied as it is, and not by __setstate__
    vars(shell).update(vars(scheduler.optimizer))
    shell.param_groups = [dict(group) for group in scheduler.optimizer.param_groups]
    ahead: LRScheduler = copy.deepcopy(scheduler, {id(scheduler.optimizer): shell})
    rates = [max(_rate(group) for group in shell.param_groups)]
    peak = 0
    with _unwarned():
        while len(rates) < LONGEST_SCHEDULE:
            if not _step(ahead):
                return peak, len(rates) - 1
            rates.append(max(_rate(group) for group in shell.param_groups))
            if rates[-1] > rates[peak]:
                peak = len(rates) - 1
            elif rates[-1] <= NEARLY_ZERO * rates[peak]:
                return peak, len(rates) - 1
    return peak, None


@contextmanager
def _unwarned() -> Iterator[None]:
    """Let no scheduler warn that its optimizer was not stepped before: it is a copy's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _step(scheduler: LRScheduler) -> bool:
    """Go on by one step, and return whether there was one."""
    with UserCode(f"{type(scheduler).__name__}.step()", "the next learning rates"):
        try:
            scheduler.step()
        except ValueError:  # OneCycleLR past its total_steps
            return False
        except OverflowError as error:
            raise WorkloadError(
                f"rates must have a peak, but those of {type(scheduler).__name__} rise until they "
                "overflow, as in a learning-rate range test; tune what is trained after it"
            ) from error
    return True


def _rate(group: dict[str, Any]) -> float:  # Any: a param group
    if "lr" not in group:
        raise WorkloadError(
            "build_optimizer(model) must return an optimizer whose param groups have an 'lr' to "
            f"anneal, but one has only {sorted(set(group) - {'params'})}; use one of torch.optim"
        )
    return float(group["lr"])


def _set_rate(group: dict[str, Any], rate: float) -> None:  # Any: a param group
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
