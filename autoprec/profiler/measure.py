"""Workload + ModelSpec -> Profile: what every layer costs in every option, and whole steps.

The search adds up layer totals, so what the sum leaves out must be a constant:

    fixed_ms       step of uniform FP32  - sum of FP32 totals
    fixed_bf16_ms  step of uniform BF16 O2 - sum of BF16 totals (FP32 for a layer without BF16)

Each holds attention, activations, loss, optimizer and Python's share, and also what an isolated
layer runs faster or slower than one within its step: their common part cancels in the fixed time.
Of a BF16 step that takes many times as long as FP32's the difference is noise of the layers, larger
than a whole step: FP32's is taken. What does not cancel is in `sum_check`: uniform FP8 less uniform
BF16 by the layers, and by steps.
"""

import logging
import time
from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from autoprec.common.text import shown_bytes
from autoprec.device.local import device_facts, find_monitor
from autoprec.device.memory import free_bytes
from autoprec.device.random_state import random_state_kept
from autoprec.device.ranks import gathered
from autoprec.device.timing import Clock, Stopping, sample_interleaved
from autoprec.errors import DeviceError
from autoprec.model.context import Context
from autoprec.model.memory import step_bytes
from autoprec.model.options import compile_obstacle, without_slow_gemms_hp
from autoprec.model.recording import Call
from autoprec.profiler.candidates import WORTH_TIMING
from autoprec.profiler.compiling import (
    COMPILED,
    EAGER,
    Compilation,
    compiler_problem,
    open_compilation,
)
from autoprec.profiler.groups import Group, group_layers, record_groups, uniform_options
from autoprec.profiler.kept import KeptRows, without_ended
from autoprec.profiler.layers import LayerMeter, predicted_timing
from autoprec.profiler.steps import AUTOCAST, Eager, Variant, time_steps, written_variants
from autoprec.records.cost import DeviceFacts, LayerTiming, Profile, StepTiming, SumCheck
from autoprec.records.model import FP32, Basis, ModelSpec, Option

log = logging.getLogger(__name__)
STEP_SAMPLES, STEP_LEAST = 4, 2
STEP_BUDGET = 4.0  # FP32 steps that the samples of one variant may take
SLOW_STEP = 2.0  # times the FP32 step; a slower FP8 step is predicted, not timed
CAST_SAMPLES = 7
CASTS_PER_SAMPLE = 8  # a step casts what it has just computed, so all but the first are warm
DEFAULT_CAST_ELEMENTS = 2**20  # where the step has no floating activation


@random_state_kept()
def profile_model(
    context: Context,
    spec: ModelSpec,
    *,
    options: Sequence[Option] | None = None,
    gemms_hp: bool = False,
    compiled: bool | None = False,
    kept: KeptRows | None = None,
    asked: Mapping[str, Container[Option]] | None = None,
) -> Profile:
    """Measure what every layer costs in every option, and what whole steps cost.

    FP8 is considered by the recipes of `options` (default: all that the spec's layers list), with
    `gemms_hp` also with one or two GEMMs in BF16, where that beats BF16. `compiled` times under
    torch.compile; None: on a GPU that can, and where the user's own model is compiled. `kept` holds
    rows that are timed, and gets the others. FP8 options `asked` for by a layer's name are timed
    however slow they are; else the time of those that are far slower than FP32 is predicted.

    Raises:
        DeviceError: torch.compile is asked for and does not work, or --memory-limit is too small.
    """
    check_room(context, spec)
    mode, problem = _choose_mode(context.device, spec, compiled)
    # imports torchao, which is no part of the measurement
    facts = device_facts(context.device).model_copy(update={"compile_mode": mode})
    groups = group_layers(spec, options)
    kept = kept or KeptRows()
    with open_compilation(context.device, mode) as compilation, kept.noting():
        meter = LayerMeter(
            context.device,
            context.timer,
            spec.optimizer_state_numel_ratio,
            gemms_hp=gemms_hp,
            monitor=find_monitor(context.device),
            seed=context.seed,
            compilation=compilation,
            kept=kept,
        )
        profile = _measure(context, meter, spec, groups, asked or {}, facts)
    return profile.model_copy(update={"compile_problem": problem})


