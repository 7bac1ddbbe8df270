"""From a model's calls to the loss -> a torch.fx graph that computes it again.

While a `Tape` is open, each call of the model, or of a part of it, is a node of the graph, and so
is every call of a torch function that has its output in the arguments, or a result of such a call.
What no node made is an input of the graph:

    parameter_I   parameter I of the model (a penalty on the weights, a tied head)
    constant_I    any other tensor (targets, masks), copied when it is first used
    device        the device that the model is on
    NAME          a tensor that a call of the model left as an attribute of it (an auxiliary loss)
    unseen        depends on weights in a way that was not seen: no loss may need it

What is computed without the output is a constant. Numbers that a script takes out of tensors
(`.item()`) stay the numbers that they were.
"""

import copy
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import EllipsisType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function as AutogradFunction
from torch.fx.node import map_aggregate, map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from autoprec.errors import WorkloadError
from autoprec.integrations.launch.alive import find_roots
from autoprec.integrations.launch.patches import Function
from autoprec.model.recording import nodes_behind
from autoprec.runtime.activations import ActivationMode
from autoprec.workload.functions import move_batch, tensors_in
from autoprec.workload.written import LOW_PRECISION

Value = Any  # Any: whatever a script hands to torch or a model returns
READ_GRADIENT = getattr(Tensor.grad, "__get__", None)  # a getter in C, which has no type
ADD_HOOK: Function = Tensor.register_hook
PLAIN = (Tensor, int, float, complex, str, NoneType, slice, EllipsisType, torch.dtype, torch.device)
FACTORS: tuple[Function, ...] = (torch.mul, Tensor.mul, torch.div, Tensor.div)


class Known(NamedTuple):
    """A tensor that a node stands for, as it was when the tape last saw it."""

    tensor: Tensor  # alive, so that no other tensor gets its id
    node: fx.Node
    version: int
    requires_grad: bool


@dataclass(frozen=True)
class FromTape:
    """Stands, in what a script gave its model, for a tensor that a node made."""

    index: int  # among such arguments of one call


