"""A model's discrete choices, such as the experts of a token, kept as the reference pass made them.

Moved weights send some tokens to other experts: calls would have other rows, and what a product
compares would be different tokens. So moved passes take the indices of the reference.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# by name, the place of `dim` among the arguments; it is the last dimension where it is not given
_DIM = {"topk": 2, "sort": 1, "max": 1, "min": 1}
_CHOOSING = {
    found: name
    for name in (*_DIM, "argmax", "argmin", "argsort")
    for found in (getattr(torch, name), getattr(Tensor, name))
}


@dataclass
class Choices:
    """The indices of one pass, in order, and after which layer each was chosen."""

    indices: list[Tensor] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def behind(self, names: Sequence[str]) -> dict[str, float]:
        """Return, for layers in their order, the part of the choices that come after each."""
        places = {name: place for place, name in enumerate(names)}
        made = [places.get(name, -1) for name in self.layers]
        count = max(len(made), 1)
        return {name: sum(at >= place for at in made) / count for name, place in places.items()}


@contextmanager
def recorded_choices(layers: Mapping[str, nn.Module]) -> Iterator[Choices]:
    """Record the choices that run inside; `layers` are all of the model's."""
    found, last = Choices(), [""]

    def see(index: Tensor) -> Tensor:
        found.indices.append(index.detach().clone())  # the model may change its own in place
        found.layers.append(last[0])
        return index

    def called(name: str, *_: object) -> None:
        last[0] = name

    handles = [m.register_forward_hook(partial(called, n)) for n, m in layers.items()]
    try:
        with _Choosing(see):
            yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def kept_choices(choices: Choices) -> Iterator[None]:
    """Make the choices that run inside those of another pass, as long as their shapes agree."""
    left = iter(choices.indices)

    def take(index: Tensor) -> Tensor:
        kept = next(left, index)
        return kept.clone() if kept.shape == index.shape else index

    with _Choosing(take):
        yield


class _Choosing(TorchFunctionMode):
    """Give every index that torch chooses to a function, and go on with what that returns."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._choose = choose

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = _CHOOSING.get(func)
        if name is None or (isinstance(result, Tensor) and name in _DIM):  # max of two tensors
            return result
        if isinstance(result, Tensor):
            return self._choose(result)
        index = result[1]
        kept = self._choose(index)
        if kept is index:
            return result
        # the moved values at the kept places
        x, place = args[0] if args else kwargs["input"], _DIM[name]
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        is_reduced = kept.dim() < x.dim()
        picked = x.gather(dim, kept.unsqueeze(dim) if is_reduced else kept)
        return type(result)((picked.squeeze(dim) if is_reduced else picked, kept))
