"""Layers and one pass -> what each was called with, and the gradients its outputs got back.

The one hook recorder. Every argument tensor goes through `keep`, which says what stays of it: the
tensor itself, detached, where the layer is run again alone; its shape and dtype where only these
are asked for, so that recording holds no memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map, tree_map_only

from autoprec.device.ranks import local_part
from autoprec.model.local_copy import is_divided
from autoprec.model.neighbours import NeighbourWatch, Surroundings, own_kernel
from autoprec.model.options import IN_TRANSFORM, TWICE_DIFFERENTIATED
from autoprec.workload.functions import tensors_in

NO_BACKWARD = -1  # the autograd engine's task where it runs none
Keep = Callable[[Tensor], Any]  # Any: what stays of an argument tensor


class Gradients(Enum):
    """The outputs whose gradients are recorded."""

    NONE = auto()
    NEEDED = auto()  # those that a gradient flows to anyway
    ALL = auto()  # every floating one, behind frozen layers too: they are made to require one


@dataclass
class Call:
    """One call of a layer; each tensor among its arguments is as `keep` left it."""

    args: tuple[Any, ...]  # Any: whatever the layer takes
    kwargs: dict[str, Any]
    # What came back to each floating output, in order; None where nothing did.
    gradients: list[Tensor | None] = field(default_factory=list)
    count: int = 1  # how many calls were like it, where equal ones are merged
    with_grad: bool = True  # whether autograd recorded it
    in_backward: bool = False  # computed again there, as activation checkpointing does
    surroundings: Surroundings | None = None  # what is beside it, where that was watched
    output_elements: int = 0  # of its floating outputs
    made_by: str = ""  # a kernel of somebody's own that made its input (`own_kernel`)
    obstacle: str = ""  # why FP8 could not run in its place


def detached(tensor: Tensor) -> Tensor:
    """Return this rank's tensor without its history; it needs a gradient if it did."""
    found = local_part(tensor.detach())
    found.requires_grad = tensor.requires_grad  # no `requires_grad_`: transforms refuse that
    return found


