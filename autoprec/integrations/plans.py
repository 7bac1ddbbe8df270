"""The parts that all integrations have in common: a plan and its model, a guard and its steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoprec.errors import PlanMismatchError
from autoprec.guard import Guard
from autoprec.model.layers import own_class, unwrapped
from autoprec.records import Plan
from autoprec.runtime import apply, attach_optimizer
from autoprec.runtime.activations import cast_floating
from autoprec.runtime.attach import check_optimizer
from autoprec.runtime.finite import leave_first_step
from autoprec.runtime.fit import check_fit, without_autocast
from autoprec.runtime.install import is_all_bf16
from autoprec.runtime.masters import ON_MODEL

GuardState = dict[str, Any]  # Any: whatever `Guard.state_dict` holds
MakeGuard = Callable[[nn.Module, Optimizer, Plan], Guard]  # autoprec.Guard, or a partial of it


def mismatch(plan: Plan, module: nn.Module) -> str | None:
    """Say why a plan does not fit a module, None if it does."""
    try:
        check_fit(plan, unwrapped(module))
    except PlanMismatchError as error:
        return str(error)
    return None


def apply_plan(
    plan: Plan, model: nn.Module, *optimizers: Optimizer, is_guarded: bool = False
) -> None:
    """Apply a plan to a model and all its optimizers; on an error to none of them.

    The first step must then have finite gradients, or it raises before it trains anything; a guard,
    where there is one, looks at every step itself.
    """
    for optimizer in optimizers:
        check_optimizer(model, optimizer)
    apply(plan, model, optimizers[0] if optimizers else None)
    for optimizer in optimizers[1:]:
        attach_optimizer(model, optimizer)
    if is_guarded:
        leave_first_step(model)


def remove_autocast(model: nn.Module) -> None:
    """Take autocast off a forward that is on the object.

    Accelerate's `prepare` sets one, so every `bf16=True` of a Trainer does. Within a model that
    runs a plan autocast is off, and outputs are FP32, as with Accelerate's; a model in BF16, whose
    outputs a plan leaves as they are, casts them as that did. What else is on the object stays.
    """
    inside, gives_fp32 = without_autocast(before := vars(model).get("forward"))
    if inside is before:
        return
    vars(model).pop("_original_forward", None)
    vars(model)["forward"] = inside
    if getattr(inside, "__func__", None) is own_class(model).forward:
        del vars(model)["forward"]
    if gives_fp32 and is_all_bf16(model):
        model.register_forward_hook(_give_fp32, prepend=True)  # before the script's own


def _give_fp32(_model: nn.Module, _args: object, output: Any) -> Any:  # Any: the model's own
    return cast_floating(output, torch.float32)


def runs_plan(model: nn.Module, plan: Plan) -> bool:
    """Whether this very plan is applied to the model already."""
    masters, options = vars(unwrapped(model)).get(ON_MODEL), {x.name: x.option for x in plan.layers}
    return masters is not None and options == masters.options


def foreign_precision(setting: str, *, fix: str) -> PlanMismatchError:
    """Return the error for a library whose own mixed precision is on."""
    return PlanMismatchError(f"a plan is the mixed precision of its model, but {setting}; {fix}")


def replaced_parameters(who: str) -> PlanMismatchError:
    """Return the error for a library that shards, so that masters would lose their parameters."""
    return PlanMismatchError(
        f"a plan needs parameters that stay where it put them, but {who} replaces them; use DDP, "
        "or autoprec.apply and torch's fully_shard in a loop of your own"
    )


class GuardedSteps:
    """A guard in a loop that is not the user's: it looks once for each step of the optimizer."""

    def __init__(self, make_guard: MakeGuard) -> None:
        self.guard: Guard | None = None
        self._make_guard = make_guard
        self._loss: Tensor | None = None  # of the micro-batches since the last optimizer step
        self._has_looked = False  # since the last optimizer step

    def start(
        self, model: nn.Module, optimizer: Optimizer, plan: Plan, state: GuardState | None = None
    ) -> None:
        """Make the guard, which goes on from a checkpoint's state if there is one."""
        self.close()
        self.guard = self._make_guard(model, optimizer, plan)
        if state:
            self.guard.load_state_dict(state)

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, divided by their number already."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def look(self) -> None:
        """Let the guard look at the gradients before somebody clips them."""
        if self.guard is not None and self._loss is not None and not self._has_looked:
            self.guard.step(self._loss)
            self._has_looked = True

    def end_step(self) -> None:
        """Let the guard look if it has not; the optimizer steps next."""
        self.look()
        self._loss, self._has_looked = None, False

    def close(self) -> None:
        """Take the guard's hooks out; its state stays."""
        if self.guard is not None:
            self.guard.close()
            self._loss, self._has_looked = None, False
