"""A plan and a `transformers.Trainer` -> the same Trainer, training with the plan.

    trainer = Trainer(model=model, args=args, train_dataset=data)
    apply("plan.json", trainer)                             # or guard=autoprec.Guard
    trainer.train(resume_from_checkpoint=...)

A Trainer makes its optimizer, wraps the model and loads a checkpoint into both between two events
of its callbacks, so that a callback alone can only come too early or too late for the masters of a
checkpoint. `apply` therefore asks the Trainer for its optimizer at once. The guard looks at the end
of `training_step`: what callbacks get to see later was clipped, and `clip_grad_norm_` makes every
gradient a NaN where one was.

`PrecisionPlanCallback` alone does for stacks that take callbacks and nothing else.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from autoprec.errors import PlanMismatchError
from autoprec.integrations.accelerate import check_state
from autoprec.integrations.plans import GuardedSteps, MakeGuard, apply_plan, mismatch, runs_plan
from autoprec.model.layers import unwrapped
from autoprec.records import Plan
from autoprec.runtime import attach_optimizer, check_fit
from autoprec.runtime.attach import ON_OPTIMIZER

GUARD_STATE = "autoprec.Guard"  # the guard's key in trainer_state.json


def apply(plan: Plan | Path | str, trainer: Trainer, *, guard: MakeGuard | None = None) -> Trainer:
    """Make a Trainer train with a plan, in place. Call it before `trainer.train`.

    Args:
        plan: a plan, or the path of a plan.json.
        trainer: of any subclass; not one with `model_init`. It is returned.
        guard: makes the guard of the run: `autoprec.Guard`, or a `functools.partial` of it.

    Raises:
        RecordError: the file is no plan.
        PlanMismatchError: the plan does not fit the model, or the Trainer's arguments do not go
            with a plan. The Trainer is as it was.
    """
    callback = PrecisionPlanCallback(plan)
    if trainer.model_init is not None:
        raise PlanMismatchError(
            "a plan is applied to the model that is trained, but this Trainer makes another one "
            "with model_init when training starts; give it model=, or call "
            "autoprec.apply(plan, model) in model_init"
        )
    # all that can be refused is refused before the Trainer is changed
    _check_arguments(trainer.args)
    # a plan may be for a module that holds the model: the loss of sentence-transformers
    held = (own for own in [trainer.model, *vars(trainer).values()] if isinstance(own, nn.Module))
    fitting = next((own for own in held if not mismatch(callback.plan, own)), trainer.model)
    check_fit(callback.plan, unwrapped(fitting))
    trainer.create_optimizer()  # `train` takes this one, and loads a checkpoint's masters into it
    apply_plan(callback.plan, fitting, _inner(trainer.optimizer))
    callback.holder = None if fitting is trainer.model else fitting
    trainer.add_callback(callback)
    if guard is not None:
        steps = callback.steps = GuardedSteps(guard)
        trainer.training_step = functools.partial(_guarded_step, steps, trainer.training_step)
    return trainer


class PrecisionPlanCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Applies a plan when the Trainer was made: `Trainer(..., callbacks=[this])`.

    A checkpoint is resumed from only if the Trainer was given its optimizer
    (`optimizers=(optimizer, None)`), and there is no guard. Use `apply` for both.
    """

    def __init__(self, plan: Plan | Path | str) -> None:
        """Read the plan."""
        self.plan = Plan.load(plan)
        self.steps: GuardedSteps | None = None
        self.holder: nn.Module | None = None  # what the plan is for, if not the Trainer's model

    # Any, here and below: what else a Trainer gives its callbacks
    def on_init_end(self, args: TrainingArguments, *_: Any, model: nn.Module, **event: Any) -> None:
        """Apply the plan to the model, and to the optimizer if the Trainer was given one."""
        _check_arguments(args)
        optimizer = event.get("optimizer")
        apply_plan(self.plan, model, *([] if optimizer is None else [optimizer]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: nn.Module, **event: Any
    ) -> None:
        """Attach the optimizer that the Trainer has made since, and go on with the guard's run."""
        model = self.holder or model
        if not runs_plan(model, self.plan):
            raise PlanMismatchError(
                "the model that is trained must be the one that the plan was applied to, but the "
                "Trainer has made another since; without model_init it makes none"
            )
        optimizer = _inner(event["optimizer"])
        if state.global_step > 0 and ON_OPTIMIZER not in vars(optimizer):
            raise PlanMismatchError(
                "masters are loaded by an optimizer that knows the plan, but this one was made "
                "and loaded out of the callback's sight; call autoprec.integrations.transformers"
                ".apply(plan, trainer) after making the Trainer, in place of the callback"
            )
        attach_optimizer(unwrapped(model), optimizer)
        if self.steps is not None:
            saved = state.stateful_callbacks.get(GUARD_STATE)
            self.steps.start(model, optimizer, self.plan, saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Keep the guard's state where the next checkpoint takes it from."""
        if self.steps is not None and self.steps.guard is not None:
            state.stateful_callbacks[GUARD_STATE] = self.steps.guard.state_dict()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the guard's hooks out."""
        if self.steps is not None:
            self.steps.close()


def _guarded_step(
    steps: GuardedSteps, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:  # Any: what the Trainer calls its step with
    """Run the Trainer's step; let the guard look at the last one before an optimizer step."""
    loss = training_step(*args, **kwargs)
    steps.add_loss(loss)
    if GradientState().sync_gradients:
        steps.end_step()
    return loss


def _check_arguments(args: TrainingArguments) -> None:
    check_state(AcceleratorState())
    if args.n_gpu > 1:
        raise PlanMismatchError(
            "a plan trains one process per device, but this Trainer would use DataParallel over "
            f"{args.n_gpu} GPUs; start it with torchrun"
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise PlanMismatchError(
                "evaluation must leave the model's dtypes as the plan has them, but "
                f"TrainingArguments has {name}=True; turn it off: the plan is on there too"
            )


def _inner(optimizer: Any) -> Optimizer:
    """Return the optimizer inside Accelerate's wrapper."""
    is_wrapped = isinstance(optimizer, AcceleratedOptimizer)
    inner: Optimizer = optimizer.optimizer if is_wrapped else optimizer
    return inner
