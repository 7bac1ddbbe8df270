"""What FP8 casts and scales cost beside the GEMMs, per recipe, compiled or eager.

Each operand of a linear is cast for two GEMMs, once as it lies and once transposed (FP8 GEMMs want
both operands contiguous along the summed dimension):

    operand       as it lies    transposed     elements
    input         output        grad_weight    M*K
    weight        output        grad_input     K*N
    grad_output   grad_input    grad_weight    M*N

Both casts of one element of the weight cost `*_cast_bytes` of memory traffic at streaming speed:
amax pass, read, write and the transposed copy, whose strided access runs at half speed (all of it
is in the number). Input and grad_output differ by a share, since a compiler fuses part of their
casts into the kernels that make them. `rowwise_with_gw_hp` has no transposed activations, and casts
the weight for grad_input with one scale for the tensor (torchao's float8/config.py). Then comes a
floor per kernel. In eager mode every step of a cast is a kernel of its own in FP32, and the host
can be slower than the device.
"""

from collections.abc import Collection
from dataclasses import dataclass

from autoprec.predict.machine import Machine
from autoprec.records.model import RECIPE_GEMMS_HP, Gemm, Recipe

GW_HP_KERNELS = 5.0  # torchao's roofline: one for input and grad_output, three for the weight
BLOCK_KERNELS = 6.0  # torchao's blockwise linear: input, weight twice, grad_output twice, input
TENSORWISE_USES_SHARED = 0.25  # the amax pass serves both uses of an operand


@dataclass(frozen=True)
class CastCost:
    """Time of a layer's casts in microseconds, and how many kernels they are."""

    us: float
    kernels: float


def cast_cost(
    machine: Machine,
    M: int,
    K: int,
    N: int,
    *,
    recipe: Recipe,
    gemms: Collection[Gemm],
    compiled: bool,
) -> CastCost:
    """Return what the casts for the FP8 GEMMs in `gemms` cost (none: nothing)."""
    if not gemms:
        return CastCost(0.0, 0.0)
    per_element, kernels = _full_cost(machine, recipe)
    if not compiled:
        per_element, kernels = machine.eager_cast_bytes, machine.eager_cast_kernels
    shares = _operand_shares(machine, recipe, gemms)
    used = kernels * sum(shares) / 3
    per_weight = shares[1] * per_element
    if compiled and recipe is Recipe.ROWWISE_WITH_GW_HP:
        used = GW_HP_KERNELS
        direct = machine.direct_cast_share
        per_weight = direct * per_element + (1 - direct) * machine.tensorwise_cast_bytes
    moved = (
        shares[0] * per_element * machine.cast_share_input * M * K
        + per_weight * K * N
        + shares[2] * per_element * machine.cast_share_grad * M * N
    )
    return CastCost(moved / machine.bytes_per_us + used * machine.kernel_floor_us, used)


def fp8_gemms(recipe: Recipe, gemms_hp: Collection[Gemm] = ()) -> tuple[Gemm, ...]:
    """Return the GEMMs that run on FP8 operands."""
    kept = (*gemms_hp, *RECIPE_GEMMS_HP.get(recipe, ()))
    return tuple(gemm for gemm in Gemm if gemm not in kept)


def _full_cost(machine: Machine, recipe: Recipe) -> tuple[float, float]:
    """Return bytes per element and kernels of a layer whose three GEMMs are all FP8."""
    if recipe is Recipe.TENSORWISE:
        return machine.tensorwise_cast_bytes, machine.tensorwise_cast_kernels
    if recipe is Recipe.DELAYED:
        saved = machine.tensorwise_cast_bytes - machine.amax_bytes
        return max(saved, 1.0), max(machine.tensorwise_cast_kernels - 1, 1.0)
    if recipe is Recipe.BLOCKWISE:
        return machine.block_cast_bytes, BLOCK_KERNELS
    if recipe is Recipe.MXFP8:
        return machine.mx_cast_bytes, BLOCK_KERNELS
    return machine.rowwise_cast_bytes, machine.rowwise_cast_kernels


def _operand_shares(
    machine: Machine, recipe: Recipe, gemms: Collection[Gemm]
) -> tuple[float, float, float]:
    """Return which part of the casts of input, weight and grad_output is needed."""
    direct = machine.direct_cast_share

    def share(as_it_lies: Gemm, transposed: Gemm) -> float:
        part = direct * (as_it_lies in gemms) + (1 - direct) * (transposed in gemms)
        shared = recipe in (Recipe.TENSORWISE, Recipe.DELAYED) and 0 < part < 1
        return part + TENSORWISE_USES_SHARED * (1 - part) if shared else part

    return (
        share(Gemm.OUTPUT, Gemm.GRAD_WEIGHT),
        share(Gemm.OUTPUT, Gemm.GRAD_INPUT),
        share(Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT),
    )
