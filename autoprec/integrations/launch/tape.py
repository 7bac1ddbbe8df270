"""The operations between a model's output and its loss -> a torch.fx graph to run on other outputs.

While a `Tape` is open, every call of a torch function that has the model's output in its arguments,
or a result of such a call, becomes a node of the graph. Tensors that no node made are its inputs:

    output      a tensor in what the model returned
    parameter   a parameter of the model (a penalty on the weights, a tied head)
    constant    any other tensor (targets, masks), copied when it is first used

What is computed without the output is a constant. Numbers that a script takes out of tensors
(`.item()`) stay the numbers that they were.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_map

from autoprec.errors import WorkloadError

Value = Any  # Any: whatever a script hands to torch or a model returns
_READ_GRADIENT = getattr(Tensor.grad, "__get__", None)  # a getter in C, which has no type
GRADIENT_HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
FACTORS = ("mul", "__mul__", "__rmul__", "div", "__truediv__")


class Source(StrEnum):
    """What an input of a graph is."""

    OUTPUT = "output"
    PARAMETER = "parameter"
    CONSTANT = "constant"
    DEVICE = "device"  # no tensor: the device that the model is on
    UNKNOWN = "unknown"  # depends on weights in a way that was not seen; its index says in which


@dataclass(frozen=True)
class Known:
    """What a tape knows of a tensor, as it was when the tape last saw it."""

    node: fx.Node
    version: int
    requires_grad: bool

    def is_still(self, tensor: Tensor) -> bool:
        """Whether nothing unseen happened to it since: another value, or a graph of its own."""
        if self.node.meta.get("source") is Source.CONSTANT and tensor._version != self.version:
            return False
        return self.requires_grad or not tensor.requires_grad  # a custom autograd.Function's result


class Taping(TorchFunctionMode):
    """Hands every call of a torch function to the tape that is open, if one is."""

    tape: "Tape | None" = None

    def __torch_function__(
        self,
        func: Callable[..., Value],
        types: Sequence[type],
        args: tuple[Value, ...] = (),
        kwargs: dict[str, Value] | None = None,
    ) -> Value:
        """Run the function, taped or not."""
        if self.tape is None:
            return func(*args, **(kwargs or {}))
        return self.tape.run(func, args, kwargs or {})


class Tape:
    """Records what happens to one output of a model."""

    def __init__(self, output: Value, model: nn.Module) -> None:
        self.constants: list[Tensor] = []
        self.graph = fx.Graph()
        self._known: dict[int, Known] = {}  # by id
        self._kept: list[Tensor] = []  # alive, so that no other tensor gets an id of these
        self._device = next(model.parameters()).device
        for index, parameter in enumerate(model.parameters()):
            self._name(parameter, self._input(Source.PARAMETER, index))
        for index, tensor in enumerate(tensors_in(output)):
            self._name(tensor, self._input(Source.OUTPUT, index))

    def run(
        self, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> Value:
        """Run a function and record it if the output plays a part in it."""
        tensors = list(tensors_in((args, kwargs)))
        is_live = any(id(tensor) in self._known for tensor in tensors)
        if not is_live or function is _READ_GRADIENT:
            return function(*args, **kwargs)
        # nodes are taken before the call, which may write into its arguments: a constant is copied
        # as it was, and torch counts the writes in `_version`
        nodes = map_aggregate((args, kwargs), self._node)
        versions = [tensor._version for tensor in tensors]
        meta = {"has_grad": torch.is_grad_enabled()}
        result = function(*args, **kwargs)
        written = [t for t, v in zip(tensors, versions, strict=True) if t._version != v]
        if function in GRADIENT_HOOKS:  # it changes gradients, in a way that no replay repeats
            self._input(Source.UNKNOWN, "a gradient hook").meta["writes"] = True
        elif written or any(True for _ in tensors_in(result)):  # not .item(), or a shape
            self._record(function, nodes, meta, result=result, written=written)
        return result

    def _record(
        self,
        function: Callable[..., Value],
        nodes: Any,  # Any: the arguments, with nodes in them
        meta: dict[str, bool],
        *,
        result: Value,
        written: list[Tensor],
    ) -> None:
        """Append a call to the graph, and name the tensors that it made or changed."""
        call = self.graph.call_function(function, *nodes)
        call.meta.update(meta, writes=bool(written))
        # a tensor that was changed in place keeps its node, of which the replay changes the value;
        # so do those that are views of the same storage
        for tensor in self._sharing(written):
            node = self._known[id(tensor)].node
            node.meta["is_written"] = True
            self._name(tensor, node)
        if isinstance(result, Tensor):
            self._name(result, call)
            return
        for index, tensor in enumerate(tensors_in(result)):
            node = self.graph.call_function(_nth_tensor, (call, index))
            node.meta.update(meta)
            self._name(tensor, node)

    def finish(self, root: Tensor) -> None:
        """Let the graph lead to `root`, without the nodes that do not matter to it.

        Raises:
            Untaped: a node that matters has an operand of which the origin was not seen.
        """
        self.graph.output(self._node(root))
        _drop_unused(self.graph)
        for node in self.graph.nodes:
            if node.meta.get("source") is Source.UNKNOWN:
                raise Untaped(node.meta["index"])

    def _sharing(self, written: list[Tensor]) -> list[Tensor]:
        """Return all known tensors that a write in place changed: also those it was a view of."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in written}
        known = {id(tensor): tensor for tensor in self._kept} if storages else {}
        return [t for t in known.values() if t.untyped_storage().data_ptr() in storages]

    def _name(self, tensor: Tensor, node: fx.Node) -> None:
        self._known[id(tensor)] = Known(node, tensor._version, tensor.requires_grad)
        self._kept.append(tensor)

    def _input(self, source: Source, index: int | str = 0) -> fx.Node:
        node = self.graph.placeholder(source.value)
        node.meta.update(source=source, index=index)
        return node

    def _node(self, value: Value) -> Value:
        """Return the node that stands for an argument, or the argument if it is no tensor."""
        if isinstance(value, torch.device):
            return self._input(Source.DEVICE) if value.type == self._device.type else value
        if not isinstance(value, Tensor):
            return value
        known = self._known.get(id(value))
        if known is not None and known.is_still(value):
            return known.node
        if value.requires_grad:  # it hangs on weights, and no call that was seen made it
            name = value.grad_fn.name() if value.grad_fn is not None else "another parameter"
            return self._input(Source.UNKNOWN, name)
        node = self._input(Source.CONSTANT, len(self.constants))
        self.constants.append(copied(value))
        self._name(value, node)
        return node


