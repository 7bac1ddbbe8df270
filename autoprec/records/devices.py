"""Devices that are not here: their constants with sources, and what is predicted from them.

A device profile is a JSON file of numbers. Each number says where it comes from (`ConstantKind`),
and each must lie within its bounds in `Machine`, so that a slip of a thousand (torchao's roofline
has one, in the RTX 5090's bandwidth) is an error when the file is read and not a wrong plan.
"""

import re
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt, Strict, model_validator

from autoprec.common.recipes import Recipe
from autoprec.records.base import FileRecord, Record
from autoprec.records.model import Basis

NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"  # a name is shown in one line and may name a file
# FP8 operands are half as wide as BF16 ones, so units that are fed at one rate gain 2. What kernels
# reach of the two peaks differs, under a power limit above all: 2.4 at most in shipped profiles.
FP8_GAIN = (1.0, 4.0)  # of the peak over BF16's
FP8_FRACTIONS = ("fp8_fraction", "fp8_slow_fraction", "fp8_rowwise_fraction", "fp8_block_fraction")
_BEFORE_BF16 = re.compile(r"[1-7]\.\d")  # NVIDIA has BF16 units from compute capability 8.0 on
VERSION = r"^\d+\.\d+[A-Za-z0-9.+]*$"
CUBLAS_ROWWISE = 12, 9  # the CUDA whose cuBLAS has row scales, on Hopper alone (ScaledBlas.cpp)
RESCALED_ROWWISE = 0, 8  # the torchao whose rowwise gradients are rescaled after (ao PR#1377)
_BOOST = 1.2  # boost clocks take consumer cards over the data sheet's peak


class ConstantKind(StrEnum):
    """Where a constant comes from; `fitted` by bench/fit_costmodel.py to published rows."""

    DATASHEET = "datasheet"
    PUBLISHED = "published"
    FITTED = "fitted"
    MEASURED = "measured"


@dataclass(frozen=True)
class Bounds:
    """The unit of a constant, the range that is believable, and what it is."""

    unit: str
    low: float
    high: float
    meaning: str

    @property
    def span(self) -> str:
        """The range in words, with the unit where there is one."""
        unit = "" if self.unit == "1" else f" {self.unit}"
        return f"between {self.low:g} and {self.high:g}{unit}"


# Any: as dataclasses.field
def _in(unit: str, low: float, high: float, meaning: str) -> Any:
    return field(metadata={"bounds": Bounds(unit, low, high, meaning)})