def output_tensors(output: Any) -> list[Tensor]:  # Any: whatever a layer gives
    """Return the floating tensors of a layer's output, in order."""
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def nodes_behind(tensors: Iterable[Tensor | Node]) -> Iterator[Node]:
    """Yield the nodes of autograd's graph behind some tensors, each once.

    A node is taken for the tensor that it made.
    """
    nodes = (x.grad_fn if isinstance(x, Tensor) else x for x in tensors)
    waiting = [node for node in nodes if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {behind for behind, _ in node.next_functions if behind is not None} - seen
        seen |= new
        waiting += new


@contextmanager
def recorded_calls(
    layers: Mapping[str, nn.Module],
    *,
    keep: Keep = detached,
    gradients: Gradients = Gradients.NEEDED,
    merged: bool = False,
    watch: NeighbourWatch | None = None,
    placed: bool = False,
    arrived: Callable[[Call], None] = lambda _: None,
) -> Iterator[dict[str, list[Call]]]:
    """Record the calls of layers while the context is open, by layer name.

    `merged` keeps only the first of calls with equal shapes, with their number. A `watch` that is
    entered around the step tells what is beside each call. Divided layers are recorded inside the
    hooks of tensor parallelism, with `placed` gradients as DTensors. `arrived` is called when a
    gradient has.
    """
    found: dict[str, list[Call]] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            recorder = _Recorder(keep, gradients, merged, watch, placed, arrived)
            hook, is_first = recorder.after_forward, is_divided(layer)
            stack.enter_context(
                layer.register_forward_hook(hook, with_kwargs=True, prepend=is_first)
            )
            found[name] = recorder.calls
        yield found


@dataclass
class _Recorder:
    """The forward hook of one layer and the calls that it saw."""

    keep: Keep
    gradients: Gradients
    merged: bool
    watch: NeighbourWatch | None
    placed: bool
    arrived: Callable[[Call], None]
    calls: list[Call] = field(default_factory=list)
    known: dict[object, Call] = field(default_factory=dict)  # by what is equal, where merged

    def after_forward(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:  # Any: the layer's own
        with_grad = torch.is_grad_enabled()
        is_in_backward = torch._C._current_graph_task_id() != NO_BACKWARD
        is_transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if self.merged:
            # Activation checkpointing calls a layer twice: in forward and, to compute it again,
            # within backward. A gradient comes back to one of the two only, so they stay apart.
            key = (with_grad, is_in_backward, is_transformed, _shapes((args, kwargs)))
            if (known := self.known.get(key)) is not None:
                known.count += 1
                _watch_graphs(known, output_tensors(output))
                return
        if is_transformed:
            args, kwargs, output = tree_map_only(Tensor, _untransformed, (args, kwargs, output))
        kept_args, kept_kwargs = _kept(self.keep, (args, kwargs))
        call = Call(kept_args, kept_kwargs, with_grad=with_grad, in_backward=is_in_backward)
        call.output_elements = sum(local_part(each).numel() for each in output_tensors(output))
        call.made_by = own_kernel(args[0]) if args else ""
        if is_transformed:
            call.obstacle = IN_TRANSFORM
        if self.merged:
            self.known[key] = call
        self.calls.append(call)
        is_plain = isinstance(output, Tensor) and bool(args) and isinstance(args[0], Tensor)
        if self.watch is not None and is_plain:
            call.surroundings = self.watch.surround(local_part(args[0]), local_part(output))
        if with_grad and not call.obstacle:
            self._catch_gradients(call, output)

    def _catch_gradients(self, call: Call, output: Any) -> None:  # Any: whatever a layer gives
        tensors = output_tensors(output)
        # what a layer that trains gives without a gradient (a scale) it means to give so
        is_frozen = not any(tensor.requires_grad for tensor in tensors)
        if self.gradients is Gradients.NONE:
            _watch_graphs(call, tensors)
            return
        for place, tensor in enumerate(tensors):
            call.gradients.append(None)
            if self.gradients is Gradients.ALL and is_frozen:
                tensor.requires_grad_()
            if tensor.requires_grad:
                catch = partial(_catch, call, place, self.placed, self.arrived)
                tensor.register_hook(catch)  # type: ignore[no-untyped-call]  # torch


def _untransformed(tensor: Tensor) -> Tensor:
    """Return the values that transforms of torch.func have wrapped, a dimension of vmap's first."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        is_batched, inner = functorch.is_batchedtensor(tensor), functorch.get_unwrapped(tensor)
        tensor = inner.movedim(functorch.maybe_get_bdim(tensor), 0) if is_batched else inner
    return tensor


def _rows(tensor: Tensor) -> Tensor:
    """Return the matrix of the rows of all sequences that a jagged tensor holds."""
    return tensor.values() if tensor.layout is torch.jagged else tensor


def _kept(keep: Keep, values: Any) -> Any:  # Any: a layer's arguments
    """Return the arguments with what is kept of each tensor in its place."""

    def keep_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, PackedSequence):
            return keep(_rows(leaf)) if isinstance(leaf, Tensor) else leaf
        fields: list[Any] = [None if field is None else keep(field) for field in leaf]
        # its constructor takes tensors alone
        return PackedSequence(*fields) if isinstance(fields[0], Tensor) else tuple(fields)

    return tree_map(keep_leaf, values, is_leaf=lambda value: isinstance(value, PackedSequence))


def _catch(
    call: Call, place: int, placed: bool, arrived: Callable[[Call], None], gradient: Tensor | None
) -> None:
    if gradient is None:  # of an autograd function that has none for what the layer gives
        return
    _see_graph(call, gradient)
    own = _rows(gradient.detach())
    before, own = call.gradients[place], own if placed else local_part(own)
    call.gradients[place] = own if before is None else before + own
    arrived(call)


def _watch_graphs(call: Call, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if tensor.requires_grad and not call.obstacle:
            tensor.register_hook(partial(_see_graph, call))  # type: ignore[no-untyped-call]  # torch


def _see_graph(call: Call, _: Tensor | None) -> None:
    """See whether a backward pass records itself, to be differentiated too: `create_graph`."""
    if torch.is_grad_enabled():
        call.obstacle = TWICE_DIFFERENTIATED


def _shapes(arguments: Any) -> tuple[object, ...]:  # Any: whatever the layer takes
    tensors = tensors_in(arguments)
    return tuple((x.shape, x.stride(), x.dtype, x.requires_grad) for x in tensors)
