"""What the branches of one plan say so far, and the record that is made of it."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autoprec.common.text import first_and_more, percent
from autoprec.common.versions import software_versions
from autoprec.records import Plan, Sensitivity, StepTiming
from autoprec.records.verification import (
    MOST_SEEDS,
    REFUTED,
    Branch,
    ExpectedGap,
    LossGap,
    MetricGap,
    MetricTolerance,
    Verdict,
    Verification,
    loss_gaps,
)
from autoprec.sensitivity.gap import expected_gap, loss_exponent, predicted_loss_gap
from autoprec.verification.metrics import Tested, metric_interval, tested_sides
from autoprec.verification.sequential import (
    CONFIDENCE,
    Terms,
    can_decide,
    gap_interval,
    seeds_needed,
    smallest_tolerance,
    verdict_of,
)
from autoprec.verification.session import Session

MOST_LISTED = 4  # layers that a sentence names
FEWEST_EVAL_BATCHES = 2  # below it nothing is known about the batches that were not drawn


@dataclass(frozen=True)
class Evidence:
    """The branches of reference, control and plan, seed by seed, and what follows from them."""

    plan: Plan
    terms: Terms
    loss_tolerance: float
    branches: tuple[Branch, ...] = ()
    tolerances: tuple[MetricTolerance, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The answer after these seeds: the worst of the loss's and the tested metrics'."""
        if self.diverged("plan"):
            return Verdict.REFUTED
        if len(self.gaps("plan")) < self.terms.seeds_min:
            return Verdict.INCONCLUSIVE
        return self.worst(self.tested)

    @property
    def tested(self) -> list[Tested]:
        """What the verdict is on: the loss gaps, then each metric's with a tolerance."""
        found = [Tested(tuple(self.gaps("plan")), self.loss_tolerance)]
        for tolerance in self.tolerances:
            found += tested_sides(self.metric_gaps(tolerance.name), tolerance)
        return found

    def worst(self, tested: Sequence[Tested]) -> Verdict:
        """Return the worst verdict on these gaps."""
        verdicts = {
            verdict_of(gap_interval(x.gaps, self.terms, tolerance=x.tolerance), x.tolerance)
            for x in tested
        }
        order = (Verdict.REFUTED, Verdict.INCONCLUSIVE, Verdict.VERIFIED)
        return next(verdict for verdict in order if verdict in verdicts)

    @property
    def unresolved(self) -> Tested | None:
        """The first of the gaps that differ too widely for the seeds that are left, if any do."""
        if len(self.gaps("plan")) < self.terms.seeds_min or self.diverged("plan"):
            return None
        undecided = (x for x in self.tested if self.worst([x]) is Verdict.INCONCLUSIVE)
        too_wide = (x for x in undecided if not can_decide(x.gaps, x.tolerance, self.terms))
        return next(too_wide, None)

    def metric_gaps(self, name: str) -> list[float]:
        """Return how far a metric is from the reference's, seed by seed, in its unit."""
        beside = {branch.seed: branch.metrics for branch in self.of("reference")}
        return [
            branch.metrics[name] - beside[branch.seed][name]
            for branch in self.of("plan")
            if name in branch.metrics and name in beside.get(branch.seed, {})
        ]

    def of(self, label: str) -> list[Branch]:
        """Return the branches of that label, in the order of the seeds."""
        return [branch for branch in self.branches if branch.label == label]

    def diverged(self, label: str) -> Branch | None:
        """Return the label's first branch whose loss became NaN, infinite or far too large."""
        return next((each for each in self.of(label) if each.diverged_at is not None), None)

    def gaps(self, label: str, base: str = "reference") -> list[float]:
        """Return the relative loss gap of every seed whose branch of that label was evaluated."""
        return list(loss_gaps(self.branches, label, base=base).values())

    def gap(self, label: str, base: str = "reference") -> LossGap | None:
        """Return the interval of the gap; None with fewer than two seeds, or when one diverged."""
        gaps = self.gaps(label, base)
        if len(gaps) < 2 or self.diverged(label):
            return None
        if label == "plan" and base == "reference" and self.plan.is_fp32:
            # one branch serves both: there is nothing that no seed showed
            return LossGap(mean=0.0, low=0.0, high=0.0, confidence=CONFIDENCE, seeds=len(gaps))
        # the tolerance is on gaps to the reference
        tolerance = self.loss_tolerance if base == "reference" else 0.0
        return gap_interval(gaps, self.terms, tolerance=tolerance)

    @property
    def asks_for_written(self) -> bool:
        """Whether a seed may tell if the user's own training is within the tolerance."""
        if any(branch.eval_loss is None for branch in self.of("as_written")):
            return False  # it diverges, or fails
        gap, gaps = self.gap("as_written"), self.gaps("as_written")
        if gap is None or len(gaps) < self.terms.seeds_min:
            return True
        is_open = verdict_of(gap, self.loss_tolerance) is Verdict.INCONCLUSIVE
        return is_open and can_decide(gaps, self.loss_tolerance, self.terms)

    @property
    def implied_limit(self) -> float | None:
        """The gradient error whose gap would be the tolerance, by this plan's own; else None.

        A loss gap grows about in proportion to the gradient error e (`sensitivity.gap`). So a plan
        with e and a measured gap above the tolerance implies a limit of e * tolerance / gap,
        whatever was predicted before training.
        """
        gap, grad_error = self.gap("plan"), self.plan.grad_error
        if gap is None or grad_error is None or gap.mean <= 0.0:
            return None
        return grad_error * min(self.loss_tolerance / gap.mean, 1.0)


