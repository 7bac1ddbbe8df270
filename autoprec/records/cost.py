"""What a model costs on a device: time and memory per layer x option, and whole steps."""

import math
from functools import lru_cache
from statistics import NormalDist

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from autoprec.records.base import FileRecord, Record
from autoprec.records.model import Basis, ModelSpec, Option

P80_SIGMAS = 0.8416  # the 80th percentile of a normal distribution, in standard deviations
MEDIAN_FACTOR = 1.2533  # standard error of a median over that of a mean, sqrt(pi / 2)
FEWEST_SPREAD = 2  # samples; a single one shows no spread
WIDEST = 20.0  # half-width of a log ratio, a factor of 5e8: nothing is known of it, and exp() is
BASELINES = ("as_written", "fp32", "bf16_o2", "autocast_bf16")  # what users run now comes first


class Timing(Record):
    """A time in ms: the median and its spread.

    Measured: 20th and 80th percentile over `samples` runs, `rejected` dirty ones left out.
    Predicted: `samples` is 0 and p20..p80 is the prediction interval.
    `host_ms` is what the host took to queue it for a GPU; None: on a CPU, or not known.
    `turn_error` is the standard error by the medians of a whole step's turns, relative to the time.
    """

    median_ms: NonNegativeFloat
    p20_ms: NonNegativeFloat
    p80_ms: NonNegativeFloat
    samples: NonNegativeInt
    rejected: NonNegativeInt = 0
    basis: Basis = Basis.MEASURED
    host_ms: NonNegativeFloat | None = None
    turn_error: NonNegativeFloat = 0.0

    @property
    def relative_error(self) -> float:
        """The standard error of the median, relative to it; 0 without samples.

        Of normal samples p80 - p20 is 2 * 0.8416 sigma, and the error of the median of n of them
        sqrt(pi / 2) sigma / sqrt(n). Samples of one turn share the machine's state of that moment:
        where turns differ by more, `turn_error` is the error.
        """
        if self.samples < 1 or self.median_ms <= 0.0:
            return 0.0
        sigma = (self.p80_ms - self.p20_ms) / (2.0 * P80_SIGMAS)
        own = MEDIAN_FACTOR * sigma / math.sqrt(self.samples) / self.median_ms
        return max(own, self.turn_error)


def ratio_error(first: Timing, second: Timing) -> float | None:
    """Return the 95 % half-width of the logarithm of a ratio of two measured medians.

    None where it is not known: a single sample has no spread, and a prediction no samples.

    Their relative errors add in squares, and the factor on them is Student's: of simulated normal
    samples of a known ratio, 95, 96, 95, 95 and 95 % then have it in their interval for n = 2, 3,
    5, 8 and 20.
    """
    fewer = min(first.samples, second.samples)
    if fewer < FEWEST_SPREAD:
        return None
    error = student_factor(fewer - 1) * math.hypot(first.relative_error, second.relative_error)
    return min(error, WIDEST)


