"""Functions of torch -> wrapped for a while, and put back.

A wrapper may outlive its removal where a script has imported it by name or patched on top of it,
so every wrapper has to be a plain call once its owner is done.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Function = Callable[..., Any]  # Any: whatever torch's functions take and return


class Patch:
    """One attribute of a class or module, wrapped until `remove`."""

    def __init__(self, owner: object, name: str, wrapper_of: Callable[[Function], Function]):
        self._owner, self._name = owner, name
        self._original: Function = vars(owner)[name]
        self._wrapper = functools.wraps(self._original)(wrapper_of(self._original))
        setattr(owner, name, self._wrapper)

    def remove(self) -> None:
        """Put the original back, unless somebody else has replaced the wrapper since."""
        if vars(self._owner).get(self._name) is self._wrapper:
            setattr(self._owner, self._name, self._original)


class OptimizerList:
    """All optimizers that were made while it was `watching`, in order; it keeps none alive."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[Optimizer]] = []
        self._patch: Patch | None = None

    def __iter__(self) -> Iterator[Optimizer]:
        """Yield those that are still there."""
        for reference in self._made:
            optimizer = reference()
            if optimizer is not None:
                yield optimizer

    def watch(self, then: Callable[[Optimizer], None] = lambda _: None) -> None:
        """Note every optimizer that is made from now on, and call `then` with it."""

        def wrapper_of(original: Function) -> Function:
            def __init__(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
                original(optimizer, *args, **kwargs)
                if self._patch is not None and all(known is not optimizer for known in self):
                    self._made.append(weakref.ref(optimizer))
                    then(optimizer)

            return __init__

        self._patch = Patch(Optimizer, "__init__", wrapper_of)

    def stop(self) -> None:
        """Note no more of them."""
        if self._patch is not None:
            self._patch.remove()
            self._patch = None


def holds(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer trains a parameter of a model."""
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


def patch_backward(before: Callable[[Any, Any], None], after: Callable[[], None]) -> Patch:
    """Call `before(tensors, grad_tensors)` and `after()` around every backward pass."""

    def wrapper_of(original: Function) -> Function:
        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
            before(tensors, grad_tensors)
            try:
                return original(tensors, grad_tensors, *args, **kwargs)
            finally:
                after()

        return backward

    return Patch(torch.autograd, "backward", wrapper_of)
