"""A Guard in a script that does not know of it: its `step` is called where the script shows why.

backward         the losses since the last step are added up (gradient accumulation)
clip_grad_norm_  the guard looks before gradients are clipped
optimizer.step   or else here
"""

import logging
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoprec.guard import Guard
from autoprec.integrations.launch.patches import Function, has_closure, patched, trains
from autoprec.records import Plan

logger = logging.getLogger(__name__)


class ScriptGuard:
    """Makes a Guard for the first model that the plan is applied to, and steps it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._is_on = False
        self._guard: Guard | None = None
        self._loss: Tensor | None = None  # of the backward passes since the last step
        self._depth = 0  # of backward passes, one within the other
        self._has_looked = False  # at the step that comes next
        self._stack = ExitStack()

    def watch(self, model: nn.Module) -> None:
        """Watch a model; only the first one."""
        if self._is_on:
            return
        self._model, self._is_on = weakref.ref(model), True
        for owner, name, around in (
            (torch.autograd, "backward", self._around_backward),
            (torch.nn.utils, "clip_grad_norm_", self._around_clip),
            (torch.nn.utils.clip_grad, "clip_grad_norm_", self._around_clip),
        ):
            self._stack.enter_context(patched(owner, name, around))
        self._stack.enter_context(register_optimizer_step_pre_hook(self._before_step))

    def stop(self) -> None:
        """Take everything out."""
        self._is_on = False
        self._stack.close()
        if self._guard is not None:
            self._guard.close()

    def _around_backward(self, call: Function, /, *args: Any, **kwargs: Any) -> None:
        if self._is_on and self._depth == 0:  # checkpointing calls backward inside of backward
            self._add_loss(*args, **kwargs)
        self._depth += 1
        try:
            call(*args, **kwargs)
        finally:
            self._depth -= 1

    def _add_loss(self, tensors: Any, *_args: Any, **_kwargs: Any) -> None:  # Any: torch's
        roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        added = torch.stack([root.detach().float().sum() for root in roots]).sum()
        self._loss = added if self._loss is None else self._loss + added

    def _around_clip(self, call: Function, /, *args: Any, **kwargs: Any) -> Any:  # Any: torch's
        self._look()
        return call(*args, **kwargs)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # Any: torch's
        model = self._model()
        if self._guard is None and model is not None and trains(optimizer, model):
            # of several optimizers the steps of the first one count
            self._guard = Guard(model, optimizer, self._plan)
            if has_closure(args, kwargs):
                logger.warning(
                    "the guard cannot see steps that an optimizer takes with a closure; call "
                    "autoprec.Guard in the script"
                )
        if self._guard is not None and optimizer is self._guard.optimizer:
            self._look()
            self._has_looked, self._loss = False, None

    def _look(self) -> None:
        """Step the guard once for each step of the optimizer."""
        if self._guard is not None and self._loss is not None and not self._has_looked:
            self._guard.step(self._loss)
            self._has_looked = True
