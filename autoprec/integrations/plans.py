"""What all integrations ask about a plan and a model."""

from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from autoprec.guard import Guard
from autoprec.records import Plan
from autoprec.runtime.apply import plain_name, unwrapped
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
