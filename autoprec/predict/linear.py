"""A linear layer, forward and backward: three GEMMs, casts, and what FP8 gains.

    output       [M, K] @ [K, N]
    grad_input   [M, N] @ [N, K]
    grad_weight  [K, M] @ [M, N]

Fast accumulation is on for the output GEMM only with tensorwise scales (torchao's default); rowwise
kernels have it everywhere.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from autoprec.errors import DeviceError
from autoprec.predict.casts import cast_cost, fp8_gemms
from autoprec.predict.gemm import Kernel, gemm_us
from autoprec.predict.machine import Machine, machine_of
from autoprec.predict.spelling import parse_recipe
from autoprec.records.devices import (
    ArmPrediction,
    DeviceProfile,
    LinearPrediction,
    Prediction,
)
from autoprec.records.model import Basis, Gemm, Recipe

FP8_MULTIPLE = 16  # elements; torch._scaled_mm and cuBLASLt
BLOCKS = {Recipe.BLOCKWISE: 128, Recipe.MXFP8: 32}  # torchao's kernels take whole ones
LARGEST_DIMENSION = 2**31


@dataclass(frozen=True)
class LinearTimes:
    """Times of one linear in microseconds; `cast` is 0 without FP8."""

    output: float
    grad_input: float
    grad_weight: float
    cast: float

    @property
    def gemms(self) -> float:
        """The three GEMMs."""
        return self.output + self.grad_input + self.grad_weight

    @property
    def total(self) -> float:
        """GEMMs and casts."""
        return self.gemms + self.cast


def predict_linear(
    profile: DeviceProfile,
    M: int,
    K: int,
    N: int,
    *,
    recipe: Recipe | str = Recipe.TENSORWISE,
    compiled: bool = True,
    gemms_hp: Collection[Gemm] = (),
) -> LinearPrediction:
    """Predict forward + backward of a linear in BF16 and FP8.

    Args:
        profile: the device.
        M: tokens.
        K: in-features.
        N: out-features.
        recipe: how FP8 operands are scaled.
        compiled: casts fused by torch.compile, or eager.
        gemms_hp: GEMMs of the FP8 arm that stay in BF16.

    Raises:
        DeviceError: a dimension is no positive integer, or the recipe is unknown.
    """
    priced = parse_recipe(recipe)
    _check_dimensions(M, K, N)
    machine = machine_of(profile)
    around = neighbours_us(machine, compiled=compiled)
    bf16 = bf16_linear(machine, M, K, N, compiled=compiled)
    refusal = fp8_refusal(profile, M, K, N, recipe=priced, gemms_hp=gemms_hp)
    fp8 = None
    if not refusal:
        fp8 = fp8_linear(machine, M, K, N, recipe=priced, compiled=compiled, gemms_hp=gemms_hp)
    return LinearPrediction(
        device=profile.name,
        M=M,
        K=K,
        N=N,
        recipe=priced,
        compiled=compiled,
        bf16=_arm(machine, bf16, around),
        fp8=_arm(machine, fp8, around) if fp8 else None,
        gemm_speedup=_gemm_speedup(machine, bf16, fp8) if fp8 else None,
        speedup=_speedup(machine, bf16, fp8, around) if fp8 else None,
        refusal=refusal,
        basis=Basis.PREDICTED,
    )


def fp8_refusal(
    profile: DeviceProfile,
    M: int,
    K: int,
    N: int,
    *,
    recipe: Recipe,
    gemms_hp: Collection[Gemm] = (),
) -> str:
    """Return why FP8 cannot run this shape on this device, or an empty string."""
    if not profile.has_fp8:
        return profile.fp8_reason
    if recipe not in profile.fp8_recipes:
        names = ", ".join(profile.fp8_recipes)
        return f"{profile.title} does not run {recipe}; it runs {names}"
    multiple = fp8_multiple(recipe)
    what = f"{recipe} scales" if recipe in BLOCKS else "FP8 GEMMs"
    for axis, size in (("K", K), ("N", N)):
        if size % multiple:
            return f"{axis}={size} is not a multiple of {multiple}, which {what} need"
    if M % multiple and Gemm.GRAD_WEIGHT in fp8_gemms(recipe, gemms_hp):
        return f"M={M} is not a multiple of {multiple}, which the FP8 grad_weight GEMM needs"
    return ""


def fp8_multiple(recipe: Recipe) -> int:
    """Return what K and N, and M where grad_weight runs in FP8, must be multiples of."""
    return BLOCKS.get(recipe, FP8_MULTIPLE)


def bf16_linear(machine: Machine, M: int, K: int, N: int, *, compiled: bool = True) -> LinearTimes:
    """Return the times of a linear in BF16."""
    return plain_linear(machine, M, K, N, kernel=Kernel.BF16, compiled=compiled)


def plain_linear(
    machine: Machine, M: int, K: int, N: int, *, kernel: Kernel, compiled: bool = True
) -> LinearTimes:
    """Return the times of a linear whose three GEMMs are of one kind, without casts."""
    floor = 0.0 if compiled else machine.eager_host_us
    output, grad_input, grad_weight = (
        max(gemm_us(machine, *shape, kernel), floor) for shape in gemm_shapes(M, K, N)
    )
    return LinearTimes(output, grad_input, grad_weight, 0.0)


def fp8_linear(
    machine: Machine,
    M: int,
    K: int,
    N: int,
    *,
    recipe: Recipe,
    compiled: bool = True,
    gemms_hp: Collection[Gemm] = (),
) -> LinearTimes:
    """Return the times of a linear in FP8; `gemms_hp` stay in BF16."""
    gemms = fp8_gemms(recipe, gemms_hp)
    floor = 0.0 if compiled else machine.eager_host_us
    output, grad_input, grad_weight = (
        max(gemm_us(machine, *shape, _kernel(recipe, gemm, gemms)), floor)
        for gemm, shape in zip(Gemm, gemm_shapes(M, K, N), strict=True)
    )
    cast = cast_cost(machine, M, K, N, recipe=recipe, gemms=gemms, compiled=compiled)
    cast_us = cast.us if compiled else max(cast.us, cast.kernels * machine.eager_host_us)
    return LinearTimes(output, grad_input, grad_weight, cast_us)


def neighbours_us(machine: Machine, *, compiled: bool) -> float:
    """Return the fixed time of the kernels that a compiled graph has around a linear."""
    return machine.neighbour_kernels * machine.kernel_floor_us if compiled else 0.0


def gemm_shapes(M: int, K: int, N: int) -> tuple[tuple[int, int, int], ...]:
    """Return output, grad_input and grad_weight as (rows, summed, columns)."""
    return ((M, K, N), (M, N, K), (K, M, N))


def _kernel(recipe: Recipe, gemm: Gemm, gemms: Collection[Gemm]) -> Kernel:
    if gemm not in gemms:
        return Kernel.BF16
    if recipe in (Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP):
        return Kernel.FP8_ROWWISE
    if recipe in (Recipe.BLOCKWISE, Recipe.MXFP8):
        return Kernel.FP8_BLOCK
    return Kernel.FP8_FAST if gemm is Gemm.OUTPUT else Kernel.FP8_SLOW


def _check_dimensions(M: int, K: int, N: int) -> None:
    for axis, size in (("M", M), ("K", K), ("N", N)):
        if not 1 <= size < LARGEST_DIMENSION:
            raise DeviceError(
                f"M, K and N must be between 1 and {LARGEST_DIMENSION - 1}, but {axis} is {size}; "
                "write a shape as MxKxN, e.g. 8192x4096x14336"
            )


def _arm(machine: Machine, times: LinearTimes, around: float) -> ArmPrediction:
    total = times.total + around
    spread = math.exp(machine.time_error)
    return ArmPrediction(
        output_ms=times.output / 1e3,
        grad_input_ms=times.grad_input / 1e3,
        grad_weight_ms=times.grad_weight / 1e3,
        cast_ms=times.cast / 1e3,
        neighbours_ms=around / 1e3,
        total_ms=total / 1e3,
        total_low_ms=total / spread / 1e3,
        total_high_ms=total * spread / 1e3,
    )


def _gemm_speedup(machine: Machine, bf16: LinearTimes, fp8: LinearTimes) -> Prediction:
    value = bf16.gemms / fp8.gemms
    low, high = math.exp(machine.gemm_error_low), math.exp(machine.gemm_error_high)
    return Prediction(value=value, low=value * low, high=value * high)


def _speedup(machine: Machine, bf16: LinearTimes, fp8: LinearTimes, around: float) -> Prediction:
    value = (bf16.total + around) / (fp8.total + around)
    low, high = math.exp(machine.speedup_error_low), math.exp(machine.speedup_error_high)
    return Prediction(value=value, low=value * low, high=value * high)
