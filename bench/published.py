"""Published rows (bench/data) as observations that a cost model can be fitted to and scored on.

Which rows count, and which do not, is said here once, for fitting and scoring alike. Left out:
    nvfp4, grouped GEMMs        not priced
    forward only, small M       inference kernels; host time and vendor decide
    padded shapes               their BF16 arm is itself misaligned
    rowwise, full accumulation  no recipe runs it, and PR#940 shows it three times slower
    TE issue#445                host-bound user script (FP8 at 0.08 of BF16)
    ao issue#2262               a user's report, settings not read
    PR#155507                   its scaling is not stated
    PR#151, single calls        the host shows: run a hundred times, the same layers gain up to 24 %
    RTX 5090 in gpu-flops-bench its FP8 rate is above what FP32 accumulation can give
    MI300X in TE #73, hipBLASLt library faults (110 and 28 TFLOPS)
    FFN blocks of issue#685     hidden width not read: used for the eager penalty only

PR#940's FP8 GEMMs multiplied zeros, its BF16 GEMMs normal values (torchao's bench_matmul.py and
float8_roofline.py of 2024), so its GEMM ratios are too high: zeros flip no bits and meet no power
limit. `has_zeros` prices that. Its linear layers, and all other sources, have real values.
Its rowwise kernel runs at 1000 TFLOPS from 8192 on and at 1680 at 4096, as one without swizzle
would: `is_unswizzled`. PyTorch's kernel of 2025, of the image grid, has it.

GEMMs of aiconfigurator are as NVIDIA timed them with TensorRT-LLM of 2026 (CUDA graphs, operands
larger than L2, random data). Only the kernel alone is read, not its quantisation or block scales.

PR#151's PyTorch layers are `Float8Linear`, which scaled with a history then (the benchmark calls
sync_float8_amax_and_scale_history).
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from autoprec.common.recipes import Gemm, Recipe
from autoprec.predict.casts import cast_us, recipe_cost
from autoprec.predict.gemm import Kernel
from autoprec.predict.gemm import gemm_us as predicted_gemm_us
from autoprec.predict.linear import gemm_shapes, linear_times, neighbours_us
from autoprec.predict.spelling import parse_recipe
from autoprec.records.devices import Machine
from autoprec.records.model import BF16_O2, fp8_option

DATA = Path(__file__).parent / "data"
gemm_us = lru_cache(maxsize=4096)(predicted_gemm_us)  # a grid's ratio asks for its two times again
Shape = tuple[int, int, int]
FFN_SHAPES = ((8192, 4096, 14336), (8192, 4096, 14336), (8192, 14336, 4096))  # PR#282's
TE_SHAPES = ((4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096))  # its four linears
META = ("H100", "H100 (presumed)", "H100 (Meta)", "H100 SXM (Meta 500 W/2.4 TB/s presumed)")
ZERO_SPEED = 295 / 257  # 8192 cubes of zeros against normal values on an A100, thonking.ai 2024
SMALLEST_TOKENS = 512
EARLY_SIGMA = 0.15  # kernels and casts of before today's
NARROW_SIGMA = 0.15  # PR#23280's width, 2112, fits no tile: its vendor's choice of kernel decides
LARGE = 4096
LARGE_SHARE_OF_BEST = 0.93  # a large GEMM against the best shape of a sweep
GRID_SOURCE = "ai-dynamo/aiconfigurator"
GRID_SIGMA = 0.08  # cuBLASLt's choice of kernel, and clocks, differ by more than a run repeats
ALL_CASTS = "all fp8 overhead kernels in norm+FFN+norm"


class Kind(StrEnum):
    """What a row says."""

    LINEAR = "linear"  # BF16 / FP8 time of forward + backward with casts
    PART = "part"  # the same for one of the three GEMMs of a linear, with its casts
    GEMMS = "gemms"  # BF16 / FP8 time of the three GEMMs
    GEMM = "gemm"  # BF16 / FP8 time of one GEMM
    BF16_US = "bf16_us"  # time of one BF16 GEMM
    FP8_US = "fp8_us"  # time of one FP8 GEMM
    BF16_LINEAR_US = "bf16_linear_us"  # time of the three
    BF16_RATE = "bf16_rate"  # TFLOPS of large BF16 GEMMs
    FP8_RATE = "fp8_rate"  # TFLOPS of large FP8 GEMMs


@dataclass(frozen=True)
class Observation:
    """One published number; `sigma` is its believable error in log units."""

    source: str
    device: str
    kind: Kind
    shapes: tuple[Shape, ...]
    recipe: Recipe
    value: float
    compiled: bool = True
    has_neighbours: bool = False
    part: Gemm = Gemm.OUTPUT
    is_fast: bool = True
    sigma: float = 0.05
    has_zeros: bool = False  # its FP8 operands were zeros, its BF16 ones were not
    is_unswizzled: bool = False  # a rowwise kernel of before PyTorch's swizzle
    is_early_rowwise: bool = False  # torchao before 0.8: three GEMMs in the rowwise kernel

    def predict(self, machine: Machine) -> float:
        """Return what the model says instead of `value`."""
        if self.has_zeros:
            machine = _on_zeros(machine)
        if self.is_early_rowwise:
            machine = replace(machine, rescales_rowwise=0.0)
        if self.is_unswizzled:
            machine = replace(machine, rowwise_swizzle_from=math.inf)
        if self.kind in (Kind.LINEAR, Kind.PART, Kind.GEMMS):
            return self._linear_ratio(machine)
        M, K, N = self.shapes[0]
        if self.kind in (Kind.BF16_RATE, Kind.FP8_RATE):
            kernel = Kernel.BF16 if self.kind is Kind.BF16_RATE else Kernel.FP8_FAST
            return 2 * M * K * N / gemm_us(machine, M, K, N, kernel) / 1e6
        if self.kind is Kind.BF16_LINEAR_US:
            return sum(gemm_us(machine, *s, Kernel.BF16) for s in gemm_shapes(M, K, N))
        bf16 = gemm_us(machine, M, K, N, Kernel.BF16)
        if self.kind is Kind.BF16_US:
            return bf16
        fp8 = gemm_us(machine, M, K, N, self._kernel(machine))
        return fp8 if self.kind is Kind.FP8_US else bf16 / fp8

    def residual(self, machine: Machine) -> float:
        """Return the log error in units of `sigma`."""
        return math.log(self.predict(machine) / self.value) / self.sigma

    def _kernel(self, machine: Machine) -> Kernel:
        cost = recipe_cost(machine, self.recipe)
        return cost.output if self.is_fast else cost.backward

    def _linear_ratio(self, machine: Machine) -> float:
        around = neighbours_us(machine, compiled=True) if self.has_neighbours else 0.0
        above = below = 0.0
        for M, K, N in self.shapes:
            bf16 = linear_times(machine, M, K, N, BF16_O2, compiled=self.compiled)
            fp8 = linear_times(machine, M, K, N, fp8_option(self.recipe), compiled=self.compiled)
            if self.kind is Kind.GEMMS:
                above, below = above + bf16.gemms, below + fp8.gemms
            elif self.kind is Kind.PART:
                above += getattr(bf16, self.part)
                below += getattr(fp8, self.part) + self._part_cast(machine, (M, K, N))
            else:
                above, below = above + bf16.total + around, below + fp8.total + around
        return above / below

    def _part_cast(self, machine: Machine, shape: Shape) -> float:
        gemms = fp8_option(self.recipe).fp8_gemms
        kept = tuple(gemm for gemm in gemms if gemm is not self.part)
        whole = cast_us(machine, *shape, recipe=self.recipe, gemms=gemms, compiled=True)
        return whole - cast_us(machine, *shape, recipe=self.recipe, gemms=kept, compiled=True)


def observations() -> list[Observation]:
    """Return every row that counts."""
    return [*_linears(), *_gemms(), *_rates(), *grid()]


def grid() -> list[Observation]:
    """Return aiconfigurator's GEMMs: each shape's BF16 and FP8 time, and their ratio.

    TensorRT-LLM's cuBLASLt call is torch's tensorwise one: e4m3, fast accumulation, BF16 out.
    """
    found = []
    for row in read_rows("aic_gemm.csv"):
        bf16, fp8 = 1e3 * float(row["bf16_ms"]), 1e3 * float(row["fp8_kernel_ms"])
        values = {Kind.BF16_US: bf16, Kind.FP8_US: fp8, Kind.GEMM: bf16 / fp8}
        found += [
            Observation(
                GRID_SOURCE, row["device"], kind, (_shape(row),), Recipe.TENSORWISE, value,
                sigma=GRID_SIGMA,
            )
            for kind, value in values.items()
        ]  # fmt: skip
    return found


def read_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of a file of bench/data."""
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


