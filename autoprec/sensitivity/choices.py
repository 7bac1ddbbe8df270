"""A model's discrete choices, such as the experts of a token, kept as the reference pass made them.

Moved weights send some tokens to other experts: calls would have other rows, and what a product
compares would be different tokens. So moved passes take the indices of the reference.

Not kept are those whose index nothing takes: where the largest value is all that is used (pooling,
hard examples), it has a kink there, which moved passes have to cross. Thresholds in the model's own
code are seen, and not kept either: `x * (x > 0)` is a ReLU, and nothing tells it from a gate, whose
value jumps.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from autoprec.device.tracing import OperationTracer
from autoprec.sensitivity.constants import Constants, is_in_backward

# by name, the place of `dim` among the arguments; it is the last dimension where it is not given
_DIM = {"topk": 2, "kthvalue": 2, "sort": 1, "max": 1, "min": 1, "median": 1}
# draws too, with probabilities that weights may move, and not a number as dropout's
_DRAWING = ("multinomial", "bernoulli", "bernoulli_")
_CHOOSING = (*_DIM, "argmax", "argmin", *_DRAWING)
_BY_A_NUMBER = ("p", "float")
_COMPARING = ("gt", "ge", "lt", "le")


@dataclass(frozen=True)
class Choice:
    """The index of a choice among `x`, along a dimension (None: a draw), with values or alone."""

    index: Tensor
    x: Tensor
    dim: int | None
    is_alone: bool

    def less_mean(self, changes: Tensor) -> Tensor:
        """Return changes of what is compared less their mean, which changes no choice but draws."""
        return changes if self.dim is None else changes - changes.mean(self.dim, keepdim=True)


@dataclass
class Choices:
    """The indices of one pass that something takes, by place, and what came before each layer.

    `before` is the places before a layer's first call, in the order of calls. `followed` choices
    and thresholds are followed by a layer; an accuracy beside the loss is not among them.
    `compared` is what choices compare, of those that a layer follows where one follows any.
    """

    indices: dict[int, Tensor] = field(default_factory=dict)
    compared: dict[int, Tensor] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    followed: int = 0
    # see constants.py: what was made under no_grad, and the layers in front of it
    given: dict[int, Tensor] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)

    def behind(self, places: Collection[int]) -> dict[str, float]:
        """Return the part of the choices in these places that come after each layer."""
        return {
            name: sum(place >= before for place in places) / max(len(places), 1)
            for name, before in self.before.items()
        }


@contextmanager
def recorded_choices(layers: Mapping[str, nn.Module]) -> Iterator[Choices]:
    """Record the choices that run inside; `layers` are all of the model's."""
    found, recorder, constants = Choices(), _Recorder(), Constants()
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(recorder.call, name)))
        stack.enter_context(_choosing(recorder.choose, constants, recorder.watch))
        yield found
    recorder.tell(found)
    found.given, found.constant = constants.given, constants.makers(layers)


class _Recorder:
    """What one pass chooses, and which of its indices something takes."""

    def __init__(self) -> None:
        self._indices: list[Tensor] = []
        self._compared: dict[int, Tensor] = {}
        self._places: Any = WeakTensorKeyDictionary()  # by index; Any: torch's own has no types
        self._taken: set[int] = set()
        self._again: dict[int, int] = {}  # what checkpointing chooses again: where it did at first
        self._thresholds = 0
        self._before: dict[str, int] = {}
        self._last = 0, 0  # choices and thresholds before the last call of a layer

    def choose(self, choice: Choice) -> Tensor:
        index, place = choice.index, len(self._indices)
        if is_in_backward():
            same = (first for first, own in enumerate(self._indices) if torch.equal(own, index))
            self._again[place] = next(same, -1)
        else:
            self._places[index] = place
            self._compared[place] = choice.x.detach()
            if choice.is_alone:
                self._take(place)
        self._indices.append(index.detach().clone())  # the model may change its own in place
        return index

    def _take(self, place: int) -> None:
        if place not in self._taken:
            self._taken.add(place)
            # kept for good; what is pooled would be as much again as a layer's output
            self._compared[place] = self._compared[place].clone()

    def watch(self, name: str, args: tuple[Any, ...]) -> None:  # Any: torch's own
        if is_in_backward():
            return
        self._thresholds += name in _COMPARING and _is_decided(args[0])
        if self._places:
            tensors = (x for x in tree_leaves(args) if isinstance(x, Tensor))
            for place in [self._places[x] for x in tensors if x in self._places]:
                self._take(place)

    def call(self, name: str, *_: object) -> None:
        self._before.setdefault(name, len(self._indices))
        if not is_in_backward():
            self._last = len(self._indices), self._thresholds

    def tell(self, found: Choices) -> None:
        (before, thresholds), taken = self._last, sorted(self._taken)
        of_layers = [place for place in taken if place < before]
        found.compared = {place: self._compared[place] for place in of_layers or taken}
        found.followed = len(of_layers) + thresholds
        found.before = self._before
        taken += [place for place, first in self._again.items() if first in self._taken]
        found.indices = {place: self._indices[place] for place in taken}


@contextmanager
def kept_choices(
    choices: Choices, see: Callable[[int, Choice], None] = lambda *_: None
) -> Iterator[None]:
    """Make the choices that run inside those of another pass, as long as their shapes agree.

    So is what is made under no_grad. `see` is called with each choice in `compared` as it is now,
    and its place.
    """
    places = itertools.count()

    def take(choice: Choice) -> Tensor:
        kept = choices.indices.get(place := next(places))
        if kept is None or kept.shape != choice.index.shape:
            return choice.index
        if place in choices.compared:
            see(place, choice)
        return kept.clone()

    with _choosing(take, Constants(choices.given)):
        yield


def _choosing(
    choose: Callable[[Choice], Tensor],
    constants: Constants,
    watch: Callable[[str, tuple[Any, ...]], None] = lambda *_: None,  # Any: torch's own
) -> OperationTracer:
    """Give every index and draw to a function, and go on with what that returns.

    Below autograd, so that those within torch's own functions (F.gumbel_softmax) are seen, and
    gradients go where the kept index says.
    """

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: torch's own
        result, name = func(*args, **kwargs), func.overloadpacket.__name__
        constants.see(func, (args, kwargs), result)
        watch(name, args)
        has_index = name in _CHOOSING and not (isinstance(result, Tensor) and name in _DIM)
        if not has_index or func._overloadname in _BY_A_NUMBER or not args[0].is_floating_point():
            return result
        is_alone, place = isinstance(result, Tensor), _DIM.get(name, 1)
        index = result if is_alone else result[1]
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        kept = choose(Choice(index, args[0], None if name in _DRAWING else dim, is_alone))
        if kept is index:
            return result
        if name == "bernoulli_":
            return result.copy_(kept)
        if is_alone:
            return kept
        # the moved values at the kept places
        x, is_reduced = args[0], kept.dim() < args[0].dim()
        picked = x.gather(dim, kept.unsqueeze(dim) if is_reduced else kept)
        return picked.squeeze(dim) if is_reduced else picked, kept

    return OperationTracer(run)


def _is_decided(compared: Tensor) -> bool:
    """Whether weights may decide a comparison: not that of a mask, or of a draw with a number."""
    return compared.is_floating_point() and (compared.requires_grad or not torch.is_grad_enabled())
