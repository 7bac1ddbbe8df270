"""The product: the precision of every layer, why, for what, and with what proof.

A plan is data only: nothing in it is imported or executed when it is read or applied.
"""

from typing import Any, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from autoprec.common.recipes import Gemm, Precision, Recipe
from autoprec.common.text import short_digest
from autoprec.records.base import FileRecord, Many, Record
from autoprec.records.model import FP32, Basis, LayerKind, LayerSpec, Option
from autoprec.records.verification import (
    ExpectedGap,
    LossGap,
    MetricGap,
    Proxy,
    Verdict,
    Verification,
)


class Assignment(Record):
    """The precision of one layer by exact name, with what led to it.

    Times are the layer's forward + backward per step in this option and in the baseline BF16 O2, in
    ms; `grad_error` its gradient error; `reason` is a sentence for people.
    """

    name: str = Field(max_length=4096)
    kind: LayerKind
    shapes: Many[Many[NonNegativeInt]]  # of its parameters, in registration order
    precision: Precision
    recipe: Recipe | None = None
    gemms_hp: Many[Gemm] = ()
    layer_ms: NonNegativeFloat | None = None
    baseline_ms: NonNegativeFloat | None = None
    basis: Basis = Basis.MEASURED
    grad_error: float | None = None
    grad_error_basis: Basis = Basis.MEASURED
    reason: str = ""

    @classmethod
    def of(cls, layer: LayerSpec, option: Option, **known: Any) -> Self:  # Any: the other fields
        """Return the assignment of an option to a layer, with what is known of it."""
        return cls(
            name=layer.name,
            kind=layer.kind,
            shapes=tuple(parameter.shape for parameter in layer.parameters),
            precision=option.precision,
            recipe=option.recipe,
            gemms_hp=option.gemms_hp,
            **known,
        )

    @property
    def option(self) -> Option:
        """The assignment's option."""
        return Option(precision=self.precision, recipe=self.recipe, gemms_hp=self.gemms_hp)

    @model_validator(mode="after")
    def _check_option(self) -> Self:
        _ = self.option  # raises ValueError (reported by pydantic) on an impossible combination
        return self


KEPT = "kept by --keep"  # so starts the reason of a layer that a keep decides


class Constraint(Record):
    """What the plan had to satisfy."""

    loss_tolerance: NonNegativeFloat  # relative loss gap, 0.001 = 0.1 %
    grad_error_budget: NonNegativeFloat | None  # the gradient error that it allows
    memory_bytes: NonNegativeInt | None = None
    keep: Many[str] = ()  # --keep GLOB=precision, as given
    run_steps: PositiveInt | None = None  # of the run that is planned; None: what a proof trains


class Fingerprint(Record):
    """For what the plan was made; a difference at apply time is an error or a named warning.

    `device_digest` tells device profiles of one name apart; empty for a device that was there.
    """

    structure: str
    device: str
    capability: str
    software: dict[str, str]
    compile_mode: str
    tokens_per_step: NonNegativeInt
    parallel: str = ""
    time_basis: Basis = Basis.MEASURED
    sensitivity_basis: Basis = Basis.MEASURED
    device_digest: str = ""


class PredictedStep(Record):
    """The step time that the search's model gives, in ms, for the plan and the uniform plans.

    `low_ms`..`high_ms` is the interval of `plan_ms`; `memory_bytes` the plan's peak on one device.
    `left_out` is the share of the weights whose layers' time is not known and not in any of these.
    """

    plan_ms: NonNegativeFloat
    fp32_ms: NonNegativeFloat
    bf16_o2_ms: NonNegativeFloat
    low_ms: NonNegativeFloat | None = None
    high_ms: NonNegativeFloat | None = None
    memory_bytes: NonNegativeInt | None = None
    left_out: NonNegativeFloat = 0.0


class Certificate(Record):
    """The verification in short; the whole is in verification.json.

    Branches trained `branch_steps` after `warmup_steps` in FP32. With a `proxy`, it is
    that of a smaller model that stood for the plan's.
    """

    verdict: Verdict
    loss_tolerance: NonNegativeFloat
    gap: LossGap | None
    step_ms: dict[str, float]
    seeds: NonNegativeInt
    warmup_steps: NonNegativeInt
    branch_steps: NonNegativeInt
    advice: str = ""
    proxy: Proxy | None = None
    expected_gap: ExpectedGap | None = None
    metrics: Many[MetricGap] = ()

    @classmethod
    def of(cls, verification: Verification) -> Self:
        """Return a verification in short."""
        shared = cls.model_fields.keys() & Verification.model_fields.keys()
        return cls(
            **{name: getattr(verification, name) for name in shared},
            step_ms={step.label: step.ms for step in verification.steps},
            seeds=verification.gap.seeds if verification.gap else 0,
        )


class Phase(Record):
    """One stretch of a precision schedule: from `start_step` on, FP8 layers run as `fp8` says."""

    start_step: NonNegativeInt
    fp8: bool


