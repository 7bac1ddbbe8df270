"""Functions of torch, wrapped for a while; and the parameters of an optimizer.

A wrapper may outlive its removal where a script has imported it by name or patched on top of it, so
what it calls has to do nothing of its own once its owner is done.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Function = Callable[..., Any]  # Any, here and in what wraps one: as torch's functions take it


@contextmanager
def patched(owner: object, name: str, around: Function) -> Iterator[None]:
    """Let calls of a class's or module's function go to `around(function, *args, **kwargs)`.

    Code that torch.compile traces calls the function itself, without a break in its graph.
    """
    original: Function = vars(owner)[name]

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        if vars(owner).get(name) is wrapper:  # else somebody has replaced the wrapper since
            setattr(owner, name, original)


def trained_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer has a parameter of a model."""
    own = {id(parameter) for parameter in model.parameters()}
    return any(id(parameter) in own for parameter in trained_by(optimizer))


def has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of an optimizer's step hook say that it was given a closure."""
    return any(callable(value) for value in (*args[1:], *kwargs.values()))
