"""The guard: once a step it looks at a run, and takes layers out of FP8 when something is wrong.

    with autoprec.Guard(model, optimizer, plan) as guard:
        for batch in batches:
            loss = loss_fn(model, batch)
            loss.backward()
            guard.step(loss)            # before clipping: a clipped norm hides a spike
            optimizer.step()
            optimizer.zero_grad()

What counts as wrong, and which layers are suspected of it:

    not finite    a loss or gradient that is an infinity or a NaN. Suspected: the first layer that
                  saturates, if the step was sampled (the one after an alarm always is); else the
                  last layer in plan order with such a gradient, and the FP8 layer after it, whose
                  grad_input it got; no layer if the loss itself is not finite, which may be the
                  data's fault; every FP8 layer if something was wrong a short while ago already
    gradient norm above the band of its logarithm; `patience` steps in a row: see below
    loss          `patience` steps in a row above its band
    range         a sampled operand loses more than `Limits` allows to FP8's range: that layer

A loss or norm above its band does not say which layer it was, so the suspects are those whose
sampled operands lose most, and all FP8 layers when none stands out. A single spike of the norm is
the data's more often than the precision's: its step is skipped, and no layer moves.

A moved layer runs in BF16 with the same parameters, masters and optimizer state. It is given back
after `quiet_steps` without an alarm, and every time that it has to be moved again it waits twice as
long. After `most_moves` alarms all layers stay in BF16, so torch.compile compiles a bounded number
of times.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from autoprec.errors import PlanMismatchError, TrainingStoppedError
from autoprec.guard.bands import RunningBand
from autoprec.guard.events import EventKind, EventLog, GuardEvent, SummaryWriter, finite
from autoprec.guard.limits import Action, Limits
from autoprec.guard.sampling import OPERANDS, Sampler
from autoprec.guard.signals import Signals, read_signals
from autoprec.guard.snapshots import Snapshot, take_snapshot
from autoprec.guard.state import GuardState, Moved, parse_state
from autoprec.guard.switches import fp8_layers, is_fp8_phase, set_active
from autoprec.records import Plan
from autoprec.runtime.apply import plain_name
from autoprec.runtime.checkpoint import unwrapped

MOST_NAMED = 4  # layers in one message
STANDS_OUT = (
    0.5  # of the allowed underflow: from there a layer is a suspect of a loss or norm alarm
)


class Guard:
    """Watches a model to which a plan was applied. Call `step` once an optimizer step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan | Path | str,
        *,
        on_alarm: Action | str = Action.SKIP,
        limits: Limits | None = None,
        events: Path | str | None = None,
        writer: SummaryWriter | None = None,
    ) -> None:
        """Start watching.

        Args:
            model: after `autoprec.apply`, wrapped by DDP, FSDP2 or torch.compile or not.
            optimizer: what steps it.
            plan: the plan that was applied, or its path; its schedule, if any, is run.
            on_alarm: what happens to a poisoned step.
            limits: when to act.
            events: a file to which every event is appended as a line of JSON.
            writer: a TensorBoard SummaryWriter.

        Raises:
            PlanMismatchError: the model's FP8 layers are not those of the plan.
        """
        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self.on_alarm, self.limits = Action(on_alarm), limits or Limits()
        self.layers = fp8_layers(model, plan)
        self.events = EventLog(Path(events) if events is not None else None, writer)
        self.moved: dict[str, Moved] = {}
        self.steps = self.moves = self._bad_run = 0
        self._last_alarm = -self.limits.window
        self._is_fp8 = is_fp8_phase(plan.schedule, 0)
        self._loss, self._norm = _bands(self.limits)
        self._parameters = _trained(model, plan)
        self._sampler = Sampler(model, self.layers)
        self._snapshot: Snapshot | None = None
        self._prepare()

    def step(self, loss: Tensor | float) -> bool:
        """Look at the step, after backward and before clipping and `optimizer.step()`.

        Returns:
            Whether the step is good; if not, it was dealt with as `on_alarm` says.

        Raises:
            TrainingStoppedError: something is wrong, and `on_alarm` is `stop`; or too many steps in
                a row were bad.
        """
        device = loss.device if isinstance(loss, Tensor) else self._parameters[0][1].device
        shares = self._sampler.shares(device) if self._sampler.is_armed else None
        parameters = [parameter for _, parameter in self._parameters]
        signals = read_signals(loss, parameters, shares=shares)
        if shares is not None:
            rows = self._sampled(signals).values()
            lost = max((share for row in rows for share, _ in row.values()), default=0.0)
            self.events.draw(self.steps, underflow=lost, bf16_layers=len(self._out))
        is_good = self._judge(signals)
        self._bad_run = 0 if is_good else self._bad_run + 1
        if is_good:
            self._give_back()
        self.steps += 1
        self._prepare()
        if self._bad_run >= self.limits.most_bad:
            raise TrainingStoppedError(
                f"a run must train, but its last {self._bad_run} steps were all bad; BF16 does not "
                "mend it: look at the data and the learning rate, then resume from a checkpoint"
            )
        return is_good

    def close(self) -> None:
        """Take the hooks out; layers stay as they are."""
        self._sampler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:  # Any: JSON values
        """Return what the guard remembers, to be saved with model and optimizer."""
        return GuardState(
            step=self.steps,
            moves=self.moves,
            last_alarm=self._last_alarm,
            moved=self.moved,
            losses=tuple(self._loss.values),
            norms=tuple(self._norm.values),
            loss_run=self._loss.run,
            norm_run=self._norm.run,
        ).model_dump(mode="json")

    def load_state_dict(self, state: dict[str, Any]) -> None:  # Any: JSON values
        """Go on where another guard was; layers get the precision that they had there.

        Raises:
            RecordError: it is not a guard's state.
            PlanMismatchError: it moved layers that are not FP8 layers of this plan.
        """
        loaded = parse_state(state)
        unknown = sorted(set(loaded.moved) - set(self.layers))
        if unknown:
            raise PlanMismatchError(
                f"a guard's state must be of a run with the same plan, but it moved "
                f"{unknown[0]!r}, which is no FP8 layer of this one; load this plan's state"
            )
        self.steps, self.moves, self.moved = loaded.step, loaded.moves, dict(loaded.moved)
        self._last_alarm = loaded.last_alarm
        self._loss.restore(loaded.losses, loaded.loss_run)
        self._norm.restore(loaded.norms, loaded.norm_run)
        self._snapshot = None
        self._is_fp8 = is_fp8_phase(self.plan.schedule, self.steps)
        self._prepare()

    @property
    def in_bf16(self) -> tuple[str, ...]:
        """The FP8 layers of the plan that the guard moved to BF16 and has not given back."""
        return tuple(name for name in self.layers if name in self._out)

    # --- one step --------------------------------------------------------------------------------

    def _judge(self, signals: Signals) -> bool:
        """Return whether the step is good; else deal with it."""
        if not (math.isfinite(signals.loss) and math.isfinite(signals.grad_norm)):
            return self._alarm(EventKind.NOT_FINITE, signals, self._blamed(signals))
        self._loss.is_above(signals.loss)
        spikes = signals.grad_norm > 0 and self._norm.is_above(math.log(signals.grad_norm))
        suspects = self._out_of_range(signals, self.limits.underflow * STANDS_OUT)
        ranges = self._out_of_range(signals, self.limits.underflow)
        if ranges:
            self._alarm(EventKind.RANGE, signals, ranges)
        elif self._loss.run >= self.limits.patience:
            return self._alarm(EventKind.LOSS, signals, suspects or tuple(self.layers))
        if spikes:
            lasts = self._norm.run >= self.limits.patience
            suspects = (suspects or tuple(self.layers)) if lasts else ()
            return self._alarm(EventKind.GRAD_NORM, signals, suspects)
        self._keep_snapshot()
        return True

    def _alarm(self, kind: EventKind, signals: Signals, suspects: Sequence[str]) -> bool:
        """Deal with the step, move the suspects, say so; return whether the step was good."""
        is_poisoned = kind is not EventKind.RANGE
        lasts = bool(suspects) or kind is EventKind.NOT_FINITE
        if lasts and self.on_alarm is Action.STOP:
            raise TrainingStoppedError(
                f"the guard stops a run when something is wrong, and at step {self.steps} "
                f"{_reason(kind, signals)}; look at it, then resume from the last checkpoint, or "
                "use on_alarm='skip'"
            )
        is_skipped = is_poisoned and self.on_alarm in (Action.SKIP, Action.ROLLBACK)
        restored = self._drop_step(goes_back=bool(suspects)) if is_skipped else None
        moves = self._move(tuple(name for name in suspects if self.layers[name].fp8_active))
        if lasts:
            self._last_alarm = self.steps
            self._loss.run = self._norm.run = 0
        self.events.write(
            GuardEvent(
                step=self.steps,
                kind=kind,
                message=_message(kind, signals, moves, is_skipped=is_skipped, restored=restored),
                layers=moves,
                is_skipped=is_skipped,
                restored_step=restored,
                loss=finite(signals.loss),
                grad_norm=finite(signals.grad_norm),
            )
        )
        return not is_poisoned

    def _drop_step(self, *, goes_back: bool) -> int | None:
        """Drop the gradients; with snapshots also go back; return the step gone back to."""
        for _, parameter in self._parameters:
            parameter.grad = None
        self.optimizer.zero_grad(set_to_none=True)
        if self.on_alarm is not Action.ROLLBACK or not goes_back or self._snapshot is None:
            return None
        self._snapshot.restore(self.model, self.optimizer)
        return self._snapshot.step

    # --- who it was ------------------------------------------------------------------------------

    def _blamed(self, signals: Signals) -> tuple[str, ...]:
        """Return the FP8 layers that a loss or gradient that is not finite may have come from."""
        rows = self._sampled(signals).items()
        saturated = [n for n, row in rows if max(row["input"][1], row["weight"][1]) > 0]
        if saturated:
            return (saturated[0],)  # what follows it got its infinities and NaNs
        if self.steps - self._last_alarm < self.limits.window:
            return tuple(self.layers)
        if not math.isfinite(signals.loss):
            return ()
        order = [layer.name for layer in self.plan.layers]
        position = {name: index for index, name in enumerate(order)}
        bad = [
            position.get(layer, -1)
            for (layer, _), norm in zip(self._parameters, signals.norms, strict=True)
            if not math.isfinite(norm)
        ]
        last = max(bad, default=-1)
        here = [name for name in order[max(last, 0) : last + 1] if name in self.layers]
        after = [name for name in order[last + 1 :] if name in self.layers]
        return (*here, *after[:1])

    def _out_of_range(self, signals: Signals, underflow: float) -> tuple[str, ...]:
        """Return the FP8 layers with a sampled operand that loses more than allowed."""
        return tuple(
            name
            for name, row in self._sampled(signals).items()
            if any(lost > underflow or over > 0 for lost, over in row.values())
        )

    def _sampled(self, signals: Signals) -> dict[str, dict[str, tuple[float, float]]]:
        """Return (underflow, saturated) of the operands of the layers in FP8, {} if not sampled."""
        if not signals.shares:
            return {}
        pairs = iter(zip(signals.shares[::2], signals.shares[1::2], strict=True))
        rows = {name: dict(zip(OPERANDS, pairs, strict=False)) for name in self.layers}
        return {name: row for name, row in rows.items() if self.layers[name].fp8_active}

    # --- layers out and back ---------------------------------------------------------------------

    @property
    def _out(self) -> frozenset[str]:
        return frozenset(name for name, moved in self.moved.items() if not moved.is_back)

    def _move(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Note layers as moved, all of them at the last allowed move; return those that are."""
        if not names:
            return ()
        self.moves += 1
        if self.moves >= self.limits.most_moves:
            names = tuple(name for name in self.layers if name not in self._out)
        for name in names:
            before = self.moved.get(name)
            quiet = 2 * before.quiet_steps if before else self.limits.quiet_steps or 1
            self.moved[name] = Moved(since=self.steps, quiet_steps=quiet)
        return names

    def _give_back(self) -> None:
        """Run in FP8 again the layers that were quiet for long enough."""
        if self.limits.quiet_steps is None or self.moves >= self.limits.most_moves:
            return
        since = {name: max(self.moved[name].since, self._last_alarm) for name in self.in_bf16}
        names = tuple(n for n in since if self.steps - since[n] >= self.moved[n].quiet_steps)
        if not names:
            return
        for name in names:
            self.moved[name] = self.moved[name].model_copy(update={"is_back": True})
        message = f"{_named(names)} had no alarm for long enough: FP8 again"
        self._note(EventKind.GIVEN_BACK, message, names)

    def _prepare(self) -> None:
        """Make layers and hooks ready for the step that comes."""
        is_fp8 = is_fp8_phase(self.plan.schedule, self.steps)
        if is_fp8 is not self._is_fp8:
            self._is_fp8 = is_fp8
            state = "FP8 on" if is_fp8 else "FP8 off, all layers in BF16"
            names = tuple(name for name in self.layers if name not in self._out)
            self._note(EventKind.SCHEDULE, f"the plan's schedule: {state}", names)
        set_active(self.layers, moved=self._out, fp8=is_fp8)
        was_alarm = self._last_alarm == self.steps - 1  # look who it is, if it comes again
        if is_fp8 and (was_alarm or self.steps % self.limits.sample_every == 0):
            self._sampler.arm()
        else:
            self._sampler.disarm()

    def _note(self, kind: EventKind, message: str, layers: tuple[str, ...]) -> None:
        event = GuardEvent(step=self.steps, kind=kind, message=message, layers=layers)
        self.events.write(event)

    def _keep_snapshot(self) -> None:
        is_due = self._snapshot is None or self.steps % self.limits.snapshot_every == 0
        if self.on_alarm is Action.ROLLBACK and is_due and not self._loss.run:
            self._snapshot = take_snapshot(self.model, self.optimizer, step=self.steps)


def _trained(model: nn.Module, plan: Plan) -> list[tuple[str, nn.Parameter]]:
    """Return the trained parameters, each with the name of its layer ("" if none has it)."""
    layers = {layer.name for layer in plan.layers}
    found = []
    for name, parameter in unwrapped(model).named_parameters():
        if parameter.requires_grad:
            owner = plain_name(name)
            while owner not in layers and owner:
                owner = owner.rpartition(".")[0]
            found.append((owner, parameter))
    if not found:
        raise PlanMismatchError(
            "a guard watches a model that trains, but no parameter requires a gradient; "
            "unfreeze parameters before making the guard"
        )
    return found


def _bands(limits: Limits) -> tuple[RunningBand, RunningBand]:
    """Return the bands of the loss and of the gradient norm's logarithm."""
    window, width = limits.window, limits.loss_width
    loss = RunningBand(window=window, width=width, relative_floor=limits.loss_floor)
    return loss, RunningBand(window=window, width=limits.norm_width, floor=limits.norm_floor)


def _reason(kind: EventKind, signals: Signals) -> str:
    return {
        EventKind.NOT_FINITE: f"loss {signals.loss:.4g} or gradient norm {signals.grad_norm:.4g} "
        "is not finite",
        EventKind.LOSS: f"the loss {signals.loss:.4g} stays above its band",
        EventKind.GRAD_NORM: f"the gradient norm {signals.grad_norm:.4g} is above its band",
        EventKind.RANGE: "operands do not fit FP8's range",
    }[kind]


def _message(
    kind: EventKind,
    signals: Signals,
    moves: Sequence[str],
    *,
    is_skipped: bool,
    restored: int | None,
) -> str:
    parts = [_reason(kind, signals)]
    if moves:
        parts.append(f"{_named(moves)} moved to BF16")
    if restored is not None:
        parts.append(f"back to the values of step {restored}")
    elif is_skipped:
        parts.append("step skipped")
    return "; ".join(parts)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