def make_verification(
    session: Session,
    evidence: Evidence,
    steps: Sequence[StepTiming],
    sensitivity: Sensitivity | None,
    refuted: Sequence[Evidence],
    *,
    skipped: int,
) -> Verification:
    """Make the record of a plan's verification, after `refuted` plans and `skipped` ones."""
    repairs = repair_notes(evidence.plan, refuted, skipped=skipped)  # they come first
    end = len(session.checkpoint.curve) + session.terms.branch_steps
    return Verification(
        plan=evidence.plan.digest,
        verdict=evidence.verdict,
        loss_tolerance=evidence.loss_tolerance,
        gap=evidence.gap("plan"),
        control_gap=evidence.gap("bf16_o2"),
        seed_spread=seed_spread(evidence),
        predicted_gap=predicted_gap(session, evidence.plan, sensitivity),
        warmup_steps=len(session.checkpoint.curve),
        branch_steps=session.terms.branch_steps,
        branches=evidence.branches,
        steps=tuple(steps),
        refuted_plans=tuple(other.plan.options for other in refuted),
        checkpoint=session.checkpoint_path,
        advice=advice(evidence) or idle_branches(session.checkpoint.eval_losses, evidence),
        software=software_versions(),
        eval_stderr=eval_stderr(evidence),
        metrics=tuple(metric_gaps(evidence)),
        own_gap=own_gap(evidence),
        floor=session.floor,
        bf16_gap=evidence.gap("plan", "bf16_o2"),
        loss_exponent=loss_exponent(session.checkpoint.curve, end),
        notes=(*repairs, *notes(session, evidence, steps)),
        expected_gap=expected_gap_of(evidence.plan, sensitivity),
        written_gap=evidence.gap("as_written"),
    )


def exceeds_limit(plan: Plan, refuted: Sequence[Evidence]) -> bool:
    """Whether a plan's gradient error is above a limit that the refuted plans imply."""
    limits = [limit for each in refuted if (limit := each.implied_limit) is not None]
    return plan.grad_error is not None and any(plan.grad_error > limit for limit in limits)