class Untaped(Exception):  # noqa: N818 - the tape's answer to its caller, no user sees it
    """The loss depends on something that no node made; the message names it."""


def replay(graph: fx.Graph, model: nn.Module, output: Value, constants: Sequence[Tensor]) -> Tensor:
    """Run a graph on what the model returned, and return the loss.

    Raises:
        WorkloadError: the model returns something else than when it was recorded.
    """
    parameters = list(model.parameters())
    inputs: dict[Source, Sequence[Value]] = {
        Source.OUTPUT: list(tensors_in(output)),
        Source.PARAMETER: parameters,
        Source.CONSTANT: constants,
        Source.DEVICE: [parameters[0].device],
    }
    values: dict[fx.Node, Value] = {}
    for node in graph.nodes:  # in the order of the script, which writes in place depend on
        if node.op == "placeholder":
            given, index = inputs[node.meta["source"]], node.meta["index"]
            if index >= len(given):
                raise WorkloadError(
                    "a recorded model must return what it returned in the script, but it gave "
                    f"{len(given)} tensors and the loss needs number {index + 1}; write a "
                    "model.py (see the README)"
                )
            # a constant that calls write into starts afresh each time
            is_changed = node.meta["source"] is Source.CONSTANT and "is_written" in node.meta
            values[node] = given[index].clone() if is_changed else given[index]
        elif node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.set_grad_enabled(node.meta["has_grad"] and torch.is_grad_enabled()):
                values[node] = node.target(*args, **kwargs)
    loss: Tensor = values[_root(graph)]
    return loss


def remove_scale(graph: fx.Graph, constants: Sequence[Tensor], *, micro_steps: int) -> None:
    """Take the loss's last factors out: accumulation's 1/n, GradScaler's scale."""
    while (root := _root(graph)).op == "call_function" and _name_of(root.target) in FACTORS:
        # a product or quotient of one tensor of the graph and one factor: go back to the tensor
        sides = [value for value in root.args if not _is_factor(value, constants, micro_steps)]
        if len(root.args) != 2 or len(sides) != 1 or not isinstance(sides[0], fx.Node):
            break
        graph.output_node().args = (sides[0],)
    _drop_unused(graph)


def tensors_in(value: Value) -> Iterator[Tensor]:
    """Yield the tensors in a model's output or a function's arguments, always in one order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, f.name) for f in dataclasses.fields(value)])


def copied(value: Value) -> Value:
    """Return a copy on the CPU of nested values that shares no storage, without its graph."""
    return tree_map(_copied, value)


def _copied(value: Value) -> Value:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).requires_grad_(value.requires_grad)
    other = copy.deepcopy(value)
    return other.to("cpu") if hasattr(other, "to") else other


def _nth_tensor(result: Value, index: int) -> Tensor:
    return list(tensors_in(result))[index]


def _root(graph: fx.Graph) -> Any:  # Any: always a node
    return graph.output_node().args[0]


def _drop_unused(graph: fx.Graph) -> None:
    """Remove what leads to no output; calls that write in place stay, others may read from that."""
    graph.eliminate_dead_code(lambda node: node.op == "output" or node.meta.get("writes", False))


def _name_of(function: Callable[..., Value]) -> str:
    return (resolve_name(function) or "").rpartition(".")[2]


def _is_factor(value: Value, constants: Sequence[Tensor], micro_steps: int) -> bool:
    if isinstance(value, fx.Node):
        index = value.meta["index"] if value.meta.get("source") is Source.CONSTANT else None
        if index is None or constants[index].numel() != 1:
            return False
        scale = float(constants[index])
        return scale > 1 and scale.hex().startswith("0x1.0000000000000p")  # GradScaler's are 2^k
    is_number = isinstance(value, int | float) and micro_steps > 1
    return is_number and value in (micro_steps, 1 / micro_steps)
