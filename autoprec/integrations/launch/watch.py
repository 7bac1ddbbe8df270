"""A plan and an unmodified training script -> the script, training with the plan.

A script shows its model when it calls it, and its optimizer when it makes it. So until the plan is
applied three things of torch are wrapped:

    Optimizer.__init__                  notes the optimizers
    Module.__call__                     the first call that trains a model that fits is the moment
    DistributedDataParallel, DataParallel, fully_shard      or just before one of these wraps it

Then `apply` changes model and optimizers in place, and the wrappers go; the one around
`Module.__call__` stays only while another optimizer waits for its first step, since that may belong
to a second model that the plan is for (an ensemble, cross-validation).
"""

import logging
import os
import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from autoprec.errors import AutoprecError
from autoprec.integrations.launch.guarding import ScriptGuard
from autoprec.integrations.launch.patches import Function, OptimizerList, Patch, holds
from autoprec.integrations.launch.placing import (
    Misfit,
    find_fitting,
    find_roots,
    is_initialised,
    measure_misfit,
)
from autoprec.integrations.launch.script import Script, run_script, script_line
from autoprec.records import Plan
from autoprec.runtime import apply, attach_optimizer
from autoprec.runtime.apply import unwrapped
from autoprec.runtime.attach import MASTER, ON_OPTIMIZER, STATELESS, watch_optimizers
from autoprec.runtime.masters import ON_MODEL

logger = logging.getLogger(__name__)
MOST_NAMED = 4  # models that a message lists


@dataclass(frozen=True)
class Applied:
    """One model that the plan was applied to: where, and why just then."""

    model: "weakref.ref[nn.Module]"
    name: str
    moment: str
    optimizers: list[str]


@dataclass(frozen=True)
class RunOutcome:
    """How a script ended: its exit status, and what became of the plan, in one line."""

    status: int
    message: str
    was_applied: bool


def run_with_plan(script: Script, plan: Plan, *, guard: bool | None = None) -> RunOutcome:
    """Run a script in this process with `plan` applied to the model that it trains.

    Args:
        script: what to run.
        plan: for the model that the script trains.
        guard: whether a Guard watches the run; None: only if the plan has a precision schedule.

    Raises:
        AutoprecError: there is no such script, or the plan could not be applied when it should.
    """
    watch = Watch(plan, guard=bool(plan.schedule) if guard is None else guard)
    watch.start()
    try:
        status = run_script(script)
    finally:
        watch.stop()
    if watch.failure is not None:  # the script went on after it
        raise watch.failure
    return RunOutcome(status=status, message=watch.describe(), was_applied=bool(watch.applied))