@dataclass(frozen=True)
class Machine:
    """The constants of a device, one list: unit, believable range and meaning of each."""

    fp32_peak_tflops: float = _in("TFLOPS", 0.1, 1e3, "dense FP32 peak without tensor cores")
    tf32_peak_tflops: float = _in("TFLOPS", 0.0, 1e4, "dense TF32 peak, 0 without")
    bf16_peak_tflops: float = _in("TFLOPS", 1.0, 2e4, "dense BF16 peak")
    fp8_peak_tflops: float = _in("TFLOPS", 0.0, 5e4, "dense FP8 peak, FP32 accumulation, 0 without")
    memory_bandwidth_tbs: float = _in("TB/s", 0.02, 50.0, "device memory bandwidth")
    memory_capacity_gb: float = _in("GB", 1.0, 5e3, "device memory")
    power_limit_w: float = _in("W", 10.0, 5e3, "board power limit")
    sm_count: float = _in("1", 1.0, 2e3, "multiprocessors or compute units")
    l2_cache_mb: float = _in("MB", 0.25, 4e3, "last-level cache")
    interconnect_gbs: float = _in("GB/s", 1.0, 1e4, "link to the node's other devices, one way")
    network_gbs: float = _in("GB/s", 0.1, 1e4, "link to other nodes, one way, per device")
    devices_per_node: float = _in("1", 1.0, 1e3, "devices that share the fast interconnect")
    fp32_fraction: float = _in("1", 0.05, _BOOST, "share of the FP32 peak that large GEMMs reach")
    bf16_fraction: float = _in("1", 0.05, _BOOST, "share of the BF16 peak that large GEMMs reach")
    fp8_fraction: float = _in("1", 0.05, _BOOST, "share of the FP8 peak, fast accumulation")
    fp8_slow_fraction: float = _in("1", 0.05, _BOOST, "share of the FP8 peak, full accumulation")
    fp8_rowwise_fraction: float = _in("1", 0.05, _BOOST, "share of the FP8 peak, rowwise scales")
    fp8_block_fraction: float = _in("1", 0.05, _BOOST, "share of the FP8 peak, block scales")
    memory_fraction: float = _in("1", 0.1, 1.0, "share of the bandwidth that streaming reaches")
    attention_fraction: float = _in("1", 0.02, 1.0, "share of the BF16 peak, fused attention")
    link_fraction: float = _in("1", 0.1, 1.0, "share of a link that collectives reach")
    wave_share: float = _in("1", 0.0, 1.0, "how much of a partial wave of tiles is paid in full")
    small_tile_factor: float = _in("1", 1.0, 4.0, "slowdown of a tile of half the area")
    overlap_share: float = _in("1", 0.0, 1.0, "share of the shorter of compute and traffic shown")
    rowwise_swizzle_from: float = _in("1", 1.0, 1e9, "size from which rowwise GEMMs walk in blocks")
    bf16_gemm_floor_us: float = _in("us", 0.1, 200.0, "fixed time of a BF16 GEMM kernel")
    tensorwise_gemm_floor_us: float = _in("us", 0.1, 200.0, "fixed time of a tensorwise FP8 GEMM")
    rowwise_gemm_floor_us: float = _in("us", 0.1, 200.0, "fixed time of a rowwise FP8 GEMM")
    kernel_floor_us: float = _in("us", 0.1, 200.0, "fixed time of an elementwise kernel")
    eager_host_us: float = _in("us", 0.1, 500.0, "host time per kernel in eager mode")
    tensorwise_cast_bytes: float = _in("B/element", 1.0, 200.0, "compiled casts of an operand")
    amax_bytes: float = _in("B/element", 0.0, 20.0, "what delayed scaling saves of it")
    rowwise_cast_bytes: float = _in("B/element", 1.0, 200.0, "the same, rowwise")
    block_cast_bytes: float = _in("B/element", 1.0, 200.0, "the same, blocks of 128")
    mx_cast_bytes: float = _in("B/element", 1.0, 200.0, "the same, MX blocks of 32")
    cast_share_input: float = _in("1", 0.05, 5.0, "cost of the input's casts against the weight's")
    cast_share_grad: float = _in("1", 0.05, 5.0, "cost of grad_output's casts against the weight's")
    direct_cast_share: float = _in("1", 0.05, 0.95, "share of the cast that is not transposed")
    tensorwise_cast_kernels: float = _in("1", 1.0, 200.0, "compiled cast kernels, layer and step")
    rowwise_cast_kernels: float = _in("1", 1.0, 200.0, "the same, rowwise")
    eager_cast_bytes: float = _in("B/element", 1.0, 400.0, "eager casts of an operand, both uses")
    eager_cast_kernels: float = _in("1", 1.0, 500.0, "eager cast kernels per layer and step")
    neighbour_kernels: float = _in("1", 0.0, 50.0, "kernels of norm before and activation behind")
    glue_bytes: float = _in("B/element", 0.0, 400.0, "BF16 traffic between layers per output")
    loss_bytes: float = _in("B/element", 0.0, 400.0, "traffic of the loss per logit")
    optimizer_bytes: float = _in("B/parameter", 0.0, 200.0, "traffic of an AdamW step")
    step_overhead: float = _in("1", 1.0, 5.0, "measured over modelled time outside the linears")
    communication_overlap: float = _in("1", 0.0, 1.0, "share of compute that hides communication")
    gemm_error_low: float = _in("1", -1.0, 0.0, "10 % quantile of log(published/predicted), GEMMs")
    gemm_error_high: float = _in("1", 0.0, 1.0, "90 % quantile of it")
    speedup_error_low: float = _in("1", -0.7, 0.0, "10 % quantile of it, linear forward + backward")
    speedup_error_high: float = _in("1", 0.0, 0.7, "90 % quantile of it")
    time_error: float = _in("1", 0.0, 1.0, "80 % half-width of a predicted time, log units")
    step_error: float = _in("1", 0.0, 1.0, "80 % half-width of a whole-training speedup, absolute")
    tile_us: float = _in("us", 0.0, 50.0, "start and end of a GEMM's tile, not hidden")
    bf16_boost: float = _in("1", 0.0, 1.0, "how much faster short BF16 GEMMs run, clocks high")
    fp8_boost: float = _in("1", 0.0, 1.0, "the same, FP8 GEMMs")
    # What the software does (`DeviceProfile.software`), 0 or 1: no constants of the device.
    rowwise_is_cublas: float = 0.0
    rescales_rowwise: float = 1.0

    @property
    def bytes_per_us(self) -> float:
        """What a streaming kernel moves."""
        return self.memory_bandwidth_tbs * 1e6 * self.memory_fraction


