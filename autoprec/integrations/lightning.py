"""A plan in Lightning: a precision plugin for its Trainer, and `setup` for Fabric.

    trainer = L.Trainer(plugins=PlanPrecision("plan.json", inside="model"), ...)
    trainer.fit(module, ckpt_path=...)

    model, optimizer = setup(fabric, "plan.json", model, optimizer)

The Trainer converts the module by its precision plugin before it wraps it, and shows the plugin the
optimizers before it loads their state, so masters resume exactly. It refuses a `precision=` beside
a plugin by itself.
"""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric import strategies as fabric_strategies
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.pytorch import strategies
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from autoprec.errors import PlanMismatchError
from autoprec.guard import Guard
from autoprec.integrations.plans import (
    GuardedSteps,
    GuardState,
    MakeGuard,
    apply_plan,
    foreign_precision,
    replaced_parameters,
    runs_plan,
)
from autoprec.records import Plan
from autoprec.runtime import attach_optimizer

OWN_WRAPPERS = tuple(
    cls
    for room in (fabric_strategies, strategies)
    for cls in (room.DeepSpeedStrategy, room.FSDPStrategy, room.ModelParallelStrategy)
)


def setup(
    fabric: L.Fabric, plan: Plan | Path | str, model: nn.Module, *optimizers: Optimizer
) -> Any:  # Any: as fabric.setup, a module or a tuple
    """Apply a plan, then return `fabric.setup(model, *optimizers)`.

    Raises:
        RecordError: the file is no plan.
        PlanMismatchError: the plan does not fit, or Fabric has a precision or a sharding of its
            own. Nothing is set up then.
    """
    plan = Plan.load(plan)
    _check_strategy(fabric.strategy)
    precision = fabric.strategy.precision
    if type(precision) is not FabricPrecision:  # even bf16-mixed casts the model's inputs
        raise foreign_precision(
            f"Fabric has precision={precision.precision!r}", fix="leave it at '32-true'"
        )
    apply_plan(plan, model, *optimizers)
    return fabric.setup(model, *optimizers)


def _check_strategy(strategy: object) -> None:
    if isinstance(strategy, OWN_WRAPPERS):
        raise replaced_parameters(f"the {type(strategy).__name__}")


class PlanPrecision(Precision):
    """A precision plugin for Lightning's Trainer that applies a plan to what is trained.

    The Trainer calls it in this order: `convert_module` on the new module, `connect` with the
    module as the strategy wrapped it and its new optimizers, and only then are states loaded.
    """

    def __init__(self, plan: Plan | Path | str, *, inside: str = "") -> None:
        """Read the plan; it is for the submodule `inside`, or for the whole LightningModule."""
        self.plan = Plan.load(plan)
        self.inside = inside
        self.model: nn.Module | None = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Apply the plan, once."""
        if isinstance(module, L.LightningModule):
            _check_strategy(module.trainer.strategy)
        try:
            self.model = module.get_submodule(self.inside)
        except AttributeError as error:
            raise PlanMismatchError(
                f"inside= must name a submodule of the {type(module).__name__}, but it has no "
                f"{self.inside!r}; give the name of the attribute that holds the plan's model"
            ) from error
        # a second fit, or validate before a fit, converts the same module again
        if not runs_plan(self.model, self.plan):
            apply_plan(self.plan, self.model)
        return module

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:  # Any: Lightning's own
        """Give the optimizers their masters, before their state is loaded."""
        if self.model is not None:
            for optimizer in optimizers:
                attach_optimizer(self.model, optimizer)
        return model, optimizers, lr_schedulers


class GuardCallback(L.Callback):
    """Lets a guard look at every step of a Trainer that has a `PlanPrecision`.

    Its state is saved in Lightning's checkpoints.
    """

    def __init__(self, make_guard: MakeGuard = Guard) -> None:
        """Remember how to make the guard: `autoprec.Guard`, or a `functools.partial` of it."""
        self.steps = GuardedSteps(make_guard)
        self.loaded: GuardState = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the guard of the plan and the optimizer, of which there must be one each."""
        plugin = trainer.precision_plugin
        if not isinstance(plugin, PlanPrecision) or plugin.model is None:
            raise PlanMismatchError(
                "a guard watches a model that runs a plan, but this Trainer's precision plugin is "
                f"a {type(plugin).__name__}; give it plugins=PlanPrecision(plan)"
            )
        if (count := len(trainer.optimizers)) != 1:
            raise PlanMismatchError(
                f"a guard watches one optimizer, but the module has {count}; call autoprec.Guard's "
                "step in the module instead"
            )
        self.steps.start(plugin.model, trainer.optimizers[0], plugin.plan, self.loaded)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss, which Lightning has divided by the number of micro-batches."""
        self.steps.add_loss(loss)

    def on_before_optimizer_step(self, *_: Any, **__: Any) -> None:  # Any: Lightning's own
        """Let the guard look, before clipping."""
        self.steps.end_step()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the guard's hooks out."""
        self.steps.close()

    def state_dict(self) -> GuardState:
        """Return the guard's state for Lightning's checkpoint."""
        return self.loaded if self.steps.guard is None else self.steps.guard.state_dict()

    def load_state_dict(self, state_dict: GuardState) -> None:
        """Keep a checkpoint's state until there is a guard."""
        self.loaded = state_dict
