"""A linear layer, forward and backward: three GEMMs, casts, and what FP8 gains.

output       [M, K] @ [K, N]
grad_input   [M, N] @ [N, K]
grad_weight  [K, M] @ [M, N]
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from autoprec.common.recipes import Gemm, Precision, Recipe
from autoprec.errors import DeviceError
from autoprec.model.options import FP8_MULTIPLE, shape_refusal
from autoprec.predict.casts import RECIPE_COSTS, cast_us, recipe_cost, rescale_us
from autoprec.predict.gemm import Kernel, gemm_us
from autoprec.predict.spelling import parse_recipe
from autoprec.records.devices import (
    ArmPrediction,
    DeviceProfile,
    LinearPrediction,
    Machine,
    Prediction,
)
from autoprec.records.model import BF16_O2, Basis, Option, fp8_option

LARGEST_DIMENSION = 2**31


@dataclass(frozen=True)
class LinearTimes:
    """Times of one layer in microseconds, the GEMMs named as in `Gemm`; 0 of what does not run."""

    output: float = 0.0
    grad_input: float = 0.0
    grad_weight: float = 0.0
    cast: float = 0.0

    @property
    def gemms(self) -> float:
        """The three GEMMs."""
        return self.output + self.grad_input + self.grad_weight

    @property
    def total(self) -> float:
        """GEMMs, and casts with the rescaling of rowwise gradients."""
        return self.gemms + self.cast


def predict_linear(
    profile: DeviceProfile,
    M: int,
    K: int,
    N: int,
    *,
    recipe: Recipe | str = Recipe.TENSORWISE,
    compiled: bool = True,
) -> LinearPrediction:
    """Predict forward + backward of a linear in BF16 and FP8: M tokens, K in- and N out-features.

    FP8 operands are scaled by `recipe`; `compiled` casts are fused by torch.compile, else eager.

    Raises:
        DeviceError: a dimension is no positive integer, or the recipe is unknown.
    """
    priced, shape = parse_recipe(recipe), {"M": M, "K": K, "N": N}
    for axis, size in shape.items():
        if not 1 <= size < LARGEST_DIMENSION:
            raise DeviceError(
                f"M, K and N must be between 1 and {LARGEST_DIMENSION - 1}, but {axis} is {size}; "
                "write a shape as MxKxN, e.g. 8192x4096x14336"
            )
    machine = profile.machine
    # The kernels around the layer cost the same in both arms, so they pull the speedup to 1.
    around = neighbours_us(machine, compiled=compiled)
    bf16 = linear_times(machine, M, K, N, BF16_O2, compiled=compiled)
    refusal = fp8_refusal(profile, M, K, N, priced)
    fp8 = gemm_speedup = speedup = None
    if not refusal:
        fp8 = linear_times(machine, M, K, N, fp8_option(priced), compiled=compiled)
        ratio = (bf16.total + around) / (fp8.total + around)
        speedup = _within(ratio, machine.speedup_error_low, machine.speedup_error_high)
        ratio = bf16.gemms / fp8.gemms
        gemm_speedup = _within(ratio, machine.gemm_error_low, machine.gemm_error_high)
    return LinearPrediction(
        device=profile.name,
        **shape,
        recipe=priced,
        compiled=compiled,
        bf16=_arm(machine, bf16, around),
        fp8=_arm(machine, fp8, around) if fp8 else None,
        gemm_speedup=gemm_speedup,
        speedup=speedup,
        refusal=refusal,
        basis=Basis.PREDICTED,
        software=str(profile.software),
    )


def fp8_refusal(profile: DeviceProfile, M: int, K: int, N: int, recipe: Recipe) -> str:
    """Return the reason that a recipe cannot run this shape on this device, or an empty string."""
    multiple, gemms = RECIPE_COSTS[recipe].multiple, fp8_option(recipe).fp8_gemms
    owner = "FP8 GEMMs" if multiple == FP8_MULTIPLE else f"{recipe} scales"
    return recipe_refusal(profile, recipe) or shape_refusal(
        K, N, tokens=(M,), gemms=gemms, multiple=multiple, needed_by=owner
    )


def recipe_refusal(profile: DeviceProfile, recipe: Recipe) -> str:
    """Return the reason that this device runs a recipe at no shape, or an empty string."""
    if not profile.has_fp8:
        return profile.fp8_reason
    if recipe not in profile.fp8_recipes:
        return f"{profile.title} does not run {recipe}; it runs {', '.join(profile.fp8_recipes)}"
    return ""


def linear_times(
    machine: Machine,
    M: int,
    K: int,
    N: int,
    option: Option,
    *,
    compiled: bool = True,
    gemms: Collection[Gemm] = tuple(Gemm),
    fp32: Kernel = Kernel.FP32,
) -> LinearTimes:
    """Return the times of a linear with an option; `gemms` are those of its three that run.

    `fp32` is what FP32 GEMMs run in: TF32 where the process allows it.
    """
    if min(M, K, N) < 1:
        return LinearTimes()
    # In eager mode no kernel is faster than the host launches it.
    floor = 0.0 if compiled else machine.eager_host_us
    us = {
        gemm.value: max(gemm_us(machine, *shape, _kernel(machine, option, gemm, fp32)), floor)
        for gemm, shape in zip(Gemm, gemm_shapes(M, K, N), strict=True)
        if gemm in gemms
    }
    if option.recipe is not None:
        fp8 = [gemm for gemm in option.fp8_gemms if gemm in gemms]
        us["cast"] = sum(
            part(machine, M, K, N, recipe=option.recipe, gemms=fp8, compiled=compiled)
            for part in (cast_us, rescale_us)
        )
    return LinearTimes(**us)


def neighbours_us(machine: Machine, *, compiled: bool) -> float:
    """Return the fixed time of the kernels that a compiled graph has around a linear."""
    return machine.neighbour_kernels * machine.kernel_floor_us if compiled else 0.0


def gemm_shapes(M: int, K: int, N: int) -> tuple[tuple[int, int, int], ...]:
    """Return output, grad_input and grad_weight as (rows, summed, columns)."""
    return ((M, K, N), (M, N, K), (K, M, N))


def _kernel(machine: Machine, option: Option, gemm: Gemm, fp32: Kernel) -> Kernel:
    if option.recipe is None or gemm not in option.fp8_gemms:
        return fp32 if option.precision is Precision.FP32 else Kernel.BF16
    cost = recipe_cost(machine, option.recipe)
    return cost.output if gemm is Gemm.OUTPUT else cost.backward


def _arm(machine: Machine, times: LinearTimes, around: float) -> ArmPrediction:
    total = times.total + around
    spread = math.exp(machine.time_error)
    return ArmPrediction(
        **{f"{part}_ms": us / 1e3 for part, us in vars(times).items()},
        neighbours_ms=around / 1e3,
        total_ms=total / 1e3,
        total_low_ms=total / spread / 1e3,
        total_high_ms=total * spread / 1e3,
    )


def _within(value: float, low: float, high: float) -> Prediction:
    """Return a value with its interval; the ends are log errors."""
    return Prediction(value=value, low=value * math.exp(low), high=value * math.exp(high))