class Taping(TorchFunctionMode):
    """Hands every call of a torch function to the tape that is open, if one is."""

    tape: "Tape | None" = None

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Any = None
    ) -> Value:
        """Run the function, taped or not."""
        if self.tape is None:
            return func(*args, **(kwargs or {}))
        return self.tape.run(func, args, kwargs or {})

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Be the mode, and see autograd functions of the script too, for which torch has none."""
        own = vars(AutogradFunction).get("apply")  # of Python, or inherited from C++

        def apply(cls: type[AutogradFunction], *args: Any, **kwargs: Any) -> Value:
            above: Any = super(AutogradFunction, cls)  # Any: torch's stubs have no apply there
            call = above.apply if own is None else own.__get__(None, cls)
            tape = self.tape
            if tape is None or not all(isinstance(x, PLAIN) for x in tree_leaves((args, kwargs))):
                return call(*args, **kwargs)  # a function or a module would hide weights
            self.tape = None  # what is in it runs again with it
            try:
                return tape.run(call, args, kwargs)
            finally:
                self.tape = tape

        AutogradFunction.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
        try:
            with self:
                yield
        finally:
            if own is None:
                del AutogradFunction.apply
            else:
                AutogradFunction.apply = own  # type: ignore[method-assign]


class Tape:
    """Records the calls of a model and what happens to their outputs."""

    def __init__(self, device: torch.device) -> None:
        self.calls = 0  # so far
        self.constants: list[Tensor] = []
        self.graph = fx.Graph()
        self.has_changed_gradient = False  # by a hook: no replay repeats it
        self._known: dict[int, Known] = {}  # by id
        self._device = device

    def take(self, inputs: Value) -> tuple[Value, list[fx.Node]]:
        """Return a copy of a call's arguments, and the nodes of those tensors that have one."""
        nodes: list[fx.Node] = []

        def taken(value: Value) -> Value:
            known = self._known.get(id(value))
            if (known is None or "constant" in known.node.meta) and _is_leaf(value):
                # the loss may ask for the gradient of it
                nodes.append(self._node(value, is_input=True))
            elif known is None or known.node.op == "placeholder":
                return _copied(value)
            else:
                nodes.append(known.node)
            return FromTape(len(nodes) - 1)

        return tree_map(taken, inputs), nodes

    def add(self, nodes: list[fx.Node], output: Value, model: nn.Module, *, part: nn.Module) -> int:
        """Record one more call of the model's part (or all), and return the call's number."""
        number = self.calls
        self.calls += 1
        for parameter in model.parameters():
            if id(parameter) not in self._known:
                self._add_parameter(parameter)
        call = self.graph.call_module(str(number), tuple(nodes))
        for index, tensor in enumerate(tensors_in(output, looked_into=set())):
            self._name(tensor, self.graph.call_function(_nth, (call, index)))
        for module in part.modules():
            for name, kept in (*vars(module).items(), *module._buffers.items()):
                if isinstance(kept, Tensor) and kept.grad_fn and id(kept) not in self._known:
                    self._name(kept, self.graph.create_node("get_attr", name, (call,)))
                    self._known[id(kept)].node.meta["module"] = module
        return number

    def has_made(self, value: Tensor) -> bool:
        """Whether a node made this tensor."""
        return id(value) in self._known

    def run(self, function: Function, args: Any, kwargs: Any) -> Value:
        """Run a function and record it if the output plays a part in it."""
        tensors = tensors_in((args, kwargs))
        if function == READ_GRADIENT or not any(id(tensor) in self._known for tensor in tensors):
            return function(*args, **kwargs)
        # nodes are taken before the call, which may write into its arguments: a constant is copied
        # as it was, and torch counts the writes in `_version`
        nodes = map_aggregate((args, kwargs), self._node)
        versions = [tensor._version for tensor in tensors]
        has_grad = torch.is_grad_enabled()
        if function is ADD_HOOK:
            return function(args[0], self._watched(*args[1:], **kwargs))
        result = function(*args, **kwargs)
        written = [t for t, v in zip(tensors, versions, strict=True) if t._version != v]
        made = tensors_in(result)
        if not written and not made:  # .item(), or a shape
            return result
        call = self.graph.call_function(function, *nodes)
        call.meta.update(has_grad=has_grad, writes=set(), writes_weights=False)
        # a tensor that was changed in place keeps its node, of which the replay changes the value;
        # so do those that are views of the same storage
        storages = {_storage(tensor) for tensor in written}
        for known in list(self._known.values()) if written else ():
            if _storage(known.tensor) in storages:
                call.meta["writes"].add(known.node)
                call.meta["writes_weights"] |= "parameter" in known.node.meta
                known.node.meta["is_written"] = True
                self._name(known.tensor, known.node)
        for index, tensor in enumerate(made):
            node = call if tensor is result else self.graph.call_function(_nth, (call, index))
            self._name(tensor, node)
        return result

    def finish(self, root: Tensor) -> str | None:
        """Let the graph lead to `root`, without the nodes that do not matter to it.

        Returns:
            The name of something that `root` depends on and no call made, if there is any.
        """
        self.graph.output(self._node(root))
        _forget_earlier_weights(self.graph)
        _drop_unused(self.graph)
        self._known.clear()  # outputs and their graphs
        return next((n.meta["unseen"] for n in self.graph.nodes if "unseen" in n.meta), None)

    def used_calls(self) -> set[int]:
        """Return the numbers of the calls on whose outputs the finished graph depends."""
        return {int(node.target) for node in self.graph.nodes if node.op == "call_module"}

    def named_graph(self, model: nn.Module) -> fx.Graph:
        """Return the finished graph with parameters by their place in the model."""
        places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        paths = {module: f"{path}." if path else "" for path, module in model.named_modules()}
        for node in self.graph.nodes:
            if "parameter" in node.meta:
                node.target = f"parameter_{places[id(node.meta.pop('parameter'))]}"
            if "module" in node.meta:
                node.target = f"{paths[node.meta.pop('module')]}{node.target}"
        return self.graph

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the finished graph computes with."""
        return [node.meta["parameter"] for node in self.graph.nodes if "parameter" in node.meta]

    def describe(self, value: Tensor) -> str:
        """Say what a tensor with a gradient hangs on, if no call that was seen made it."""
        nodes = [node for node in nodes_behind([value]) if hasattr(node, "variable")]
        for leaf in [node.variable for node in nodes] if value.grad_fn else [value]:
            if id(leaf) not in self._known:
                shape = f"of shape {tuple(leaf.shape)}" if leaf.ndim else "that is one number"
                if isinstance(leaf, nn.Parameter) and (owner := next(find_roots(leaf), None)):
                    return f"a weight {shape} of {type(owner).__name__} that is not the model's"
                return f"a tensor {shape} that requires gradients and is not the model's"
        name = value.grad_fn.name() if value.grad_fn else "a parameter"
        if isinstance(value.grad_fn, torch.autograd.function.BackwardCFunction):
            return f"{name}, of an autograd function of its own"
        return (
            f"{name} of the model's weights, from before the model's call, or from within it and "
            "not returned (a list that the model keeps, a hook, an object that is no container)"
        )

    def _watched(self, hook: Function) -> Function:
        """Return a hook that notes when it gives another gradient; many only look (Fabric's)."""

        def watched(gradient: Tensor) -> Tensor | None:
            found: Tensor | None = hook(gradient)
            self.has_changed_gradient |= found is not None and found is not gradient
            return found

        return watched

    def _name(self, tensor: Tensor, node: fx.Node) -> None:
        self._known[id(tensor)] = Known(tensor, node, tensor._version, tensor.requires_grad)

    def _add_parameter(self, parameter: nn.Parameter) -> fx.Node:
        node = self.graph.placeholder("parameter")
        node.meta["parameter"] = parameter
        self._name(parameter, node)
        return node

    def _node(self, value: Value, *, is_input: bool = False) -> Value:
        """Return the node that stands for an argument, or the argument if it is no tensor."""
        if isinstance(value, torch.device):
            return self.graph.placeholder("device") if value.type == self._device.type else value
        if not isinstance(value, Tensor):
            return value
        known = self._known.get(id(value))
        if known is not None:
            # unless something unseen happened since: another value, or a graph of its own, which
            # a custom autograd.Function's result gets late
            is_written = "constant" in known.node.meta and value._version != known.version
            if not is_written and (known.requires_grad or not value.requires_grad):
                return known.node
        if value.requires_grad and isinstance(value, nn.Parameter):
            return self._add_parameter(value)  # whose model may be seen later: PPO's log_std
        if value.requires_grad and not is_input:  # of weights, and no call that was seen made it
            node = self.graph.placeholder("unseen")
            node.meta["unseen"] = self.describe(value)
            return node
        node = self.graph.placeholder(f"constant_{len(self.constants)}")
        node.meta["constant"] = len(self.constants)
        self.constants.append(_copied(value))
        self._name(value, node)
        return node


def replay(
    graph: fx.Graph, model: nn.Module, call: Callable[..., Value], constants: Sequence[Tensor]
) -> Tensor:
    """Run a graph, in which `call(number, *made)` calls the model, and return the loss.

    `made` are those of the call's tensors that nodes made (`FromTape`). Of a model that a script
    holds in 16 bit and that gives FP32 here, operands of two dtypes meet: they are made FP32.
    """
    parameters = list(model.parameters())
    inputs: dict[str, Value] = {"device": parameters[0].device}
    fresh = [c.detach().requires_grad_(c.requires_grad) for c in constants]  # without a gradient
    for name, tensors in (("parameter", parameters), ("constant", fresh)):
        inputs |= {f"{name}_{index}": tensor for index, tensor in enumerate(tensors)}
    is_mixed = any(tensor.dtype in LOW_PRECISION for tensor in constants)
    values: dict[fx.Node, Value] = {}
    for node in graph.nodes:  # in the order of the script, which writes in place depend on
        if node.op == "placeholder":
            # a constant that calls write into starts afresh each time
            is_changed = "constant" in node.meta and "is_written" in node.meta
            values[node] = inputs[node.target].clone() if is_changed else inputs[node.target]
        elif node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            has_grad = node.meta.get("has_grad", True) and torch.is_grad_enabled()
            mode = ActivationMode(torch.float32) if is_mixed else nullcontext()
            with torch.set_grad_enabled(has_grad), mode:
                values[node] = node.target(*args, **kwargs)
        elif node.op == "call_module":
            values[node] = call(int(node.target), *map_arg(node.args, values.__getitem__))
            outputs = tensors_in(values[node])
            is_mixed = is_mixed and not any(t.dtype in LOW_PRECISION for t in outputs)
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(model)
    loss: Tensor = values[_root(graph)]
    return loss


def remove_scale(graph: fx.Graph, constants: Sequence[Tensor], *, micro_steps: int) -> None:
    """Take the loss's last factors out: accumulation's 1/n, GradScaler's scale.

    A step of a workload takes the mean over its batches. Where the script takes their sum, as
    transformers' Trainer does with the tokens of all batches under each loss, a factor n goes in.
    """
    takes_mean = micro_steps == 1
    while (root := _root(graph)).op == "call_function" and root.target in FACTORS:
        # a product or quotient of one tensor of the graph and one factor: go back to the tensor
        sides = [value for value in root.args if not _is_factor(value, constants, micro_steps)]
        if len(root.args) != 2 or len(sides) != 1 or not isinstance(sides[0], fx.Node):
            break
        takes_mean |= any(_is_accumulation(value, micro_steps) for value in root.args)
        graph.output_node().args = (sides[0],)
    if not takes_mean:
        with graph.inserting_before(graph.output_node()):
            graph.output_node().args = (graph.call_function(torch.mul, (root, micro_steps)),)
    _drop_unused(graph)


def _is_leaf(value: Value) -> bool:
    """Whether it is a tensor, and no weight, whose gradient somebody wants."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return False
    return value.is_leaf and value.requires_grad


def _copied(value: Value) -> Value:
    """Return a copy on the CPU that shares no storage, without its graph."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).requires_grad_(value.requires_grad)
    return move_batch(copy.deepcopy(value), torch.device("cpu"))


def _nth(result: Value, index: int) -> Tensor:
    tensors = tensors_in(result, looked_into=set())
    if index >= len(tensors):
        raise WorkloadError(
            "a recorded model must return all that it returned in the script, but it gave "
            f"{len(tensors)} tensors and the loss needs more; write a model.py (see the README)"
        )
    return tensors[index]


def _root(graph: fx.Graph) -> Any:  # Any: always a node
    return graph.output_node().args[0]


def _drop_unused(graph: fx.Graph) -> None:
    """Remove what leads to no output, also through what it writes: weights, or what others read."""
    writers: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for written in node.meta.get("writes", ()):
            writers[graph.output_node() if node.meta["writes_weights"] else written].append(node)
    needed, waiting = set[fx.Node](), [graph.output_node()]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [*node.all_input_nodes, *writers[node]]
    graph.eliminate_dead_code(needed.__contains__)


def _forget_earlier_weights(graph: fx.Graph) -> None:
    """Let what was written into weights before the first call that the loss needs be no write.

    The weights are recorded as they are at that call: after one on trial scripts initialize them.
    """
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            needed.update(node.all_input_nodes)
    for node in graph.nodes:
        if node.op == "call_module" and node in needed:
            return
        if node.meta.get("writes_weights"):
            node.meta["writes"] = set()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_factor(value: Value, constants: Sequence[Tensor], micro_steps: int) -> bool:
    if isinstance(value, fx.Node):
        index = value.meta.get("constant")
        if index is None or constants[index].numel() != 1:
            return False
        scale = float(constants[index])
        return scale > 1 and math.frexp(scale)[0] == 0.5  # GradScaler's are 2^k
    return _is_accumulation(value, micro_steps)


def _is_accumulation(value: Value, micro_steps: int) -> bool:
    is_number = isinstance(value, int | float) and micro_steps > 1
    return is_number and value in (micro_steps, 1 / micro_steps)