def _measure(
    context: Context,
    meter: LayerMeter,
    spec: ModelSpec,
    groups: Sequence[Group],
    asked: Mapping[str, Container[Option]],
    facts: DeviceFacts,
) -> Profile:
    """Time all layers, then whole steps, and put both together."""
    started = time.perf_counter()
    rows, cast_ms, step_ms = _time_layers(context, meter, groups, asked)
    if meter.gemms_hp:
        spec, rows = without_slow_gemms_hp(spec, rows)
    steps, left_out = _time_uniform_steps(context, meter, spec, groups, rows, step_ms)
    elapsed_s = time.perf_counter() - started
    compiling = meter.compilation or Compilation(context.device)
    ms = {step.label: step.ms for step in steps}
    fixed_ms = ms["fp32"] - sum_totals(rows, dict.fromkeys(spec.names, FP32))
    fixed_bf16_ms = ms["bf16_o2"] - sum_totals(rows, _feasible(groups, rows))
    if ms["bf16_o2"] > WORTH_TIMING * ms["fp32"]:
        fixed_bf16_ms = fixed_ms
    return Profile(
        model=without_ended(spec, rows),
        device=facts,
        basis=Basis.MEASURED,
        layers=rows,
        steps=steps,
        boundary_cast_ms_per_melement=cast_ms,
        fixed_ms=fixed_ms,
        fixed_bf16_ms=fixed_bf16_ms,
        step_equivalents=max(elapsed_s - compiling.seconds, 0.0) / max(ms["fp32"] / 1e3, 1e-9),
        compile_s=compiling.seconds,
        recompiles=compiling.recompiles,
        sum_check=check_sum(groups, rows, steps),
        steps_left_out=left_out,
    )


def _choose_mode(device: torch.device, spec: ModelSpec, compiled: bool | None) -> tuple[str, str]:
    """Return the mode to time in, and the reason where it is eager but should be compiled."""
    if compiled is not None:
        return (COMPILED if compiled else EAGER), ""
    # what the user trains, or should train: eager FP8 loses on a GPU
    is_users = spec.as_written is not None and spec.as_written.is_compiled
    if not is_users and device.type != "cuda":
        return EAGER, ""
    missing = compile_obstacle(spec) or compiler_problem(device)
    problem = next(filter(None, gathered(missing)), "")
    if problem:
        log.warning("all is timed eagerly: %s", problem)
    return (EAGER if problem else COMPILED), problem


def check_room(context: Context, spec: ModelSpec) -> None:
    """Say what a whole step takes of the device's memory, before anything is timed."""
    limit, free = context.memory_limit, free_bytes(context.device)
    steps = (step_bytes(spec, is_16_bit=is_16_bit) for is_16_bit in (False, True))
    size = max(steps)  # variants take turns, so that the largest of them is the peak
    text = f"a training step takes about {shown_bytes(size)} on {context.device}"
    if limit is not None and size > limit:
        raise DeviceError(
            f"what tuning takes must keep within --memory-limit {shown_bytes(limit)}, but {text}; "
            "raise it, or make the batch smaller"
        )
    if free is not None and size > free:
        log.warning("%s, and %s are free: it may not fit", text, shown_bytes(free))
    log.info("%s; steps are timed one model at a time", text)


def _time_layers(
    context: Context,
    meter: LayerMeter,
    groups: Sequence[Group],
    asked: Mapping[str, Container[Option]],
) -> tuple[tuple[LayerTiming, ...], float, float]:
    """Return the rows of all groups, the ms of a boundary cast, and the ms of the recorded step."""
    recorded = record_groups(context, groups, in_surroundings=meter.compilation is not None)
    rows: list[LayerTiming] = []
    for number, group in enumerate(groups):
        context.progress("layers", number, len(groups))
        if group.names not in meter.kept.rows:
            own = [o for o in group.options if any(o in asked.get(n, ()) for n in group.names)]
            found = meter.time_group(group, *recorded.first_of(group), own)
            meter.kept.add(group.names, found)
        rows += meter.kept.rows[group.names]
    context.progress("layers", len(groups), len(groups))
    calls = recorded.calls.values()  # of a cast their size alone matters
    cast_ms = time_boundary_cast(calls, clock=context.timer, device=context.device)
    return tuple(rows), cast_ms, recorded.step_ms


