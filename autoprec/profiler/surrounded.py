"""A layer between what makes its input and what takes its output, as one function to compile.

Casts are what FP8 costs, and a compiler fuses them with the layer's neighbours. With c(o) the time
of before -> layer in option o -> behind, forward and backward, and a(o) that of the layer alone,
both compiled:

    total(o) = c(o) - x        for every FP8 option o
    x        = c(bf16) - a(bf16)

The neighbours' own time x is common to all options, so total(fp8) - total(bf16) is what a compiled
step saves, and the totals of all layers still add up with what lies between them. FP32 and BF16
layers have no casts to fuse: theirs are a(fp32) and a(bf16).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from autoprec.model.neighbours import Neighbour, Surroundings
from autoprec.model.recording import Call


class Surrounded(nn.Module):
    """A layer and its neighbours; called with the arguments of both neighbours."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        super().__init__()
        found = call.surroundings or Surroundings()
        self.layer = layer
        self.before, self.behind = found.before, found.behind

    def forward(self, before: Any, behind: Any) -> Any:  # Any: as `_arguments` has them
        """Run what there is of the neighbours, and the layer between them."""
        x = before
        if self.before is not None:
            args, kwargs = before
            x = self.before.function(*args, **kwargs).reshape(self.before.shape)
        y = self.layer(x)
        if self.behind is None or self.behind.place is None:
            return y
        args, kwargs = behind
        taken = [*args]
        taken[self.behind.place] = y.reshape(self.behind.shape)
        return self.behind.function(*taken, **kwargs)


def surrounded_calls(calls: Sequence[Call]) -> list[Call] | None:
    """Return the calls of a layer in its surroundings; None where there is nothing to fuse with.

    A layer that a step trains in several calls, or calls with more than one tensor, is timed alone.
    """
    shapes = {tuple(getattr(arg, "shape", ())) for call in calls for arg in call.args}
    is_plain = all(len(call.args) == 1 and not call.kwargs for call in calls)
    if not is_plain or len(shapes) != 1 or sum(map(_is_trained, calls)) != 1:
        return None
    # Of a checkpointed layer's two passes one runs within backward, where nothing is watched.
    found = max((c.surroundings or Surroundings() for c in calls), key=lambda one: len(one.names))
    return [_surrounded_call(call, found) for call in calls] if found.names else None


def _surrounded_call(call: Call, found: Surroundings) -> Call:
    before = call.args[0] if found.before is None else _arguments(found.before)
    behind = None if found.behind is None else _arguments(found.behind)
    gradients = call.gradients
    if found.behind is not None and _is_trained(call):
        # what came back to the layer has the shape of what came back to an elementwise function
        own = next(gradient for gradient in call.gradients if gradient is not None)
        behind_own = found.behind.gradient
        gradients = [own.reshape(found.behind.shape) if behind_own is None else behind_own]
    return replace(call, args=(before, behind), gradients=gradients, surroundings=found)


def _is_trained(call: Call) -> bool:
    return any(gradient is not None for gradient in call.gradients)


def _arguments(neighbour: Neighbour) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a neighbour's arguments without the layer's output among them."""
    args = list(neighbour.args)
    if neighbour.place is not None:
        args[neighbour.place] = None
    return tuple(args), neighbour.kwargs
