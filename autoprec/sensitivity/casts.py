"""FP8 casts in plain arithmetic: what torchao's recipes do to each operand of each GEMM.

    scale = fp8_max / amax        amax over the whole tensor, or along the GEMM's inner dimension
    cast(x) = round_to_fp8(scale * x) / scale

The operands come in as BF16, as in the real layer. Which cast each operand gets is read from
torchao's own config, so that another torchao cannot mean something else by a recipe's name.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autoprec.device.ranks import sharded_tensor
from autoprec.device.torchao import float8_config
from autoprec.records import Gemm, Operand, Option

PART = 1 << 16  # elements that are looked up at a time
EPS = 1e-12  # the smallest amax, torchao.float8.float8_utils.EPS


@dataclass(frozen=True)
class Cast:
    """One way to bring an operand to FP8. `dim` is what amax is taken along; None is all."""

    dtype: torch.dtype
    dim: int | None
    is_power_of_2: bool = False


Sides = tuple[tuple[Operand, Cast], ...]  # the two operands of a GEMM

# The operands of each GEMM, what torchao's config calls their casts, and the dimension of x_MK,
# weight_NK, grad_output_MN that the GEMM sums over:
#   output      [M, K] @ [K, N]        grad_input  [M, N] @ [N, K]       grad_weight [N, M] @ [M, K]
_SIDES: dict[Gemm, tuple[tuple[Operand, str, int], ...]] = {
    Gemm.OUTPUT: ((Operand.INPUT, "input", 1), (Operand.WEIGHT, "weight", 1)),
    Gemm.GRAD_INPUT: (
        (Operand.GRAD_OUTPUT, "grad_output", 1),
        (Operand.WEIGHT, "weight_for_grad_input", 0),
    ),
    Gemm.GRAD_WEIGHT: (
        (Operand.GRAD_OUTPUT, "grad_output_for_grad_weight", 0),
        (Operand.INPUT, "input_for_grad_weight", 0),
    ),
}


def gemm_casts(option: Option) -> dict[Gemm, Sides]:
    """Return the two casts of each GEMM that an option runs in FP8; none for other precisions."""
    if not option.is_fp8:
        return {}
    config = float8_config(option)
    return {
        gemm: tuple((operand, _current_cast(config, field, dim)) for operand, field, dim in sides)
        for gemm, sides in _SIDES.items()
        if getattr(config, f"cast_config_{sides[0][1]}").scaling_type.name == "DYNAMIC"
    }


def staying_casts(option: Option) -> Sides:
    """Return the casts of an option's grad_weight GEMM, whose error stays in the layer."""
    return gemm_casts(option).get(Gemm.GRAD_WEIGHT, ())


def largest_of(x: Tensor, cast: Cast) -> Tensor:
    """Return the amax that a cast takes of a tensor."""
    return x.abs().amax() if cast.dim is None else x.abs().amax(cast.dim, keepdim=True)


def scale_from(largest: Tensor, cast: Cast) -> Tensor:
    """Return the scale that belongs to an amax."""
    scale = (torch.finfo(cast.dtype).max / largest.double().clamp(min=EPS)).float()
    return torch.exp2(torch.floor(torch.log2(scale))) if cast.is_power_of_2 else scale


def cast_scaled(x: Tensor, cast: Cast, scale: Tensor) -> Tensor:
    """Return a BF16-rounded operand, or some rows of it, after its cast to FP8 with this scale."""
    return fp8_to_float((x * scale).to(cast.dtype)).div_(scale)


def fp8_to_float(x_fp8: Tensor) -> Tensor:
    """Return an FP8 tensor in FP32; exact.

    On a CPU by a table of all 256 values: torch 2.13's own conversion of e4m3 takes six times as
    long (8.4 ms against 1.4 ms for two million values, one core).
    """
    if x_fp8.device.type != "cpu" or isinstance(x_fp8, sharded_tensor()):
        return x_fp8.float()
    codes, values = x_fp8.contiguous().view(torch.uint8).flatten(), _all_values(x_fp8.dtype)
    found = torch.empty(codes.shape)
    for part, into in zip(torch.split(codes, PART), torch.split(found, PART), strict=True):
        torch.index_select(values, 0, part.int(), out=into)
    return found.view(x_fp8.shape)


def round_bf16(x: Tensor) -> Tensor:
    """Return x rounded to BF16, in FP32."""
    return x.to(torch.bfloat16).float()


@cache
def _all_values(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _current_cast(config: Any, field: str, dim: int) -> Cast:  # Any: torchao is untyped
    cast = getattr(config, f"cast_config_{field}")
    taken = dim if cast.scaling_granularity.name == "AXISWISE" else None
    return Cast(cast.target_dtype, taken, is_power_of_2=config.round_scales_to_power_of_2)
