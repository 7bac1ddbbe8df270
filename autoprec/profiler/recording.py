"""One real step -> what each layer was called with, and the gradients its outputs got back.

Layers are timed alone on these: real tensors with their strides, because constants draw less power
and zeros skip work. Calls of one shape are kept once, with their number.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from autoprec.model.capture import run_step
from autoprec.workload.functions import Batch, Workload

Shapes = tuple[tuple[tuple[int, ...], tuple[int, ...], bool], ...]


@dataclass
class Call:
    """A layer's arguments in one call, the gradient of every output tensor, and how often."""

    args: tuple[Any, ...]  # Any: whatever the layer takes
    kwargs: dict[str, Any]
    gradients: list[Tensor | None] = field(default_factory=list)
    count: int = 1


def record_step(
    workload: Workload,
    model: nn.Module,
    batch: Batch,
    layers: Mapping[str, nn.Module],
    *,
    seed: int,
) -> dict[str, list[Call]]:
    """Run forward and backward of one batch; return the calls of the given layers by name."""
    recorders = {name: _Recorder() for name in layers}
    with _recording(layers, recorders):
        run_step(workload, model, batch, seed=seed)
    model.zero_grad(set_to_none=True)
    return {name: list(recorder.calls.values()) for name, recorder in recorders.items()}


def output_tensors(output: Any) -> list[Tensor]:  # Any: whatever a layer gives
    """Return the tensors of an output that take part in the backward pass, in order."""
    leaves, _ = tree_flatten(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


@contextmanager
def _recording(
    layers: Mapping[str, nn.Module], recorders: Mapping[str, "_Recorder"]
) -> Iterator[None]:
    handles = []
    for name, layer in layers.items():
        recorder = recorders[name]
        handles.append(layer.register_forward_pre_hook(recorder.before, with_kwargs=True))
        handles.append(layer.register_forward_hook(recorder.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Recorder:
    """Hooks of one layer: the first call of every shape is kept, the others are counted."""

    calls: dict[Shapes, Call] = field(default_factory=dict)
    fresh: Call | None = None  # the call that is running, when it is the first of its shape

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes = _shapes(args, kwargs)
        known = self.calls.get(shapes)
        if known is not None:
            known.count += 1
            self.fresh = None
            return
        self.fresh = self.calls[shapes] = Call(*_detached((args, kwargs)))

    def after(self, _: nn.Module, _args: object, output: Any) -> None:
        call = self.fresh
        if call is None:
            return
        for position, tensor in enumerate(output_tensors(output)):
            call.gradients.append(None)
            tensor.register_hook(_keeper(call, position))  # type: ignore[no-untyped-call]  # torch


def _keeper(call: Call, position: int):  # type: ignore[no-untyped-def]  # a hook
    def keep(gradient: Tensor) -> None:
        call.gradients[position] = gradient.detach()

    return keep


def _detached(value: Any) -> Any:
    """Return the same structure with detached tensors that need a gradient as before."""
    return tree_map_only(
        Tensor, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), value
    )


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
    leaves, _ = tree_flatten((args, kwargs))
    return tuple(
        (tuple(leaf.shape), tuple(leaf.stride()), leaf.requires_grad)
        for leaf in leaves
        if isinstance(leaf, Tensor)
    )
