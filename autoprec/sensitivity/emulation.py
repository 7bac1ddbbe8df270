"""A linear in FP8 of plain arithmetic: what a recipe's casts do, with an operand repaired or not.

Where a layer's error is looked into (repairs.py), and where tests hold its casts against torchao's
own layers. FP32 matmuls on operands that were cast and taken back give what FP8 GEMMs give, up to
the order of sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.records import Gemm, Operand, Option
from autoprec.sensitivity.casts import Cast, Sides, cast_operand, gemm_casts, round_bf16


@contextmanager
def emulated_layer(
    layer: nn.Linear,
    option: Option,
    *,
    in_range: Operand | None = None,
    without_mean: bool = False,
) -> Iterator[None]:
    """Run a linear with an FP8 option's casts and FP32 matmuls inside.

    `in_range` is an operand that loses digits as in FP8, and no range; `without_mean` takes the
    mean over rows out of the input before it is cast, and adds what it does to the results in FP32:

        x w' = (x - m) w' + m w'        g' x = g' (x - m) + (sum of g's rows)' m
    """
    casts = gemm_casts(option)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = _EmulatedMatmul.apply(x, layer.weight, casts, in_range, without_mean)  # type: ignore[no-untyped-call]
        return y if layer.bias is None else round_bf16(y + round_bf16(layer.bias))

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]


class _EmulatedMatmul(torch.autograd.Function):
    """x_MK @ weight_NK.t() with each of the three GEMMs on its own casts; results are BF16."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: autograd's context is untyped
        x: Tensor,
        weight: Tensor,
        casts: dict[Gemm, Sides],
        in_range: Operand | None,
        without_mean: bool,
    ) -> Tensor:
        x_MK, weight_NK = round_bf16(x.reshape(-1, x.shape[-1])), round_bf16(weight)
        mean_K = x_MK.mean(0) * without_mean
        x_MK = x_MK - mean_K
        ctx.save_for_backward(x_MK, weight_NK, mean_K)
        ctx.shape, ctx.casts, ctx.in_range = x.shape, casts, in_range
        left, right = _cast_sides(casts.get(Gemm.OUTPUT), ctx.in_range, x_MK, weight_NK)
        # [M, K] @ [K, N] -> [M, N]
        y_MN = round_bf16((left @ right.t()).add_(weight_NK @ mean_K))
        return y_MN.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x_MK, weight_NK, mean_K = ctx.saved_tensors
        grad_MN = round_bf16(grad_outputs[0].reshape(-1, len(weight_NK)))
        left, right = _cast_sides(ctx.casts.get(Gemm.GRAD_INPUT), ctx.in_range, grad_MN, weight_NK)
        grad_input_MK = round_bf16(left @ right)  # [M, N] @ [N, K] -> [M, K]
        left, right = _cast_sides(ctx.casts.get(Gemm.GRAD_WEIGHT), ctx.in_range, grad_MN, x_MK)
        # [N, M] @ [M, K] -> [N, K]
        grad_weight_NK = round_bf16(left.t() @ right + torch.outer(grad_MN.sum(0), mean_K))
        return grad_input_MK.reshape(ctx.shape), grad_weight_NK, None, None, None


def _cast_sides(
    sides: Sides | None, in_range: Operand | None, *tensors: Tensor
) -> tuple[Tensor, ...]:
    if sides is None:  # this GEMM stays in BF16
        return tensors
    return tuple(
        _rounded(tensor, cast) if operand is in_range else cast_operand(tensor, cast)
        for tensor, (operand, cast) in zip(tensors, sides, strict=True)
    )


def _rounded(x: Tensor, cast: Cast) -> Tensor:
    """Return x with as many digits as the cast's dtype keeps, however small or large it is."""
    mantissa, exponent = torch.frexp(x)  # of magnitude 1/2 to 1
    step = torch.finfo(cast.dtype).eps / 2
    return torch.ldexp((mantissa / step).round_() * step, exponent)
