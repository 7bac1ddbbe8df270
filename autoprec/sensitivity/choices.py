"""A model's discrete choices, such as the experts of a token, kept as the reference pass made them.

Moved weights send some tokens to other experts: calls would have other rows, and what a product
compares would be different tokens. So moved passes take the indices of the reference.

Thresholds in the model's own code are seen, and not kept: `x * (x > 0)` is a ReLU, whose kinks
moved passes have to cross, and nothing tells it from a gate, whose value jumps.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.device.tracing import OperationTracer
from autoprec.sensitivity.constants import Constants

# by name, the place of `dim` among the arguments; it is the last dimension where it is not given
_DIM = {"topk": 2, "kthvalue": 2, "sort": 1, "max": 1, "min": 1, "median": 1}
# draws too, with probabilities that weights may move, and not a number as dropout's
_CHOOSING = (*_DIM, "argmax", "argmin", "multinomial", "bernoulli", "bernoulli_")
_BY_A_NUMBER = ("p", "float")
_COMPARING = ("gt", "ge", "lt", "le")


@dataclass
class Choices:
    """The indices of one pass, in order, and how many came before each layer's first call.

    `before` is in the order of those calls. A layer was called after the first `followed` indices
    and thresholds; an accuracy beside the loss is not among them.
    """

    indices: list[Tensor] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    thresholds: int = 0
    followed: int = 0
    # see constants.py: what was made under no_grad, and the layers in front of it
    given: dict[int, Tensor] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)

    def behind(self) -> dict[str, float]:
        """Return the part of the choices that come after each layer."""
        count = len(self.indices)
        return {name: 1.0 - before / count for name, before in self.before.items()}


@contextmanager
def recorded_choices(layers: Mapping[str, nn.Module]) -> Iterator[Choices]:
    """Record the choices that run inside; `layers` are all of the model's."""
    found = Choices()

    def see(index: Tensor) -> Tensor:
        found.indices.append(index.detach().clone())  # the model may change its own in place
        return index

    def compare() -> None:
        found.thresholds += 1

    def calls(name: str, *_: object) -> None:
        found.followed = len(found.indices) + found.thresholds
        found.before.setdefault(name, len(found.indices))

    constants = Constants()
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(calls, name)))
        stack.enter_context(_choosing(see, constants, compare))
        yield found
    found.given, found.constant = constants.given, constants.makers(layers)


@contextmanager
def kept_choices(choices: Choices) -> Iterator[None]:
    """Make the choices that run inside those of another pass, as long as their shapes agree.

    So is what is made under no_grad.
    """
    left = iter(choices.indices)

    def take(index: Tensor) -> Tensor:
        kept = next(left, index)
        return kept.clone() if kept.shape == index.shape else index

    with _choosing(take, Constants(choices.given)):
        yield


def _choosing(
    choose: Callable[[Tensor], Tensor],
    constants: Constants,
    compare: Callable[[], None] = lambda: None,
) -> OperationTracer:
    """Give every index and draw to a function, and go on with what that returns; tell thresholds.

    Below autograd, so that those within torch's own functions (F.gumbel_softmax) are seen, and
    gradients go where the kept index says.
    """

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: torch's own
        result, name = func(*args, **kwargs), func.overloadpacket.__name__
        constants.see(func, (args, kwargs), result)
        if name in _COMPARING and _is_decided(args[0]):
            compare()
        has_index = name in _CHOOSING and not (isinstance(result, Tensor) and name in _DIM)
        if not has_index or func._overloadname in _BY_A_NUMBER or not args[0].is_floating_point():
            return result
        index = result if isinstance(result, Tensor) else result[1]
        kept = choose(index)
        if kept is index:
            return result
        if name == "bernoulli_":
            return result.copy_(kept)
        if isinstance(result, Tensor):
            return kept
        # the moved values at the kept places
        x, place = args[0], _DIM[name]
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        is_reduced = kept.dim() < x.dim()
        picked = x.gather(dim, kept.unsqueeze(dim) if is_reduced else kept)
        return picked.squeeze(dim) if is_reduced else picked, kept

    return OperationTracer(run)


def _is_decided(compared: Tensor) -> bool:
    """Whether weights may decide a comparison: not that of a mask, or of a draw with a number."""
    return compared.is_floating_point() and (compared.requires_grad or not torch.is_grad_enabled())
