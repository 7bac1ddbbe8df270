"""Faults for a linear that FP32 does not notice, and times by which FP8 pays everywhere.

rows       two rows of the weight times a power of two, outputs divided by it
gradient   each token's gradient times a power of two on the way in, divided on the way out
channel    one channel of the input times a power of two, its weights 0 and without gradient
offset     so many spreads added to the input, what that does to the output subtracted
sink       one token in 32 times a power of two, its output divided by it
quantised  a weight of 2 n + 1 values (n = 7: 4 bits), which it keeps
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.records import LayerSpec, Option, Precision, Recipe

TOKENS_PER_SINK = 32


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:  # Any: torch's context
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0] * scale.to(gradients[0].dtype), None


class Planted(nn.Module):
    """A linear with a fault; `spread` is that of its inputs."""

    def __init__(self, layer: nn.Linear, kind: str, strength: int, spread: float) -> None:
        super().__init__()
        self.layer, self.kind, self.factor = layer, kind, 2.0**strength
        self.offset = strength * spread
        with torch.no_grad():
            if kind == "rows":
                for parameter in layer.parameters():
                    parameter[:2] *= self.factor
            elif kind == "channel":
                alive = (torch.arange(layer.in_features) != 3).float()
                layer.weight *= alive
                layer.weight.register_hook(lambda g: g * alive.to(g.dtype))  # type: ignore[no-untyped-call]  # torch's
            elif kind == "quantised":
                step = layer.weight.abs().max() / strength
                self.lost = layer.weight - (layer.weight / step).round() * step
                layer.weight -= self.lost
                # 50 steps at a usual rate would leave nothing of the levels
                layer.weight.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]  # torch's

    @torch.no_grad()
    def undo(self) -> None:
        """Take the fault out where training has brought the layer; FP32 computes the same."""
        if self.kind == "rows":
            for parameter in self.layer.parameters():
                parameter[:2] /= self.factor
        elif self.kind == "quantised":
            self.layer.weight += self.lost
        self.kind = "control"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        match self.kind:
            case "rows":
                out = self.layer(x)
                return out / self._at(out, -1, slice(2))
            case "channel":
                out = self.layer(x * self._at(x, -1, slice(3, 4)))
            case "sink":
                scale = self._at(x[..., :1].flatten(0, -2), 0, slice(None, None, TOKENS_PER_SINK))
                scale = scale.view(*x.shape[:-1], 1)
                out = self.layer(x * scale) / scale
            case "gradient":
                tokens = torch.arange(x[..., 0].numel()).view(*x.shape[:-1], 1)
                part = (tokens * 0.618034) % 1.0  # spread evenly, in no order
                scale = torch.exp2(-torch.floor(part * torch.tensor(self.factor).log2()))
                apply: Any = ScaledGradient.apply  # Any: torch has no types for it
                out = apply(self.layer(apply(x, 1.0 / scale)), scale)
            case "offset":
                weight = self.layer.weight.detach()
                out = self.layer(x + self.offset) - self.offset * weight.sum(1)
            case _:
                out = self.layer(x)
        return out

    def _at(self, like: Tensor, dim: int, where: slice) -> Tensor:
        """Return the factor at some places along a dimension, 1 elsewhere."""
        scale = torch.ones(like.shape[dim], dtype=like.dtype)
        scale[where] = self.factor
        return scale if dim == -1 else scale[:, None]


def plant(family: Any, place: str, kind: str, strength: int) -> Any:  # Any: a workload's functions
    """Return the family with the fault; the layer's name becomes `place.layer`."""

    def build_model() -> nn.Module:
        model: nn.Module = family.build_model()
        layer = model.get_submodule(place)
        assert isinstance(layer, nn.Linear)
        seen: list[float] = []
        hook = layer.register_forward_pre_hook(lambda _, x: seen.append(float(x[0].std())))
        with torch.no_grad():
            family.loss_fn(model.train(), next(family.train_batches(0)))
        hook.remove()
        parent, _, own = place.rpartition(".")
        setattr(model.get_submodule(parent), own, Planted(layer, kind, strength, seen[0]))
        return model

    names = ("train_batches", "loss_fn", "build_optimizer")
    return SimpleNamespace(build_model=build_model, **{n: getattr(family, n) for n in names})


def ms_of(option: Option) -> float:
    """Return a time: FP8 pays everywhere, tensorwise most and each GEMM in BF16 less."""
    if option.precision is not Precision.FP8_O1:
        return {Precision.FP32: 4.0, Precision.BF16_O2: 2.0}[option.precision]
    recipes = {Recipe.TENSORWISE: 1.0, Recipe.ROWWISE: 1.1, Recipe.ROWWISE_WITH_GW_HP: 1.25}
    return recipes[Recipe(option.recipe or "")] + 0.2 * len(option.gemms_hp)


def times_of(layer: LayerSpec) -> dict[Option, tuple[float, float]]:
    """Return ms of every option that a plan can apply."""
    return {option: (ms_of(option), 0.0) for option in layer.options}