def source_of(row: dict[str, str]) -> str:
    """Return a source's short name: the words before its date."""
    return row["source"].split(" (")[0].split(" @")[0]


def _on_zeros(machine: Machine) -> Machine:
    """Return a machine whose FP8 operands are zeros: no bits flip, so no power limit is met."""
    return replace(
        machine,
        fp8_fraction=machine.fp8_fraction * ZERO_SPEED,
        fp8_slow_fraction=machine.fp8_slow_fraction * ZERO_SPEED,
        fp8_rowwise_fraction=machine.fp8_rowwise_fraction * ZERO_SPEED,
    )


def _linears() -> Iterator[Observation]:
    for row in read_rows("linear_layers.csv"):
        source = source_of(row)
        if "nvfp4" in row["recipe"] or not row["speedup"] or not row["M"]:
            continue
        if "gemm_profiling" in source:
            yield from _transformer_engine(row, source)
        if row["direction"].startswith("GEMM part only"):
            yield from _feed_forward(row, source)
        if row["direction"] not in (
            "fwd+bwd",
            "Linear fwd+bwd",
            "LayerNorm+Linear+Sigmoid fwd+bwd",
        ):
            continue
        if row["device"] not in META or not row["N"] or "single call" in row["notes"]:
            continue
        is_early = "float8_experimental" in source
        yield Observation(
            source=source,
            device="h100-sxm-500w",
            kind=Kind.LINEAR,
            shapes=(_shape(row),),
            recipe=Recipe.DELAYED if is_early else parse_recipe(row["recipe"]),
            value=float(row["speedup"]),
            has_neighbours="LayerNorm" in row["direction"] or "README" in source,
            sigma=EARLY_SIGMA if is_early or _is_unswizzled(row, source) else 0.05,
            is_unswizzled=_is_unswizzled(row, source),
            is_early_rowwise="PR#940" in source,
        )


