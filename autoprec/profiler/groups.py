"""ModelSpec -> layers of equal shape, which are timed once, with the calls of a real step.

Layers are timed on real tensors with their strides, because constants draw less power and zeros
skip work. Calls of one shape are kept once, with their number.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from autoprec.device.ranks import largest_over_ranks
from autoprec.model.capture import run_step
from autoprec.model.context import Context
from autoprec.model.layers import find_layers
from autoprec.model.local_copy import is_divided, local_copy
from autoprec.model.neighbours import NeighbourWatch
from autoprec.model.recording import Call, recorded_calls
from autoprec.profiler.candidates import MakeLayer
from autoprec.records import BF16_O2, FP32, LayerSpec, ModelSpec, Option
from autoprec.workload.functions import Batch, take_batches


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


@dataclass(frozen=True)
class RecordedStep:
    """One step of the FP32 model: its layers, what they were called with, and the ms it took."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    calls: Mapping[str, Sequence[Call]]
    step_ms: float
    build_model: Callable[[], nn.Module]

    def first_of(self, group: Group) -> tuple[Sequence[Call], MakeLayer]:
        """Return the calls of a group's first layer, and the function that makes copies of it."""
        name, layer = group.first.name, self.layers[group.first.name]
        if is_divided(layer):
            own = local_copy(self.model, layer)
            return self.calls[name], lambda: copy.deepcopy(own)
        return self.calls[name], lambda: copy_layer(layer, self.build_model, name)


def record_groups(
    context: Context, groups: Iterable[Group], *, in_surroundings: bool = False
) -> RecordedStep:
    """Run two steps of the FP32 model: one warms up, the other is recorded and timed."""
    workload, device = context.workload, context.device
    model = workload.build_model(seed=context.seed).to(device).train()
    batch = take_batches(workload, seed=context.seed, count=1, device=device)[0]
    record_step(context, model, batch, {})  # lazy modules have parameters after it
    layers = find_layers(model)
    chosen = {group.first.name: layers[group.first.name] for group in groups}
    started = time.perf_counter()
    calls = record_step(context, model, batch, chosen, in_surroundings=in_surroundings)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    step_ms = largest_over_ranks([(time.perf_counter() - started) * 1e3])[0]
    return RecordedStep(
        model, layers, calls, step_ms, lambda: workload.build_model().to(device).train()
    )


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
        return build_model().get_submodule(name)
