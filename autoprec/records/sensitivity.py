"""What a precision does to the loss and the gradient, per layer x option, with standard errors."""

from collections.abc import Iterable, Mapping
from enum import StrEnum

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from autoprec.records.base import FileRecord, Record
from autoprec.records.model import FP32, Basis, Option

# What an error that stays in the layer's own weights costs a run, beside one that spreads: any
# weight up to this predicts runs alike (decision 053), and this is the most cautious
GRAD_WEIGHT_COUNTS = 0.5


class Estimate(Record):
    """A mean with its standard error over batches (None when a single batch leaves it unknown)."""

    mean: float
    stderr: NonNegativeFloat | None = None

    def scaled(self, factor: float) -> "Estimate":
        """Return the estimate times a factor."""
        stderr = None if self.stderr is None else self.stderr * factor
        return Estimate(mean=self.mean * factor, stderr=stderr)


class Operand(StrEnum):
    """The three tensors that a linear layer casts."""

    INPUT = "input"
    WEIGHT = "weight"
    GRAD_OUTPUT = "grad_output"


class LayerSensitivity(Record):
    """One layer x option against the reference.

    `grad_error` is the gradient error E|P(g - g_ref)|^2 / E|P g_ref|^2 (1/SQNR), and `staying` the
    part of it that stays in the layer's own parameters: the error of its grad_weight GEMM, 0 where
    it is not known.
    """

    name: str
    option: Option
    grad_error: Estimate
    basis: Basis = Basis.MEASURED
    staying: NonNegativeFloat = 0.0

    @property
    def cell(self) -> tuple[str, Option]:
        """The layer and the option that it is of."""
        return self.name, self.option

    @property
    def counted_error(self) -> float:
        """The gradient error as plans count it: what stays in the layer's own parameters by half.

        Noise that made it negative counts as 0.
        """
        whole = max(self.grad_error.mean, 0.0)
        return whole - (1.0 - GRAD_WEIGHT_COUNTS) * min(self.staying, whole)


class OperandStatistics(Record):
    """The range of one operand of one layer, and what a recipe would do to it.

    `underflow`, the non-zero values that become zero, is a fraction per recipe. `outlier_channels`
    are channels with amax > 10x the median one. `mean_over_std` is the root of
    sum(mean^2) / sum(variance) over channels, each over all rows (of a weight: each output's, over
    its inputs): rounding is relative to the mean, what a layer learns from to the spread.
    `outlier_token_share` is the share of tokens whose amax is more than about 10x the median one's.
    None: not known, nothing varies, or a weight, which has no tokens.

    `range_share` and `mean_share` are the parts of the layer's gradient error under a recipe that
    go where this operand is rounded as in FP8, but of any range, and where its mean is taken out;
    below zero where the error grows. They are there where an operand of a layer with a large error
    stands out.
    """

    name: str
    operand: Operand
    amax: NonNegativeFloat
    underflow: dict[str, float]
    outlier_channels: tuple[int, ...]
    channels: NonNegativeInt
    mean_over_std: NonNegativeFloat | None = None
    outlier_token_share: NonNegativeFloat | None = None
    range_share: dict[str, float] = Field(default_factory=dict)
    mean_share: dict[str, float] = Field(default_factory=dict)


class Island(Record):
    """Layers that go to FP32 together or not at all, and what stays FP32 between layers with them.

    `grad_error` is what a plan without the island has beyond the layers' rows. `outputs` are layers
    whose outputs stay FP32, whatever they are in, and parameters outside of layers. An island of
    these alone is no choice: every plan has it.
    """

    names: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    grad_error: NonNegativeFloat = 0.0


def fp32_outputs(islands: Iterable[Island], options: Mapping[str, Option]) -> tuple[str, ...]:
    """Return what stays FP32 between layers, with the islands that a plan has in FP32."""
    held = (x for x in islands if all(options[name] == FP32 for name in x.names))
    return tuple(dict.fromkeys(name for x in held for name in (*x.names, *x.outputs)))


def between_layers(activations: Estimate, islands: Iterable[Island]) -> float:
    """Return what any plan with a 16-bit layer pays beyond its rows, if no island is in FP32."""
    own = (island.grad_error for island in islands if island.names)
    return max(activations.mean, 0.0) + sum(own)


class JointMeasurement(Record):
    """The measured gradient error of a whole plan beside the sum of its rows in the table.

    `overlap` is what that sum has too much, as several rows' errors cross the same kinks
    or change the same choices.
    """

    label: str
    options: tuple[Option, ...]  # in the order of the model's layers
    grad_error: Estimate
    predicted_grad_error: float
    overlap: NonNegativeFloat = 0.0


