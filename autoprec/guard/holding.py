"""Optimizer steps that the device leaves out by itself, so that the host need not ask it.

torch's fused optimizers take a tensor, `found_inf`, and where it is 1 they change neither
parameters nor state, step counters included: GradScaler skips steps that way. A guard uses the same
door. Optimizers without it can only be kept from stepping by the host, which must wait to know.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FLAG = "found_inf"  # torch's name for the attribute that fused optimizers read


def can_hold(optimizer: Optimizer) -> bool:
    """Whether the optimizer leaves out a step that a tensor on the device says is bad."""
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    takes_it = getattr(optimizer, "_step_supports_amp_scaling", False)
    # a step of its own may not hand the tensor on
    return bool(is_fused and takes_it and type(optimizer).step.__module__.startswith("torch.optim"))


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
