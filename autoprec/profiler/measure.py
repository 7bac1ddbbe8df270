"""Workload + ModelSpec -> Profile: what every layer costs in every option, and whole steps.

The search adds up layer totals, so what the sum leaves out must be a constant:

    fixed_ms       step of uniform FP32  - sum of FP32 totals
    fixed_bf16_ms  step of uniform BF16 O2 - sum of BF16 totals (FP32 for a layer without BF16)

Each holds attention, activations, loss, optimizer and Python's share, and also what an isolated
layer runs faster or slower than one within its step: their common part cancels in the fixed time.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprec.common.progress import Progress, report_nothing
from autoprec.device.local import device_facts, find_monitor, release_memory
from autoprec.device.timing import Clock, Stopping, make_clock, sample_interleaved
from autoprec.model.capture import run_step
from autoprec.model.gemms_hp import without_slow_masks
from autoprec.model.layers import find_layers
from autoprec.model.recording import Call, recorded_calls
from autoprec.profiler.candidates import copy_layer
from autoprec.profiler.compiling import COMPILED, EAGER, Compilation, open_compilation
from autoprec.profiler.layers import Group, LayerMeter
from autoprec.profiler.proving import name_kernels
from autoprec.profiler.steps import AUTOCAST, Arm, time_steps
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    DeviceFacts,
    LayerSpec,
    LayerTiming,
    ModelSpec,
    Option,
    Profile,
    StepTiming,
    Timing,
)
from autoprec.workload.functions import Batch, Workload, take_batches

STEP_SAMPLES, STEP_LEAST = 6, 2
STEP_WARMUP = 2  # after one only, FP32 steps of a small CNN were 6 % slow (CPU, torch 2.13)
STEP_BUDGET = 4.0  # FP32 steps that the samples of one arm may take
SLOW_STEP = 3.0  # times the FP32 step; a slower FP8 step is predicted, not timed
CAST_SAMPLES = 7
CASTS_PER_SAMPLE = 8  # a step casts what it has just computed, so all but the first are warm
DEFAULT_CAST_ELEMENTS = 2**20  # where the step has no floating activation


@dataclass(frozen=True)
class Given:
    """What every part of one measurement is given."""

    workload: Workload
    device: torch.device
    clock: Clock
    seed: int
    progress: Progress
    compilation: Compilation | None = None  # None: eager


@dataclass(frozen=True)
class Recorded:
    """The FP32 model, its layers, what each was called with, and the ms of one such step."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    calls: Mapping[str, Sequence[Call]]
    step_ms: float


def profile_model(
    workload: Workload,
    spec: ModelSpec,
    *,
    device: torch.device,
    options: Sequence[Option] | None = None,
    gemms_hp: bool = False,
    compiled: bool = False,
    seed: int = 0,
    progress: Progress = report_nothing,
    clock: Clock | None = None,
    names_kernels: bool = True,
) -> Profile:
    """Measure what every layer costs in every option, and what whole steps cost.

    Args:
        workload: the user's functions.
        spec: the captured model.
        device: where to measure.
        options: the FP8 options to consider, by recipe; default: all that the spec's layers list.
        gemms_hp: consider them also with one or two GEMMs in BF16, where that beats plain BF16.
        compiled: time layers and steps under torch.compile; on a CPU it takes minutes to compile.
        seed: of the model, the batches and the order of turns.
        progress: told of every group of layers and every round of steps.
        clock: default: the device's own.
        names_kernels: add the names of FP8 layers' CUDA kernels; slows later launches, see proving.

    Raises:
        DeviceError: torch.compile does not work here, or a step compiles again and again.
    """
    facts = device_facts(device)  # imports torchao, which is no part of the measurement
    given = Given(workload, device, clock or make_clock(device), seed, progress)
    groups = group_layers(spec, options)
    mode = COMPILED if compiled else EAGER
    facts = facts.model_copy(update={"compile_mode": mode})
    with open_compilation(device, mode) as compilation:
        given = replace(given, compilation=compilation)
        profile = _profile(given, spec, facts, groups, gemms_hp=gemms_hp)
    if device.type != "cuda" or not names_kernels:
        return profile
    return profile.model_copy(update={"layers": name_kernels_of(given, groups, profile.layers)})


