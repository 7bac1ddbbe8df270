"""A model's discrete choices, such as the experts of a token, kept as the reference pass made them.

Moved weights send some tokens to other experts: calls would have other rows, and what a product
compares would be different tokens. So moved passes take the indices of the reference.

Thresholds in the model's own code are seen, and not kept: `x * (x > 0)` is a ReLU, whose kinks
moved passes have to cross, and nothing tells it from a gate, whose value jumps.
"""

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
from autoprec.model.recording import NO_BACKWARD
from autoprec.sensitivity.constants import Constants

# by name, the place of `dim` among the arguments; it is the last dimension where it is not given
_DIM = {"topk": 2, "kthvalue": 2, "sort": 1, "max": 1, "min": 1, "median": 1}
# draws too, with probabilities that weights may move, and not a number as dropout's
_DRAWING = ("multinomial", "bernoulli", "bernoulli_")
_CHOOSING = (*_DIM, "argmax", "argmin", *_DRAWING)
_BY_A_NUMBER = ("p", "float")
_COMPARING = ("gt", "ge", "lt", "le")


@dataclass
class Choices:
    """The indices of one pass, in order, and how many came before each layer's first call.

    `before` is in the order of those calls. A layer was called after the first `followed` indices
    and thresholds; an accuracy beside the loss is not among them. `compared` is, by place, what the
    choices compare whose index something takes (the largest value alone is a kink), of those that a
    layer follows where one follows any.
    """

    indices: list[Tensor] = field(default_factory=list)
    compared: dict[int, Tensor] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    thresholds: int = 0
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
    found, acting = Choices(), 0
    places: Any = WeakTensorKeyDictionary()  # Any: torch's own has no types
    compared: list[Tensor] = []
    taken: set[int] = set()

    def see(index: Tensor, x: Tensor, _: int | None) -> Tensor:
        places[index] = len(compared)
        # the model may change its own in place
        found.indices.append(index.detach().clone())
        compared.append(x.detach().clone())
        return index

    def watch(name: str, args: tuple[Any, ...]) -> None:  # Any: torch's own
        if name in _COMPARING and _is_decided(args[0]):
            found.thresholds += 1
        if places and torch._C._current_graph_task_id() == NO_BACKWARD:
            tensors = (x for x in tree_leaves(args) if isinstance(x, Tensor))
            taken.update(places[x] for x in tensors if x in places)

    def calls(name: str, *_: object) -> None:
        nonlocal acting
        acting = len(found.indices)
        found.followed = acting + found.thresholds
        found.before.setdefault(name, acting)

    constants = Constants()
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(calls, name)))
        stack.enter_context(_choosing(see, constants, watch))
        yield found
    of_layers = {place for place in taken if place < acting}
    found.compared = {place: compared[place] for place in sorted(of_layers or taken)}
    found.given, found.constant = constants.given, constants.makers(layers)


@contextmanager
def kept_choices(
    choices: Choices, see: Callable[[int, Tensor, int | None], None] = lambda *_: None
) -> Iterator[None]:
    """Make the choices that run inside those of another pass, as long as their shapes agree.

    So is what is made under no_grad. `see` is called with the place, what is compared now and along
    which dimension, of each choice in `compared`.
    """
    left = enumerate(choices.indices)

    def take(index: Tensor, x: Tensor, dim: int | None) -> Tensor:
        place, kept = next(left, (-1, index))
        if place < 0 or kept.shape != index.shape:
            return index
        if place in choices.compared:
            see(place, x, dim)
        return kept.clone()

    with _choosing(take, Constants(choices.given)):
        yield


def _choosing(
    choose: Callable[[Tensor, Tensor, int | None], Tensor],
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
        index = result if isinstance(result, Tensor) else result[1]
        place = _DIM.get(name, 1)
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        kept = choose(index, args[0], None if name in _DRAWING else dim)
        if kept is index:
            return result
        if name == "bernoulli_":
            return result.copy_(kept)
        if isinstance(result, Tensor):
            return kept
        # the moved values at the kept places
        x, is_reduced = args[0], kept.dim() < args[0].dim()
        picked = x.gather(dim, kept.unsqueeze(dim) if is_reduced else kept)
        return picked.squeeze(dim) if is_reduced else picked, kept

    return OperationTracer(run)


def less_mean(x: Tensor, dim: int | None) -> Tensor:
    """Return changes along a dimension less their mean, which changes no choice.

    Of draws as they are.
    """
    return x if dim is None else x - x.mean(dim, keepdim=True)


def _is_decided(compared: Tensor) -> bool:
    """Whether weights may decide a comparison: not that of a mask, or of a draw with a number."""
    return compared.is_floating_point() and (compared.requires_grad or not torch.is_grad_enabled())
