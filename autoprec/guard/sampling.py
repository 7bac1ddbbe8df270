"""Which operands of FP8 layers are looked at, and when: a forward hook on each, on in few steps.

The hook writes the shares of the layer's input into a buffer, and passes the output through an
autograd function that does the same with its gradient. It is made of what torch.compile traces
without a graph break, and it asks an attribute of the layer whether to look, on which dynamo
guards: so a compiled model has two graphs, one for sampled steps. There the hooks must stay in,
because dynamo does not notice hooks that come later. Elsewhere they are in only while they look,
because a hook costs some microseconds a call.

torchao casts x to FP8 as round(x * max / amax), with amax over the tensor (tensorwise) or over each
row (rowwise) and max the largest FP8 number (448 for e4m3, 57344 for e5m2). So

    underflow   non-zero elements with |x| * max / amax at most half the smallest FP8 number,
                2^-10 for e4m3 and 2^-17 for e5m2, which the cast rounds to zero
    saturated   elements that lie above max after scaling, or are not finite

The largest element always fits, by construction. A layer that runs out of range therefore shows it
as underflow of all the rest, and saturates only when its operand has an infinity or a NaN, which
makes the scale 0 or NaN. A sample of the elements is enough for shares; amax must be exact, because
outliers decide it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoprec.device.ranks import local_part
from autoprec.model.kinds import is_transposed
from autoprec.workload.written import is_compiled

OPERANDS = ("input", "weight", "grad_output")
MOST_ELEMENTS = 1 << 16  # of an operand; the standard error of a share is then below 0.2 %
SMALLEST_AMAX = 1e-12  # torchao 0.18's EPS
# Of the largest FP8 number. Up to 1 + 2^-5 the cast still rounds to it; inductor fuses a BF16 cast
# away for the elements but not for their amax, so that these may lie 2^-8 above it.
ABOVE = 1 + 2**-6


class Sampler:
    """Looks at the operands of FP8 layers during a step; holds the worst shares seen."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Any]) -> None:  # Any: FP8 layers
        self.layers = layers
        self.transposed = {name for name, layer in layers.items() if is_transposed(layer)}
        self.hooks_stay = is_compiled(model)
        self._handles: list[RemovableHandle] = []
        self._seen = {
            name: torch.zeros(len(OPERANDS), 2, device=layer.weight.device)  # underflow, saturated
            for name, layer in layers.items()
        }
        self.disarm()

    def arm(self) -> None:
        """Look at the step that comes."""
        self.is_armed = bool(self.layers)
        for name, layer in self.layers.items():
            vars(layer)["fp8_sampled"] = True  # on the instance: torch.compile guards on it there
            self._seen[name].zero_()
            if len(self._handles) < len(self.layers):
                hook = functools.partial(_look, self, self._seen[name])
                self._handles.append(layer.register_forward_hook(hook))

    def disarm(self) -> None:
        """Look no more."""
        self.is_armed = False
        for layer in self.layers.values():
            vars(layer)["fp8_sampled"] = False
        if not self.hooks_stay:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def close(self) -> None:
        """Leave no trace on the layers."""
        self.hooks_stay = False
        self.disarm()
        for layer in self.layers.values():
            vars(layer).pop("fp8_sampled", None)

    @torch.no_grad()
    def shares(self, device: torch.device) -> Tensor:
        """Return [layers, operands, 2] shares in the order of `layers`, 0 where not seen."""
        for name, layer in self.layers.items():
            if layer.fp8_active:
                weight_NK = layer.weight.t() if name in self.transposed else layer.weight
                _keep_worst(self._seen[name][1], weight_NK, *_cast(layer, "weight"))
        return torch.stack([seen.to(device) for seen in self._seen.values()])


class GradTap(torch.autograd.Function):
    """The identity; its backward looks at the gradient that passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Tensor, dtype: torch.dtype, is_rowwise: bool) -> Any:
        """Return a copy, not a view: user code may write into it in place."""
        ctx.save_for_backward(seen)
        ctx.dtype, ctx.is_rowwise = dtype, is_rowwise
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Look, and pass the gradient on."""
        (seen,) = ctx.saved_tensors
        _keep_worst(seen, grad_output, ctx.dtype, ctx.is_rowwise)
        return grad_output, None, None, None


def _look(sampler: Sampler, seen: Tensor, layer: Any, args: Any, output: Any) -> Any:
    """Look at one call; a forward hook, so what it returns takes the output's place."""
    if not layer.fp8_active or not layer.fp8_sampled:
        return None
    if torch.compiler.is_compiling():
        sampler.hooks_stay = True
    if args and isinstance(args[0], Tensor) and args[0].numel():
        with torch.no_grad():
            _keep_worst(seen[0], args[0], *_cast(layer, "input"))
    if isinstance(output, Tensor) and output.requires_grad and output.numel():
        cast = _cast(layer, "grad_output")
        return GradTap.apply(output, seen[2], *cast)  # type: ignore[no-untyped-call]  # torch's own
    return None


def _cast(layer: Any, operand: str) -> tuple[torch.dtype | None, bool]:
    """Return the FP8 dtype to which an operand is cast, None if it is not, and whether by rows."""
    cast = getattr(layer.config, f"cast_config_{operand}")
    dtype = None if cast.scaling_type.name == "DISABLED" else cast.target_dtype
    return dtype, cast.scaling_granularity.name == "AXISWISE"


def _keep_worst(seen: Tensor, value: Tensor, dtype: torch.dtype | None, is_rowwise: bool) -> None:
    if dtype is not None:
        seen.copy_(torch.maximum(seen, range_shares(value.detach(), dtype, is_rowwise=is_rowwise)))


def range_shares(x: Tensor, dtype: torch.dtype, *, is_rowwise: bool) -> Tensor:
    """Return [underflow, saturated] of an operand that is cast to an FP8 dtype, on its device."""
    x = local_part(x)
    rows = x.reshape(-1, x.shape[-1]) if is_rowwise else x.reshape(-1)
    sample = rows[:: 1 + x.numel() // MOST_ELEMENTS].float().abs()
    if is_rowwise:
        amax = sample.amax(dim=1, keepdim=True)
    else:
        amax = torch.stack(torch.aminmax(rows)).abs().amax().float()
    limits = torch.finfo(dtype)
    scaled = sample * (limits.max / amax.clamp(min=SMALLEST_AMAX))
    half_smallest = limits.smallest_normal * limits.eps / 2
    flushed = ((scaled <= half_smallest) & (sample > 0)).sum() / (sample > 0).sum().clamp(min=1)
    saturated = (~(scaled <= limits.max * ABOVE)).float().mean()  # written so that NaN counts
    return torch.stack([flushed, saturated])
