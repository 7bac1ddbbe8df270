"""A plan, a model and an optimizer -> what `accelerator.prepare` makes of them, running the plan.

    model, optimizer, loader = prepare(accelerator, "plan.json", model, optimizer, loader)

`accelerator.backward`, `accumulate`, `clip_grad_norm_`, `save_state` and `load_state` then work as
ever; masters are saved with the optimizer. For a guard:

    guard = autoprec.Guard(model, optimizer, "plan.json")
    accelerator.register_for_checkpointing(guard)
    ...
    if accelerator.sync_gradients:
        guard.step(loss)            # before accelerator.clip_grad_norm_
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import Optimizer

from autoprec.integrations.plans import (
    apply_plan,
    foreign_precision,
    replaced_parameters,
)
from autoprec.model.layers import unwrapped
from autoprec.records import Plan
from autoprec.runtime import check_fit

HARMLESS = ("no", "bf16")  # autocast is off inside a model that runs a plan
OWN_WRAPPERS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")  # of `DistributedType`


def prepare(
    accelerator: Accelerator,
    plan: Plan | Path | str,
    model: nn.Module,
    optimizer: Optimizer,
    *others: Any,  # Any: whatever accelerator.prepare takes
) -> tuple[Any, ...]:
    """Apply a plan, then return `accelerator.prepare(model, optimizer, *others)`.

    Raises:
        RecordError: the file is no plan.
        PlanMismatchError: the plan does not fit, or the Accelerator has a precision or a sharding
            of its own. Nothing is prepared then.
    """
    plan = Plan.load(plan)
    check_state(accelerator.state)
    check_fit(plan, unwrapped(model))
    if accelerator.device_placement:
        model.to(accelerator.device)  # before the masters are made of it
    apply_plan(plan, model, optimizer)
    return tuple(accelerator.prepare(model, optimizer, *others))


def check_state(state: AcceleratorState) -> None:
    """Raise a PlanMismatchError if what Accelerate does of its own does not leave a plan alone."""
    if state.mixed_precision not in HARMLESS:
        raise foreign_precision(
            f"mixed_precision is {state.mixed_precision!r}",
            fix="set it to 'no' (TrainingArguments: fp16=False), or leave it at 'bf16', which "
            "does no harm",
        )
    if state.distributed_type in OWN_WRAPPERS:
        raise replaced_parameters(f"Accelerate's {state.distributed_type.value}")
