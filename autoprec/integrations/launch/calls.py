"""Calls of a script's model: as they are seen, and as they are kept."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from autoprec.device.random_state import generator_state
from autoprec.integrations.launch.sharded import Policy
from autoprec.model.state import Signatures, attribute_signatures, place_of

State = dict[str, Any]  # Any: attributes of a model, by name


class RecordedCall(NamedTuple):
    """What the script gave its model; tensors on the CPU."""

    path: str  # of the part of the model that was called, "" for all of it
    args: tuple[Any, ...]  # Any: whatever it was
    kwargs: dict[str, Any]
    writes_inputs: bool  # whether the model writes into its own arguments
    state: State  # what the script had written into attributes since the call before

    def begin(self, model: nn.Module) -> nn.Module:
        """Give a model the state from before this call, and return the part that is called."""
        for name, value in self.state.items():
            module, own = place_of(model, name)
            vars(module)[own] = tree_map_only(Tensor, Tensor.clone, value)
        return model.get_submodule(self.path)


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
    state: list[tuple[nn.Module, str, Any]]  # Any: the attribute of the module

    def kept(self, path: Mapping[int, str]) -> RecordedCall:
        """Return the call for a model whose modules have these names."""
        state = {f"{path[id(m)]}.{own}".lstrip("."): value for m, own, value in self.state}
        return RecordedCall(path[id(self.part)], self.args, self.kwargs, self.writes_inputs, state)

    def draw_again(self) -> None:
        """Let the generators give what they gave in this call."""
        torch.set_rng_state(self.random_state)
        torch.cuda.set_rng_state_all(self.random_states_gpu)


@dataclass(frozen=True)
class FirstCall:
    """What else it takes to repeat the first batch exactly, from before a call."""

    model: nn.Module  # a copy on the CPU
    device: torch.device
    autocast: torch.autocast
    is_compiled: bool  # whether the script compiles the model, or parts of it
    policy: Policy  # of FSDP


@dataclass
class Attributes:
    """The plain attributes of a model that its script writes between calls: inputs of the next.

    A hidden state that is reset for every batch, a weight of the loss that a schedule sets.
    """

    model: nn.Module | None = None
    left: Signatures = field(default_factory=dict)  # by the last call

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[list[tuple[nn.Module, str, Any]]]:
        """Give what was written since this model's last call, and note what the one inside leaves.

        Of each attribute its module, its name and a copy of its value.
        """
        yield self._written(model) if model is self.model else []
        self.model, self.left = model, attribute_signatures(model)

    def _written(self, model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
        found = []
        for name, seen in attribute_signatures(model).items():
            module, own = place_of(model, name)
            value = vars(module)[own]
            is_plain = generator_state(value) is None
            is_made = any(isinstance(x, Tensor) and x.grad_fn for x in tree_leaves(value))
            if seen != self.left.get(name, []) and is_plain and not is_made:
                found.append((module, own, tree_map_only(Tensor, _copied, value)))
        return found


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def begun_like(model: nn.Module, batches: Sequence[RecordedBatch]) -> None:
    """Let the first call begin as a copy of the model from before it, in all that others set."""
    every = [call for batch in batches for call in batch.calls.values()]
    for name in {name: 0 for call in every for name in call.state}:
        module, own = place_of(model, name)
        if own in vars(module):
            every[0].state.setdefault(name, vars(module)[own])
