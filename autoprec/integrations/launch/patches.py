"""Functions of torch, wrapped for a while."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Function = Callable[..., Any]  # Any, here and in what wraps one: as torch's functions take it


@contextmanager
def patched(owner: object, name: str, around: Function) -> Iterator[None]:
    """Let calls of a class's or module's function go to `around(function, *args, **kwargs)`."""
    is_own = name in vars(owner)  # else inherited
    original: Function = vars(owner)[name] if is_own else getattr(owner, name)
    is_open, process = True, os.getpid()

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # Code that torch.compile traces calls the function itself, without a break in its graph;
        # so do forked workers, and scripts that imported or patched the wrapper and outlive it.
        if torch.compiler.is_compiling() or not is_open or os.getpid() != process:
            return original(*args, **kwargs)
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        is_open = False
        if vars(owner).get(name) is wrapper:  # else somebody has replaced the wrapper since
            delattr(owner, name)
            if is_own:
                setattr(owner, name, original)


@contextmanager
def patched_spawn(around: Function) -> Iterator[None]:
    """Let `torch.multiprocessing.spawn` and `start_processes` go to `around`."""
    inner = sys.modules["torch.multiprocessing.spawn"]  # a function hides the module of its name
    with (
        patched(torch.multiprocessing, "start_processes", around),
        patched(inner, "start_processes", around),
    ):
        yield
