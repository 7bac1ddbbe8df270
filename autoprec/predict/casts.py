"""What each FP8 recipe costs: its GEMM kernels, and its casts and scales, compiled or eager.

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

What runs which GEMM (torchao's float8/config.py and float8_ops.py, PyTorch's ScaledBlas.cpp):

    recipe               output                  grad_input              grad_weight
    tensorwise           tensorwise, fast        tensorwise, full        tensorwise, full
    rowwise              rowwise, fast           tensorwise, full, *     tensorwise, full, *
    rowwise_with_gw_hp   rowwise, fast           tensorwise, full, *     BF16

"fast" and "full" are the accumulation. * torchao from 0.8 on: the row kernel is so slow with full
accumulation that the GEMM runs with scales of one, and its result is read, multiplied by the scales
of rows and columns and written again: with torch.compile by a kernel of its own (ao#2184).

All that the cost model knows of a recipe is its row of `RECIPE_COSTS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoprec.common.recipes import Gemm, Recipe
from autoprec.model.options import FP8_MULTIPLE
from autoprec.predict.gemm import Kernel
from autoprec.records.devices import Machine

GW_HP_KERNELS = 5.0  # torchao's roofline: one for input and grad_output, three for the weight
BLOCK_KERNELS = 6.0  # torchao's blockwise linear: input, weight twice, grad_output twice, input
RESCALE_BYTES = 4.0  # compiled: a BF16 result is read and written; scales are short
EAGER_RESCALE_BYTES = 12.0  # the outer product of scales written in FP32 and read, and the same
EAGER_RESCALE_KERNELS = 2.0
USES_SHARED = 0.25  # of a cast: the amax pass over a whole tensor serves both of its uses


@dataclass(frozen=True)
class RecipeCost:
    """The kernels and casts of a recipe; casts are compiled ones of a layer with three FP8 GEMMs.

    `output` is the kernel of the output GEMM, `backward` that of the other two, which are rescaled
    afterwards where `rescales` says so.
    `cast` gives the bytes per element of an operand's casts, and the kernels of all.
    `multiple` is what K and N must be multiples of, and M where grad_weight runs in FP8.
    `fixed_kernels` replaces the kernel count whichever GEMMs run; 0: it follows the operands.
    `transposed_bytes` is what the weight's transposed cast costs where it is another.
    """

    output: Kernel
    backward: Kernel
    cast: Callable[[Machine], tuple[float, float]]
    rescales: bool = False
    shares_amax: bool = False
    multiple: int = FP8_MULTIPLE
    fixed_kernels: float = 0.0
    transposed_bytes: Callable[[Machine], float] | None = None


_TENSORWISE = RecipeCost(
    output=Kernel.FP8_FAST,
    backward=Kernel.FP8_SLOW,
    cast=lambda m: (m.tensorwise_cast_bytes, m.tensorwise_cast_kernels),
    shares_amax=True,
)
_ROWWISE = RecipeCost(
    output=Kernel.FP8_ROWWISE,
    backward=Kernel.FP8_SLOW,
    rescales=True,
    cast=lambda m: (m.rowwise_cast_bytes, m.rowwise_cast_kernels),
)
_BLOCKWISE = RecipeCost(
    output=Kernel.FP8_BLOCK,
    backward=Kernel.FP8_BLOCK,
    cast=lambda m: (m.block_cast_bytes, BLOCK_KERNELS),
    multiple=128,  # torchao's kernels take whole blocks
)
RECIPE_COSTS: dict[Recipe, RecipeCost] = {
    Recipe.TENSORWISE: _TENSORWISE,
    Recipe.ROWWISE: _ROWWISE,
    Recipe.ROWWISE_WITH_GW_HP: replace(
        _ROWWISE, fixed_kernels=GW_HP_KERNELS, transposed_bytes=lambda m: m.tensorwise_cast_bytes
    ),
    Recipe.DELAYED: replace(  # no pass over the operand for its amax before the cast
        _TENSORWISE,
        cast=lambda m: (
            max(m.tensorwise_cast_bytes - m.amax_bytes, 1.0),
            max(m.tensorwise_cast_kernels - 1, 1.0),
        ),
    ),
    Recipe.BLOCKWISE: _BLOCKWISE,
    Recipe.MXFP8: replace(_BLOCKWISE, cast=lambda m: (m.mx_cast_bytes, BLOCK_KERNELS), multiple=32),
}


def recipe_cost(machine: Machine, recipe: Recipe) -> RecipeCost:
    """Return the costs of a recipe with the software that is assumed on the device."""
    cost = RECIPE_COSTS[recipe]
    if cost.rescales and not machine.rescales_rowwise:
        cost = replace(cost, backward=Kernel.FP8_ROWWISE, rescales=False)
    return cost


def cast_us(
    machine: Machine, M: int, K: int, N: int, recipe: Recipe, gemms: Sequence[Gemm], compiled: bool
) -> float:
    """Return the microseconds of the casts for the FP8 GEMMs in `gemms` (none: 0)."""
    if not gemms:
        return 0.0
    cost, direct = recipe_cost(machine, recipe), machine.direct_cast_share
    eager = machine.eager_cast_bytes, machine.eager_cast_kernels
    per_element, kernels = cost.cast(machine) if compiled else eager

    # GEMMs that stay in BF16 need no casts: of each operand, the part that the others need.
    def share(as_it_lies: Gemm, transposed: Gemm) -> float:
        part = direct * (as_it_lies in gemms) + (1 - direct) * (transposed in gemms)
        return part + USES_SHARED * (1 - part) if cost.shares_amax and 0 < part < 1 else part

    of_input = share(Gemm.OUTPUT, Gemm.GRAD_WEIGHT)
    of_weight = share(Gemm.OUTPUT, Gemm.GRAD_INPUT)
    of_grad = share(Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT)
    fixed = cost.fixed_kernels if compiled else 0.0
    kernels = fixed or kernels * (of_input + of_weight + of_grad) / 3
    per_weight = of_weight * per_element
    if compiled and cost.transposed_bytes is not None:
        per_weight = direct * per_element + (1 - direct) * cost.transposed_bytes(machine)
    # Traffic at streaming speed, and a floor for each kernel; eager launches can take longer.
    moved = (
        of_input * per_element * machine.cast_share_input * M * K
        + per_weight * K * N
        + of_grad * per_element * machine.cast_share_grad * M * N
    )
    us = moved / machine.bytes_per_us + kernels * machine.kernel_floor_us
    return us if compiled else max(us, kernels * machine.eager_host_us)


def rescale_us(
    machine: Machine, M: int, K: int, N: int, recipe: Recipe, gemms: Sequence[Gemm], compiled: bool
) -> float:
    """Return the microseconds in which the results of `gemms` are scaled after their GEMMs."""
    if not recipe_cost(machine, recipe).rescales:
        return 0.0
    per_element = RESCALE_BYTES if compiled else EAGER_RESCALE_BYTES
    floor = machine.kernel_floor_us
    if not compiled:
        floor = EAGER_RESCALE_KERNELS * max(floor, machine.eager_host_us)
    results = {Gemm.GRAD_INPUT: M * K, Gemm.GRAD_WEIGHT: K * N}
    return sum(
        floor + size * per_element / machine.bytes_per_us
        for gemm, size in results.items()
        if gemm in gemms
    )