class Plan(FileRecord):
    """The precision of every layer of one model.

    `grad_error` is the joint gradient error (measured or not, see `grad_error_basis`) with that of
    grad_weight GEMMs by half, as in `LayerSensitivity.counted_error`: about that many extra steps
    per step. `schedule` is empty when FP8 runs from the first step to the last.
    `fp8_all_gather`: FSDP gathers FP8 weights (tensorwise only). `fp32_outputs` are layers
    whose outputs stay FP32 up to the next layer, as BF16 is too coarse between them, and for the
    same reason parameters of `uncovered` that stay FP32; where it has all layers, activations are
    FP32 between all of them, those in BF16 and FP8 too. `followers` are parameters that stay FP32,
    whatever their layers compute in: no optimizer trains them, but the training writes into them (a
    teacher that averages its student). `expected_gap` is what the search predicts for the end of
    the run; None where nobody said how long it is.
    """

    KIND = "plan"
    REMAKE = "`autoprec tune MODEL.py`"

    layers: Many[Assignment] = Field(max_length=200_000)
    uncovered: Many[str]
    constraint: Constraint
    fingerprint: Fingerprint
    grad_error: float | None
    grad_error_basis: Basis
    predicted: PredictedStep | None
    certificate: Certificate | None = None
    schedule: Many[Phase] = ()
    fp8_all_gather: bool = False
    fp32_outputs: Many[str] = ()
    followers: Many[str] = ()
    notes: Many[str] = ()
    expected_gap: ExpectedGap | None = None

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError("every layer is named once")
        starts = [phase.start_step for phase in self.schedule]
        if starts != sorted(set(starts)):
            raise ValueError("schedule phases start at increasing steps")
        if unknown := set(self.fp32_outputs).difference(names, self.uncovered):
            raise ValueError(f"fp32_outputs has layers or what is uncovered, not {min(unknown)!r}")
        return self

    @property
    def options(self) -> tuple[Option, ...]:
        """The options in layer order."""
        return tuple(layer.option for layer in self.layers)

    @property
    def is_fp32(self) -> bool:
        """Whether every layer stays FP32: there is nothing to apply."""
        return set(self.options) == {FP32}

    @property
    def digest(self) -> str:
        """A hash of what the plan decides (names and options), not of its evidence."""
        layers = ([layer.name, layer.option.key] for layer in self.layers)
        return short_digest(*layers, *(x for x in (self.fp32_outputs, self.followers) if x))

    def count(self, precision: Precision) -> int:
        """Return the number of layers that have that precision."""
        return sum(layer.precision is precision for layer in self.layers)


class FrontPoint(Record):
    """One plan on the Pareto front of predicted step time and gradient error."""

    options: tuple[Option, ...]
    step_ms: NonNegativeFloat
    grad_error: NonNegativeFloat
    grad_error_measured: NonNegativeFloat | None = None  # joint, where a trial measured it
    memory_bytes: NonNegativeInt | None = None
    grad_error_stderr: NonNegativeFloat | None = None  # of the measured one; None: one batch


class SearchTrial(Record):
    """One Optuna trial: a whole plan with its joint gradient error.

    `time_to_loss_ms` counts the time that is sure (see search.costs) and the extra steps.
    `feasible`: the gradient error with its standard error, and the bytes, are within the limits.
    `source` is `exact` (the knapsack's, on the table), `drawn` (what promised most on the table as
    measurements corrected it), `front`, `uniform` or `repair` (older: `corrected`, `sampler`).
    `grad_error_basis` is `predicted` where there was no workload to measure with, and `grad_error`
    is the table's sum.
    """

    number: NonNegativeInt
    source: str
    options: tuple[Option, ...]
    step_ms: NonNegativeFloat
    grad_error: NonNegativeFloat
    time_to_loss_ms: NonNegativeFloat
    feasible: bool
    grad_error_basis: Basis = Basis.MEASURED
    grad_error_stderr: NonNegativeFloat | None = None


class Search(FileRecord):
    """What the search looked at: the front with its bound, and every plan it evaluated.

    `exact` is the best additive plan within the constraint and `bound_ms` the proven lower bound of
    the step time of any; `expected` would be the best if every expected gain were sure (see
    search.costs), None where it is `exact`; `free` would be if nothing were kept, None where
    nothing is; `chosen` what the study preferred; `ranked` the plans to try, best first, should
    verification refute the chosen one. `interacting` are layers that were found by bisection to
    make the joint error larger than the sum of its parts; `notes` say what the search did about it.
    `measured_front` are the measured plans of which no other has less step time, gradient error
    and bytes, by increasing error.
    """

    KIND = "search"
    REMAKE = "`autoprec search FOLDER`"

    structure: str
    grad_error_budget: NonNegativeFloat
    front: tuple[FrontPoint, ...]
    exact: FrontPoint
    bound_ms: NonNegativeFloat
    chosen: FrontPoint
    ranked: tuple[FrontPoint, ...]
    trials: tuple[SearchTrial, ...]
    seed: int
    step_equivalents: NonNegativeFloat
    duplicates_skipped: NonNegativeInt = 0
    interacting: tuple[str, ...] = ()
    expected: FrontPoint | None = None
    free: FrontPoint | None = None
    measured_front: tuple[FrontPoint, ...] = ()
    notes: tuple[str, ...] = ()