def repair_notes(plan: Plan, refuted: Sequence[Evidence], *, skipped: int) -> list[str]:
    """Return the refuted plans before this one, and the layers that are otherwise now."""
    notes = []
    for each in refuted:
        gap, diverged = each.gap("plan"), each.diverged("plan")
        found = "no gap" if gap is None else f"mean loss gap {gap.mean:+.2%}"
        if diverged:
            found = f"diverged at step {diverged.diverged_at}{why_diverged(diverged)}"
        pairs = zip(each.plan.layers, plan.layers, strict=True)
        other = [old.name for old, new in pairs if old.option != new.option]
        counts = Counter(layer.option.key for layer in each.plan.layers)
        layers = ", ".join(f"{count} {key}" for key, count in counts.items())
        notes.append(f"{REFUTED} {layers} ({found}); changed since: {first_and_more(other)}")
    if skipped:
        notes.append(
            f"{skipped} more plans were passed over: by the refuted plan's gap, their gradient "
            "error is too large"
        )
    return notes


def why_diverged(branch: Branch) -> str:
    """Return the layers at fault where a branch's first step shows them, else nothing."""
    layers = first_and_more(map(repr, branch.not_finite), most=MOST_LISTED)
    return f": its gradients are not finite, beginning in {layers}" if branch.not_finite else ""


def seed_spread(evidence: Evidence) -> float | None:
    """Return the relative standard deviation of the reference's evaluation loss over seeds."""
    losses = [b.eval_loss for b in evidence.of("reference") if b.eval_loss is not None]
    if len(losses) < 2:
        return None
    return float(np.std(losses, ddof=1)) / abs(math.fsum(losses) / len(losses))


def metric_gaps(evidence: Evidence) -> Iterator[MetricGap]:
    """Yield what the plan does to each of the user's metrics."""
    tolerances = {each.name: each for each in evidence.tolerances}
    references = [branch.metrics for branch in evidence.of("reference")]
    for name in dict.fromkeys(name for metrics in references for name in metrics):
        tolerance, gaps = tolerances.get(name), evidence.metric_gaps(name)
        known = [metrics[name] for metrics in references if name in metrics]
        is_known = len(gaps) >= 2 and not evidence.diverged("plan")
        sides = tested_sides(gaps, tolerance) if tolerance else []
        yield MetricGap(
            name=name,
            reference=math.fsum(known) / len(known),
            gap=metric_interval(gaps, tolerance, evidence.terms) if is_known else None,
            tolerance=tolerance,
            verdict=evidence.worst(sides) if is_known and sides else Verdict.NOT_RUN,
        )


def own_gap(evidence: Evidence) -> LossGap | None:
    """Return the loss gap with the plan's branches evaluated through the plan's own forward."""
    beside = {branch.seed: branch.eval_loss for branch in evidence.of("reference")}
    gaps = [
        (branch.own_loss - loss) / abs(loss)
        for branch in evidence.of("plan")
        if branch.own_loss is not None and (loss := beside.get(branch.seed))
    ]
    if len(gaps) < 2 or len(gaps) < len(evidence.of("plan")):
        return None
    return gap_interval(gaps, evidence.terms, tolerance=evidence.loss_tolerance)


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
    # over the seeds first, which share the batches: what is left is the scatter of batches
    difference = (plan - reference).mean(axis=0)
    stderr = difference.std(ddof=1) / math.sqrt(len(difference))
    return float(stderr) / abs(float(reference.mean()))


def predicted_gap(session: Session, plan: Plan, sensitivity: Sensitivity | None) -> float | None:
    """Return the gap that the plan's gradient error predicts for such a branch."""
    if sensitivity is None or plan.grad_error is None:
        return None
    steps, start = session.terms.branch_steps, len(session.checkpoint.curve)
    return predicted_loss_gap(sensitivity, plan.grad_error, steps, start=start)