CONSTANTS: dict[str, Bounds] = {x.name: x.metadata["bounds"] for x in fields(Machine) if x.metadata}


def _one_printed_line(text: str) -> str:
    if not text.isprintable():  # a newline or a control character could forge output
        raise ValueError("must be one line of printable text")
    return text


Line = Annotated[str, AfterValidator(_one_printed_line)]


class Constant(Record):
    """One number with its unit and where it comes from."""

    value: Annotated[float, Strict()]  # neither true nor "989"
    unit: str
    kind: ConstantKind
    source: Line = Field(min_length=1)


class Software(Record):
    """The versions that a prediction assumes: they decide which kernels a recipe runs.

    The defaults are those of a fresh `pip install torch torchao`.
    """

    torch: str = Field("2.11", pattern=VERSION)
    cuda: str = Field("13.0", pattern=VERSION)
    torchao: str = Field("0.18", pattern=VERSION)

    def is_from(self, name: str, version: tuple[int, int]) -> bool:
        """Return whether one of them is at least a version, e.g. `("cuda", (12, 9))`."""
        major, minor = re.findall(r"\d+", getattr(self, name))[:2]
        return (int(major), int(minor)) >= version

    def __str__(self) -> str:
        return f"torch {self.torch}, CUDA {self.cuda}, torchao {self.torchao}"


class DeviceProfile(FileRecord):
    """A device as the cost model sees it.

    `fp8_recipes` is empty where the device has no FP8 units, and `fp8_reason` says so.
    `basis` is `measured` for a profile that `autoprec devices measure` wrote. `software` is what is
    assumed to run on the device: edit it in a copy of the file to price another version.
    """

    KIND = "device_profile"
    REMAKE = "`autoprec devices measure`, or take a shipped one (`autoprec devices list`)"

    name: str = Field(max_length=100, pattern=NAME)
    title: Line
    aliases: tuple[Line, ...]
    architecture: Line
    capability: Line
    fp8_recipes: tuple[Recipe, ...]
    fp8_reason: Line
    basis: Basis
    software: Software = Software()
    constants: dict[str, Constant]
    notes: tuple[Line, ...] = ()

    @classmethod
    def from_json(cls, text: str, *, source: str = "text") -> Self:
        """Read a profile from JSON text, with or without an editor's byte order mark before it."""
        return super().from_json(text.removeprefix("\ufeff"), source=source)

    @model_validator(mode="after")
    def _check_constants(self) -> Self:
        if missing := CONSTANTS.keys() - self.constants.keys():
            raise ValueError(f"constant {min(missing)!r} is missing")
        if unknown := self.constants.keys() - CONSTANTS.keys():
            raise ValueError(f"constant {min(unknown)!r} is unknown")
        for name, constant in self.constants.items():
            _check_constant(name, constant, CONSTANTS[name])
        if bool(self.fp8_recipes) != (self.value("fp8_peak_tflops") > 0):
            raise ValueError("fp8_recipes and fp8_peak_tflops must both be there or both be absent")
        if not self.fp8_recipes and not self.fp8_reason:
            raise ValueError("a device without FP8 must say why in fp8_reason")
        _check_peaks(self)
        return self

    def value(self, name: str) -> float:
        """Return a constant's number."""
        return self.constants[name].value

    @property
    def machine(self) -> Machine:
        """The constants as plain floats, and what the software does: what the formulas read."""
        software, is_hopper = self.software, self.capability.startswith("9.")
        return Machine(
            **{name: constant.value for name, constant in self.constants.items()},
            rowwise_is_cublas=is_hopper and software.is_from("cuda", CUBLAS_ROWWISE),
            rescales_rowwise=software.is_from("torchao", RESCALED_ROWWISE),
        )

    @property
    def has_fp8(self) -> bool:
        """Whether any FP8 recipe runs."""
        return bool(self.fp8_recipes)


