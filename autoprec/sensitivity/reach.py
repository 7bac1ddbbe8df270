"""Which layers an error of each reaches, by autograd's graph of one pass.

In the order of calls all that is called later comes behind a layer. But branches (experts, towers,
heads) run one after the other and are not in front of each other.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.autograd.graph import Node

from autoprec.model.layers import layer_named
from autoprec.model.recording import output_tensors
from autoprec.sensitivity.constants import is_in_backward


@dataclass
class Reach:
    """For each layer that was called, in this order, those in front of it.

    A layer whose output has no history, as reentrant checkpointing's, is in front of all that are
    called later. One that is called again is in front of and behind what comes between.
    """

    in_front: dict[str, set[str]] = field(default_factory=dict)

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
    found.in_front |= _in_front(made)


def _in_front(made: Mapping[str, set[Node]]) -> dict[str, set[str]]:
    """Return the layers in front of each, from what their outputs were made by, in call order."""
    bits = {name: 1 << place for place, name in enumerate(made)}
    own: dict[Node, int] = {}
    for name, nodes in made.items():
        for node in nodes:
            own[node] = own.get(node, 0) | bits[name]
    behind = _reached(own)
    found, unknown = dict[str, set[str]](), 0  # those without a history, so far
    for name, nodes in made.items():
        known = unknown if nodes else bits[name] - 1  # all before it
        for node in nodes:
            known |= behind[node]
        found[name] = {other for other, bit in bits.items() if known & bit and other != name}
        unknown |= 0 if nodes else bits[name]
    return found


def _reached(own: Mapping[Node, int]) -> dict[Node, int]:
    """Return the bits of each node and of all behind it, each node once, without recursion."""
    found: dict[Node, int] = {}
    waiting = [(node, False) for node in own]
    while waiting:
        node, is_ready = waiting.pop()
        if node in found:
            continue
        inputs = [behind for behind, _ in node.next_functions if behind is not None]
        if is_ready:
            found[node] = own.get(node, 0)
            for behind in inputs:
                found[node] |= found[behind]
        else:
            waiting += [(node, True), *((behind, False) for behind in inputs)]
    return found
