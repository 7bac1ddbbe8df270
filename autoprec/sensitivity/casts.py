"""FP8 casts in plain arithmetic: what torchao's recipes do to each operand of each GEMM.

    scale = fp8_max / amax        amax over the whole tensor, or along the GEMM's inner dimension
    cast(x) = round_to_fp8(scale * x) / scale

The operands come in as BF16, as in the real layer. Which cast each operand gets is read from
torchao's own config, so that another torchao cannot mean something else by a recipe's name.
`delayed` is Transformer Engine's: e4m3 forward and e5m2 backward, tensorwise, the amax the largest
of the last steps instead of the current one, scaled down by 2^margin.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autoprec.device.torchao import float8_config
from autoprec.records import Gemm, Operand, Option, Recipe

EPS = 1e-12  # the smallest amax, torchao.float8.float8_utils.EPS
AMAX_HISTORY = 1024  # steps; Transformer Engine's DelayedScaling.amax_history_len
MARGIN = 0  # Transformer Engine's DelayedScaling.margin


@dataclass(frozen=True)
class Cast:
    """One way to bring an operand to FP8. `dim` is what amax is taken along; None is all."""

    dtype: torch.dtype
    dim: int | None
    is_power_of_2: bool = False
    is_delayed: bool = False


Sides = tuple[tuple[Operand, Cast], tuple[Operand, Cast]]

# The operands of each GEMM, with the dimension of x_MK, weight_NK, grad_output_MN it sums over:
#   output      [M, K] @ [K, N]        grad_input  [M, N] @ [N, K]       grad_weight [N, M] @ [M, K]
_ROLES: dict[Gemm, tuple[tuple[Operand, str, int], tuple[Operand, str, int]]] = {
    Gemm.OUTPUT: (
        (Operand.INPUT, "cast_config_input", 1),
        (Operand.WEIGHT, "cast_config_weight", 1),
    ),
    Gemm.GRAD_INPUT: (
        (Operand.GRAD_OUTPUT, "cast_config_grad_output", 1),
        (Operand.WEIGHT, "cast_config_weight_for_grad_input", 0),
    ),
    Gemm.GRAD_WEIGHT: (
        (Operand.GRAD_OUTPUT, "cast_config_grad_output_for_grad_weight", 0),
        (Operand.INPUT, "cast_config_input_for_grad_weight", 0),
    ),
}


def gemm_casts(option: Option) -> dict[Gemm, Sides]:
    """Return the two casts of each GEMM that an FP8 option runs in FP8."""
    if option.recipe is Recipe.DELAYED:
        return {gemm: _delayed(gemm) for gemm in Gemm if gemm not in option.gemms_hp}
    config = float8_config(option)
    return {
        gemm: (_side(config, *left), _side(config, *right))
        for gemm, (left, right) in _ROLES.items()
        if getattr(config, left[1]).scaling_type.name == "DYNAMIC"
    }


def scale_of(x: Tensor, cast: Cast, *, amax: float | None = None) -> Tensor:
    """Return the scale of a tensor; `amax` is the history's, for a delayed cast."""
    if cast.is_delayed and amax is not None:
        largest = torch.tensor(amax, dtype=torch.float64, device=x.device) * 2.0**MARGIN
    elif cast.dim is None:
        largest = x.abs().amax().double()
    else:
        largest = x.abs().amax(cast.dim, keepdim=True).double()
    scale = (torch.finfo(cast.dtype).max / largest.clamp(min=EPS)).float()
    return torch.exp2(torch.floor(torch.log2(scale))) if cast.is_power_of_2 else scale


def cast_operand(x: Tensor, cast: Cast, *, amax: float | None = None) -> Tensor:
    """Return what FP8 makes of a BF16-rounded operand, in FP32."""
    scale = scale_of(x, cast, amax=amax)
    scaled = x * scale
    if cast.is_delayed:  # only a scale from the past lets values be too large
        largest = torch.finfo(cast.dtype).max
        scaled = scaled.clamp_(-largest, largest)
    return fp8_to_float(scaled.to(cast.dtype)).div_(scale)