def sum_totals(rows: Iterable[LayerTiming], options: Mapping[str, Option]) -> float:
    """Return the ms of all layers in these options; a layer that does not run has none."""
    by_key = {
        (name, row.option): row.total.median_ms
        for row in rows
        if row.total is not None
        for name in row.names
    }
    return sum(by_key.get(chosen, 0.0) for chosen in options.items())


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


def _feasible(
    groups: Sequence[Group], rows: Sequence[LayerTiming], *, fp8: bool = False
) -> dict[str, Option]:
    """Return uniform BF16 O2, or FP8, but the next wider where a layer cannot run it."""
    broken = {(name, row.option) for row in rows if row.infeasible for name in row.names}
    options = uniform_options(groups)
    owners = {x.name: x.tied_to or x.name for group in groups for x in group.layers}
    # layers that share a parameter have it in one dtype
    fp32 = {owners[name] for name, option in options.items() if (name, option) in broken}
    bf16 = {name: FP32 if owners[name] in fp32 else option for name, option in options.items()}
    if not fp8:
        return bf16
    options = uniform_options(groups, fp8=True)
    is_wide = {name: bf16[name] == FP32 or (name, o) in broken for name, o in options.items()}
    return {name: bf16[name] if is_wide[name] else o for name, o in options.items()}


def check_sum(
    groups: Sequence[Group], rows: Sequence[LayerTiming], steps: Sequence[StepTiming]
) -> SumCheck | None:
    """Return the cost of FP8 beyond BF16 by the layers, and by whole steps."""
    ms = {s.label: s.ms for s in steps if s.basis is Basis.MEASURED}
    if not {"fp8_o1", "bf16_o2"} <= set(ms):
        return None
    by_option = sum_totals(rows, _feasible(groups, rows, fp8=True))
    return SumCheck(
        layers_ms=by_option - sum_totals(rows, _feasible(groups, rows)),
        steps_ms=ms["fp8_o1"] - ms["bf16_o2"],
    )


def _time_uniform_steps(
    context: Context,
    meter: LayerMeter,
    spec: ModelSpec,
    groups: Sequence[Group],
    rows: Sequence[LayerTiming],
    step_ms: float,
) -> tuple[tuple[StepTiming, ...], dict[str, str]]:
    bf16, fp8 = _feasible(groups, rows), _feasible(groups, rows, fp8=True)
    is_compiled = meter.compilation is not None
    variants: dict[str, Variant] = {"fp32": {}, "bf16_o2": bf16, AUTOCAST: AUTOCAST}
    variants |= written_variants(spec.as_written, compiled=is_compiled)
    if is_compiled:
        variants["eager_bf16_o2"] = Eager(bf16)
    # By its layers a uniform FP8 step takes this much longer than a BF16 one; on a CPU without FP8
    # units that can be minutes, and the sum is then all there is to know.
    has_fp8 = any(option.is_fp8 for option in fp8.values())
    surplus_ms = sum_totals(rows, fp8) - sum_totals(rows, bf16)
    is_slow = surplus_ms > (SLOW_STEP - 1) * step_ms
    if has_fp8 and not is_slow:
        variants["fp8_o1"] = fp8
        if is_compiled:
            variants["eager_fp8_o1"] = Eager(fp8)
    budget_ms = STEP_BUDGET * step_ms
    stopping = Stopping(STEP_SAMPLES, STEP_LEAST, budget_ms=budget_ms, rejections=STEP_LEAST)
    steps, left_out = time_steps(
        context, variants, stopping=stopping, compilation=meter.compilation, kept=meter.kept
    )
    if has_fp8 and is_slow:
        base = next(step for step in steps if step.label == "bf16_o2")
        timing = predicted_timing(surplus_ms, beside_ms=base.ms)
        steps += (StepTiming(label="fp8_o1", timing=timing, peak_bytes=None),)
    return steps, left_out
