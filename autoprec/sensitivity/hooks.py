"""Hooks at a parameter's gradient: what they leave of an error that autograd did not see.

A mask or a factor in `Tensor.register_hook` or `register_post_accumulate_grad_hook` stands between
a gradient and the optimizer. Passes through the model run them; errors that are worked out from a
layer's operands do not, so here they are run on g + d and on g, and the difference is what is left:

    d -> h(g + d) - h(g)        M d for a hook that multiplies by M
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.device.ranks import sharded_tensor
from autoprec.model.averaging import GradientAverage
from autoprec.sensitivity.real import of_dtype, real_view

SMALL = 1e-2  # of the gradient: how much of a direction is added to it, in root mean squares


def has_hooks(parameter: Tensor) -> bool:
    """Whether a hook sees the parameter's gradient; those of a sharded one are left to passes.

    Averaging over ranks is none: it is for whole passes, and errors are averaged by themselves.
    """
    kept = (parameter._post_accumulate_grad_hooks or {}).values()
    hooks = (parameter._backward_hooks, [hook for hook in kept if not _averages(hook)])
    return any(hooks) and not isinstance(parameter, sharded_tensor())


def after_hooks(parameter: Tensor, error: Tensor, *, at: Tensor) -> Tensor:
    """Return what a parameter's hooks leave of an error of its gradient `at`."""
    if not has_hooks(parameter):
        return error
    at = at.to(error.device)
    return _hooked(parameter, at + error) - _hooked(parameter, at)


def direction_after_hooks(parameter: Tensor, direction: Tensor, *, at: Tensor) -> Tensor:
    """Return what hooks leave of a direction of any length, taken as a small error."""
    sizes = [float(each.square().mean().sqrt()) for each in (at, direction)]
    scale = SMALL * sizes[0] / sizes[1] if all(sizes) else 1.0
    return after_hooks(parameter, direction * scale, at=at) / scale


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Run no hooks at the gradients of a module's parameters inside."""
    held = [p._backward_hooks for p in module.parameters() if p._backward_hooks]
    with _put_back(held):
        for hooks in held:
            hooks.clear()
        yield


def change_backward(model: nn.Module, run: Callable[[], object]) -> bool:
    """Whether hooks at modules' backward give other gradients than they get, in a pass of `run`.

    What is handed on is no derivative then, which is what probes take it for.
    """
    every = [hooks for m in model.modules() for hooks in (m._backward_hooks, m._backward_pre_hooks)]
    held: list[Any] = [hooks for hooks in every if hooks]  # Any: hooks of two kinds
    if not held:
        return False
    changed: list[bool] = []

    def watched(hook: Callable[..., Any], *given: Any) -> Any:
        found = hook(*given)
        changed.append(found is not None)
        return found

    with _put_back(held):
        for hooks in held:
            hooks.update({key: partial(watched, hook) for key, hook in hooks.items()})
        run()
    return any(changed)


@contextmanager
def _put_back(held: list[Any]) -> Iterator[None]:  # Any: hooks of any kind, by their keys
    kept = [dict(hooks) for hooks in held]
    try:
        yield
    finally:
        for hooks, before in zip(held, kept, strict=True):
            hooks.update(before)


def _averages(hook: object) -> bool:
    """Whether a hook is that of averaging over ranks, within what `install_options` puts around."""
    inner = hook.args[-1] if isinstance(hook, partial) and hook.args else hook
    return isinstance(getattr(inner, "__self__", None), GradientAverage)


@torch.no_grad()
def _hooked(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient as its hooks leave it for the optimizer."""
    gradient = of_dtype(gradient.clone(), parameter)
    for hook in list((parameter._backward_hooks or {}).values()):
        returned = hook(gradient)
        gradient = gradient if returned is None else returned
    kept, parameter.grad = parameter.grad, gradient
    try:
        for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
            if not _averages(hook):
                hook(parameter)
        left = parameter.grad
        return real_view(torch.zeros_like(gradient) if left is None else left).float()
    finally:
        parameter.grad = kept