class Watch:
    """Waits in a running script for what the plan is for."""

    def __init__(self, plan: Plan, *, guard: bool = False) -> None:
        self.plan = plan
        self.applied: list[Applied] = []
        self.misfits: dict[str, Misfit] = {}
        self.failure: AutoprecError | None = None
        self._guard = ScriptGuard(plan) if guard else None
        self._optimizers = OptimizerList()
        self._waiting: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # for their first step
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._patches: list[Patch] = []  # until the script ends
        self._armed: list[Patch] = []  # until the plan is applied
        self._handles: list[Any] = []  # as _patches; Any: torch's handles
        self._process = os.getpid()  # a forked worker has our wrappers, but is not watched

    def start(self) -> None:
        """Wrap what a script shows itself by."""
        watch_optimizers()  # not later from a hook: torch is iterating over its hooks then
        self._handles.append(register_optimizer_step_pre_hook(self._before_step))
        self._optimizers.watch(self._note_optimizer)
        self._patches += [
            Patch(Optimizer, "load_state_dict", self._watched_load),
            *(Patch(cls, "__init__", self._watched_wrapper) for cls in _wrapper_classes()),
            *(Patch(owner, "fully_shard", self._watched_shard) for owner in _shard_owners()),
        ]
        self._arm()

    def stop(self) -> None:
        """Put everything back."""
        self._disarm()
        self._optimizers.stop()
        for handle in (*self._patches, *self._handles):
            handle.remove()
        self._patches, self._handles = [], []
        if self._guard is not None:
            self._guard.stop()

    def describe(self) -> str:
        """Say in one line what became of the plan."""
        if self.applied:
            return "; ".join(self._describe_applied(applied) for applied in self.applied)
        if not self.misfits:
            return (
                "the plan was not applied: no model was called for training in this process; a "
                "script that starts its processes itself has to call autoprec.apply, or to be "
                "started by torchrun -m autoprec run"
            )
        nearest = min(self.misfits.values(), key=lambda misfit: misfit.distance)
        names = list(self.misfits)
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        return (
            "the plan was not applied: it fits no model that was called for training (seen: "
            f"{', '.join(names[:MOST_NAMED])}{more}); nearest is {nearest.model}: {nearest.reason}"
        )

    # --- what the script does --------------------------------------------------------------------

    def _watched_call(self, original: Function) -> Function:
        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                self._see_call(module)
            return original(module, *args, **kwargs)

        return __call__

    def _watched_wrapper(self, original: Function) -> Function:
        def __init__(wrapper: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            self._offer(module, f"before {type(wrapper).__name__} wrapped it")
            original(wrapper, module, *args, **kwargs)

        return __init__

    def _watched_shard(self, original: Function) -> Function:
        def fully_shard(module: Any, *args: Any, **kwargs: Any) -> Any:  # Any: one module or more
            first = module[0] if isinstance(module, list | tuple) else module
            if self._armed and first not in self._seen:
                for root in find_roots(first):
                    self._offer(root, "before fully_shard")
            return original(module, *args, **kwargs)

        return fully_shard

    def _watched_load(self, original: Function) -> Function:
        def load_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            is_ours = self._patches and self._attach(optimizer)
            original(optimizer, state_dict)
            if self._patches and not is_ours and STATELESS in state_dict:
                _keep_masters(optimizer, state_dict[STATELESS])

        return load_state_dict

    def _note_optimizer(self, optimizer: Optimizer) -> None:
        for applied in self.applied:
            model = applied.model()
            if model is not None and holds(optimizer, model):
                applied.optimizers.append(type(optimizer).__name__)
                return
        self._waiting.add(optimizer)
        self._arm()

    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:  # Any: torch's
        if optimizer not in self._waiting:
            return
        if not self.applied:
            self._search_for(optimizer)
        if not self.applied and self.misfits:
            logger.warning("%s trains, but %s", type(optimizer).__name__, self.describe())
        self._waiting.discard(optimizer)
        self._disarm_if_done()

    # --- what it means ---------------------------------------------------------------------------

    def _see_call(self, module: nn.Module) -> None:
        if self._armed and module not in self._seen and self._is_training(module):
            self._offer(module, "at its first training call")

    def _is_training(self, module: nn.Module) -> bool:
        """Whether a call trains: in training mode, or with an optimizer (as some fine-tune)."""
        return module.training or any(holds(optimizer, module) for optimizer in self._optimizers)

    def _offer(self, module: nn.Module, moment: str) -> None:
        """Apply the plan if this module is, or has in it, the model that it is for."""
        is_new = self._armed and os.getpid() == self._process and module not in self._seen
        if not is_new or not is_initialised(module):
            return
        self._seen.update(module.modules())
        found = find_fitting(self.plan, module)
        if found is not None:
            self._apply(found, moment)
        elif any(parameter.requires_grad for parameter in module.parameters()):
            misfit = measure_misfit(self.plan, module)
            self.misfits.setdefault(misfit.model, misfit)

    def _search_for(self, optimizer: Optimizer) -> None:
        """Apply the plan to the model of an optimizer whose step comes before any call was seen.

        So it is when the step makes the call, in a closure, or a compiled function hides it.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        roots = list(find_roots(parameters[0]))
        if all(root in self._seen for root in roots):
            return
        for parameter in parameters:
            parameter.grad = None
        for root in roots:
            self._offer(root, f"before {type(optimizer).__name__}'s first step")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None else gradient.to(parameter.dtype)

    def _apply(self, model: nn.Module, moment: str) -> None:
        inner = unwrapped(model)
        if ON_MODEL in vars(inner) and any(each.model() is inner for each in self.applied):
            return
        mine = [optimizer for optimizer in self._optimizers if holds(optimizer, inner)]
        plan = self.plan
        if self._guard is not None:  # it runs the schedule; `apply` would ask for it
            plan = plan.model_copy(update={"schedule": ()})
        try:
            apply(plan, inner, mine[0] if mine else None)
            for optimizer in mine[1:]:
                attach_optimizer(inner, optimizer)
        except AutoprecError as error:
            self.failure = error
            self.stop()
            raise
        for optimizer in mine:
            _drop_empty_states(optimizer)
        moment = f"at {script_line()} ({moment})"
        names = [type(optimizer).__name__ for optimizer in mine]
        self.applied.append(Applied(weakref.ref(inner), type(inner).__name__, moment, names))
        self._waiting.difference_update(mine)
        if self._guard is not None:
            self._guard.watch(inner)
        self._disarm_if_done()

    def _attach(self, optimizer: Optimizer) -> bool:
        """Attach an optimizer that was made after the plan was applied; say whether it is ours."""
        for applied in self.applied:
            model = applied.model()
            if model is not None and holds(optimizer, model):
                if ON_OPTIMIZER not in vars(optimizer):
                    attach_optimizer(model, optimizer)
                return True
        return False

    def _arm(self) -> None:
        if not self._armed:
            self._armed = [Patch(nn.Module, "__call__", self._watched_call)]

    def _disarm(self) -> None:
        for armed in self._armed:
            armed.remove()
        self._armed = []

    def _disarm_if_done(self) -> None:
        if self.applied and not any(optimizer in self._waiting for optimizer in self._optimizers):
            self._disarm()

    def _describe_applied(self, applied: Applied) -> str:
        counts = Counter(str(layer.precision) for layer in self.plan.layers)
        layers = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        optimizers = ", ".join(applied.optimizers) or "none"
        return (
            f"plan applied to {applied.name} {applied.moment}: layers {layers}; "
            f"optimizers {optimizers}"
        )


def _keep_masters(optimizer: Optimizer, saved: dict[int, torch.Tensor]) -> None:
    """Keep masters that a plain load leaves out, where `apply` will look for them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, master in saved.items():
        optimizer.state[parameters[index]][MASTER] = master.detach().clone()


def _drop_empty_states(optimizer: Optimizer) -> None:
    for parameter in [p for p, state in optimizer.state.items() if not state]:
        del optimizer.state[parameter]


def _wrapper_classes() -> tuple[type[nn.Module], ...]:
    return nn.parallel.DistributedDataParallel, nn.DataParallel


def _shard_owners() -> list[object]:
    """Return the modules that have `fully_shard`, which scripts import by name."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import fully_shard

    loaded = list(sys.modules.values())
    return [m for m in loaded if vars(m).get("fully_shard") is fully_shard]
