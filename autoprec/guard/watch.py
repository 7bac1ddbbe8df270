"""The guard: once a step it looks at a run, and takes layers out of FP8 when something is wrong.

A demoted layer runs in BF16 with the same parameters, masters and optimizer state. It is promoted
back to FP8 after `quiet_steps` without an alarm, and every time that it has to be demoted again it
waits twice as long. After `most_demotions` alarms all layers stay in BF16, so torch.compile
compiles a bounded number of times.

What is wrong with a step is checked in this order; the first that makes it a bad one ends it:

    not finite    a loss or gradient that is an infinity or a NaN. Suspected: the first layer that
                  saturates, if the step was sampled (the one after an alarm always is); else the
                  last layer in plan order with such a gradient, and the FP8 layer after it, whose
                  grad_input it got; no layer if the loss itself is not finite, which may be the
                  data's fault; every FP8 layer if something was wrong a short while ago already
    range         a sampled operand loses more than `Limits` allows to FP8's range: that layer; the
                  step itself is not a bad one
    loss          `patience` steps in a row above its band
    gradient norm above the band of its logarithm

A loss or norm above its band does not say which layer it was, so the suspects are those whose
sampled operands lose most, and all FP8 layers when none stands out. A single spike of the norm is
the data's more often than the precision's: its step is skipped, and no layer is suspected.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from autoprec.common.text import first_and_more
from autoprec.errors import PlanMismatchError, RecordError, TrainingStoppedError
from autoprec.guard.holding import HeldSteps, can_hold, runs_behind, say_why_it_waits, take_fused
from autoprec.guard.layers import fp8_layers, trained_parameters
from autoprec.guard.records import (
    Action,
    Demotion,
    EventKind,
    GuardEvent,
    GuardState,
    Limits,
    Log,
    write_event,
)
from autoprec.guard.sampling import OPERANDS, Sampler
from autoprec.guard.signals import Bounds, Reading, RunningBand, Signals, read_signals
from autoprec.records import Plan
from autoprec.runtime.finite import leave_first_step

STANDS_OUT = 0.5  # of the allowed underflow: from there a layer is suspected of a loss or norm
Names = Sequence[str]
Rows = Mapping[str, Mapping[str, tuple[float, float]]]  # shares lost, by layer and operand
REASONS = {
    EventKind.NOT_FINITE: "loss {0.loss:.4g} or gradient norm {0.grad_norm:.4g} is not finite",
    EventKind.LOSS: "the loss {0.loss:.4g} stays above its band",
    EventKind.GRAD_NORM: "the gradient norm {0.grad_norm:.4g} is above its band",
    EventKind.RANGE: "operands do not fit FP8's range",
}


@dataclass(frozen=True)
class _Step:
    """A step that was read; `active` are the layers that ran in FP8."""

    number: int
    reading: Reading
    active: frozenset[str]


class Guard(AbstractContextManager["Guard"]):
    """Watches a model to which a plan was applied. Call `step` once an optimizer step.

    With torch's AdamW, Adam or SGD on a GPU nothing waits for the device: their fused kernels,
    which the guard turns on where the user left the choice to torch, leave a bad step out by
    themselves, and events, demotions and what `step` returns come one step later. So it is with any
    optimizer and `stop`, but it then has taken the bad step: load the last checkpoint.

    Example:
        >>> import torch, autoprec
        >>> from autoprec.runtime import uniform_plan
        >>> model = torch.nn.Linear(16, 16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> plan = uniform_plan(model, "fp8_o1:rowwise")
        >>> model, optimizer = autoprec.apply(plan, model, optimizer)
        >>> with autoprec.Guard(model, optimizer, plan) as guard:
        ...     loss = model(torch.ones(16, 16)).square().mean()
        ...     loss.backward()
        ...     is_good = guard.step(loss)
        ...     optimizer.step()
        >>> is_good, guard.in_bf16
        (True, ())
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan | Path | str,
        *,
        on_alarm: Action | str = Action.SKIP,
        limits: Limits | None = None,
        events: Path | str | None = None,
        log: Log | None = None,
    ) -> None:
        """Start watching.

        Args:
            model: after `autoprec.apply`, wrapped by DDP, FSDP2 or torch.compile or not.
            optimizer: what steps it.
            plan: the plan that was applied, or its path; its schedule, if any, is run.
            on_alarm: what happens to a bad step.
            limits: when to act.
            events: a file to which every event is appended as a line of JSON.
            log: called with (name, value, step) of every event on rank 0, for TensorBoard or W&B:
                `guard/fp8_layers`, and the layers concerned as e.g. `guard/not_finite`.

        Raises:
            PlanMismatchError: the model's FP8 layers are not those of the plan.
        """
        plan = Plan.load(plan)
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self.on_alarm, self.limits = Action(on_alarm), (limits := limits or Limits())
        self.layers = fp8_layers(model, plan)
        self.events, self.log = None if events is None else Path(events), log
        write_event(None, self.events)
        self.demoted: dict[str, Demotion] = {}
        self.steps = self.demotions = self._bad_run = 0
        self._last_alarm = -limits.window  # no alarm yet that a step could be close to
        self._loss = RunningBand(limits.window, limits.loss_width, relative_floor=limits.loss_floor)
        self._norm = RunningBand(limits.window, limits.norm_width, floor=limits.norm_floor)
        self._owners, self._parameters = trained_parameters(model, plan)
        self._sampler = Sampler(model, self.layers)
        self._pending: _Step | None = None
        self._is_late = self._has_said = False
        self._held: HeldSteps | None = None
        self._judged = -1  # the step that was judged last
        self._prepare()
        leave_first_step(model)

    def step(self, loss: Tensor | float) -> bool:
        """Look at the step: after backward, before clipping (which hides spikes) and the optimizer.

        On a GPU a fused optimizer leaves out a bad step by itself (holding.py), so the host asks
        for nothing and is told a step later. To `skip` with any other, it waits for the gradients.

        Returns:
            Whether the step that was judged last is good: this one, or the one before it where
            nobody waits. A bad one was dealt with as `on_alarm` says.

        Raises:
            TrainingStoppedError: something is wrong, and `on_alarm` is `stop`; or too many steps in
                a row were bad.
        """
        if not isinstance(loss, Tensor):
            loss = torch.full((), loss, device=self._parameters[0].device)
        self._judge_pending()  # before this step's bounds are set
        self._choose_who_waits()
        shares = self._sampler.shares(loss.device) if self._sampler.is_armed else None
        reading = read_signals(loss, self._parameters, shares=shares, bounds=self._bounds())
        self._pending = _Step(self.steps, reading, frozenset(self._active()))
        if self._held is not None:
            self._held.hold(reading.is_bad)
        if not self._is_late:
            self._judge_pending()
        self.steps += 1
        self._follow_schedule()
        self._prepare()
        self._check_progress()
        return self._bad_run == 0

    def _choose_who_waits(self) -> None:
        """Let the device leave bad steps out if it can; asked anew since checkpoints change it."""
        is_behind = runs_behind(self._parameters[0].device)
        holds = is_behind and self.on_alarm is not Action.SWITCH
        holds = holds and (can_hold(self.optimizer) or take_fused(self.optimizer))
        if self._held is not None and not holds:
            self._held.close()
        if holds != (self._held is not None):
            self._held = HeldSteps(self.optimizer) if holds else None
        # Only the host keeps other optimizers from a bad step; a run that stops may stop late.
        waits = is_behind and not holds and self.on_alarm is Action.SKIP
        self._is_late = is_behind and not waits
        if waits and not self._has_said:
            self._has_said = True
            say_why_it_waits(self.optimizer)

    def _bounds(self) -> Bounds:
        """Return the bounds beyond which the coming step is a bad one."""
        patience = self.limits.patience
        is_norm_bad = self.on_alarm is Action.SKIP or self._norm.run + 1 >= patience
        return Bounds(
            loss=self._loss.upper,
            log_norm=self._norm.upper,
            underflow=self.limits.underflow,
            is_loss_bad=self._loss.run + 1 >= patience,
            is_norm_bad=is_norm_bad,
        )

    def _judge_pending(self) -> None:
        """Judge the step that was read and not judged, if any."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._judged, signals = pending.number, pending.reading.signals()
        is_good = True
        alarms = list(self._alarms(signals, pending.active))  # before one changes layers
        for kind, suspects in alarms:
            is_good = kind is EventKind.RANGE
            names = [name for name in suspects if name in pending.active]
            self._act(kind, names, signals, is_good=is_good)
        self._bad_run = 0 if is_good else self._bad_run + 1
        if is_good:
            self._promote()

    def _check_progress(self) -> None:
        if self._bad_run >= self.limits.most_bad:
            raise TrainingStoppedError(
                f"a run must train, but its last {self._bad_run} steps were all bad; BF16 does not "
                "fix it: look at the data and the learning rate, then resume from a checkpoint"
            )

    def close(self) -> None:
        """Judge the last step, and take the hooks out; layers stay as they are.

        Raises:
            TrainingStoppedError: as `step`, of the last one.
        """
        self._remove_hooks()
        if self._pending is not None:
            self._judge_pending()
            self._check_progress()

    def _remove_hooks(self) -> None:
        self._sampler.close()
        if self._held is not None:
            self._held.close()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._remove_hooks()

    def state_dict(self) -> dict[str, Any]:  # Any: JSON values
        """Return the memory of the guard, to be saved with model and optimizer."""
        self._judge_pending()
        return GuardState(
            step=self.steps,
            demotions=self.demotions,
            last_alarm=self._last_alarm,
            demoted=self.demoted,
            losses=tuple(self._loss.values),
            norms=tuple(self._norm.values),
            loss_run=self._loss.run,
            norm_run=self._norm.run,
            active=tuple(self._active()),
            is_sampled=self._sampler.is_armed,
        ).model_dump(mode="json")

    def load_state_dict(self, state: dict[str, Any]) -> None:  # Any: JSON values
        """Go on where another guard was; layers get the precision that they had there.

        Raises:
            RecordError: it is not a guard's state.
            PlanMismatchError: it demoted layers that are not FP8 layers of this plan.
        """
        try:
            loaded = GuardState.model_validate(state)
        except ValidationError as error:
            raise RecordError(
                f"a guard loads what Guard.state_dict() returned, but this is not "
                f"({error.errors()[0]['msg']}); start without it, or load the right checkpoint"
            ) from error
        unknown = sorted(set(loaded.demoted) - set(self.layers))
        if unknown:
            raise PlanMismatchError(
                f"a guard's state must be of a run with the same plan, but it demoted "
                f"{unknown[0]!r}, which is no FP8 layer of this one; load this plan's state"
            )
        self.steps, self.demotions, self.demoted = loaded.step, loaded.demotions, loaded.demoted
        self._last_alarm, self._pending, self._judged = loaded.last_alarm, None, loaded.step - 1
        self._loss.restore(loaded.losses, loaded.loss_run)
        self._norm.restore(loaded.norms, loaded.norm_run)
        self._prepare(loaded.active, is_sampled=loaded.is_sampled)

    @property
    def in_bf16(self) -> tuple[str, ...]:
        """The FP8 layers of the plan that the guard demoted and has not promoted again."""
        out = {name for name, demotion in self.demoted.items() if not demotion.is_promoted}
        return tuple(name for name in self.layers if name in out)

    def _alarms(
        self, signals: Signals, active: frozenset[str]
    ) -> Iterator[tuple[EventKind, Names]]:
        """Yield what is wrong with a step and the layers suspected, up to what makes it bad."""
        rows, norm = self._rows(signals, active), signals.grad_norm
        if not (math.isfinite(signals.loss) and math.isfinite(norm)):
            yield EventKind.NOT_FINITE, self._not_finite_suspects(signals, rows)
            return
        loss_run = self._loss.add(signals.loss, is_above=signals.is_loss_high)
        is_above, norm_run = signals.is_norm_high, 0
        if norm > 0:
            norm_run = self._norm.add(math.log(norm), is_above=is_above)
        out_of_range = self._losing(rows, self.limits.underflow)
        if out_of_range:
            yield EventKind.RANGE, out_of_range
        # Layers out of range explain a loss or norm that stays high: they are demoted first.
        patience = math.inf if out_of_range else self.limits.patience
        standing_out = self._losing(rows, STANDS_OUT * self.limits.underflow) or list(self.layers)
        if loss_run >= patience:
            yield EventKind.LOSS, standing_out
        elif norm_run > 0:
            yield EventKind.GRAD_NORM, standing_out if norm_run >= patience else ()

    def _rows(self, signals: Signals, active: frozenset[str]) -> Rows:
        """Return (underflow, saturated) of the operands of the layers in FP8, {} if not sampled."""
        if not signals.shares:
            return {}
        pairs = iter(zip(signals.shares[::2], signals.shares[1::2], strict=True))
        rows = {name: dict(zip(OPERANDS, pairs, strict=False)) for name in self.layers}
        return {name: row for name, row in rows.items() if name in active}

    @staticmethod
    def _losing(rows: Rows, allowed: float) -> Names:
        """Return the layers with an operand that underflows more than allowed, or saturates."""
        return [
            name
            for name, row in rows.items()
            if any(lost > allowed or over > 0 for lost, over in row.values())
        ]

    def _not_finite_suspects(self, signals: Signals, rows: Rows) -> Names:
        """Return the FP8 layers that a loss or gradient that is not finite may have come from."""
        for name, row in rows.items():
            if max(row["input"][1], row["weight"][1]) > 0:
                return (name,)  # what follows it got its infinities and NaNs
        if self._judged - self._last_alarm < self.limits.window:
            return tuple(self.layers)
        if not math.isfinite(signals.loss):
            return ()
        # Backward runs from the last layer to the first and every gradient is made of the one
        # before: so the NaN began at the last layer that has one, or in grad_input of the FP8
        # layer after it.
        norms = zip(self._owners, signals.norms, strict=True)
        bad = {owner for owner, norm in norms if not math.isfinite(norm)}
        order = [layer.name for layer in self.plan.layers]
        last = max((place for place, name in enumerate(order) if name in bad), default=-1)
        here = [name for name in order[max(last, 0) : last + 1] if name in self.layers]
        after = [name for name in order[last + 1 :] if name in self.layers]
        return (*here, *after[:1])

    def _act(self, kind: EventKind, suspects: Names, signals: Signals, *, is_good: bool) -> None:
        """Deal with the step as `on_alarm` says, demote the suspects, and say so."""
        reason = REASONS[kind].format(signals)
        lasts = bool(suspects) or kind is EventKind.NOT_FINITE  # or else it is one spike
        if lasts and self.on_alarm is Action.STOP:
            raise TrainingStoppedError(
                f"the guard stops a run when something is wrong, and at step {self._judged} "
                f"{reason}; look at it, then resume from the last checkpoint, or "
                "use on_alarm='skip'"
            )
        is_skipped = not is_good and self.on_alarm is Action.SKIP
        if is_skipped and self._held is None:  # without gradients, optimizer.step() changes nothing
            for parameter in self._parameters:
                parameter.grad = None
            self.optimizer.zero_grad(set_to_none=True)
        demoted = self._demote([n for n in suspects if n not in self.in_bf16])
        if lasts:
            self._last_alarm = self._judged
            self._loss.run = self._norm.run = 0
        moved = f"; {first_and_more(demoted)} moved to BF16" if demoted else ""
        text = f"{reason}{moved}{'; step skipped' if is_skipped else ''}"
        numbers = {"loss": signals.loss, "grad_norm": signals.grad_norm}
        finite = {name: x for name, x in numbers.items() if math.isfinite(x)}  # JSON has no NaN
        self._note(kind, text, demoted, is_skipped=is_skipped, **finite)

    def _demote(self, names: Names) -> Names:
        """Take layers out of FP8, all of them at the last allowed time; return those that are."""
        if not names:
            return names
        self.demotions += 1
        if self.demotions >= self.limits.most_demotions:
            names = [name for name in self.layers if name not in self.in_bf16]
        for name in names:
            before = self.demoted.get(name)
            quiet = 2 * before.quiet_steps if before else self.limits.quiet_steps or 1
            self.demoted[name] = Demotion(since=self._judged, quiet_steps=quiet)
        return names

    def _promote(self) -> None:
        """Run in FP8 again the layers that were quiet for long enough."""
        if self.limits.quiet_steps is None or self.demotions >= self.limits.most_demotions:
            return
        names = []
        for name in self.in_bf16:
            out = self.demoted[name]
            if self._judged - max(out.since, self._last_alarm) >= out.quiet_steps:
                self.demoted[name] = out.model_copy(update={"is_promoted": True})
                names.append(name)
        if names:
            message = f"{first_and_more(names)} had no alarm for long enough: FP8 again"
            self._note(EventKind.PROMOTED, message, names)

    def _follow_schedule(self) -> None:
        """Say that the plan's schedule switches FP8 on or off at the step that comes."""
        is_fp8 = self._is_fp8(self.steps)
        if is_fp8 is not self._is_fp8(self.steps - 1):
            state = "FP8 on" if is_fp8 else "FP8 off, all layers in BF16"
            names = [name for name in self.layers if name not in self.in_bf16]
            self._note(EventKind.SCHEDULE, f"the plan's schedule: {state}", names)

    def _is_fp8(self, step: int) -> bool:
        """Whether the plan's schedule has FP8 on at a step; before its first phase it is on."""
        return next((p.fp8 for p in reversed(self.plan.schedule) if p.start_step <= step), True)

    def _active(self) -> Names:
        """Return the layers that run in FP8 now."""
        return [name for name, layer in self.layers.items() if layer.fp8_active]

    def _prepare(self, active: Names | None = None, *, is_sampled: bool | None = None) -> None:
        """Make layers and hooks ready for the step that comes.

        A layer in FP8 O1 stores what it stores in BF16 O2, so `fp8_active = False` is all that
        makes its GEMMs BF16. torch.compile guards on the attribute: a switch compiles once, and
        switching back finds what was compiled before.
        """
        is_fp8, out = self._is_fp8(self.steps), self.in_bf16
        for name, layer in self.layers.items():
            wanted = is_fp8 and name not in out if active is None else name in active
            if layer.fp8_active is not wanted:
                layer.fp8_active = wanted
        was_alarm = self._last_alarm == self._judged >= 0  # look who it is, if it comes again
        if is_sampled is None:
            is_sampled = is_fp8 and (was_alarm or self.steps % self.limits.sample_every == 0)
        if is_sampled:
            self._sampler.arm()
        else:
            self._sampler.disarm()

    def _note(self, kind: EventKind, text: str, names: Names, **more: Any) -> None:
        """Write an event (Any: the fields that only alarms have)."""
        step = self.steps if kind is EventKind.SCHEDULE else self._judged
        event = GuardEvent(step=step, kind=kind, message=text, layers=tuple(names), **more)
        active = len(self.layers) - len(self.in_bf16) if self._is_fp8(self.steps) else 0
        write_event(event, self.events, self.log, fp8_layers=active)
