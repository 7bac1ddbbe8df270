"""Which layers an error of each reaches, by autograd's graph of one pass.

In the order of calls all that is called later comes behind a layer. But branches (experts, towers,
heads) run one after the other and are not in front of each other.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import nn
from torch.autograd.graph import Node

from autoprec.model.layers import layer_named
from autoprec.model.recording import output_tensors
from autoprec.sensitivity.constants import is_in_backward


@dataclass
class Reach:
    """The layers that were called, in this order, and those whose outputs each one's is made of.

    `makers` are they where functions alone come between; None where an output has no history, as
    reentrant checkpointing's.
    """

    makers: dict[str, set[str] | None] = field(default_factory=dict)

    @cached_property
    def in_front(self) -> dict[str, set[str]]:
        """All layers in front of each; without a history all that are called before it.

        One that is called again is in front of and behind what comes between.
        """
        near, unknown, called = dict[str, set[str]](), set[str](), set[str]()
        for name, own in self.makers.items():
            near[name] = set(called) if own is None else own | unknown
            unknown |= {name} if own is None else set()
            called.add(name)
        found, size = {name: set(own) for name, own in near.items()}, -1
        while size != (size := sum(map(len, found.values()))):  # twice, but for loops
            for name, own in near.items():
                found[name].update(*(found[other] for other in own))
        return {name: own - {name} for name, own in found.items()}

    def related(self, model: nn.Module, names: Iterable[str]) -> dict[str, tuple[list[int], ...]]:
        """Return the model's parameters, by place, at or behind each layer, and those in front.

        A parameter is its layer's, of several the one that is called first; what is not called, or
        is no layer's, goes with the parameter before it in the model.
        """
        names, called = list(names), list(self.in_front)
        layers = {name: [*layer_named(model, name).parameters()] for name in names}
        # the first that is called comes last, and stays
        owned = {p: name for name in reversed(called) for p in layers.get(name, ())}
        owners, owner = dict[nn.Parameter, str](), next(iter(called), "")
        for parameter in model.parameters():
            owners[parameter] = owner = owned.get(parameter, owner)
        standing_in = {name: owners[p] for name in names for p in layers[name][:1]}
        every = [*owners.values()]
        return {
            name: self._places(name if name in self.in_front else standing_in.get(name, ""), every)
            for name in names
        }

    def _places(self, name: str, owners: list[str]) -> tuple[list[int], list[int]]:
        in_front = self.in_front.get(name, set())
        is_behind = [own == name or name in self.in_front.get(own, ()) for own in owners]
        behind = [place for place, found in enumerate(is_behind) if found]
        before = zip(owners, is_behind, strict=True)
        return behind, [k for k, (own, found) in enumerate(before) if own in in_front and not found]


@contextmanager
def recorded_reach(layers: Mapping[str, nn.Module]) -> Iterator[Reach]:
    """Record how the layers that are called inside follow each other."""
    found, made = Reach(), dict[str, set[Node]]()

    def see(name: str, _module: nn.Module, _args: object, output: Any) -> None:  # Any: its own
        if not is_in_backward():
            nodes = (y.grad_fn for y in output_tensors(output))
            made.setdefault(name, set()).update(node for node in nodes if node is not None)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(see, name)).remove)
        yield found
    behind = _layers_behind(made)
    for name, nodes in made.items():
        inputs = [each for node in nodes for each in _inputs(node)]
        found.makers[name] = set().union(*(behind[each] for each in inputs)) if nodes else None


def _layers_behind(made: Mapping[str, set[Node]]) -> dict[Node, frozenset[str]]:
    """Return the layer whose output each node is, or those it is made of, without recursion."""
    found = {node: frozenset([name]) for name, nodes in made.items() for node in nodes}
    waiting = [(each, False) for node in found for each in _inputs(node)]
    while waiting:
        node, is_ready = waiting.pop()
        if node in found:
            continue
        if is_ready:
            found[node] = frozenset().union(*(found[each] for each in _inputs(node)))
        else:
            waiting += [(node, True), *((each, False) for each in _inputs(node))]
    return found


def _inputs(node: Node) -> list[Node]:
    return [behind for behind, _ in node.next_functions if behind is not None]