def _feed_forward(row: dict[str, str], source: str) -> Iterator[Observation]:
    """Yield a profiled feed-forward block's three linears: GEMMs alone, and with their casts.

    Its hidden width is 16384 * 2 / 3 * 1.3 rounded up to 1024s, as Llama's code has it.
    """
    bf16, fp8 = float(row["bf16_value"]), float(row["fp8_value"])
    casts = next(
        float(r["value"]) for r in read_rows("overhead.csv") if r["what"].startswith(ALL_CASTS)
    )
    recipe = parse_recipe(row["recipe"])
    for kind, value in ((Kind.GEMMS, bf16 / fp8), (Kind.LINEAR, bf16 / (fp8 + casts))):
        yield Observation(source, "h100-sxm-500w", kind, FFN_SHAPES, recipe, value)


def _transformer_engine(row: dict[str, str], source: str) -> Iterator[Observation]:
    """Yield TE's four linears on a B300; its casts are fused kernels of its own, eager or not."""
    part = {"fprop": Gemm.OUTPUT, "dgrad": Gemm.GRAD_INPUT, "wgrad": Gemm.GRAD_WEIGHT}
    last = row["direction"].split()[-1]
    shapes = tuple((int(row["M"]), k, n) for k, n in TE_SHAPES)
    common = {"source": source, "device": "b300", "recipe": parse_recipe(row["recipe"])}
    value = float(row["speedup"])
    if row["N"] and row["direction"] == "forward":
        yield Observation(kind=Kind.PART, shapes=(_shape(row),), value=value, **common)  # type: ignore[arg-type]
    elif last in part:
        yield Observation(kind=Kind.PART, shapes=shapes, part=part[last], value=value, **common)  # type: ignore[arg-type]
    elif row["quant_cost_included"] == "yes":
        yield Observation(kind=Kind.LINEAR, shapes=shapes, value=value, **common)  # type: ignore[arg-type]
    else:
        yield Observation(kind=Kind.GEMMS, shapes=shapes, value=value, **common)  # type: ignore[arg-type]


def _gemms() -> Iterator[Observation]:
    for row in read_rows("gemm.csv"):
        device = _gemm_device(row)
        recipe, notes = row["recipe"], row["notes"]
        if not device or not all(row[axis] for axis in "MKN"):
            continue
        if (
            "best" in row["metric"]
            or "(with act quant)" in recipe
            or "grouped" in recipe
            or "padded" in recipe
        ):
            continue
        if "triton" in recipe or "template" in recipe or "aten" in recipe:
            continue
        if "rowwise" in recipe and "fast_accum=False" in notes:
            continue
        if "act quant?" in recipe:  # of such a row only the BF16 half is known
            yield from _bf16_halves(row, source_of(row), device)
        else:
            yield from _gemm_observations(row, device)