def _profile(
    given: Given, spec: ModelSpec, facts: DeviceFacts, groups: Sequence[Group], *, gemms_hp: bool
) -> Profile:
    started = time.perf_counter()
    recorded = _record(given, groups)
    meter = LayerMeter(
        given.device,
        given.clock,
        spec.optimizer_state_numel_ratio,
        gemms_hp=gemms_hp,
        monitor=find_monitor(given.device),
        seed=given.seed,
        compilation=given.compilation,
    )
    rows = _time_layers(given, meter, groups, recorded)
    if gemms_hp:
        spec, rows = without_slow_masks(spec, rows)
    cast_ms = time_boundary_cast(recorded.calls.values(), clock=given.clock, device=given.device)
    step_ms = recorded.step_ms
    del recorded  # a model and all its activations, which whole steps would have to fit beside
    release_memory(given.device)
    steps = _time_uniform_steps(given, rows, groups, step_ms)
    elapsed_ms = (time.perf_counter() - started) * 1e3
    compilation = given.compilation or Compilation(given.device)
    fp32_ms = next(step.timing.median_ms for step in steps if step.label == "fp32")
    return Profile(
        model=spec,
        device=facts,
        basis=Basis.MEASURED,
        layers=rows,
        steps=steps,
        boundary_cast_ms_per_melement=cast_ms,
        fixed_ms=fixed_time("fp32", steps, rows, groups),
        fixed_bf16_ms=fixed_time("bf16_o2", steps, rows, groups),
        step_equivalents=max(elapsed_ms - compilation.seconds * 1e3, 0.0) / max(fp32_ms, 1e-6),
        compile_s=compilation.seconds,
        recompiles=compilation.recompiles,
    )


def _time_layers(
    given: Given, meter: LayerMeter, groups: Sequence[Group], recorded: Recorded
) -> tuple[LayerTiming, ...]:
    rows: list[LayerTiming] = []
    for number, group in enumerate(groups):
        given.progress("layers", number, len(groups))
        rows += meter.time_group(group, *_layer_of(given, recorded, group))
    given.progress("layers", len(groups), len(groups))
    return tuple(rows)


def name_kernels_of(
    given: Given, groups: Sequence[Group], rows: Sequence[LayerTiming]
) -> tuple[LayerTiming, ...]:
    """Return all rows with the names of FP8 layers' CUDA kernels; the model is built once more."""
    recorded = _record(given, groups)
    named: list[LayerTiming] = []
    for group in groups:
        own = [row for row in rows if group.first.name in row.names]
        named += name_kernels(own, *_layer_of(given, recorded, group))
    return tuple(named)


def group_layers(spec: ModelSpec, options: Sequence[Option] | None) -> list[Group]:
    """Return the layers in groups that are timed once, each with the options to time."""
    groups: dict[tuple[object, ...], list[LayerSpec]] = {}
    for layer in spec.layers:
        shared = tuple(parameter.shared_with is not None for parameter in layer.parameters)
        groups.setdefault((layer.shape_key, shared, layer.options), []).append(layer)
    return [Group(tuple(same), chosen_options(same[0], options)) for same in groups.values()]


def chosen_options(layer: LayerSpec, options: Sequence[Option] | None) -> tuple[Option, ...]:
    """Return the layer's options, those of FP8 limited to the recipes of `options`."""
    if options is None:
        return layer.options
    recipes = {option.recipe for option in options}
    return tuple(o for o in layer.options if not o.is_fp8 or o.recipe in recipes)


def uniform_options(groups: Iterable[Group], *, fp8: bool = False) -> dict[str, Option]:
    """Return BF16 O2 for every layer that takes it, or its first FP8 option where `fp8`."""
    chosen: dict[str, Option] = {}
    for group in groups:
        first_fp8 = next((option for option in group.options if option.is_fp8), None)
        best = BF16_O2 if BF16_O2 in group.options else FP32
        chosen |= {layer.name: (fp8 and first_fp8) or best for layer in group.layers}
    return chosen


def sum_totals(rows: Iterable[LayerTiming], options: Mapping[str, Option]) -> float:
    """Return the ms of all layers in these options; a layer that does not run has none."""
    by_key = {
        (name, row.option): row.total.median_ms
        for row in rows
        if row.total is not None
        for name in row.names
    }
    return sum(by_key.get(chosen, 0.0) for chosen in options.items())


def fixed_time(
    label: str, steps: Iterable[StepTiming], rows: Sequence[LayerTiming], groups: Sequence[Group]
) -> float:
    """Return the uniform step's time outside of its layers."""
    step = next(step for step in steps if step.label == label)
    options = uniform_options(groups)
    if label == "fp32":
        options = dict.fromkeys(options, FP32)
    return step.timing.median_ms - sum_totals(rows, options)


