"""Optimizer steps that the device leaves out by itself, so that the host need not ask it.

torch's fused optimizers take a tensor, `found_inf`, and where it is 1 they change neither
parameters nor state, step counters included: GradScaler skips steps that way. A guard uses the same
door. Optimizers without it can only be kept from stepping by the host, which must wait to know.
"""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _default_to_fused_or_foreach

from autoprec.workload.optimizers import FLAG, trained_by

logger = logging.getLogger(__name__)
# Adagrad's fused kernel for GPUs is younger than the oldest torch that is supported.
FUSED = frozenset(inspect.unwrap(kind.step) for kind in (Adam, AdamW, SGD))


def runs_behind(device: torch.device) -> bool:
    """Whether a device has its answer later than the host asks; a CPU has it at once."""
    return device.type != "cpu"


def can_hold(optimizer: Optimizer) -> bool:
    """Whether the optimizer leaves out a step that a tensor on the device says is bad."""
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    takes_it = getattr(optimizer, "_step_supports_amp_scaling", False)
    # a step of its own may not hand the tensor on
    return bool(is_fused and takes_it and type(optimizer).step.__module__.startswith("torch.optim"))


def take_fused(optimizer: Optimizer) -> bool:
    """Let torch's fused kernels step where the user left the choice to torch; whether they do.

    Moments stay as they are. Call it with the gradients there: fused kernels take no sparse ones.
    """
    every: list[Tensor] = [*trained_by(optimizer)]
    fits = (
        inspect.unwrap(type(optimizer).step) in FUSED
        and all(map(_is_left_to_torch, optimizer.param_groups))
        and not any(p.grad is not None and p.grad.is_sparse for p in every)
        and _default_to_fused_or_foreach(every, differentiable=False, use_fused=True)[0]
    )
    if not fits:
        return False
    # What the constructor does with fused=True, and what was made for another kernel.
    settings: Any = optimizer  # Any: torch declares none of these attributes
    settings._step_supports_amp_scaling = settings._need_device_dtype_check_for_fused = True
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["fused"] = True
    for parameter in every:
        own = optimizer.state.get(parameter, {})
        if isinstance(own.get("step"), Tensor):  # on the host, for kernels that are not fused
            own["step"] = own["step"].to(parameter.device, torch.float32)
    return True


def say_why_it_waits(optimizer: Optimizer) -> None:
    """Log that the host must wait for the device in every step, and the way out."""
    name = type(optimizer).__name__
    reason = f"{name} has no fused kernels of torch's; use torch's AdamW, Adam or SGD"
    if inspect.unwrap(type(optimizer).step) in FUSED:
        reason = f"this {name} is not fused; make it with fused=True"
    logger.warning(
        "the guard waits for the device in every step, to know before the optimizer steps whether "
        "the step must be skipped: %s, or on_alarm='switch' or 'stop'",
        reason,
    )


def _is_left_to_torch(group: dict[str, Any]) -> bool:  # Any: torch's own
    chosen = (group.get(name) for name in ("foreach", "capturable", "differentiable"))
    return bool(group.get("fused")) or (group.get("fused") is None and not any(chosen))


class HeldSteps:
    """Holds back steps of one optimizer by a tensor on the device."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._flag: Tensor | None = None
        self._is_shared = False
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def hold(self, is_bad: Tensor) -> None:
        """Leave the next step out if `is_bad` (FP32, no dimensions) is 1 on the device."""
        self._flag = is_bad
        vars(self._optimizer)[FLAG] = is_bad

    def close(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    def _before(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:  # Any: torch's hook
        other: Tensor | None = vars(optimizer).get(FLAG)
        self._is_shared = self._flag is not None and other is not self._flag
        if self._is_shared and self._flag is not None and other is not None:  # GradScaler's own
            vars(optimizer)[FLAG] = torch.maximum(other, self._flag.to(other.device))

    def _after(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:  # Any: torch's hook
        self._forget()

    def _forget(self) -> None:
        if self._flag is not None and not self._is_shared:  # else GradScaler takes it away
            vars(self._optimizer).pop(FLAG, None)
        self._flag, self._is_shared = None, False
