"""What training with a plan really did: paired branches, step times, and the verdict."""

from collections.abc import Iterable
from enum import StrEnum

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from autoprec.records.base import FileRecord, Record
from autoprec.records.cost import StepTiming
from autoprec.records.model import Basis, Option
from autoprec.records.sensitivity import Estimate

REFUTED = "refuted before:"  # so start the notes on plans that were
MOST_SEEDS = 64  # of a proof; beyond it longer branches are the better use of time
ROUNDING = 1e-6  # sums of the same numbers in another order differ by less


class Verdict(StrEnum):
    """The answer of the sequential test."""

    VERIFIED = "verified"
    REFUTED = "refuted"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not_run"


class LossGap(Record):
    """A relative loss gap against the reference: mean and two-sided interval over seeds.

    Fractions of the reference's evaluation loss: 0.001 is 0.1 %. `confidence` e.g. 0.95.
    """

    mean: float
    low: float
    high: float
    confidence: float
    seeds: NonNegativeInt


class MetricTolerance(Record):
    """How far a metric may differ with the plan from without, in its unit.

    `at_least` is below zero (a metric of which more is better may fall that far), `at_most` above
    it; both, where it may not move further either way.
    """

    name: str
    at_least: float | None = None
    at_most: float | None = None


class MetricGap(Record):
    """What the plan does to one of the user's metrics, and the verdict on its tolerance.

    `reference` is the metric's mean over the reference's seeds, `gap` the plan's difference from
    it, both in its unit, and None where a branch diverged. `verdict` is `not_run` without a
    tolerance.
    """

    name: str
    reference: float
    gap: LossGap | None
    tolerance: MetricTolerance | None = None
    verdict: Verdict = Verdict.NOT_RUN


class ExpectedGap(Record):
    """The relative loss gap expected after `steps` steps with the plan, and an interval around it.

    Not measured but predicted (`sensitivity.gap`): from the plan's gradient error, and the gap of a
    shorter run where one was measured, as `reason` then says. `low` to `high` held the measured
    gap of `confidence` of the plans, in the mean over model families that the prediction was not
    fitted to. `mean` and interval are None where nothing is known, and `reason` says why.
    """

    steps: PositiveInt
    mean: float | None
    low: float | None
    high: float | None
    confidence: float
    basis: Basis = Basis.PREDICTED
    reason: str = ""

    def times(self, factor: float) -> "ExpectedGap":
        """Return what is expected with so many times the gradient error: a gap is in proportion."""
        gaps = {"mean": self.mean, "low": self.low, "high": self.high}
        return self.model_copy(
            update={name: gap if gap is None else gap * factor for name, gap in gaps.items()}
        )


class Branch(Record):
    """One branch of one seed: a candidate trained from the common checkpoint and evaluated in FP32.

    `label` is `reference`, `bf16_o2` (the control), `plan`, or `as_written` (with the user's own
    16-bit parameters, without masters). `diverged_at` is the branch step at which the loss became
    NaN or infinite (None: it did not); `eval_loss` is then None, as where the user's own training
    ended in an error. `not_finite` are the layers at fault where gradients were not finite in the
    first step, in forward order.
    `metrics` are the user's, `own_loss` is the evaluation loss through the plan's own forward.
    """

    label: str
    seed: int
    eval_loss: float | None
    diverged_at: NonNegativeInt | None
    curve: tuple[float, ...]
    eval_losses: tuple[float, ...] = ()
    not_finite: tuple[str, ...] = ()
    metrics: dict[str, float] = Field(default_factory=dict)
    own_loss: float | None = None


def loss_gaps(
    branches: Iterable[Branch], label: str, *, base: str = "reference"
) -> dict[int, float]:
    """Return the relative loss gap of each seed whose branch and base were evaluated."""
    losses = {(each.label, each.seed): each.eval_loss for each in branches}
    return {
        seed: (loss - beside) / abs(beside)
        for (of, seed), loss in losses.items()
        if of == label and loss is not None and (beside := losses.get((base, seed)))
    }


