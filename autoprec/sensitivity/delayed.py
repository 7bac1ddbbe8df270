"""Delayed scaling, emulated for comparison: the amax history, and a linear that casts by it.

No plan applies it (torchao has current scaling only), and it is measured only where it is asked
for. The linear can emulate every other recipe too, which is how tests hold its casts against
torchao's own layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.device.ranks import largest_over_ranks, local_part
from autoprec.records import Gemm, Operand, Option
from autoprec.sensitivity.casts import Cast, Sides, cast_operand, gemm_casts, round_bf16

ABSENT = -1.0  # of an operand that no step had
Amax = Mapping[Operand, float]  # of a linear's past; an operand not in it is scaled by its own


@contextmanager
def recorded_amax(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Amax]]:
    """Record the largest magnitudes of the operands of linears that run inside; whole on leaving.

    The warm-up is far shorter than the 1024 steps that Transformer Engine looks back on, so its
    "max over the history" is the maximum of all of it.
    """
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    largest: dict[str, dict[Operand, Tensor]] = {name: {} for name in linears}
    found: dict[str, Amax] = {}
    with ExitStack() as hooks:
        for name, layer in linears.items():
            hooks.enter_context(layer.register_forward_hook(partial(_see_call, largest[name])))
        yield found
    # numbers only now: on a GPU each one waits for the device; over ranks, as Transformer Engine
    seen = [(name, operand) for name in largest for operand in Operand]
    own = [float(largest[name].get(operand, ABSENT)) for name, operand in seen]
    for (name, operand), amax in zip(seen, largest_over_ranks(own), strict=True):
        found.setdefault(name, {})
        if amax != ABSENT:
            found[name] = {**found[name], operand: amax}


def _see_call(
    largest: dict[Operand, Tensor], layer: nn.Linear, args: tuple[Any, ...], output: Any
) -> None:  # Any: whatever a subclass takes and gives
    if not args or not isinstance(output, Tensor):
        return
    _see(largest, Operand.INPUT, args[0])
    _see(largest, Operand.WEIGHT, layer.weight)
    if output.requires_grad:
        output.register_hook(partial(_see, largest, Operand.GRAD_OUTPUT))  # type: ignore[no-untyped-call]  # torch's own


def _see(largest: dict[Operand, Tensor], operand: Operand, tensor: Tensor) -> None:
    amax = local_part(tensor.detach()).abs().amax()
    largest[operand] = torch.maximum(largest.get(operand, amax), amax)


@contextmanager
def emulated_layer(
    layer: nn.Linear,
    option: Option,
    amax: Amax,
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
        settings = casts, amax, in_range, without_mean
        y: Tensor = _EmulatedMatmul.apply(x, layer.weight, *settings)  # type: ignore[no-untyped-call]
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
        amax: Amax,
        in_range: Operand | None,
        without_mean: bool,
    ) -> Tensor:
        x_MK, weight_NK = round_bf16(x.reshape(-1, x.shape[-1])), round_bf16(weight)
        mean_K = x_MK.mean(0) * without_mean
        x_MK = x_MK - mean_K
        ctx.save_for_backward(x_MK, weight_NK, mean_K)
        ctx.shape, ctx.casts, ctx.how = x.shape, casts, (amax, in_range)
        left, right = _cast_sides(casts.get(Gemm.OUTPUT), ctx.how, x_MK, weight_NK)
        # [M, K] @ [K, N] -> [M, N]
        y_MN = round_bf16((left @ right.t()).add_(weight_NK @ mean_K))
        return y_MN.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x_MK, weight_NK, mean_K = ctx.saved_tensors
        grad_MN = round_bf16(grad_outputs[0].reshape(-1, len(weight_NK)))
        left, right = _cast_sides(ctx.casts.get(Gemm.GRAD_INPUT), ctx.how, grad_MN, weight_NK)
        grad_input_MK = round_bf16(left @ right)  # [M, N] @ [N, K] -> [M, K]
        left, right = _cast_sides(ctx.casts.get(Gemm.GRAD_WEIGHT), ctx.how, grad_MN, x_MK)
        # [N, M] @ [M, K] -> [N, K]
        grad_weight_NK = round_bf16(left.t() @ right + torch.outer(grad_MN.sum(0), mean_K))
        return grad_input_MK.reshape(ctx.shape), grad_weight_NK, None, None, None, None


def _cast_sides(
    sides: Sides | None, how: tuple[Amax, Operand | None], *tensors: Tensor
) -> tuple[Tensor, ...]:
    if sides is None:  # this GEMM stays in BF16
        return tensors
    amax, in_range = how
    return tuple(
        _rounded(tensor, cast)
        if operand is in_range
        else cast_operand(tensor, cast, amax=amax.get(operand))
        for tensor, (operand, cast) in zip(tensors, sides, strict=True)
    )


def _rounded(x: Tensor, cast: Cast) -> Tensor:
    """Return x with as many digits as the cast's dtype keeps, however small or large it is."""
    mantissa, exponent = torch.frexp(x)  # of magnitude 1/2 to 1
    step = torch.finfo(cast.dtype).eps / 2
    return torch.ldexp((mantissa / step).round_() * step, exponent)
