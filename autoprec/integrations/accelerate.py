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
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

import autoprec
from autoprec.errors import PlanMismatchError
from autoprec.integrations.plans import load_plan
from autoprec.records import Plan
from autoprec.runtime import check_fit
from autoprec.runtime.apply import unwrapped

HARMLESS = ("no", "bf16")  # autocast is off inside a model that runs a plan
OWN_WRAPPERS = (
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
)


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
    plan = load_plan(plan)
    check_state(accelerator.state)
    check_fit(plan, unwrapped(model))
    if accelerator.device_placement:
        model.to(accelerator.device)  # before the masters are made of it
    autoprec.apply(plan, model, optimizer)
    prepared: tuple[Any, ...] = accelerator.prepare(model, optimizer, *others)
    return prepared


def check_state(state: AcceleratorState) -> None:
    """Check that what Accelerate does of its own leaves a plan alone.

    Raises:
        PlanMismatchError: it does not.
    """
    if state.mixed_precision not in HARMLESS:
        raise PlanMismatchError(
            "a plan is the mixed precision of its model, but mixed_precision is "
            f"{state.mixed_precision!r}; set it to 'no' (TrainingArguments: fp16=False), or leave "
            "it at 'bf16', which does no harm"
        )
    if state.distributed_type in OWN_WRAPPERS:
        raise PlanMismatchError(
            "a plan needs parameters that stay where it put them, but Accelerate runs "
            f"{state.distributed_type.value}, which replaces them; use DDP, or autoprec.apply and "
            "torch's fully_shard in a loop of your own"
        )