class StepError(Record):
    """The gradient error of FP8 wherever it goes, after `step` steps of the reference's training.

    It is of all layers at once, each in the first recipe that it can run.
    """

    step: NonNegativeInt
    grad_error: Estimate


class BatchEffect(Record):
    """What larger batches do to a gradient error (`sensitivity.batching`).

    `ratio` is the error at `tokens` per optimizer step over that of one batch of `batch_tokens`, as
    `systematic`, the share of the squared error that all batches have in common, and `gradient`,
    that of the squared gradient, imply. None where one of them cannot be told from zero; `reason`
    says which.
    """

    tokens: NonNegativeInt
    batch_tokens: NonNegativeInt
    systematic: Estimate
    gradient: Estimate
    ratio: NonNegativeFloat | None = None
    reason: str = ""


class Sensitivity(FileRecord):
    """The table of gradient errors and what it was measured with.

    `structure` ties it to a model spec. `method` is `layerwise` or `sign_coded`, or `transferred`
    or `unknown` for a model that was not measured; `passes` counts forward+backward passes,
    `step_equivalents` the cost in FP32 training steps. `preconditioner` names P (`adam`, ...).
    `activation_error` is what the joint error of uniform BF16 has beyond its rows, from BF16
    activations between layers: paid once by any plan with a 16-bit layer, and without what BF16
    does to `islands`, where it is too coarse by itself. `floor` is the error
    between two runs of the reference (0 when deterministic). `loss_curve` holds (step, loss) of the
    reference warm-up. `table_check` says where the table and joint measurements are more than a
    factor of two apart; empty where they agree. `by_step` has the gradient error at several steps
    of the warm-up, the last one where the table was measured: how the error grows as the reference
    learns. `batch_effect` is there where the tokens of an optimizer step of the planned run were
    given, `schedule_steps` where the user's schedule has an end: the steps to where its rates are
    about zero.
    """

    KIND = "sensitivity"
    REMAKE = "`autoprec sensitivity MODEL.py`"

    structure: str
    reference: Option
    method: str
    preconditioner: str
    batches: NonNegativeInt
    passes: NonNegativeInt
    step_equivalents: NonNegativeFloat
    warmup_steps: NonNegativeInt
    checkpoint: str
    seed: int
    rows: tuple[LayerSensitivity, ...]
    activation_error: Estimate
    floor: Estimate
    statistics: tuple[OperandStatistics, ...]
    joint: tuple[JointMeasurement, ...]
    loss_curve: tuple[tuple[int, float], ...]
    software: dict[str, str]
    notes: tuple[str, ...] = ()
    table_check: str = ""
    islands: tuple[Island, ...] = ()
    by_step: tuple[StepError, ...] = ()
    batch_effect: BatchEffect | None = None
    schedule_steps: NonNegativeInt | None = None

    @property
    def layer_islands(self) -> tuple[Island, ...]:
        """The islands of some layers; what is outside of layers, or between all, is none."""
        layers = set() if self.is_fp32_between else {row.name for row in self.rows}
        return tuple(x for x in self.islands if layers.intersection((*x.names, *x.outputs)))

    @property
    def error_without_islands(self) -> float:
        """The error of a plan without any island of layers, beyond its layers' rows."""
        own = sum(island.grad_error for island in self.layer_islands)
        return max(self.activation_error.mean, 0.0) + own

    @property
    def fp32_always(self) -> tuple[str, ...]:
        """What every plan has in FP32: parameters outside of layers, and outputs of layers."""
        return fp32_outputs((island for island in self.islands if not island.names), {})

    @property
    def is_fp32_between(self) -> bool:
        """Whether every plan has FP32 between all layers."""
        always = set(self.fp32_always)
        return bool(always) and all(row.name in always for row in self.rows)

    def without_fp32_between(self) -> "Sensitivity":
        """Return the sensitivity of plans that have no FP32 between all layers, and pay for it.

        Joint measurements had it, so they tell nothing of such plans.
        """
        if not self.is_fp32_between:
            return self
        whole = max(self.activation_error.mean, 0.0) + sum(x.grad_error for x in self.islands)
        error = self.activation_error.model_copy(update={"mean": whole})
        return self.model_copy(update={"islands": (), "joint": (), "activation_error": error})

    def row(self, name: str, option: Option) -> LayerSensitivity | None:
        """Return the row of a layer and option, or None when it was not measured."""
        return next((r for r in self.rows if r.name == name and r.option == option), None)
