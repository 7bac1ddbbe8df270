"""A Guard in a script that does not know of it: its `step` is called where the script shows why.

backward         the losses since the last step are added up (gradient accumulation)
clip_grad_norm_  the guard looks before gradients are clipped
optimizer.step   or else here, after the closure if the step is given one (Lightning's always are)
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoprec.guard import Guard
from autoprec.integrations.launch.patches import Function
from autoprec.integrations.plans import GuardedSteps
from autoprec.records import Plan
from autoprec.workload.optimizers import StepArguments, after_closure, trains


class ScriptGuard:
    """Makes a Guard for the first model that the plan is applied to, and steps it."""

    def __init__(self, plan: Plan) -> None:
        self.steps = GuardedSteps(Guard)
        self.patches = (
            (torch.autograd, "backward", self._around_backward),
            (torch.nn.utils, "clip_grad_norm_", self._around_clip),
            (torch.nn.utils.clip_grad, "clip_grad_norm_", self._around_clip),
        )
        self._plan = plan
        self._model: Callable[[], nn.Module | None] | None = None
        self._depth = 0  # of backward passes, one within the other

    def watch(self, model: nn.Module) -> None:
        """Watch a model; only the first one."""
        self._model = self._model or weakref.ref(model)

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> StepArguments | None:
        """Look before an optimizer's step, if it trains the model; return other arguments if any.

        Gradients that a closure makes are looked at when it is done.
        """
        model = self._model() if self._model is not None else None
        if self.steps.guard is None and model is not None and trains(optimizer, model):
            # of several optimizers the steps of the first one count
            self.steps.start(model, optimizer, self._plan)
        if self.steps.guard is None or optimizer is not self.steps.guard.optimizer:
            return None
        changed = after_closure(args, kwargs, self.steps.end_step)
        if changed is None:
            self.steps.end_step()
        return changed

    def _around_backward(self, call: Function, /, tensors: Any, *args: Any, **kwargs: Any) -> None:
        # checkpointing calls backward inside of backward
        if self._model is not None and self._depth == 0:
            roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
            self.steps.add_loss(torch.stack([root.detach().float().sum() for root in roots]).sum())
        self._depth += 1
        try:
            call(tensors, *args, **kwargs)
        finally:
            self._depth -= 1

    def _around_clip(self, call: Function, /, *args: Any, **kwargs: Any) -> Any:  # Any: torch's
        self.steps.look()
        return call(*args, **kwargs)
