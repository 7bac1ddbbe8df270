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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autoprec.guard.records import EventKind, Limits
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
    loss_run: int  # steps in a row above the band, this one included
    norm_run: int
    was_alarm: bool  # a short while ago

    def losing(self, share: float) -> Names:
        """Return the layers with an operand that loses more than this share of what is allowed."""
        allowed = share * self.limits.underflow
        return tuple(
            name
            for name, row in self.rows.items()
            if any(lost > allowed or over > 0 for lost, over in row.values())
        )


def alarms(look: Look) -> Iterator[tuple[EventKind, Names]]:
    """Yield what is wrong with a step and the layers suspected, up to what makes it a bad one."""
    if not look.signals.is_finite:
        yield EventKind.NOT_FINITE, not_finite_suspects(look)
        return
    out_of_range = look.losing(1.0)
    if out_of_range:
        yield EventKind.RANGE, out_of_range
    # Layers out of range explain a loss or norm that stays high: they are demoted first.
    patience = math.inf if out_of_range else look.limits.patience
    standing_out = look.losing(STANDS_OUT) or look.layers
    if look.loss_run >= patience:
        yield EventKind.LOSS, standing_out
    elif look.norm_run > 0:
        yield EventKind.GRAD_NORM, standing_out if look.norm_run >= patience else ()


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
