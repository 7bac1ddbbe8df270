"""A layer run again alone, on what went through it in a pass.

A layer replayed in another precision on the very inputs and output gradients of the reference shows
its own error, nothing carried over from other layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from autoprec.device.memory import is_out_of_memory
from autoprec.device.random_state import seed_generators
from autoprec.device.ranks import sharded_tensor
from autoprec.model.recording import Call, Gradients, output_tensors, recorded_calls
from autoprec.sensitivity.hooks import without_hooks
from autoprec.sensitivity.parked import Parked
from autoprec.sensitivity.real import real_view

KEEP = torch.bfloat16  # how errors are stored: 0.2 % off, a half of the memory


@dataclass(frozen=True)
class Replayed:
    """What a layer's calls gave, one after the other: outputs, input and parameter gradients."""

    outputs: list[Tensor]
    input_gradients: list[Tensor]  # of no dimension where none came
    # by parameter, summed over the calls; that of one call has the parameter's dtype, and memory of
    # its own
    parameter_gradients: dict[Tensor, Tensor]


@dataclass
class Watched:
    """What went through layers in a pass, by layer name.

    `unseen` has the layers that act on the loss otherwise, too, than by what the gradients tell:
    called under no_grad, for an output that is detached, for a gradient that the loss is made of.
    """

    calls: dict[str, list[Call]]
    unseen: set[str] = field(default_factory=set)

    def begin_backward(self) -> None:
        """Forget the gradients until now, which `loss_fn` took of something else on its way."""
        for call in chain.from_iterable(self.calls.values()):
            call.gradients = [None] * len(call.gradients)


@contextmanager
def differentiated_calls(
    layers: Mapping[str, nn.Module], *, is_parked: bool = False
) -> Iterator[Watched]:
    """Record every layer's calls inside; on leaving, only those that a gradient came back to.

    Where they are parked, a call's tensors leave as soon as its gradient is there.

    Activation checkpointing calls a layer twice; the call that has no gradient is dropped. Frozen
    layers are watched as well: their errors change the gradients of others.
    """
    parked = Parked()

    def arrived(call: Call) -> None:
        if is_parked:
            parked.leave([call], passing="gradients")

    with recorded_calls(
        layers, keep=Tensor.detach, gradients=Gradients.ALL, placed=True, arrived=arrived
    ) as calls:
        watched = Watched(calls)
        yield watched
    for name, found in calls.items():
        calls[name] = [c for c in found if any(g is not None for g in c.gradients)]
        are_again = any(call.in_backward for call in found)
        if (len(calls[name]) < len(found) and not are_again) or any(c.obstacle for c in found):
            watched.unseen.add(name)


class OtherwiseAloneError(Exception):
    """A layer does otherwise when it is run again: its arguments or it have changed since."""


def floating_inputs(call: Call) -> list[Tensor]:
    """Return the floating tensors among a call's arguments, in order."""
    return output_tensors((call.args, call.kwargs))


def replay(
    layer: nn.Module, calls: Sequence[Call], *, seed: int, exact: Replayed | None = None
) -> Replayed:
    """Run a layer forward and backward on recorded calls, as it stands now.

    The same seed draws the same dropout masks, so two replays differ in precision only. Where an
    `exact` one is given, outputs and input gradients are returned less its own, which it loses.

    Raises:
        OtherwiseAloneError: it fails, or gives other shapes: a cache was filled since, say.
    """
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    totals: dict[Tensor, Tensor] = {}
    outputs: list[Tensor] = []
    input_gradients: list[Tensor] = []
    exact_outputs = None if exact is None else exact.outputs
    exact_gradients = None if exact is None else exact.input_gradients
    for number, call in enumerate(calls):
        seed_generators(seed + number)
        # leaves of their own graph; floating ones always get a gradient
        args, kwargs = tree_map_only(
            Tensor,
            lambda t: t.detach().requires_grad_(t.is_floating_point()),
            (call.args, call.kwargs),
        )
        inputs = output_tensors((args, kwargs))
        produced = _outputs_again(layer, call, args, kwargs)
        # the loss's own gradient goes in at every output that it came back to in the pass
        pairs = [
            (_root(y), g.to(y.dtype))
            for y, g in zip(produced, call.gradients, strict=True)
            if g is not None and y.requires_grad
        ]
        outputs += [_less(exact_outputs, y.detach().float()) for y in produced]
        del produced
        found = _gradients(layer, pairs, [*inputs, *trained])
        of_inputs = (found.pop(x).float() if x in found else torch.zeros(()) for x in inputs)
        input_gradients += [_less(exact_gradients, g) for g in of_inputs]
        _add_up(totals, found, passed={g.untyped_storage()._cdata for _, g in pairs})
    for parameter in trained:
        if parameter not in totals:
            totals[parameter] = real_view(torch.zeros_like(parameter)).float()
    return Replayed(outputs, input_gradients, totals)