def _bf16_halves(row: dict[str, str], source: str, device: str) -> Iterator[Observation]:
    """Yield a row's BF16 time; the rows of a shape repeat it, so one of them counts."""
    if "cutlass" in row["recipe"] and int(row["M"]) >= SMALLEST_TOKENS:
        us = _microseconds(float(row["bf16_value"]), row["unit"], _shape(row))
        recipe = Recipe.TENSORWISE
        yield Observation(
            source, device, Kind.BF16_US, (_shape(row),), recipe, us, sigma=NARROW_SIGMA
        )


def _rates() -> Iterator[Observation]:
    """Yield the best rates of sweeps; a large real GEMM reaches a little less."""
    devices = {
        "A100 SXM": "a100",
        "H100 SXM": "h100-sxm",
        "H200 SXM": "h200",
        "B200 SXM": "b200",
        "B300 SXM": "b300",
        "MI300X": "mi300x",
    }
    kinds = {
        "bf16_mamf": Kind.BF16_RATE,
        "bf16_maf": Kind.BF16_RATE,
        "fp8_mamf": Kind.FP8_RATE,
        "fp8_maf": Kind.FP8_RATE,
    }
    for row in read_rows("devices.csv"):
        if row["device"] in devices and row["quantity"] in kinds:
            yield Observation(
                source=source_of(row),
                device=devices[row["device"]],
                kind=kinds[row["quantity"]],
                shapes=((8192, 8192, 8192),),
                recipe=Recipe.TENSORWISE,
                value=LARGE_SHARE_OF_BEST * float(row["value"]),
            )


def _gemm_observations(row: dict[str, str], device: str) -> Iterator[Observation]:
    source, shape = source_of(row), _shape(row)
    is_bf16_only = not row["fp8_value"]
    recipe = Recipe.TENSORWISE if is_bf16_only else parse_recipe(row["recipe"])
    is_fast = "fast_accum=False" not in row["notes"]
    sigma = 0.10 if _is_rough(row) else EARLY_SIGMA if _is_unswizzled(row, source) else 0.05

    def make(kind: Kind, value: float, shapes: tuple[Shape, ...] = (shape,)) -> Observation:
        return Observation(
            source,
            device,
            kind,
            shapes,
            recipe,
            value,
            is_fast=is_fast,
            sigma=sigma,
            has_zeros="PR#940" in source,
            is_unswizzled=_is_unswizzled(row, source),
            is_early_rowwise="PR#940" in source,
        )

    if row["metric"].startswith("sum of 3"):
        yield make(Kind.GEMMS, float(row["speedup"]))
        if float(row["bf16_value"]) >= 50:
            yield make(Kind.BF16_LINEAR_US, float(row["bf16_value"]))
        return
    if row["speedup"]:
        yield make(Kind.GEMM, float(row["speedup"]))
    for column, kind in (("bf16_value", Kind.BF16_US), ("fp8_value", Kind.FP8_US)):
        if row[column] and not (row["unit"] == "us" and float(row[column]) < 5):
            yield make(kind, _microseconds(float(row[column]), row["unit"], shape))


def _gemm_device(row: dict[str, str]) -> str:
    """Return the profile that a GEMM row is of, or an empty string when there is none."""
    known = {
        "H100 (power not stated)": "h100-sxm",
        "H100 PCIe": "h100-pcie",
        "H800": "h800",
        "H20": "h20",
        "NVIDIA GeForce RTX 4090": "rtx-4090",
        "RTX 5090": "rtx-5090",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx-pro-6000",
        "SM100 (B200 class)": "b200",
        "SM90 (H100/H200 class)": "h100-sxm",
    }
    if "PR#23280" in row["source"]:
        return "h100-sxm"
    if row["device"] in META[2:] or "helion" in row["source"]:
        return "h100-sxm-500w"
    return known.get(row["device"], "")


def _is_rough(row: dict[str, str]) -> bool:
    words = ("noquant", "cuBLASLt")
    return any(word in row["metric"] + row["recipe"] for word in words)


def _is_unswizzled(row: dict[str, str], source: str) -> bool:
    """Return whether it is a large GEMM of the rowwise kernel before PyTorch's swizzle."""
    return "PR#940" in source and "rowwise" in row["recipe"] and int(row["M"]) >= LARGE


def _shape(row: dict[str, str]) -> Shape:
    return int(row["M"]), int(row["K"]), int(row["N"])


def _microseconds(value: float, unit: str, shape: Shape) -> float:
    if unit == "TFLOPS":
        M, K, N = shape
        return 2 * M * K * N / value / 1e6
    return value * {"us": 1.0, "ms": 1e3}[unit]
