"""Layers of equal shape and their options -> one row of times and bytes for each option.

Every option of a layer runs once under a trace (which proves what ran, warms it up, and finds the
ones that cannot run), then all of them are timed in turns: first whole, then their parts.

    output, grad_input, grad_weight   FP32 and BF16: forward, and backward to inputs or parameters
                                      alone. Parts that share work make their sum exceed `total`.
                                      FP8: the three GEMMs, operation by operation.
    cast                              FP8: every other operation

With torch.compile, `total` is of the compiled layer. Its parts cannot be run apart (one compiled
backward pass makes all gradients), so the GEMMs are those of the eager layer, the same library
calls, and an FP8 layer's `cast` is the rest of the total. Bytes and operations are the eager
layer's too, since compiled code hides its operations.

Where a CPU has only a reference kernel for FP8 GEMMs, timing whole layers would take longer than
training (oneDNN 3.12 with AVX512-FP16 but no FP8 units: 900 times slower than FP32). The cost per
operation of a small layer tells: such an option gets a predicted total.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoprec.device.local import release_memory
from autoprec.device.timing import (
    Clock,
    Function,
    Monitor,
    Samples,
    Stopping,
    merge_conditions,
    sample_interleaved,
    timing_from,
)
from autoprec.errors import PlanMismatchError
from autoprec.model.recording import Call
from autoprec.profiler.candidates import Candidate, MakeLayer, make_candidate
from autoprec.profiler.compiling import Compilation, GraphMonitor, reason_of
from autoprec.profiler.tracing import Operation, traced
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    Gemm,
    LayerSpec,
    LayerTiming,
    Option,
    Timing,
    with_gemms_hp,
)
from autoprec.runtime.classes import option_dtype

log = logging.getLogger(__name__)
TOTAL = Stopping(samples=9, least=3, precision=0.02, budget_ms=30.0, rejections=3)
PART = Stopping(samples=5, least=2, precision=0.1, budget_ms=15.0, rejections=1)
HOPELESS = 6.0  # times the FP32 layer; a slower option is predicted, not timed
PROBE_WIDTH, PROBE_ROWS, PROBE_CALLS = 64, (16, 144), 3
FEASIBILITY_ERRORS = (RuntimeError, ValueError, AssertionError, PlanMismatchError)
CAST = "cast"
MARGIN = 1.1


@dataclass(frozen=True)
class Group:
    """Layers that are timed once: equal shapes, options and shared parameters."""

    layers: tuple[LayerSpec, ...]
    options: tuple[Option, ...]

    @property
    def first(self) -> LayerSpec:
        """The layer that stands for the others."""
        return self.layers[0]


@dataclass
class Run:
    """What one trial run of an option showed."""

    option: Option
    candidate: Candidate | None = None  # None: it cannot run, or is not worth timing
    compiled: Candidate | None = None  # the same, compiled; None: eager
    infeasible: str = ""
    predicted_ms: float | None = None
    kernels: tuple[str, ...] = ()
    activation_bytes: int = 0

    @property
    def step(self) -> Function | None:
        """What is timed as a whole."""
        timed = self.compiled or self.candidate
        return None if timed is None else timed.step


@dataclass(frozen=True)
class Probe:
    """What a small layer in an FP8 option showed: forward and backward ms per M * K * N."""

    ms_per_mac: float = 0.0
    kernels: tuple[str, ...] = ()


@dataclass
class LayerMeter:
    """Times groups of layers on one device."""

    device: torch.device
    clock: Clock
    state_ratio: float  # optimizer state elements per parameter element
    gemms_hp: bool = False  # time FP8 with some GEMMs in BF16 too, where the parts promise a gain
    monitor: Monitor | None = None
    seed: int = 0
    compilation: Compilation | None = None  # None: eager
    probes: dict[Option, Probe] = field(default_factory=dict)

    def time_group(
        self, group: Group, calls: Sequence[Call], make_layer: MakeLayer
    ) -> list[LayerTiming]:
        """Return a row for every option of the group."""
        if not calls:  # the step does not call it, so it has bytes but no time
            return [self._row(group, Run(option), None, {}) for option in group.options]
        if self.compilation is not None:
            torch.compiler.reset()
        runs = [self._try_option(FP32, calls, make_layer)]
        limit_ms = self._limit(group, runs[0])
        for option in (option for option in group.options if option != FP32):
            predicted = self._predict_fp8(option, calls, limit_ms=limit_ms)
            runs.append(predicted or self._try_option(option, calls, make_layer))
        rows = self._time_runs(group, runs)
        if self.gemms_hp:
            masked = [self._try_option(o, calls, make_layer) for o in promising_masks(rows)]
            rows += self._time_runs(group, masked)
        return rows

    def _time_runs(self, group: Group, runs: Sequence[Run]) -> list[LayerTiming]:
        """Time runs in turns, whole and then in parts."""
        totals = self._sample({run.option.key: run.step for run in runs if run.step})
        parts = self._time_parts(runs)
        for run in (run for run in runs if run.compiled and run.option in parts):
            if run.option.is_fp8:
                total = totals[run.option.key].timing()
                parts[run.option][CAST] = remainder(total, parts[run.option])
        return [
            self._row(group, run, totals.get(run.option.key), parts.get(run.option, {}))
            for run in runs
        ]

    def _try_option(self, option: Option, calls: Sequence[Call], make_layer: MakeLayer) -> Run:
        """Run an option as it will be timed, and once under a trace."""
        run = self._try_eager(option, calls, make_layer)
        if run.candidate is None:
            release_memory(self.device)  # it may be what ran out
            return run
        try:
            return replace(run, compiled=self._compile(run.candidate))
        except FEASIBILITY_ERRORS as error:
            run = Run(option=option, infeasible=reason_of(error))
        release_memory(self.device)
        return run

    def _try_eager(self, option: Option, calls: Sequence[Call], make_layer: MakeLayer) -> Run:
        """Run an option once, under a trace."""
        try:
            candidate = make_candidate(make_layer, calls, option)
            kernels, activation_bytes = self._run_once(candidate)
            return Run(
                option=option,
                candidate=candidate,
                kernels=kernels,
                activation_bytes=activation_bytes,
            )
        except FEASIBILITY_ERRORS as error:
            return Run(option=option, infeasible=reason_of(error))

    def _compile(self, candidate: Candidate) -> Candidate | None:
        """Return the candidate compiled and run, or None in eager mode."""
        if self.compilation is None:
            return None
        run = self.compilation.compile_layer(candidate.layer)
        compiled = replace(candidate, compiled=run)
        self.compilation.run_first(compiled.step)
        return compiled

    def _run_once(self, candidate: Candidate) -> tuple[tuple[str, ...], int]:
        """Return the operations that ran, and the bytes that forward saved for backward."""
        with candidate.weighing() as saved:
            operations = trace_step(candidate)
        kernels = tuple(dict.fromkeys(f"{op.name} {op.dtype}".strip() for op in operations))
        return kernels, sum(saved.values())

    def _limit(self, group: Group, fp32: Run) -> float:
        """Return the ms above which an FP8 option is not timed."""
        if fp32.step is None or not any(option.is_fp8 for option in group.options):
            return math.inf
        return HOPELESS * self.clock.measure(fp32.step)

    def _predict_fp8(self, option: Option, calls: Sequence[Call], *, limit_ms: float) -> Run | None:
        """Return a run with a predicted time when it would be above the limit, else None.

        On a GPU there is FP8 where its units multiply it, and a microsecond that launching the
        probe took longer would be minutes at the size of a real layer.
        """
        if not option.is_fp8 or self.device.type == "cuda":
            return None
        if option not in self.probes:
            self.probes[option] = self._probe(option)
        probe = self.probes[option]
        predicted = probe.ms_per_mac * _linear_macs(calls)
        if predicted <= limit_ms:
            return None
        return Run(option=option, predicted_ms=predicted, kernels=probe.kernels)

    def _probe(self, option: Option) -> Probe:
        """Time a small layer with few and with more rows; the difference has no overhead."""
        generator = torch.Generator().manual_seed(self.seed)
        elapsed: list[float] = []
        kernels: tuple[str, ...] = ()
        for rows in PROBE_ROWS:
            call = _probe_call(rows, generator, self.device)
            run = self._try_eager(
                option, [call], lambda: nn.Linear(PROBE_WIDTH, PROBE_WIDTH, device=self.device)
            )
            if run.candidate is None:
                return Probe()  # the layer's own trial run will say why
            kernels = run.kernels
            step = run.candidate.step
            elapsed.append(min(self.clock.measure(step) for _ in range(PROBE_CALLS)))
        macs = (PROBE_ROWS[1] - PROBE_ROWS[0]) * PROBE_WIDTH**2
        return Probe(max(elapsed[1] - elapsed[0], 0.0) / macs, kernels)

    def _sample(
        self, functions: dict[str, Function], stopping: Stopping = TOTAL
    ) -> dict[str, Samples]:
        return sample_interleaved(
            functions,
            clock=self.clock,
            stopping=stopping,
            warmup=1,
            monitor=self._watch(),
            seed=self.seed,
        )

    def _watch(self) -> Monitor | None:
        if self.compilation is None:
            return self.monitor
        return GraphMonitor(self.compilation, self.monitor)

    def _time_parts(self, runs: Sequence[Run]) -> dict[Option, dict[str, Timing]]:
        """Time the parts of every option; none where their graphs do not fit side by side."""
        try:
            return self._time_all_parts(runs)
        except torch.OutOfMemoryError as error:
            log.warning("parts of a layer are not timed, only its total: %s", reason_of(error))
            return {}

    def _time_all_parts(self, runs: Sequence[Run]) -> dict[Option, dict[str, Timing]]:
        candidates = [run.candidate for run in runs if run.candidate]
        functions: dict[str, Function] = {}
        for candidate in candidates:
            if not candidate.option.is_fp8:
                key = candidate.option.key
                functions |= {f"{key} {part}": fn for part, fn in _part_functions(candidate)}
        found = self._sample(functions, PART)
        parts: dict[Option, dict[str, Timing]] = {}
        for candidate in candidates:
            option = candidate.option
            if option.is_fp8:
                parts[option] = self._time_fp8_parts(candidate)
            else:
                parts[option] = {
                    part: found[f"{option.key} {part}"].timing()
                    for part in Gemm
                    if f"{option.key} {part}" in found
                }
        return parts

    def _time_fp8_parts(self, candidate: Candidate) -> dict[str, Timing]:
        """Time every operation of one run: by now the layer is warm, and FP8 has a dozen casts."""
        parts = sum_parts(trace_step(candidate, self.clock))
        unwanted = set()
        if not candidate.inputs:
            unwanted.add(Gemm.GRAD_INPUT.value)
        if not candidate.parameters:
            unwanted.add(Gemm.GRAD_WEIGHT.value)
        return {
            part: timing_from([parts[part]])
            for part in (*(gemm.value for gemm in Gemm), CAST)
            if part not in unwanted
        }

    def _row(
        self, group: Group, run: Run, total: Samples | None, parts: dict[str, Timing]
    ) -> LayerTiming:
        sizes = self._bytes(group.first, run)
        return LayerTiming(
            names=tuple(layer.name for layer in group.layers),
            option=run.option,
            output=parts.get(Gemm.OUTPUT),
            grad_input=parts.get(Gemm.GRAD_INPUT),
            grad_weight=parts.get(Gemm.GRAD_WEIGHT),
            cast=parts.get(CAST),
            total=_total_timing(run, total),
            parameter_bytes=sizes[0],
            gradient_bytes=sizes[1],
            optimizer_bytes=sizes[2],
            activation_bytes=run.activation_bytes,
            infeasible=run.infeasible,
            kernels=run.kernels,
            conditions=merge_conditions(total.conditions, pauses=total.pauses) if total else None,
        )

    def _bytes(self, layer: LayerSpec, run: Run) -> tuple[int, int, int]:
        """Return parameter, gradient and optimizer bytes; shared parameters count where first."""
        width = option_dtype(run.option).itemsize
        widths = [width] * len(layer.parameters)
        if run.candidate is not None:  # batch norms keep FP32 parameters in a 16-bit option
            widths = [parameter.itemsize for parameter in run.candidate.layer.parameters()]
        own = [
            (parameter, size)
            for parameter, size in zip(layer.parameters, widths, strict=True)
            if parameter.shared_with is None
        ]
        trainable = [(p.numel, size) for p, size in own if p.is_trainable]
        states = 4 * self.state_ratio * sum(numel for numel, _ in trainable)  # FP32 always
        masters = sum(4 * numel for numel, size in trainable if size == 2)
        return (
            sum(p.numel * size for p, size in own),
            sum(numel * size for numel, size in trainable),
            round(states) + masters,
        )


def promising_masks(rows: Sequence[LayerTiming]) -> list[Option]:
    """Return the masked options that should beat BF16, by the parts of the unmasked ones.

    A masked GEMM takes BF16's time for it instead of FP8's, and saves its share of the casts. The
    guess has a margin, since parts do not quite add up; what is timed then, decides.
    """
    plain = next((row for row in rows if row.option == BF16_O2), None)
    if plain is None or plain.total is None:
        return []
    known = [row.option for row in rows]
    whole = {row.option.recipe: row for row in rows if row.option.is_fp8 and row.total}
    return [
        option
        for option in with_gemms_hp(known)
        if option not in known
        and option.recipe in whole
        and _masked_ms(whole[option.recipe], plain, option) < MARGIN * plain.total.median_ms
    ]


def _masked_ms(whole: LayerTiming, plain: LayerTiming, option: Option) -> float:
    ms = whole.total.median_ms if whole.total else math.inf
    for gemm in option.gemms_hp:
        own, other = _part_of(whole, gemm), _part_of(plain, gemm)
        if own is not None and other is not None:
            ms += other.median_ms - own.median_ms
    casts = whole.cast.median_ms if whole.cast else 0.0
    return ms - casts * len(option.gemms_hp) / len(Gemm)


def _part_of(row: LayerTiming, gemm: Gemm) -> Timing | None:
    parts = {Gemm.OUTPUT: row.output, Gemm.GRAD_INPUT: row.grad_input}
    return parts.get(gemm, row.grad_weight)


def trace_step(candidate: Candidate, clock: Clock | None = None) -> list[Operation]:
    """Run forward and backward; return the operations, timed if there is a clock."""
    with traced(clock) as trace:
        made = candidate.forward()
        trace.is_backward = True
        candidate.differentiate(made, [*candidate.inputs, *candidate.parameters])
    return trace.operations


def sum_parts(operations: Sequence[Operation]) -> dict[str, float]:
    """Return the ms of each part of an FP8 linear layer; a bias belongs to its GEMM.

    torchao multiplies grad_input first and grad_weight second, whether or not both are needed.
    """
    parts = dict.fromkeys((*(gemm.value for gemm in Gemm), CAST), 0.0)
    backward_gemms = 0
    for operation in operations:
        if operation.is_gemm and operation.is_backward:
            order = (Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT)
            part = order[backward_gemms % 2].value
            backward_gemms += 1
        elif operation.is_gemm or (operation.name == "add" and not operation.is_backward):
            part = Gemm.OUTPUT.value
        elif operation.name == "sum" and operation.is_backward:
            part = Gemm.GRAD_WEIGHT.value
        else:
            part = CAST
        parts[part] += operation.ms
    return parts


def remainder(total: Timing, parts: Mapping[str, Timing]) -> Timing:
    """Return what a compiled FP8 layer takes beyond its GEMMs."""
    gemms = sum(parts[gemm].median_ms for gemm in Gemm if gemm in parts)
    return timing_from([max(total.median_ms - gemms, 0.0)])


def _part_functions(candidate: Candidate) -> list[tuple[str, Callable[[], object]]]:
    functions: list[tuple[str, Callable[[], object]]] = [(Gemm.OUTPUT, candidate.forward)]
    if candidate.inputs:
        functions.append((Gemm.GRAD_INPUT, candidate.backward_to(candidate.inputs)))
    if candidate.parameters:
        functions.append((Gemm.GRAD_WEIGHT, candidate.backward_to(candidate.parameters)))
    return functions


def _total_timing(run: Run, samples: Samples | None) -> Timing | None:
    if samples is not None:
        return samples.timing()
    if run.predicted_ms is None:
        return None
    ms = run.predicted_ms
    return Timing(median_ms=ms, p20_ms=ms, p80_ms=ms, samples=0, basis=Basis.PREDICTED)


def _linear_macs(calls: Sequence[Call]) -> float:
    """Return M * K * N of a linear's calls in one step."""
    total = 0.0
    for call in calls:
        gradient = next((g for g in call.gradients if g is not None), None)
        first = call.args[0] if call.args else next(iter(call.kwargs.values()))
        if isinstance(first, Tensor) and gradient is not None:
            total += call.count * float(first.numel()) * gradient.shape[-1]
    return total


def _probe_call(rows: int, generator: torch.Generator, device: torch.device) -> Call:
    x, gradient = (torch.randn(rows, PROBE_WIDTH, generator=generator).to(device) for _ in "xg")
    return Call(args=(x.requires_grad_(),), kwargs={}, gradients=[gradient])