@lru_cache
def student_factor(freedom: float, confidence: float = 0.95) -> float:
    """Return the two-sided quantile of Student's t, by its expansion about the normal one.

    z + (z^3 + z) / (4 n) + (5 z^5 + 16 z^3 + 3 z) / (96 n^2), n degrees of freedom: Abramowitz and
    Stegun, 26.7.5, to two terms. Too small by 1 % at n = 5 and by 12 % at n = 2, at 95 %.
    """
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    second = (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0
    return z + (z**3 + z) / (4.0 * freedom) + second / freedom**2


class DeviceFacts(Record):
    """The device and software a record was made with.

    Facts that could not be read are in `missing` as (fact, reason) pairs, never left out silently.
    """

    name: str
    kind: str  # "cpu", "cuda", "hip" or "profile" (a device that is not here)
    capability: str  # "9.0" on CUDA, instruction sets on a CPU, "" when unknown
    memory_bytes: NonNegativeInt
    driver: str
    threads: NonNegativeInt
    allow_tf32: bool  # FP32 matrix products, as the process has it
    compile_mode: str  # "eager" or torch.compile's mode
    software: dict[str, str]  # package -> version: python, torch, torchao, autoprec, ...
    fp8_recipes: tuple[str, ...]  # recipes that torch._scaled_mm accepts here
    fp8_reason: str  # why FP8 is missing; "" where it is there
    missing: tuple[tuple[str, str], ...] = ()
    allow_tf32_conv: bool | None = None  # cuDNN's convolutions; None: not known, or no cuDNN
    digest: str = ""  # of a device profile's content: two may have one name; "" for a real device


class Conditions(Record):
    """What NVML said around a timing; without it all None, the reason in DeviceFacts.missing."""

    sm_clock_mhz: NonNegativeInt | None = None
    memory_clock_mhz: NonNegativeInt | None = None
    power_w: NonNegativeFloat | None = None
    power_limit_w: NonNegativeFloat | None = None
    temperature_c: NonNegativeInt | None = None
    throttle_reasons: tuple[str, ...] = ()
    pauses: NonNegativeInt = 0  # waits for the device to cool


ENDED = "the process ended while"  # the start of a reason for what is passed over


class LayerTiming(Record):
    """One option of all the layers that share a `shape_key`; times are per step and per layer.

    Time is `output` (forward GEMM, or forward of any other kind) + `grad_input` + `grad_weight` +
    `cast` (FP8 casts and scales of all three GEMMs; casts at the layer's boundary are NOT here).
    `grad_input` is None where the input needs no gradient, `grad_weight` None for frozen layers.
    `total` is the measured forward + backward of the whole layer; it is what the search adds up.
    It is predicted where running FP8 once would take longer than it is worth (a reference kernel),
    and None, like the parts, for a layer that the step does not call.
    Bytes are per layer. `infeasible` says why the option cannot run ("" when it can).
    `kernels` are the operations that really ran (proof of FP8).
    `beside` are the functions that a compiled FP8 layer was timed with, their own time taken off;
    `note` says why a layer is not compiled though the profile's `compile_mode` is, "" otherwise.
    `unknown` says why a layer that runs has no time: then no time of a step has it either.
    """

    names: tuple[str, ...]
    option: Option
    output: Timing | None
    grad_input: Timing | None
    grad_weight: Timing | None
    cast: Timing | None
    total: Timing | None
    parameter_bytes: NonNegativeInt
    gradient_bytes: NonNegativeInt
    optimizer_bytes: NonNegativeInt  # states and, for 16-bit layers, FP32 master weights
    activation_bytes: NonNegativeInt  # saved for backward
    infeasible: str = ""
    kernels: tuple[str, ...] = ()
    conditions: Conditions | None = None
    beside: tuple[str, ...] = ()
    note: str = ""
    unknown: str = ""

    @property
    def ended_process(self) -> bool:
        """Whether it was not run as a process ended in it before."""
        return (self.infeasible or self.unknown).startswith(ENDED)


class SumCheck(Record):
    """What uniform FP8 takes beyond uniform BF16 O2, in ms: by the layers, and by whole steps.

    The search believes the layers; the steps say how far they are right.
    """

    layers_ms: float
    steps_ms: float


class StepTiming(Record):
    """A whole training step (forward, backward, optimizer), timed in turn with the others.

    `label` says what trains:

        fp32, bf16_o2, fp8_o1        uniform: every layer that can, FP8 by its first recipe
        autocast_bf16                FP32 parameters under torch's BF16 autocast
        as_written                   what the user runs now, where that is none of the above FP32
        eager_bf16_o2, eager_fp8_o1  the uniform ones run eagerly, where the others are compiled
        plan                         the plan

    The time is that of a step among many: the device's, or the host's where `is_host_bound`.
    `is_compiled` is None where it is not known; `note` says why a step is not compiled though it
    should be, "" otherwise.
    """

    label: str
    timing: Timing
    peak_bytes: NonNegativeInt | None
    conditions: Conditions | None = None
    is_host_bound: bool = False  # the host queues no faster than the GPU runs
    is_compiled: bool | None = None
    note: str = ""

    @property
    def ms(self) -> float:
        """The median time."""
        return self.timing.median_ms

    @property
    def basis(self) -> Basis:
        """Where the time comes from."""
        return self.timing.basis


class Communication(Record):
    """FSDP's communication in a step with BF16 activations, in ms, and what hides it.

    It hides behind `share` of the compute: that of the layers and `between_ms` outside them.
    `exposed_ms` is what a BF16 O2 step shows of it. Faster layers hide less.
    """

    moved_ms: NonNegativeFloat
    between_ms: NonNegativeFloat
    share: NonNegativeFloat
    exposed_ms: NonNegativeFloat


class Profile(FileRecord):
    """The measured or predicted cost of a model on a device; carries the model's spec.

    `step_equivalents` is the cost of making the profile in FP32 training steps.
    `boundary_cast_ms_per_melement` is the time to cast a million elements between FP32 and BF16,
    there and back (forward and backward), paid where FP32 layers meet BF16 ones.
    `fixed_ms` is the FP32 step's time outside the layers (attention, activations, loss, glue), and
    `fixed_bf16_ms` the same with BF16 activations; both are step minus the sum of layer totals
    (`profiler/measure.py`).
    `speedup_error` is how far a predicted speedup of FP8 over BF16 may be too high: the logarithm
    that 90 % of published speedups do not fall short by; 0 where times are measured.
    `steps_left_out` has the baselines that were not timed, by label, and why.
    `compile_problem` says why times are eager although compiled ones were to be, "" otherwise.
    """

    KIND = "profile"
    REMAKE = "`autoprec profile MODEL.py`"

    model: ModelSpec
    device: DeviceFacts
    basis: Basis
    layers: tuple[LayerTiming, ...]
    steps: tuple[StepTiming, ...]
    boundary_cast_ms_per_melement: NonNegativeFloat
    fixed_ms: float
    fixed_bf16_ms: float
    step_equivalents: NonNegativeFloat
    compile_s: NonNegativeFloat = 0.0
    recompiles: NonNegativeInt = 0
    has_kernel_names: bool = False  # whether FP8 rows name the CUDA kernels that ran
    sum_check: SumCheck | None = None  # None: no uniform FP8 step was measured
    parallel: str = ""  # degrees and settings as in `--parallel`; predicted profiles only
    communication: Communication | None = None  # predicted profiles under FSDP only
    speedup_error: NonNegativeFloat = 0.0
    compile_problem: str = ""
    steps_left_out: dict[str, str] = Field(default_factory=dict)

    def timing(self, name: str, option: Option) -> LayerTiming | None:
        """Return the row of a layer and option, or None when it was not profiled."""
        rows = (row for row in self.layers if name in row.names and row.option == option)
        return next(rows, None)

    @property
    def unknown_times(self) -> dict[str, str]:
        """What no time has in it, and why: layers, and in a predicted profile loose parameters."""
        found = {name: row.unknown for row in self.layers if row.unknown for name in row.names}
        if self.basis is Basis.PREDICTED:
            stacks = "stacked matrices of no layer, as experts have"
            found |= dict.fromkeys(self.model.loose_stacks, stacks)
            found |= dict.fromkeys(self.model.with_complex_numbers, "complex numbers")
        return found

    @property
    def left_out(self) -> float:
        """The share of the weights that is in `unknown_times`."""
        unknown, model = self.unknown_times, self.model
        held = sum(layer.numel for layer in model.layers if layer.name in unknown)
        held += sum(p.numel for p in model.uncovered if p.name in unknown)
        return held / max(model.numel, 1)

    def step(self, label: str) -> StepTiming | None:
        """Return the whole-step timing of that label, or None."""
        return next((step for step in self.steps if step.label == label), None)


class ProfileRows(FileRecord):
    """The rows of a profile that is being made; `digest` is of all that decides it.

    `ended` are what the process did not survive: layer and option, or STEP and a step's label.
    """

    KIND = "profile_rows"
    REMAKE = "`autoprec profile MODEL.py`"

    digest: str
    rows: tuple[LayerTiming, ...]
    ended: tuple[tuple[str, str], ...] = ()
