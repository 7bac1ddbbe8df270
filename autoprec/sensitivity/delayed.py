"""Delayed scaling, emulated for comparison: the amax history, and a linear that casts by it.

No plan applies it (torchao has current scaling only), and it is measured only where it is asked
for. The linear can emulate every other recipe too, which is how tests hold its casts against
torchao's own layers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.records import Gemm, Operand, Option
from autoprec.sensitivity.casts import Sides, cast_operand, gemm_casts, round_bf16

Amax = Callable[[Operand], float | None]  # of the history; None: the current one is taken


def no_history(_operand: Operand) -> float | None:
    """Return no amax of an operand's past: every cast is scaled by the tensor at hand."""
    return None


class AmaxHistory:
    """The largest magnitudes so far, per linear and operand.

    The warm-up is far shorter than the 1024 steps that Transformer Engine looks back on, so its
    "max over the history" is the maximum of all of it.
    """

    def __init__(self) -> None:
        self._largest: dict[tuple[str, Operand], Tensor] = {}

    def of_layer(self, name: str) -> Amax:
        """Return the largest magnitudes seen of a layer's operands."""
        largest = {o: float(amax) for (layer, o), amax in self._largest.items() if layer == name}
        return largest.get

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Take in the operands of every linear among `layers` that runs inside."""
        handles = [
            layer.register_forward_hook(partial(self._see_call, name))
            for name, layer in layers.items()
            if isinstance(layer, nn.Linear)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_call(self, name: str, layer: nn.Linear, args: tuple[Any, ...], output: Any) -> None:
        if not args or not isinstance(output, Tensor):  # Any: whatever a subclass takes and gives
            return
        self._see(name, Operand.INPUT, args[0])
        self._see(name, Operand.WEIGHT, layer.weight)
        if output.requires_grad:
            output.register_hook(partial(self._see, name, Operand.GRAD_OUTPUT))  # type: ignore[no-untyped-call]  # torch's own

    def _see(self, name: str, operand: Operand, tensor: Tensor) -> None:
        amax = tensor.detach().abs().amax()
        before = self._largest.get((name, operand))
        self._largest[name, operand] = amax if before is None else torch.maximum(before, amax)


@contextmanager
def emulated_layer(layer: nn.Linear, option: Option, amax: Amax) -> Iterator[None]:
    """Run a linear with emulated casts inside."""
    run = emulated_linear(option, amax)
    vars(layer)["forward"] = lambda x: run(x, layer.weight, layer.bias)
    try:
        yield
    finally:
        del vars(layer)["forward"]


def emulated_linear(
    option: Option, amax: Amax
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
        amax: Amax,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.casts, ctx.amax = casts, amax
        x_MK, weight_NK = round_bf16(x.reshape(-1, x.shape[-1])), round_bf16(weight)
        left, right = _cast_sides(casts.get(Gemm.OUTPUT), amax, x_MK, weight_NK)
        y_MN = round_bf16(left @ right.t())  # [M, K] @ [K, N] -> [M, N]
        return y_MN.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        grad_MN = round_bf16(grad_outputs[0].reshape(-1, weight.shape[0]))
        x_MK, weight_NK = round_bf16(x.reshape(-1, x.shape[-1])), round_bf16(weight)
        left, right = _cast_sides(ctx.casts.get(Gemm.GRAD_INPUT), ctx.amax, grad_MN, weight_NK)
        grad_input_MK = round_bf16(left @ right)  # [M, N] @ [N, K] -> [M, K]
        left, right = _cast_sides(ctx.casts.get(Gemm.GRAD_WEIGHT), ctx.amax, grad_MN, x_MK)
        grad_weight_NK = round_bf16(left.t() @ right)  # [N, M] @ [M, K] -> [N, K]
        return grad_input_MK.reshape(x.shape), grad_weight_NK, None, None


def _cast_sides(
    sides: Sides | None, amax: Amax, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    if sides is None:  # this GEMM stays in BF16
        return left, right
    (left_operand, left_cast), (right_operand, right_cast) = sides
    return (
        cast_operand(left, left_cast, amax=amax(left_operand)),
        cast_operand(right, right_cast, amax=amax(right_operand)),
    )
