"""What the branches of one plan say so far, and the record that is made of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoprec.records import (
    Branch,
    LossGap,
    Plan,
    Sensitivity,
    StepTiming,
    Verdict,
    Verification,
)
from autoprec.sensitivity.gap import predicted_loss_gap
from autoprec.verification.branches import Arm
from autoprec.verification.sequential import Looks, gap_interval, judge, seeds_needed
from autoprec.verification.session import Session, Terms
from autoprec.verification.state import arm_digest

FEWEST_EVAL_BATCHES = 2  # below it nothing is known about the batches that were not drawn


@dataclass(frozen=True)
class Evidence:
    """The branches of reference, control and plan, seed by seed, and what follows from them."""

    arms: tuple[Arm, Arm, Arm]
    terms: Terms
    branches: tuple[Branch, ...] = ()
    is_out_of_time: bool = False

    @property
    def looks(self) -> Looks:
        """When the gaps are looked at."""
        return self.terms.looks

    @property
    def verdict(self) -> Verdict:
        """The answer after these seeds."""
        if self.diverged("plan"):
            return Verdict.REFUTED
        gap = self.gap("plan")
        if gap is None or gap.seeds < self.looks.seeds_min:
            return Verdict.INCONCLUSIVE
        return judge(gap, self.terms.tolerance)

    def with_seed(self, branches: Sequence[Branch]) -> "Evidence":
        """Return the evidence with another seed's branches."""
        return replace(self, branches=(*self.branches, *branches))

    def of(self, label: str) -> list[Branch]:
        """Return the branches of that label, in the order of the seeds."""
        return [branch for branch in self.branches if branch.label == label]

    def diverged(self, label: str) -> list[Branch]:
        """Return the branches of that label whose loss became NaN, infinite or far too large."""
        return [branch for branch in self.of(label) if branch.diverged_at is not None]

    def gaps(self, label: str) -> list[float]:
        """Return the relative loss gap of every seed whose branch of that label was evaluated."""
        pairs = zip(self.of("reference"), self.of(label), strict=True)
        return [
            (branch.eval_loss - reference.eval_loss) / abs(reference.eval_loss)
            for reference, branch in pairs
            if branch.eval_loss is not None and reference.eval_loss is not None
        ]

    def gap(self, label: str) -> LossGap | None:
        """Return the interval of the gap; None with fewer than two seeds, or when one diverged."""
        gaps = self.gaps(label)
        if len(gaps) < 2 or self.diverged(label):
            return None
        return gap_interval(gaps, self.looks)


def make_verification(
    session: Session,
    plan: Plan,
    evidence: Evidence,
    steps: Sequence[StepTiming],
    refuted: Sequence[Plan],
    sensitivity: Sensitivity | None,
) -> Verification:
    """Make the record of a plan's verification."""
    return Verification(
        plan=plan.digest,
        verdict=evidence.verdict,
        loss_tolerance=evidence.terms.tolerance,
        gap=evidence.gap("plan"),
        control_gap=evidence.gap("bf16_o2"),
        seed_spread=seed_spread(evidence),
        predicted_gap=predicted_gap(session, plan, sensitivity),
        warmup_steps=session.warmup_steps,
        branch_steps=session.terms.branch_steps,
        branches=evidence.branches,
        steps=tuple(steps),
        refuted_plans=tuple(other.options for other in refuted),
        checkpoint=session.checkpoint_path,
        advice=advice(evidence),
        software=session.software,
        seeds_planned=(evidence.looks.seeds_min, evidence.looks.seeds_max),
        eval_stderr=eval_stderr(evidence),
        floor=session.floor,
        notes=tuple(notes(session, evidence, steps)),
    )


def seed_spread(evidence: Evidence) -> float | None:
    """Return the relative standard deviation of the reference's evaluation loss over seeds."""
    losses = [b.eval_loss for b in evidence.of("reference") if b.eval_loss is not None]
    if len(losses) < 2:
        return None
    return float(np.std(losses, ddof=1)) / abs(math.fsum(losses) / len(losses))


def eval_stderr(evidence: Evidence) -> float | None:
    """Return the standard error of the mean gap over evaluation batches, relative to the loss.

    The interval is over seeds, on the batches at hand; other held-out batches could add this.
    """
    pairs = [
        (reference.eval_losses, branch.eval_losses)
        for reference, branch in zip(evidence.of("reference"), evidence.of("plan"), strict=True)
        if branch.eval_losses
    ]
    if not pairs or len(pairs[0][0]) < FEWEST_EVAL_BATCHES:
        return None
    reference, plan = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    difference = (plan - reference).mean(axis=0)
    stderr = difference.std(ddof=1) / math.sqrt(len(difference))
    return float(stderr) / abs(float(reference.mean()))


def predicted_gap(session: Session, plan: Plan, sensitivity: Sensitivity | None) -> float | None:
    """Return the gap that the plan's gradient error predicts for such a branch.

    The warm-up's own loss curve says what a step is worth, when it is the longer one.
    """
    if sensitivity is None or plan.grad_error is None:
        return None
    curve = tuple(enumerate(session.checkpoint.curve, start=1))
    if len(curve) > len(sensitivity.loss_curve):
        sensitivity = sensitivity.model_copy(update={"loss_curve": curve})
    steps, start = session.terms.branch_steps, len(session.checkpoint.curve)
    return predicted_loss_gap(sensitivity, plan.grad_error, steps, start=start)


def advice(evidence: Evidence) -> str:
    """Return what it would take to decide; "" when it is decided."""
    if evidence.verdict is Verdict.REFUTED and evidence.diverged("plan"):
        branch = evidence.diverged("plan")[0]
        return f"the plan diverged at step {branch.diverged_at} of the branch of seed {branch.seed}"
    if evidence.verdict is not Verdict.INCONCLUSIVE:
        return ""
    gaps = evidence.gaps("plan")
    reason = "the time budget ended" if evidence.is_out_of_time else "the seeds ended"
    if len(gaps) < 2:
        return f"{reason} after {len(gaps)} of {evidence.looks.seeds_min} seeds; allow more time"
    needed = seeds_needed(gaps, evidence.terms.tolerance, evidence.looks)
    if needed is None:
        return (
            f"{reason} after {len(gaps)} seeds and the mean gap sits on the tolerance: more seeds "
            "will not decide it; use longer branches, more evaluation batches or another tolerance"
        )
    return (
        f"{reason} after {len(gaps)} seeds; about {needed} seeds would decide it at this spread, "
        "or fewer with longer branches and more evaluation batches"
    )


def notes(session: Session, evidence: Evidence, steps: Sequence[StepTiming]) -> list[str]:
    """Return what a reader must know to read the record rightly."""
    reference, control, plan = (arm_digest(arm) for arm in evidence.arms)
    found = []
    if plan == reference:
        found.append("the plan is the FP32 reference: one branch serves both, so its gap is zero")
    elif plan == control:
        found.append("the plan is uniform BF16 O2: one branch serves as plan and control")
    if session.floor:
        found.append(
            f"training is not deterministic here: two runs of the reference differ by "
            f"{session.floor:.2e} of the loss, which is part of the spread"
        )
    if eval_stderr(evidence) is None:
        found.append("a single evaluation batch: what other batches would say is unknown")
    if not steps:
        found.append("step times were not measured: the target is not the device at hand")
    return found
