"""Calls of a script's model: as they are seen, and as they are kept."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from autoprec.integrations.launch.sharded import Policy


class RecordedCall(NamedTuple):
    """What the script gave its model; tensors on the CPU."""

    path: str  # of the part of the model that was called, "" for all of it
    args: tuple[Any, ...]  # Any: whatever it was
    kwargs: dict[str, Any]
    writes_inputs: bool  # whether the model writes into its own arguments


class RecordedBatch(NamedTuple):
    """Calls of the model by their number, and the way through them to the loss."""

    calls: dict[int, RecordedCall]
    constants: list[Tensor]
    graph: fx.Graph


class SeenCall(NamedTuple):
    """A `RecordedCall` while more of the model may be seen."""

    part: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes_inputs: bool
    random_state: Tensor
    random_states_gpu: list[Tensor]

    def draw_again(self) -> None:
        """Let the generators give what they gave in this call."""
        torch.set_rng_state(self.random_state)
        if self.random_states_gpu:
            torch.cuda.set_rng_state_all(self.random_states_gpu)


@dataclass(frozen=True)
class FirstCall:
    """What else it takes to repeat the first batch exactly, from before a call."""

    model: nn.Module  # a copy on the CPU
    device: torch.device
    autocast: torch.autocast
    is_compiled: bool  # whether the script compiles the model, or parts of it
    policy: Policy  # of FSDP
