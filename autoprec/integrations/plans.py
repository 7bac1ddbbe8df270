"""The parts that all integrations have in common: a plan and its model; where no plan can run."""

from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from autoprec.errors import PlanMismatchError
from autoprec.guard import Guard
from autoprec.model.layers import plain_name, unwrapped
from autoprec.records import Plan
from autoprec.runtime.masters import ON_MODEL

MakeGuard = Callable[[nn.Module, Optimizer, Plan], Guard]  # autoprec.Guard, or a partial of it


def load_plan(plan: Plan | Path | str) -> Plan:
    """Return the plan, read from its file if it is a path."""
    return plan if isinstance(plan, Plan) else Plan.load(plan)


def runs_plan(model: nn.Module, plan: Plan) -> bool:
    """Whether this very plan is applied to the model already."""
    masters = vars(unwrapped(model)).get(ON_MODEL)
    if masters is None:
        return False
    options = {plain_name(name): option for name, option in masters.options.items()}
    return options == {layer.name: layer.option for layer in plan.layers}


def foreign_precision(setting: str, *, fix: str) -> PlanMismatchError:
    """Return the error for a library whose own mixed precision is on."""
    rule = "a plan is the mixed precision of its model"
    return PlanMismatchError(f"{rule}, but {setting}; {fix}")


def replaced_parameters(who: str) -> PlanMismatchError:
    """Return the error for a library that shards, so that masters would lose their parameters."""
    return PlanMismatchError(
        f"a plan needs parameters that stay where it put them, but {who} replaces them; use DDP, "
        "or autoprec.apply and torch's fully_shard in a loop of your own"
    )