def time_boundary_cast(
    calls: Iterable[Sequence[Call]], *, clock: Clock, device: torch.device
) -> float:
    """Return the ms per million elements of a cast between BF16 and FP32, forward and backward.

    Measured at the size of the model's largest activation.
    """
    leaves = tree_leaves([(call.args, call.kwargs) for layer in calls for call in layer])
    sizes = [x.numel() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    elements = max(sizes, default=DEFAULT_CAST_ELEMENTS)
    x = torch.randn(elements, device=device).bfloat16().requires_grad_()
    gradient = torch.randn(elements, device=device)

    def cast() -> None:
        for _ in range(CASTS_PER_SAMPLE):
            torch.autograd.grad(x.float(), x, gradient)

    found = sample_interleaved({"cast": cast}, clock=clock, stopping=Stopping(samples=CAST_SAMPLES))
    return found["cast"].timing().median_ms / CASTS_PER_SAMPLE / elements * 1e6


def _record(given: Given, groups: Sequence[Group]) -> Recorded:
    """Run two steps of the FP32 model: one warms up, the other is recorded and timed."""
    workload, device, seed = given.workload, given.device, given.seed
    model = workload.build_model(seed=seed).to(device).train()
    batch = take_batches(workload, seed=seed, count=1, device=device)[0]
    record_step(workload, model, batch, {}, seed=seed)  # lazy modules have parameters after it
    layers = find_layers(model)
    chosen = {group.first.name: layers[group.first.name] for group in groups}
    started = time.perf_counter()
    calls = record_step(workload, model, batch, chosen, seed=seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Recorded(model, layers, calls, (time.perf_counter() - started) * 1e3)


def record_step(
    workload: Workload,
    model: nn.Module,
    batch: Batch,
    layers: Mapping[str, nn.Module],
    *,
    seed: int,
) -> dict[str, list[Call]]:
    """Run forward and backward of one batch; return the calls of the given layers by name."""
    with recorded_calls(layers, merged=True) as calls:
        run_step(workload, model, batch, seed=seed)
    model.zero_grad(set_to_none=True)
    return calls


def _layer_of(
    given: Given, recorded: Recorded, group: Group
) -> tuple[Sequence[Call], Callable[[], nn.Module]]:
    """Return the calls of a group's first layer, and what makes copies of it."""
    name = group.first.name
    make_layer = partial(_fresh_layer, given.workload, recorded, name, device=given.device)
    return recorded.calls[name], make_layer


def _fresh_layer(
    workload: Workload, recorded: Recorded, name: str, *, device: torch.device
) -> nn.Module:
    return copy_layer(
        recorded.layers[name], lambda: workload.build_model().to(device).train(), name
    )


def _time_uniform_steps(
    given: Given, rows: Sequence[LayerTiming], groups: Sequence[Group], step_ms: float
) -> tuple[StepTiming, ...]:
    bf16, fp8 = uniform_options(groups), uniform_options(groups, fp8=True)
    fp8 = _feasible(fp8, rows)
    arms: dict[str, Arm] = {"fp32": {}, "bf16_o2": bf16, AUTOCAST: AUTOCAST}
    has_fp8 = any(option.is_fp8 for option in fp8.values())
    surplus_ms = sum_totals(rows, fp8) - sum_totals(rows, bf16)
    is_slow = surplus_ms > (SLOW_STEP - 1) * step_ms
    if has_fp8 and not is_slow:
        arms["fp8_o1"] = fp8
    steps = time_steps(
        given.workload,
        arms,
        device=given.device,
        clock=given.clock,
        samples=STEP_SAMPLES,
        seed=given.seed,
        progress=given.progress,
        compilation=given.compilation,
        warmup=STEP_WARMUP,
        stopping=Stopping(
            STEP_SAMPLES,
            STEP_LEAST,
            budget_ms=STEP_BUDGET * step_ms,
            rejections=STEP_LEAST,
        ),
    )
    if has_fp8 and is_slow:
        base = next(step for step in steps if step.label == "bf16_o2")
        steps += (_predicted_step("fp8_o1", base.timing.median_ms + surplus_ms),)
    return steps


def _feasible(options: Mapping[str, Option], rows: Iterable[LayerTiming]) -> dict[str, Option]:
    """Return BF16 O2 in place of FP8 options that cannot run."""
    broken = {(name, row.option) for row in rows if row.infeasible for name in row.names}
    return {name: BF16_O2 if (name, o) in broken else o for name, o in options.items()}


def _predicted_step(label: str, ms: float) -> StepTiming:
    timing = Timing(median_ms=ms, p20_ms=ms, p80_ms=ms, samples=0, basis=Basis.PREDICTED)
    return StepTiming(label=label, timing=timing, peak_bytes=None)