class HorizonGap(Record):
    """The plan's gap over another length of training; None where it diverged there."""

    warmup_steps: NonNegativeInt
    branch_steps: PositiveInt
    gap: LossGap | None
    stderr: NonNegativeFloat | None = None

    @property
    def steps(self) -> int:
        """The whole length."""
        return self.warmup_steps + self.branch_steps


class BranchFile(FileRecord):
    """A finished branch on disk, so that a killed verification goes on where it stopped."""

    KIND = "branch"
    REMAKE = "`autoprec verify`, without the old file"

    branch: Branch


class Proxy(Record):
    """The small model on which a plan was verified, beside the model that the plan is for.

    `plan` is the digest of the plan as it was carried to the proxy, `grad_error` its gradient error
    there by the proxy's own table, and `model_grad_error` the plan's, as transferred.
    """

    name: str
    structure: str
    parameters: PositiveInt
    model_structure: str
    model_parameters: PositiveInt
    plan: str
    grad_error: NonNegativeFloat
    model_grad_error: NonNegativeFloat | None = None

    @property
    def shows_enough(self) -> bool:
        """Whether the carried plan has no less gradient error than the model's plan."""
        return self.grad_error >= (self.model_grad_error or 0.0) * (1.0 - ROUNDING)


class Verification(FileRecord):
    """The certificate of a plan.

    `loss_tolerance` is the allowed relative loss gap, `gap` the plan's and `control_gap` BF16 O2's;
    `seed_spread` the relative standard deviation of the reference's evaluation loss over seeds.
    `bf16_gap` is the plan's gap to BF16 O2, `loss_exponent` the relative fall of the loss per
    e-fold of steps at the end, by the reference's loss curve (`sensitivity.gap`).
    `predicted_gap` comes from the gradient error and that curve. `steps` are the
    whole-step timings of plan and baselines, interleaved. `refuted_plans` are the option lists of
    plans that were tried before this one. `advice` is what it would take, or would
    tell more.
    `plan` is the plan's digest (`Plan.digest`). `eval_stderr` is the standard error that the finite
    number of evaluation batches leaves on the mean gap, `floor` the relative gap between two runs
    of the reference with one seed (0.0 when training is deterministic). `notes` say what the reader
    must know, e.g. that two variants are one and the same. `proxy` is there where the branches
    trained a smaller model in the place of the plan's; `refuted_plans` are the plan's model's all
    the same. `expected_gap` is that of the plan at the end of the run that the user plans, None
    where nobody said how long it is. `metrics` are the user's, and `verdict` the worst of theirs
    and the loss's. `horizons` are the plan's gaps over other lengths too, and `growth` the exponent
    of the steps with which they grow. `own_gap` is the loss gap where the plan's branches are
    evaluated through the plan's own forward. `written_gap` is that of the user's own training,
    where its parameters are in 16 bits without FP32 masters.
    """

    KIND = "verification"
    REMAKE = "`autoprec verify MODEL.py PLAN.json`"

    plan: str
    verdict: Verdict
    loss_tolerance: NonNegativeFloat
    gap: LossGap | None
    control_gap: LossGap | None
    seed_spread: NonNegativeFloat | None
    predicted_gap: float | None
    warmup_steps: NonNegativeInt
    branch_steps: NonNegativeInt
    branches: tuple[Branch, ...]
    steps: tuple[StepTiming, ...]
    refuted_plans: tuple[tuple[Option, ...], ...] = ()
    checkpoint: str = ""
    advice: str = ""
    software: dict[str, str] = Field(default_factory=dict)
    eval_stderr: NonNegativeFloat | None = None
    floor: NonNegativeFloat | None = None
    bf16_gap: LossGap | None = None
    loss_exponent: NonNegativeFloat | None = None
    notes: tuple[str, ...] = ()
    proxy: Proxy | None = None
    expected_gap: ExpectedGap | None = None
    metrics: tuple[MetricGap, ...] = ()
    own_gap: LossGap | None = None
    horizons: tuple[HorizonGap, ...] = ()
    growth: Estimate | None = None
    written_gap: LossGap | None = None
