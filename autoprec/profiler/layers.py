"""Layers of equal shape and their options -> one row of times and bytes for each option.

Every option of a layer is tried once (which proves what ran, warms it up, and finds the ones that
cannot run), then all of them are timed in turns: first whole, then their parts (`parts`).

With torch.compile, `total` is of the compiled layer. Its parts cannot be run apart, so the GEMMs
are those of the eager layer, the same library calls. Bytes and operations are the eager layer's
too, since compiled code hides its operations.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from autoprec.device.local import release_memory
from autoprec.device.timing import (
    UNWATCHED,
    Clock,
    Function,
    Monitor,
    Samples,
    Stopping,
    merge_conditions,
    sample_interleaved,
    timing_from,
)
from autoprec.model.recording import Call
from autoprec.profiler.candidates import (
    FEASIBILITY_ERRORS,
    Attempt,
    Candidate,
    MakeLayer,
    try_option,
)
from autoprec.profiler.compiling import Compilation, GraphMonitor, reason_of
from autoprec.profiler.groups import Group
from autoprec.profiler.parts import (
    CAST,
    part_functions,
    promising_gemms_hp,
    remainder,
    sum_parts,
)
from autoprec.profiler.slow_fp8 import WORTH_TIMING, SlowFp8
from autoprec.records import FP32, Basis, Gemm, LayerSpec, LayerTiming, Option, Timing
from autoprec.runtime.classes import option_dtype

log = logging.getLogger(__name__)
TOTAL = Stopping(samples=9, least=3, precision=0.02, budget_ms=30.0, rejections=3)
PART = Stopping(samples=5, least=2, precision=0.1, budget_ms=15.0, rejections=1)


@dataclass
class LayerMeter:
    """Times groups of layers on one device."""

    device: torch.device
    clock: Clock
    state_ratio: float  # optimizer state elements per parameter element
    gemms_hp: bool = False  # time FP8 with some GEMMs in BF16 too, where the parts promise a gain
    monitor: Monitor = UNWATCHED
    seed: int = 0
    compilation: Compilation | None = None  # None: eager

    @cached_property
    def slow_fp8(self) -> SlowFp8:
        """What is known of FP8 options that are too slow to be timed."""
        return SlowFp8(self.device, self.clock, self.seed)

    def time_group(
        self, group: Group, calls: Sequence[Call], make_layer: MakeLayer
    ) -> list[LayerTiming]:
        """Return a row for every option of the group."""
        if not calls:  # the step does not call it, so it has bytes but no time
            return [self._row(group, Attempt(option), None, {}) for option in group.options]
        if self.compilation is not None:
            torch.compiler.reset()  # one layer's sizes must not make another's dynamic
        fp32 = self.try_option(FP32, calls, make_layer)
        limit_ms = math.inf
        if fp32.step is not None and any(option.is_fp8 for option in group.options):
            limit_ms = WORTH_TIMING * self.clock.measure(fp32.step)
        attempts = [fp32]
        for option in (option for option in group.options if option != FP32):
            predicted = self.slow_fp8.predict(option, calls, limit_ms=limit_ms)
            attempts.append(predicted or self.try_option(option, calls, make_layer))
        rows = self._time_attempts(group, attempts)
        if self.gemms_hp:
            more = [self.try_option(o, calls, make_layer) for o in promising_gemms_hp(rows)]
            rows += self._time_attempts(group, more)
        return rows

    def try_option(self, option: Option, calls: Sequence[Call], make_layer: MakeLayer) -> Attempt:
        """Run an option as it will be timed, and once under a trace."""
        attempt = try_option(option, calls, make_layer)
        if attempt.candidate is not None and self.compilation is not None:
            try:
                run = self.compilation.compile_layer(attempt.candidate.layer)
                attempt.compiled = replace(attempt.candidate, compiled=run)
                self.compilation.run_first(attempt.compiled.step)
            except FEASIBILITY_ERRORS as error:
                attempt = Attempt(option, infeasible=reason_of(error))
        if attempt.infeasible:
            release_memory(self.device)  # it may be what ran out
        return attempt

    def _time_attempts(self, group: Group, attempts: Sequence[Attempt]) -> list[LayerTiming]:
        """Time options in turns, whole and then in parts."""
        totals = self._sample({a.option.key: a.step for a in attempts if a.step}, TOTAL)
        parts = self.time_parts([a.candidate for a in attempts if a.candidate])
        for attempt in attempts:
            own = parts.get(attempt.option)
            if own and attempt.compiled and attempt.option.is_fp8:
                own[CAST] = remainder(totals[attempt.option.key].timing(), own)
        return [
            self._row(group, a, totals.get(a.option.key), parts.get(a.option, {})) for a in attempts
        ]

    def _sample(self, functions: Mapping[str, Function], stopping: Stopping) -> dict[str, Samples]:
        monitor = self.monitor
        if self.compilation is not None:
            monitor = GraphMonitor(self.compilation, monitor)
        return sample_interleaved(
            functions,
            clock=self.clock,
            stopping=stopping,
            warmup=1,
            monitor=monitor,
            seed=self.seed,
        )

    def time_parts(self, candidates: Sequence[Candidate]) -> dict[Option, dict[str, Timing]]:
        """Time the parts of every option; none where their graphs do not fit side by side."""
        try:
            # FP32 and BF16: what backward to one side runs, over a graph that is kept
            functions = {
                f"{candidate.option.key} {part}": fn
                for candidate in candidates
                if not candidate.option.is_fp8
                for part, fn in part_functions(candidate).items()
            }
            found = self._sample(functions, PART)
            return {
                candidate.option: self._time_fp8_parts(candidate)
                if candidate.option.is_fp8
                else {
                    part.value: found[key].timing()
                    for part in Gemm
                    if (key := f"{candidate.option.key} {part}") in found
                }
                for candidate in candidates
            }
        except torch.OutOfMemoryError as error:
            log.warning("parts of a layer are not timed, only its total: %s", reason_of(error))
            return {}

    def _time_fp8_parts(self, candidate: Candidate) -> dict[str, Timing]:
        """Time every operation of one run: by now the layer is warm, and FP8 has a dozen casts."""
        parts = sum_parts(candidate.trace_step(self.clock))
        if not candidate.inputs:  # torchao multiplies all the same; the step does not need it
            del parts[Gemm.GRAD_INPUT]
        if not candidate.parameters:
            del parts[Gemm.GRAD_WEIGHT]
        return {part: timing_from([ms]) for part, ms in parts.items()}

    def _row(
        self, group: Group, attempt: Attempt, total: Samples | None, parts: Mapping[str, Timing]
    ) -> LayerTiming:
        sizes = self._bytes(group.first, attempt)
        return LayerTiming(
            names=tuple(layer.name for layer in group.layers),
            option=attempt.option,
            output=parts.get(Gemm.OUTPUT),
            grad_input=parts.get(Gemm.GRAD_INPUT),
            grad_weight=parts.get(Gemm.GRAD_WEIGHT),
            cast=parts.get(CAST),
            total=_total_timing(attempt, total),
            parameter_bytes=sizes[0],
            gradient_bytes=sizes[1],
            optimizer_bytes=sizes[2],
            activation_bytes=attempt.activation_bytes,
            infeasible=attempt.infeasible,
            kernels=attempt.kernels,
            conditions=merge_conditions(total.conditions, pauses=total.pauses) if total else None,
        )

    def _bytes(self, layer: LayerSpec, attempt: Attempt) -> tuple[int, int, int]:
        """Return parameter, gradient and optimizer bytes; shared parameters count where first."""
        widths = [option_dtype(attempt.option).itemsize] * len(layer.parameters)
        if attempt.candidate is not None:  # batch norms keep FP32 parameters in a 16-bit option
            widths = [parameter.itemsize for parameter in attempt.candidate.layer.parameters()]
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


def _total_timing(attempt: Attempt, samples: Samples | None) -> Timing | None:
    if samples is not None:
        return samples.timing()
    return None if attempt.predicted_ms is None else predicted_timing(attempt.predicted_ms)


def predicted_timing(ms: float) -> Timing:
    """Return the timing of what was not run."""
    return Timing(median_ms=ms, p20_ms=ms, p80_ms=ms, samples=0, basis=Basis.PREDICTED)
