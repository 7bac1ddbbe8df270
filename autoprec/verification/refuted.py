"""What a refuted plan teaches: how gentle the next one has to be, and what it does otherwise.

A loss gap grows about in proportion to e (`sensitivity.gap`). A plan with e and a measured gap
above the tolerance says that at most e * tolerance / gap is bearable, whatever was predicted before
training, so plans above that are passed over instead of being trained and refuted one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from autoprec.records import Plan, Precision
from autoprec.verification.evidence import Evidence

SHOWN_NAMES = 4


@dataclass(frozen=True)
class Refuted:
    """A plan and the branches that refuted it."""

    plan: Plan
    evidence: Evidence

    @property
    def bearable_e(self) -> float | None:
        """The e at which a plan's gap would be the tolerance; None when one of both is unknown."""
        gap, grad_error = self.evidence.gap("plan"), self.plan.grad_error
        if gap is None or grad_error is None or gap.mean <= 0.0:
            return None
        return grad_error * min(self.evidence.terms.tolerance / gap.mean, 1.0)


def is_hopeless(plan: Plan, refuted: Sequence[Refuted]) -> bool:
    """Whether a plan's e is above what the refuted plans show to be bearable."""
    bounds = [bound for each in refuted if (bound := each.bearable_e) is not None]
    return plan.grad_error is not None and bool(bounds) and plan.grad_error > min(bounds)


def repair_notes(plan: Plan, refuted: Sequence[Refuted], *, skipped: int) -> list[str]:
    """Return what was refuted before this plan, and which layers are gentler now."""
    notes = []
    for each in refuted:
        gap = each.evidence.gap("plan")
        diverged = each.evidence.diverged("plan")
        found = (
            f"diverged at step {diverged[0].diverged_at}"
            if diverged
            else f"mean loss gap {gap.mean:+.2%}"
            if gap is not None
            else "no gap"
        )
        moved = _no_longer_fp8(each.plan, plan)
        notes.append(
            f"a plan with {_fp8_count(each.plan)} layers in FP8 was refuted before ({found}); "
            f"out of FP8 since: {_shown(moved)}"
        )
    if skipped:
        notes.append(
            f"{skipped} more plans were passed over: by the refuted plan's gap, their e is too much"
        )
    return notes


def _no_longer_fp8(before: Plan, after: Plan) -> list[str]:
    pairs = zip(before.layers, after.layers, strict=True)
    return [old.name for old, new in pairs if old.option.is_fp8 and not new.option.is_fp8]


def _fp8_count(plan: Plan) -> int:
    return sum(layer.option.precision is Precision.FP8_O1 for layer in plan.layers)


def _shown(names: Sequence[str]) -> str:
    if not names:
        return "no layer, but recipes are gentler"
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
