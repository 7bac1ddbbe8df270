"""A linear in FP8 of plain arithmetic: what a recipe's casts do, with an operand repaired or not.

Where a layer's error is looked into (repairs.py), and where tests hold its casts against torchao's
own layers. FP32 matmuls on operands that were cast and taken back give what FP8 GEMMs give, up to
the order of sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoprec.model.kinds import bias_of, is_transposed, weight_of
from autoprec.records import Gemm, Operand, Option
from autoprec.sensitivity.casts import Cast, Sides, gemm_casts, round_bf16
from autoprec.sensitivity.linear import Matrix


class Repair(NamedTuple):
    """What is mended in a layer's FP8, if anything.

    `operand` loses digits as in FP8, and no range; without its mean the input is cast less that of
    its rows, and what the mean does to the results is added in FP32:

        x w' = (x - m) w' + m w'        g' x = g' (x - m) + (sum of g's rows)' m
    """

    operand: Operand | None = None
    is_mean: bool = False

    def __str__(self) -> str:
        if self.is_mean:
            return "FP8 without the input's mean"
        return f"FP8 with any range of {self.operand}" if self.operand else "FP8"


class Emulation(NamedTuple):
    """What a linear runs in: casts per GEMM, and how."""

    casts: dict[Gemm, Sides]
    repair: Repair
    chunk: int  # elements of rows that are cast and multiplied at a time


@contextmanager
def emulated_layer(
    layer: nn.Module, option: Option, repair: Repair, *, chunk: int
) -> Iterator[None]:
    """Run a linear with an FP8 option's casts and FP32 matmuls inside, some elements at a time."""
    how = Emulation(gemm_casts(option), repair, chunk)
    turned = is_transposed(layer)  # asked before the layer has another forward

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        weight_NK = weight_of(layer).t() if turned else weight_of(layer)
        return _EmulatedLinear.apply(x, weight_NK, bias_of(layer), how)  # type: ignore[no-untyped-call,no-any-return]  # torch's

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]


class _Rows(Matrix):
    """An operand of one GEMM, in BF16 or cast, some rows at a time."""

    def taken(self, sides: Sides | None, side: int, rows: slice, how: Emulation) -> Tensor:
        """Return these rows as they are on one side of a GEMM; in BF16 where it has no casts."""
        if sides is None:
            return round_bf16(self.exact[rows])
        operand, cast = sides[side]
        if operand is how.repair.operand:
            # on the very grid of the cast: what it holds well is rounded as it would be
            scale = self.scale(cast, rows)
            return _rounded(round_bf16(self.exact[rows]) * scale, cast).div_(scale)
        return self.cast(cast, rows)


class _EmulatedLinear(torch.autograd.Function):
    """x_MK @ weight_NK.t() + bias_N, each of the three GEMMs on its own casts; results are BF16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Emulation) -> Tensor:
        # Any: autograd's context is untyped
        x_MK = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        mean_K = x_MK.mean(0, dtype=torch.float32) * how.repair.is_mean
        if how.repair.is_mean:
            x_MK = torch.sub(x_MK, mean_K, out=torch.empty_like(x_MK))
        ctx.save_for_backward(x_MK, weight, mean_K)
        ctx.shape, ctx.how, ctx.has_bias = x.shape, how, bias is not None
        left, right = _matrices(how, weight, x_MK)
        sides = how.casts.get(Gemm.OUTPUT)
        w_NK, shift_N = right.taken(sides, 1, slice(None), how), round_bf16(weight) @ mean_K
        output = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
        y_MN = output.view(-1, len(weight))  # a view may not be changed in place behind it
        for rows in left.chunks():
            # [M, K] @ [K, N] -> [M, N]
            y = round_bf16((left.taken(sides, 0, rows, how) @ w_NK.t()).add_(shift_N))
            y_MN[rows] = y if bias is None else round_bf16(y + round_bf16(bias))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        how = ctx.how
        x_MK, weight, mean_K = ctx.saved_tensors
        grad, w = _matrices(how, weight, grad_outputs[0].reshape(-1, len(weight)))
        x, _ = _matrices(how, weight, x_MK)
        inner, outer = (how.casts.get(gemm) for gemm in (Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT))
        w_NK = w.taken(inner, 1, slice(None), how)
        grad_input_MK = mean_K.new_empty(x_MK.shape)
        grad_weight_NK, grad_bias_N = torch.zeros_like(w_NK), w_NK.new_zeros(len(weight))
        for rows in grad.chunks():
            # [M, N] @ [N, K] -> [M, K]
            grad_input_MK[rows] = round_bf16(grad.taken(inner, 0, rows, how) @ w_NK)
            # [N, M] @ [M, K] -> [N, K]
            grad_weight_NK.addmm_(grad.taken(outer, 0, rows, how).t(), x.taken(outer, 1, rows, how))
            grad_bias_N += grad.taken(None, 0, rows, how).sum(0)
        grad_weight_NK.addr_(grad_bias_N, mean_K)
        grad_bias = round_bf16(grad_bias_N) if ctx.has_bias else None
        return grad_input_MK.reshape(ctx.shape), round_bf16(grad_weight_NK), grad_bias, None


def _matrices(how: Emulation, weight: Tensor, tokens: Tensor) -> tuple[_Rows, _Rows]:
    """Return an operand whose rows are tokens and the weight, in chunks of as many rows."""
    rows = max(how.chunk // sum(weight.shape), 1)
    return _Rows(tokens, rows), _Rows(weight.detach(), rows)


def _rounded(x: Tensor, cast: Cast) -> Tensor:
    """Return x with as many digits as the cast's dtype keeps, however small or large it is."""
    mantissa, exponent = torch.frexp(x)  # of magnitude 1/2 to 1
    step = torch.finfo(cast.dtype).eps / 2
    return torch.ldexp((mantissa / step).round_() * step, exponent)