def _gradients(
    layer: nn.Module, pairs: Sequence[tuple[Any, Tensor]], wanted: Sequence[Tensor]
) -> dict[Tensor, Tensor]:  # Any: tensors, or edges of autograd
    """Return the gradients that arrive, from outputs and the loss's gradients there."""
    if not pairs or not wanted:
        return {}
    roots, gradients = zip(*pairs, strict=True)
    with without_hooks(layer):  # the norm of its errors runs them, see hooks.py
        given = torch.autograd.grad(roots, wanted, gradients, allow_unused=True)
    arrived = ((t, g) for t, g in zip(wanted, given, strict=True) if g is not None)
    # an embedding's, made with sparse=True, is not strided
    return {t: real_view(g.to_dense() if g.is_sparse else g) for t, g in arrived}


def _outputs_again(
    layer: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:  # Any: whatever the layer takes
    """Return the floating outputs of a layer that is run again, in the shapes that they had."""
    try:
        produced = [_added_up(layer, y) for y in output_tensors(layer(*args, **kwargs))]
    except (RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise OtherwiseAloneError from error
    shapes = [None if g is None else g.shape for g in call.gradients]
    if len(produced) != len(shapes) or any(
        shape is not None and shape != y.shape for y, shape in zip(produced, shapes, strict=True)
    ):
        raise OtherwiseAloneError
    return produced


def _add_up(totals: dict[Tensor, Tensor], found: dict[Tensor, Tensor], passed: set[int]) -> None:
    """Add a call's parameter gradients; `passed` are the storages of what came in."""
    for parameter, own in found.items():
        if (before := totals.get(parameter)) is not None:
            totals[parameter] = before.float() + own
        else:  # one call: kept as it is, no sum beside it
            # what is added to the output has its very gradient, or two have the same
            key = own.untyped_storage()._cdata
            totals[parameter] = own.clone() if key in passed else own
            passed.add(key)


def _added_up(layer: nn.Module, y: Any) -> Tensor:  # Any: a tensor or DTensor
    """Return the sum over ranks of what a divided embedding gives, as the model takes it at once.

    Until then its mask is on a shelf that all embeddings of that shape share.
    """
    if isinstance(layer, nn.Embedding) and isinstance(y, sharded_tensor()):
        from torch.distributed.tensor import Replicate

        parts = [Replicate() if p.is_partial() else p for p in y.placements]
        return y.redistribute(placements=parts)  # type: ignore[no-any-return]  # a DTensor
    return y  # type: ignore[no-any-return]  # a tensor


def _root(y: Tensor) -> Tensor | GradientEdge:
    """Return where a backward pass begins; it needs no more of what a plain tensor holds."""
    return get_gradient_edge(y) if type(y) is Tensor and y.grad_fn is not None else y


def _less(exact: list[Tensor] | None, rounded: Tensor) -> Tensor:
    """Return a tensor, or its difference from the first of the exact ones, which is taken out."""
    if exact is None:
        return rounded
    own = exact.pop(0)
    if own.shape != rounded.shape:  # no gradient came in one of the two
        return torch.zeros(())
    if type(own) is not Tensor:  # a DTensor
        return (rounded - own).to(KEEP)
    # not in place: a layer may hand on what it was given
    return torch.sub(rounded, own, out=torch.empty_like(own, dtype=KEEP))
