"""One step -> what is wrong with it, and which layers are suspected. Nothing is changed here.

Checked in this order; the first that makes the step a bad one ends it:

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from autoprec.guard.events import EventKind
from autoprec.guard.limits import Limits
from autoprec.guard.signals import Signals

STANDS_OUT = 0.5  # of the allowed underflow: from there a layer is suspected of a loss or norm
Names = tuple[str, ...]
Row = Mapping[str, tuple[float, float]]  # operand -> shares that underflow and saturate


@dataclass(frozen=True)
class Look:
    """One step as the checks see it; `rows` are there for the FP8 layers of a sampled step."""

    signals: Signals
    limits: Limits
    layers: Names  # those that the plan has in FP8
    order: Names  # of all layers in the plan
    owners: Names  # of the parameters: the layer, empty where none has it
    rows: Mapping[str, Row]
    loss_run: int = 0  # steps in a row above the band, this one included
    norm_run: int = 0
    was_alarm: bool = False  # a short while ago

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are numbers."""
        return math.isfinite(self.signals.loss) and math.isfinite(self.signals.grad_norm)

    def out_of_range(self, share: float = 1.0) -> Names:
        """Return the layers with an operand that loses more than this share of what is allowed."""
        allowed = share * self.limits.underflow
        return tuple(
            name
            for name, row in self.rows.items()
            if any(lost > allowed or over > 0 for lost, over in row.values())
        )

    def standing_out(self) -> Names:
        """Return the layers that lose most of their operands, or all."""
        return self.out_of_range(STANDS_OUT) or self.layers


def alarms(look: Look) -> Iterator[tuple[EventKind, Names]]:
    """Yield what is wrong with a step and the layers suspected, up to what makes it a bad one."""
    for kind, is_wrong, suspects in CHECKS:
        if is_wrong(look):
            yield kind, suspects(look)
            if kind is not EventKind.RANGE:
                return


def not_finite_suspects(look: Look) -> Names:
    """Return the FP8 layers that a loss or gradient that is not finite may have come from."""
    rows = look.rows.items()
    saturated = [name for name, row in rows if max(row["input"][1], row["weight"][1]) > 0]
    if saturated:
        return (saturated[0],)  # what follows it got its infinities and NaNs
    if look.was_alarm:
        return look.layers
    if not math.isfinite(look.signals.loss):
        return ()
    # Backward runs from the last layer to the first and every gradient is made of the one before:
    # so the NaN began at the last layer that has one, or in grad_input of the FP8 layer after it.
    norms = zip(look.owners, look.signals.norms, strict=True)
    bad = {owner for owner, norm in norms if not math.isfinite(norm)}
    last = max((place for place, name in enumerate(look.order) if name in bad), default=-1)
    here = [name for name in look.order[max(last, 0) : last + 1] if name in look.layers]
    after = [name for name in look.order[last + 1 :] if name in look.layers]
    return (*here, *after[:1])


def norm_suspects(look: Look) -> Names:
    """Return the layers suspected of a gradient norm above its band: none if it is one spike."""
    lasts = look.norm_run >= look.limits.patience and not look.out_of_range()
    return look.standing_out() if lasts else ()


CHECKS: tuple[tuple[EventKind, Callable[[Look], bool], Callable[[Look], Names]], ...] = (
    (EventKind.NOT_FINITE, lambda look: not look.is_finite, not_finite_suspects),
    (EventKind.RANGE, lambda look: bool(look.out_of_range()), Look.out_of_range),
    (
        EventKind.LOSS,
        lambda look: look.loss_run >= look.limits.patience and not look.out_of_range(),
        Look.standing_out,
    ),
    (EventKind.GRAD_NORM, lambda look: look.norm_run > 0, norm_suspects),
)