def expected_gap_of(plan: Plan, sensitivity: Sensitivity | None) -> ExpectedGap | None:
    """Return the gap expected at the end of the planned run; None where its length is unknown."""
    before = plan.expected_gap
    steps = plan.constraint.run_steps or (before.steps if before else None)
    if steps is None or sensitivity is None:
        return before
    return expected_gap(sensitivity, plan.grad_error, steps)


def advice(evidence: Evidence) -> str:
    """Return what it would take to decide; "" when it is decided."""
    if branch := evidence.diverged("plan"):
        seed = branch.seed
        where = f"at step {branch.diverged_at} of the branch of seed {seed}"
        if branch.diverged_at == evidence.terms.branch_steps:  # it trained to its end
            return f"its held-out loss or a metric is not finite after the branch of seed {seed}"
        return f"the plan diverged {where}{why_diverged(branch)}"
    if evidence.verdict is not Verdict.INCONCLUSIVE:
        return ""
    count, terms = len(evidence.gaps("plan")), evidence.terms
    if wide := evidence.unresolved:
        early = f"it stopped after {count} seeds, since {terms.seeds_max} could not decide: "
        return f"{early if count < terms.seeds_max else ''}{_out_of_reach(wide, terms)}"
    undecided = (x for x in evidence.tested if evidence.worst([x]) is Verdict.INCONCLUSIVE)
    needed = [seeds_needed(each.gaps, each.tolerance, terms) for each in undecided]
    if not needed or None in needed:
        return (
            "the mean gap sits on the tolerance: more seeds will not decide it; use longer "
            "branches, more evaluation batches or another tolerance"
        )
    return (
        f"about {max(filter(None, needed))} seeds would decide it at this spread, or fewer with "
        "longer branches and more evaluation batches"
    )


def idle_branches(before: Sequence[float], evidence: Evidence) -> str:
    """Return that a plan which learned nothing would be verified, too; "" where it would not.

    Its gap would be what the reference's branches lower the held-out losses `before` them by.
    """
    losses = [branch.eval_loss for branch in evidence.of("reference") if branch.eval_loss]
    start = math.fsum(before) / len(before)
    lowered = math.fsum((start - loss) / abs(loss) for loss in losses) / len(losses)
    is_reference = evidence.plan.is_fp32
    if (
        is_reference
        or evidence.verdict is not Verdict.VERIFIED
        or lowered > evidence.loss_tolerance
    ):
        return ""
    moved = "lower" if lowered >= 0.0 else "raise"
    return (
        f"so would be one that learned nothing, as these branches {moved} the held-out loss "
        f"of FP32 by {percent(abs(lowered))}: --branch-steps {2 * evidence.terms.branch_steps} "
        "or longer tells more"
    )


def _out_of_reach(wide: Tested, terms: Terms) -> str:
    """Return what the seeds could resolve where gaps differ too widely, and the way out."""
    shown = "{:.3g}".format if wide.name else percent
    needed = seeds_needed(wide.gaps, wide.tolerance, terms)
    more = f"--seeds {needed}, " if needed and needed <= MOST_SEEDS else ""
    least = shown(smallest_tolerance(wide.gaps, terms))
    option = f"a --metric-tolerance of {least}" if wide.name else f"--loss-tolerance {least}"
    return (
        f"{wide.name and wide.name + ': '}gaps differ by {shown(float(np.std(wide.gaps, ddof=1)))} "
        f"from seed to seed, which resolves {least} at best; "
        f"the way out is {more}--branch-steps {2 * terms.branch_steps} or longer, more evaluation "
        f"batches, or {option.replace(' %', '%')}"
    )


def notes(session: Session, evidence: Evidence, steps: Sequence[StepTiming]) -> list[str]:
    """Return the sentences that a reader must know to read the record rightly."""
    reference, control, plan = (variant.digest for variant in session.variants(evidence.plan))
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
    if len(session.evaluation) < FEWEST_EVAL_BATCHES:
        found.append("a single evaluation batch: what other batches would say is unknown")
    if not steps:
        found.append("step times were not measured: the model did not train on its target here")
    return found
