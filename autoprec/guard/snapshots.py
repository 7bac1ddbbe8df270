"""Model and optimizer at one step, on their own devices, to go back to after a poisoned step.

A snapshot takes as much memory as the state dicts; data order, random numbers and schedulers go on.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """State dicts as they were before the update of `step`."""

    step: int
    model: dict[str, Any]  # Any: state dicts hold what modules put there
    optimizer: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the values back; parameters stay the same objects."""
        model.load_state_dict(self.model)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))


def take_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int) -> Snapshot:
    """Copy the state of model and optimizer."""
    state = {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }
    return Snapshot(step, state, copy.deepcopy(optimizer.state_dict()))
