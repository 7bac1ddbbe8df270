"""A Guard in a script that does not know of it: its `step` is called where the script shows why.

backward         the losses since the last step are added up (gradient accumulation)
clip_grad_norm_  the guard looks before gradients are clipped
optimizer.step   or else here
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoprec.guard import Guard
from autoprec.integrations.launch.patches import Function, Patch, holds, patch_backward
from autoprec.records import Plan

logger = logging.getLogger(__name__)


class ScriptGuard:
    """Makes a Guard for the first model that the plan is applied to, and steps it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._guard: Guard | None = None
        self._loss: Tensor | None = None
        self._depth = 0
        self._is_looked_at = False
        self._handles: list[Any] = []  # Any: patches and torch's handles

    def watch(self, model: nn.Module) -> None:
        """Watch a model; only the first one."""
        if self._handles:
            return
        self._model = weakref.ref(model)
        owners = (torch.nn.utils, torch.nn.utils.clip_grad)
        self._handles = [
            patch_backward(self._before_backward, self._after_backward),
            *(Patch(owner, "clip_grad_norm_", self._watched_clip) for owner in owners),
            register_optimizer_step_pre_hook(self._before_step),
        ]

    def stop(self) -> None:
        """Take everything out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._guard is not None:
            self._guard.close()

    def _before_backward(self, tensors: Any, _gradients: Any) -> None:  # Any: torch's
        self._depth += 1
        roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        if self._depth == 1 and self._handles:  # checkpointing calls backward inside of backward
            added = torch.stack([root.detach().float().sum() for root in roots]).sum()
            self._loss = added if self._loss is None else self._loss + added

    def _after_backward(self) -> None:
        self._depth -= 1

    def _watched_clip(self, original: Function) -> Function:
        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:  # Any: torch's own
            self._look()
            return original(*args, **kwargs)

        return clip_grad_norm_

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # Any: torch's
        model = self._model()
        if model is None or not self._is_ours(optimizer, model):
            return
        if self._guard is None:
            self._guard = Guard(model, optimizer, self._plan)
            if any(callable(value) for value in (*args[1:], *kwargs.values())):
                logger.warning(
                    "the guard cannot see steps that an optimizer takes with a closure; call "
                    "autoprec.Guard in the script"
                )
        self._look()
        self._is_looked_at, self._loss = False, None

    def _is_ours(self, optimizer: Optimizer, model: nn.Module) -> bool:
        """Whether this optimizer's steps are those that count: the first one's of the model."""
        return (
            holds(optimizer, model) if self._guard is None else optimizer is self._guard.optimizer
        )

    def _look(self) -> None:
        """Step the guard once for each step of the optimizer."""
        if self._guard is not None and self._loss is not None and not self._is_looked_at:
            self._guard.step(self._loss)
            self._is_looked_at = True
