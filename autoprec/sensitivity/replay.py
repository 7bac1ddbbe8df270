"""What went through each layer in a pass, and the same layer run again alone on it.

A layer replayed in another precision on the very inputs and output gradients of the reference shows
its own error, nothing carried over from other layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoprec.workload.functions import batch_tensors


@dataclass
class Call:
    """One call of a layer: its arguments (detached) and what came back to its outputs.

    `inputs` are the floating tensors among the arguments, `gradients` belong to the floating
    outputs in order; None where the loss does not depend on one.
    """

    args: tuple[Any, ...]  # Any: whatever the layer takes
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    gradients: list[Tensor | None] = field(default_factory=list)


@dataclass(frozen=True)
class Replayed:
    """A layer's outputs, input gradients (per call) and parameter gradients (summed over calls)."""

    outputs: list[list[Tensor]]
    input_gradients: list[list[Tensor | None]]
    parameter_gradients: list[Tensor]


@contextmanager
def recorded_calls(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Record every layer's calls inside; on leaving, only those that a gradient came back to.

    Activation checkpointing calls a layer twice; the call that has no gradient is dropped.
    """
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(_recorder(calls[name]), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for name, found in calls.items():
            calls[name] = [c for c in found if any(g is not None for g in c.gradients)]


def replay(layer: nn.Module, calls: Sequence[Call], *, seed: int) -> Replayed:
    """Run a layer forward and backward on recorded calls, as it stands now.

    The same seed draws the same dropout masks, so two replays differ in precision only.
    """
    parameters = [p for p in layer.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    outputs: list[list[Tensor]] = []
    input_gradients: list[list[Tensor | None]] = []
    for number, call in enumerate(calls):
        torch.manual_seed(seed + number)
        args, kwargs = tree_map(_leaf, (call.args, call.kwargs))
        inputs = [t for t in batch_tensors([*args, *kwargs.values()]) if t.is_floating_point()]
        produced = floating(layer(*args, **kwargs))
        wanted = [t for t in (*inputs, *parameters) if t.requires_grad]
        pairs = [
            (y, g.to(y.dtype))
            for y, g in zip(produced, call.gradients, strict=True)
            if g is not None and y.requires_grad
        ]
        found = _gradients(pairs, wanted)
        outputs.append([y.detach().float() for y in produced])
        input_gradients.append([found.get(id(t)) for t in inputs])
        for total, parameter in zip(totals, parameters, strict=True):
            if found.get(id(parameter)) is not None:
                total += found[id(parameter)]  # type: ignore[arg-type]  # just checked
    return Replayed(outputs, input_gradients, totals)


def floating(output: Any) -> list[Tensor]:  # Any: whatever a layer returns
    """Return the floating tensors in a layer's output, in order."""
    return [t for t in batch_tensors([output]) if t.is_floating_point()]


def _gradients(
    pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]
) -> dict[int, Tensor | None]:
    if not pairs or not wanted:
        return {}
    found = torch.autograd.grad(
        [y for y, _ in pairs], list(wanted), [g for _, g in pairs], allow_unused=True
    )
    return {
        id(t): None if g is None else g.detach().float() for t, g in zip(wanted, found, strict=True)
    }


def _leaf(value: Any) -> Any:  # Any: leaves of an argument tree
    """Return a tensor as a leaf of its own graph; floating ones always get a gradient."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.is_floating_point())


def _recorder(calls: list[Call]):  # type: ignore[no-untyped-def]  # a forward hook
    def record(
        _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not torch.is_grad_enabled():
            return
        detached_args, detached_kwargs = tree_map(_detached, (args, kwargs))
        inputs = [
            t
            for t in batch_tensors([*detached_args, *detached_kwargs.values()])
            if t.is_floating_point()
        ]
        call = Call(detached_args, detached_kwargs, inputs)
        for place, tensor in enumerate(floating(output)):
            call.gradients.append(None)
            if not tensor.requires_grad:
                tensor.requires_grad_()  # frozen so far: its error matters all the same
            tensor.register_hook(_catcher(call, place))  # type: ignore[no-untyped-call]
        calls.append(call)

    return record


def _catcher(call: Call, place: int):  # type: ignore[no-untyped-def]  # a tensor hook
    def catch(gradient: Tensor) -> None:
        before = call.gradients[place]
        call.gradients[place] = gradient.detach() if before is None else before + gradient.detach()

    return catch


def _detached(value: Any) -> Any:  # Any: leaves of an argument tree
    return value.detach() if isinstance(value, Tensor) else value