def fp8_to_float(x_fp8: Tensor) -> Tensor:
    """Return an FP8 tensor in FP32; exact.

    On a CPU by a table of all 256 values: torch 2.13's own conversion of e4m3 takes six times as
    long (8.4 ms against 1.4 ms for two million values, one core).
    """
    if x_fp8.device.type != "cpu":
        return x_fp8.float()
    codes = x_fp8.contiguous().view(torch.uint8)
    return _all_values(x_fp8.dtype).index_select(0, codes.flatten().int()).view(x_fp8.shape)


def round_bf16(x: Tensor) -> Tensor:
    """Return x rounded to BF16, in FP32."""
    return x.to(torch.bfloat16).float()


def emulated_linear(
    option: Option, amax: Callable[[Operand], float | None]
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return a function (x, weight, bias) -> y that runs an FP8 option with FP32 matmuls."""
    casts = gemm_casts(option)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _EmulatedMatmul.apply(x, weight, casts, amax)  # type: ignore[no-untyped-call]
        return y if bias is None else round_bf16(y + round_bf16(bias))

    return run


class _EmulatedMatmul(torch.autograd.Function):
    """x_MK @ weight_NK.t() with each of the three GEMMs on its own casts; results are BF16."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: autograd's context is untyped
        x: Tensor,
        weight: Tensor,
        casts: dict[Gemm, Sides],
        amax: Callable[[Operand], float | None],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.casts, ctx.amax = casts, amax
        x_MK, weight_NK = round_bf16(x.reshape(-1, x.shape[-1])), round_bf16(weight)
        left, right = _cast_sides(Gemm.OUTPUT, casts, amax, x_MK, weight_NK)
        y_MN = round_bf16(left @ right.t())  # [M, K] @ [K, N] -> [M, N]
        return y_MN.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        grad_MN = round_bf16(grad_outputs[0].reshape(-1, weight.shape[0]))
        x_MK, weight_NK = round_bf16(x.reshape(-1, x.shape[-1])), round_bf16(weight)
        left, right = _cast_sides(Gemm.GRAD_INPUT, ctx.casts, ctx.amax, grad_MN, weight_NK)
        grad_input_MK = round_bf16(left @ right)  # [M, N] @ [N, K] -> [M, K]
        left, right = _cast_sides(Gemm.GRAD_WEIGHT, ctx.casts, ctx.amax, grad_MN, x_MK)
        grad_weight_NK = round_bf16(left.t() @ right)  # [N, M] @ [M, K] -> [N, K]
        return grad_input_MK.reshape(x.shape), grad_weight_NK, None, None


@cache
def _all_values(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _cast_sides(
    gemm: Gemm,
    casts: dict[Gemm, Sides],
    amax: Callable[[Operand], float | None],
    left: Tensor,
    right: Tensor,
) -> tuple[Tensor, Tensor]:
    if gemm not in casts:
        return left, right
    (left_operand, left_cast), (right_operand, right_cast) = casts[gemm]
    return (
        cast_operand(left, left_cast, amax=amax(left_operand)),
        cast_operand(right, right_cast, amax=amax(right_operand)),
    )


def _side(config: Any, operand: Operand, name: str, dim: int) -> tuple[Operand, Cast]:
    cast = getattr(config, name)
    is_axiswise = cast.scaling_granularity.name == "AXISWISE"
    return operand, Cast(
        dtype=cast.target_dtype,
        dim=dim if is_axiswise else None,
        is_power_of_2=config.round_scales_to_power_of_2,
    )


def _delayed(gemm: Gemm) -> Sides:
    left, right = _ROLES[gemm]
    return (left[0], _delayed_cast(left[0])), (right[0], _delayed_cast(right[0]))


def _delayed_cast(operand: Operand) -> Cast:
    is_gradient = operand is Operand.GRAD_OUTPUT
    dtype = torch.float8_e5m2 if is_gradient else torch.float8_e4m3fn
    return Cast(dtype=dtype, dim=None, is_delayed=True)