def _check_peaks(profile: DeviceProfile) -> None:
    """Check the peaks against each other: a slip in one of them is a speedup that no device has."""
    bf16, fp8 = profile.value("bf16_peak_tflops"), profile.value("fp8_peak_tflops")
    wider = max(("fp32_peak_tflops", "tf32_peak_tflops"), key=profile.value)
    if bf16 < profile.value(wider) and not _BEFORE_BF16.fullmatch(profile.capability):
        raise ValueError(
            f"bf16_peak_tflops must not be below {wider}, but they are {bf16:g} and "
            f"{profile.value(wider):g}"
        )
    if not profile.has_fp8:
        return
    low, high = FP8_GAIN  # the peaks against each other, then what kernels reach of them
    if not low <= fp8 / bf16 <= high:
        raise ValueError(
            f"fp8_peak_tflops must be {low:g} to {high:g} times bf16_peak_tflops, but they are "
            f"{fp8:g} and {bf16:g}"
        )
    bf16_fraction = profile.value("bf16_fraction")
    for name in FP8_FRACTIONS:
        gain = fp8 * profile.value(name) / (bf16 * bf16_fraction)
        if gain > high:
            raise ValueError(
                f"{name} must make FP8 GEMMs at most {high:g} times as fast as BF16 ones, but with "
                f"{profile.value(name):g} beside a bf16_fraction of {bf16_fraction:g} they are "
                f"{gain:.1f} times as fast"
            )


def _check_constant(name: str, constant: Constant, bounds: Bounds) -> None:
    if constant.unit != bounds.unit:
        unit = "has no unit ('1')" if bounds.unit == "1" else f"is in {bounds.unit}"
        raise ValueError(f"{name} {unit}, but the file says {constant.unit}")
    if not bounds.low <= constant.value <= bounds.high:
        raise ValueError(f"{name} must be {bounds.span}, but it is {constant.value:g}")
    if name in ("sm_count", "devices_per_node") and not constant.value.is_integer():
        raise ValueError(f"{name} must be whole, but it is {constant.value:g}")


class Prediction(Record):
    """A predicted number with its 80 % interval."""

    value: NonNegativeFloat
    low: NonNegativeFloat
    high: NonNegativeFloat


class ArmPrediction(Record):
    """Predicted times of one linear in one precision, forward + backward, in ms.

    `cast_ms` are FP8 casts and scales. `neighbours_ms` is the fixed time of the kernels around the
    layer (norm before, activation behind) that a compiled graph fuses the casts into: the same in
    both precisions, there in every published compiled measurement, 0 in eager mode.
    `total_ms` is the sum of the five.
    """

    output_ms: NonNegativeFloat
    grad_input_ms: NonNegativeFloat
    grad_weight_ms: NonNegativeFloat
    cast_ms: NonNegativeFloat
    neighbours_ms: NonNegativeFloat
    total_ms: NonNegativeFloat
    total_low_ms: NonNegativeFloat
    total_high_ms: NonNegativeFloat


class LinearPrediction(Record):
    """What a linear [M, K] @ [K, N] costs on a device in BF16 and in FP8, and what FP8 gains.

    `refusal` says why FP8 cannot run ("" when it can; `fp8` and the speedups are then there).
    `software` are the versions that were assumed, "" where it is not known.
    """

    device: str
    M: PositiveInt
    K: PositiveInt
    N: PositiveInt
    recipe: Recipe
    compiled: bool
    bf16: ArmPrediction
    fp8: ArmPrediction | None
    gemm_speedup: Prediction | None
    speedup: Prediction | None
    refusal: str
    basis: Basis
    software: str = ""
