"""ModelSpec -> layers of equal shape, which are timed once, with the calls of a real step.

Layers are timed on real tensors with their strides, because constants draw less power and zeros
skip work. Calls of one shape are kept once, with their number.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autoprec.common.text import error_line
from autoprec.device.local import release_memory
from autoprec.device.memory import is_out_of_memory
from autoprec.device.ranks import largest_over_ranks, world_size
from autoprec.errors import WorkloadError
from autoprec.model.capture import run_step
from autoprec.model.context import Context
from autoprec.model.layers import find_layers, layer_named
from autoprec.model.local_copy import is_divided, local_copy
from autoprec.model.neighbours import Neighbour, NeighbourWatch, Surroundings
from autoprec.model.recording import Call, recorded_calls
from autoprec.profiler.candidates import MakeLayer
from autoprec.records import BF16_O2, FP32, LayerSpec, ModelSpec, Option
from autoprec.workload.functions import Batch, take_batches

log = logging.getLogger(__name__)
Record = TypeVar("Record", Call, Neighbour)


@dataclass(frozen=True)
class Group:
    """Layers that are timed once: equal shapes, options and shared parameters."""

    layers: tuple[LayerSpec, ...]
    options: tuple[Option, ...]

    @property
    def first(self) -> LayerSpec:
        """The layer that stands for the others."""
        return self.layers[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers."""
        return tuple(layer.name for layer in self.layers)


def group_layers(spec: ModelSpec, options: Sequence[Option] | None) -> list[Group]:
    """Return the layers in groups, each with the options to time: FP8 by the recipes asked for."""
    recipes = None if options is None else {None, *(option.recipe for option in options)}
    groups: dict[tuple[str, tuple[bool, ...], tuple[Option, ...]], list[LayerSpec]] = {}
    for layer in spec.layers:
        shared = tuple(parameter.shared_with is not None for parameter in layer.parameters)
        groups.setdefault((layer.shape_key, shared, layer.options), []).append(layer)
    return [
        Group(tuple(same), tuple(o for o in listed if recipes is None or o.recipe in recipes))
        for (_, _, listed), same in groups.items()
    ]


def uniform_options(groups: Iterable[Group], *, fp8: bool = False) -> dict[str, Option]:
    """Return BF16 O2 for every layer that takes it, or its first FP8 option where `fp8`."""
    chosen: dict[str, Option] = {}
    for group in groups:
        first_fp8 = next((option for option in group.options if option.is_fp8), None)
        best = BF16_O2 if BF16_O2 in group.options else FP32
        chosen |= {layer.name: (fp8 and first_fp8) or best for layer in group.layers}
    return chosen


@dataclass
class RecordedStep:
    """One step of the FP32 model: its layers, what they were called with, and the ms it took.

    On a GPU model and calls wait on the host: only the group that is timed takes the device.
    """

    context: Context
    model: nn.Module
    batch: Batch
    in_surroundings: bool
    calls: dict[str, list[Call]] = field(default_factory=dict)  # of layers that are recorded
    step_ms: float = 0.0

    def first_of(self, group: Group) -> tuple[Sequence[Call], MakeLayer]:
        """Return the calls of a group's first layer, and the function that makes copies of it."""
        name, device = group.first.name, self.context.device
        if name not in self.calls:
            self.record([name])
        calls = [moved_call(call, device) for call in self.calls[name]]
        layer = find_layers(self.model)[name]
        if is_divided(layer):
            own, _ = local_copy(self.model, layer)
            return calls, lambda: copy.deepcopy(own)
        build_model = self.context.workload.build_model
        return calls, lambda: copy_layer(layer, build_model, name).to(device)

    def record(self, names: Iterable[str]) -> None:
        """Run a step, keep the calls of these layers, and leave the device."""
        device = self.context.device
        self.model.to(device)
        layers = find_layers(self.model)
        chosen = {name: layers[name] for name in names}
        started = time.perf_counter()
        found = record_step(
            self.context, self.model, self.batch, chosen, in_surroundings=self.in_surroundings
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.step_ms = self.step_ms or (time.perf_counter() - started) * 1e3
        if device.type == "cuda" and not any(map(is_divided, layers.values())):
            host = torch.device("cpu")
            found = {name: [moved_call(c, host) for c in calls] for name, calls in found.items()}
            self.model.to(host)
        self.calls |= found


def record_groups(
    context: Context, groups: Iterable[Group], *, in_surroundings: bool = False
) -> RecordedStep:
    """Run two steps of the FP32 model: one warms up, the other is recorded and timed.

    Where the memory does not hold the calls of all groups, each is recorded when it is asked for,
    in a step of its own.
    """
    workload, device = context.workload, context.device
    model = workload.build_model(seed=context.seed).to(device)
    batch = take_batches(workload, seed=context.seed, count=1, device=device)[0]
    recorded = RecordedStep(context, model, batch, in_surroundings)
    started = time.perf_counter()
    record_step(context, model, batch, {})
    first_ms = (time.perf_counter() - started) * 1e3
    try:
        recorded.record([group.first.name for group in groups])
    except (RuntimeError, WorkloadError) as error:
        if world_size() > 1 or not is_out_of_memory(error):  # other ranks would not know
            raise
        log.warning("layers are recorded one kind at a time (%s)", error_line(error))
        recorded.step_ms = first_ms
        model.zero_grad(set_to_none=True)
    release_memory(device)
    recorded.step_ms = largest_over_ranks([recorded.step_ms])[0]
    return recorded


def moved_call(call: Call, device: torch.device) -> Call:
    """Return a call with its tensors on a device."""
    found = call.surroundings
    if found is not None:
        before, behind = (one and _with_moved(one, device) for one in vars(found).values())
        found = Surroundings(before, behind)
    return replace(_with_moved(call, device), surroundings=found)


def _with_moved(record: Record, device: torch.device) -> Record:
    """Return a dataclass whose fields hold tensors with these on a device."""
    return replace(record, **tree_map_only(Tensor, lambda t: _moved(t, device), vars(record)))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; one whose strides would change there stays where it is."""
    if tensor.device.type == device.type:
        return tensor
    copied = tensor.detach().to(device)
    if copied.stride() != tensor.stride():
        return tensor
    return copied.requires_grad_(tensor.requires_grad)


def record_step(
    context: Context,
    model: nn.Module,
    batch: Batch,
    layers: Mapping[str, nn.Module],
    *,
    in_surroundings: bool = False,
) -> dict[str, list[Call]]:
    """Run forward and backward of one batch; return the calls of the given layers by name."""
    watch = NeighbourWatch() if in_surroundings else None
    with recorded_calls(layers, merged=True, watch=watch) as calls, watch or nullcontext():
        run_step(context, model, batch)
    model.zero_grad(set_to_none=True)
    return calls


def copy_layer(layer: nn.Module, build_model: Callable[[], nn.Module], name: str) -> nn.Module:
    """Return a copy of a layer; one that cannot be copied is taken out of a new model."""
    try:
        return copy.deepcopy(layer)
    except (RuntimeError, TypeError):  # e.g. torch's older weight_norm keeps a computed weight
        return layer_named(build_model(), name)
