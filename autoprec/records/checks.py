"""What checks say: of a machine, of a plan against a model, of one record against another."""

from pydantic import NonNegativeFloat, NonNegativeInt

from autoprec.records.base import Record
from autoprec.records.cost import DeviceFacts, Timing
from autoprec.records.model import Basis
from autoprec.records.verification import ROUNDING, LossGap, Verdict


class Check(Record):
    """One thing looked at: `is_good` and what was seen, in words.

    `is_judged` is False of a layer where nothing was seen that could be good or bad.
    """

    name: str
    is_good: bool
    detail: str
    is_judged: bool = True


class Diagnosis(Record):
    """What `doctor` found: facts, checks, and one measured GEMM per precision (ms)."""

    device: DeviceFacts
    checks: tuple[Check, ...]
    gemm: str  # MxKxN of the timed GEMM
    gemm_ms: dict[str, Timing]  # fp32, bf16, fp8 (where it runs)

    @property
    def is_healthy(self) -> bool:
        """Whether every check is good."""
        return all(check.is_good for check in self.checks)


class PlanCheck(Record):
    """Whether a plan is well-formed, fits a model, and is what runs."""

    plan: str
    checks: tuple[Check, ...]

    @property
    def is_good(self) -> bool:
        """Whether every check is good."""
        return all(check.is_good for check in self.checks)


class DifferenceRow(Record):
    """One layer, or one field, that two records disagree on."""

    name: str
    before: str
    after: str


class Change(Record):
    """One number of two runs, and the interval of `after` / `before`.

    `ratio` is None where `before` is 0, the interval where the noise is not known; of two
    predictions, which have none, both its ends are the ratio. `names` are the layers that share the
    number, `option` what they ran in.
    """

    name: str
    before: float
    after: float
    ratio: float | None
    low: float | None
    high: float | None
    basis: Basis
    names: tuple[str, ...] = ()
    option: str = ""

    @property
    def is_beyond_noise(self) -> bool:
        """Whether no difference is outside the interval; a ratio of rounding is none."""
        if not self.ratio:  # of FP32, whose error is exactly 0, and another plan
            return self.before != self.after
        if self.low is None or self.high is None:
            return False
        return self.low > 1.0 + ROUNDING or self.high < 1.0 - ROUNDING


class Comparison(Record):
    """What two runs, or two records of one kind, have in common and where they differ.

    `facts` are what they were made with, where that differs. `steps`, `speedup` and `grad_error`
    are there whether they differ or not; `layer_times` and `layer_errors` are those that differ
    beyond noise, of so many that were compared. `decisions` are the layers with another option.
    `noise_between` is the standard deviation of log times between the runs, as the layers show it;
    None where they cannot. `notes` say what was not compared, `checks` what was asked to hold.
    `reaches` are the steps that each verdict is over, in words.
    """

    before: str
    after: str
    facts: tuple[DifferenceRow, ...]
    steps: tuple[Change, ...]
    speedup: Change | None
    grad_error: Change | None
    verdicts: tuple[Verdict, Verdict] | None
    gaps: tuple[LossGap | None, LossGap | None]
    decisions: tuple[DifferenceRow, ...]
    layers_compared: NonNegativeInt
    layer_times: tuple[Change, ...]
    times_compared: NonNegativeInt
    layer_errors: tuple[Change, ...]
    errors_compared: NonNegativeInt
    noise_between: NonNegativeFloat | None
    notes: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    reaches: tuple[str, str] = ("", "")

    @property
    def step(self) -> Change | None:
        """The plan's step, if both runs know its time."""
        return next((step for step in self.steps if step.name == "plan"), None)

    @property
    def is_good(self) -> bool:
        """Whether everything holds that was asked to."""
        return all(check.is_good for check in self.checks)
