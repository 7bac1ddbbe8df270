"""Layers of equal shape and their options -> one row of times and bytes for each option.

Every option of a layer is tried once (which proves what ran, warms it up, and finds the ones that
cannot run), then all of them are timed in turns: first whole, then their parts:

    output, grad_input, grad_weight   FP32 and BF16: forward, and backward to inputs or parameters
                                      alone. Parts that share work make their sum exceed `total`.
                                      FP8: the three GEMMs, operation by operation.
    cast                              FP8: every other operation

With torch.compile, `total` is of the compiled layer, an FP8 one between its neighbours, with which
its casts are fused (surrounded.py). Its parts cannot be run apart, since one
compiled backward pass makes all gradients: the GEMMs are those of the eager layer, the same library
calls, and an FP8 layer's `cast` is what they leave of the total. Bytes and operations are the eager
layer's too, since compiled code hides its operations.
"""

import logging
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from typing import TypeVar

import torch

from autoprec.common.text import first_line
from autoprec.device.local import release_memory
from autoprec.device.memory import is_out_of_memory
from autoprec.device.ranks import check_all_failed, from_first_rank, gathered, largest_over_ranks
from autoprec.device.timing import (
    UNWATCHED,
    Clock,
    Function,
    Monitor,
    Samples,
    SlowestClock,
    Stopping,
    sample_interleaved,
    timing_from,
)
from autoprec.device.tracing import Operation
from autoprec.errors import DeviceError
from autoprec.model.kinds import is_linear
from autoprec.model.recording import Call
from autoprec.profiler.candidates import (
    WORTH_TIMING,
    Attempt,
    Candidate,
    MakeLayer,
    SlowFp8,
    try_option,
)
from autoprec.profiler.compiling import Compilation, GraphMonitor
from autoprec.profiler.groups import Group
from autoprec.profiler.kept import KeptRows
from autoprec.profiler.surrounded import surrounded_calls
from autoprec.records import BF16_O2, FP32, Basis, Gemm, LayerTiming, Option, Timing, with_gemms_hp
from autoprec.runtime.activations import option_dtype

log = logging.getLogger(__name__)
Key = TypeVar("Key", bound=tuple[Option, object])  # of what is sampled
CAST = "cast"
PARTS = (*(gemm.value for gemm in Gemm), CAST)  # the fields of a row
SUM_ERROR = 1.1  # generous on purpose: parts share work and add up to too much, and timing decides
# A small layer's time per multiply-add was 0.63 to 1.16 of what real ones took (AVX512-BF16 CPU,
# torch 2.13.0; 16 to 34 million of them), less for smaller ones: the interval goes both ways.
EXTRAPOLATED = 2.0
TOTAL = Stopping(samples=9, least=3, precision=0.02, budget_ms=30.0, rejections=3)
CALLED_OTHERWISE = "ranks call it in different numbers, as those of experts"
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
    kept: KeptRows = field(default_factory=KeptRows)  # told what is in flight
    name: str = ""  # of the layer that is timed

    @cached_property
    def slow_fp8(self) -> SlowFp8:
        """What is known of FP8 options that are too slow to be timed."""
        return SlowFp8(self.device, self.clock, self.seed)

    def time_group(
        self,
        group: Group,
        calls: Sequence[Call],
        make_layer: MakeLayer,
        asked: Container[Option] = (),
    ) -> list[LayerTiming]:
        """Return a row for every option of the group; those `asked` for are run, however slow."""
        self.name = group.first.name
        reason = self.kept.why_ended(self.name, FP32)  # what would the others be compared with?
        is_unlike = not reason and len(set(gathered(len(calls)))) > 1
        reason = CALLED_OTHERWISE if is_unlike else reason  # ranks would wait for each other
        if not calls or reason:  # what the step does not call has bytes but no time
            attempts = [Attempt(option, unknown=reason) for option in group.options]
            return [self._row(group, attempt, None, {}) for attempt in attempts]
        between = None
        if self.compilation is not None:
            torch.compiler.reset()  # one layer's sizes must not make another's dynamic
            if any(option.is_fp8 for option in group.options):
                between = surrounded_calls(calls)
        fp32 = self.try_option(FP32, calls, make_layer)
        fp32_ms = math.inf
        if fp32.candidate is not None and any(option.is_fp8 for option in group.options):
            fp32_ms = self.clock.measure(fp32.candidate.step)
        attempts = [fp32]
        # BF16 first: FP8 is compiled with neighbours where BF16 is, which their time is taken from
        for option in sorted((o for o in group.options if o != FP32), key=lambda o: o.is_fp8):
            least_ms = math.inf if option in asked else fp32_ms
            predicted = self.slow_fp8.predict(option, calls, fp32_ms=least_ms)
            attempt = predicted or self.try_option(option, calls, make_layer, between)
            attempts.append(attempt)
            if option == BF16_O2 and attempt.surrounded is None:
                between = None
        rows = self._time_attempts(group, attempts)
        if self.gemms_hp:
            bf16 = [attempt for attempt in attempts if attempt.option == BF16_O2]
            promising = promising_gemms_hp(rows)
            more = [self.try_option(o, calls, make_layer, between) for o in promising]
            rows += self._time_attempts(group, more, bf16)
        return rows

    def try_option(
        self,
        option: Option,
        calls: Sequence[Call],
        make_layer: MakeLayer,
        between: Sequence[Call] | None = None,
    ) -> Attempt:
        """Run an option as it will be timed, and once under a trace."""
        if reason := self.kept.why_ended(self.name, option):
            return Attempt(option, infeasible=reason)
        self.kept.begin(self.name, option)
        attempt = try_option(option, calls, make_layer, self.compilation, between=between)
        if attempt.infeasible:
            release_memory(self.device)  # it may be what ran out
        if attempt.note:
            log.warning("a layer is timed eagerly in %s: %s", option.key, attempt.note)
        return attempt

    def _time_attempts(
        self, group: Group, attempts: Sequence[Attempt], others: Sequence[Attempt] = ()
    ) -> list[LayerTiming]:
        """Return the rows of attempts; `others` are timed with them, for their neighbours' time."""
        candidates = [attempt.candidate for attempt in attempts if attempt.candidate]
        totals = self._sample_totals([*others, *attempts]) if candidates else {}
        medians = {option: taken.timing().median_ms for option, taken in totals.items()}
        slow = from_first_rank(far_slower_than_fp32(medians))
        parts = self.time_parts([own for own in candidates if own.option not in slow])
        for option, own in parts.items():
            if self.compilation is not None and option.is_fp8:
                # What the compiled layer takes beyond its GEMMs, which are library calls.
                gemms_ms = sum(own[gemm].median_ms for gemm in Gemm if gemm in own)
                total_ms = totals[option].timing().median_ms
                own[CAST] = timing_from([max(total_ms - gemms_ms, 0.0)])
        return [
            self._row(group, a, totals.get(a.option), parts.get(a.option, {})) for a in attempts
        ]

    def _sample_totals(self, attempts: Sequence[Attempt]) -> dict[Option, Samples]:
        """Time every attempt that can run, FP8 ones between their neighbours where that compiled.

        The neighbours' own time is x = c(bf16) - a(bf16), see surrounded.py: taken off round by
        round, so that the spread of what is left, and the search's margin, has its noise in it.
        """
        try:
            taken = self._sample(_steps_of(attempts), TOTAL)
        except DeviceError as error:
            if self.compilation is None:
                raise
            for attempt in attempts:  # one of them compiled in sample after sample
                attempt.leave_eager(first_line(error))
            log.warning("a layer is timed eagerly: %s", first_line(error))
            return self._sample_totals(attempts)
        alone = {option: samples for (option, between), samples in taken.items() if not between}
        if (BF16_O2, True) not in taken:
            return alone
        base, alone_ms = taken[BF16_O2, True], alone[BF16_O2].timing().median_ms
        return alone | {
            option: samples.beyond(base, plus_ms=alone_ms)
            for (option, between), samples in taken.items()
            if between and option.is_fp8
        }

    def _sample(self, steps: Mapping[Key, Function], stopping: Stopping) -> dict[Key, Samples]:
        monitor = self.monitor
        if self.compilation is not None:
            monitor = GraphMonitor(self.compilation, monitor)
        return sample_interleaved(
            steps,
            clock=self.clock,
            stopping=stopping,
            warmup=1,
            begin=lambda key: self.kept.begin(self.name, key[0]),
            monitor=monitor,
            seed=self.seed,
        )

    def time_parts(self, candidates: Sequence[Candidate]) -> dict[Option, dict[str, Timing]]:
        """Time the parts of every option; none where their graphs do not fit side by side."""
        parts: dict[Option, dict[str, Timing]] = {own.option: {} for own in candidates}
        try:
            # FP32 and BF16: what backward to one side runs, over a graph that is kept
            functions = {
                (own.option, part): fn
                for own in candidates
                if not own.option.is_fp8
                for part, fn in part_functions(own).items()
            }
            if not functions:
                return parts
            for (option, part), taken in self._sample(functions, PART).items():
                parts[option][part] = taken.timing()
            fp8 = [own for own in candidates if own.option.is_fp8]
            return parts | {own.option: self._time_fp8_parts(own) for own in fp8}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            check_all_failed("the parts of a layer", error)
            log.warning("parts of a layer are not timed, only its total: %s", first_line(error))
            return {}

    def _time_fp8_parts(self, candidate: Candidate) -> dict[str, Timing]:
        """Time every operation of one run: by now the layer is warm, and FP8 has a dozen casts."""
        # ranks may copy where others need not, by their numbers of tokens: sums alone are compared
        clock = self.clock.own if isinstance(self.clock, SlowestClock) else self.clock
        own = sum_parts(candidate.trace_step(clock))
        parts = dict(zip(own, largest_over_ranks(list(own.values())), strict=True))
        if not candidate.inputs:  # torchao multiplies all the same; the step does not need it
            del parts[Gemm.GRAD_INPUT]
        if not candidate.parameters:
            del parts[Gemm.GRAD_WEIGHT]
        return {part: timing_from([ms]) for part, ms in parts.items()}

    def _row(
        self, group: Group, attempt: Attempt, total: Samples | None, parts: Mapping[str, Timing]
    ) -> LayerTiming:
        timing = None if total is None else total.timing()
        if attempt.predicted_ms is not None:
            timing = predicted_timing(attempt.predicted_ms)
        return LayerTiming(
            names=group.names,
            option=attempt.option,
            **{part: parts.get(part) for part in PARTS},
            total=timing,
            **self._bytes(group, attempt),
            activation_bytes=attempt.activation_bytes,
            infeasible=attempt.infeasible,
            unknown=attempt.unknown,
            kernels=attempt.kernels,
            conditions=total.merged_conditions() if total else None,
            beside=self._beside(attempt),
            note=attempt.note,
        )

    def _beside(self, attempt: Attempt) -> tuple[str, ...]:
        """Return the neighbours that an FP8 layer was timed between."""
        wide = attempt.surrounded if attempt.option.is_fp8 else None
        found = wide.calls[0].surroundings if wide else None
        return found.names if found else ()

    def _bytes(self, group: Group, attempt: Attempt) -> dict[str, int]:
        """Return parameter, gradient and optimizer bytes; shared parameters count where first.

        They are one rank's, between the moments in which FSDP gathers a layer.
        """
        widths = [option_dtype(attempt.option).itemsize] * len(group.first.parameters)
        if attempt.candidate is not None:  # batch norms keep FP32 parameters in a 16-bit option
            widths = [parameter.itemsize for parameter in attempt.candidate.layer.parameters()]
        sizes = zip(group.first.parameters, widths, strict=True)
        own = [(p, size) for p, size in sizes if p.shared_with is None]
        trainable = [(p.held_numel, size) for p, size in own if p.is_trainable]
        states = 4 * self.state_ratio * sum(numel for numel, _ in trainable)  # FP32 always
        masters = sum(4 * numel for numel, size in trainable if size == 2)
        return {
            "parameter_bytes": sum(p.held_numel * size for p, size in own),
            "gradient_bytes": sum(numel * size for numel, size in trainable),
            "optimizer_bytes": round(states) + masters,
        }


def _steps_of(attempts: Sequence[Attempt]) -> dict[tuple[Option, bool], Function]:
    """Return the steps of attempts to time, by option and whether between neighbours."""
    steps: dict[tuple[Option, bool], Function] = {}
    for attempt in attempts:
        if attempt.surrounded is not None:
            steps[attempt.option, True] = attempt.surrounded.step
        if attempt.candidate is not None and not (attempt.surrounded and attempt.option.is_fp8):
            steps[attempt.option, False] = attempt.candidate.step
    if any(between and option.is_fp8 for option, between in steps):
        return steps
    return {key: step for key, step in steps.items() if not key[1]}


def far_slower_than_fp32(total_ms: Mapping[Option, float]) -> set[Option]:
    """Return the options that nobody would take for their speed; none where FP32 has no time."""
    limit_ms = WORTH_TIMING * total_ms.get(FP32, math.inf)
    return {option for option, ms in total_ms.items() if ms > limit_ms}


def predicted_timing(ms: float, *, beside_ms: float = 0.0) -> Timing:
    """Return the timing of what was not run; `beside_ms` of it were measured."""
    low, high = (beside_ms + factor * ms for factor in (1.0 / EXTRAPOLATED, EXTRAPOLATED))
    median_ms = beside_ms + ms
    return Timing(median_ms=median_ms, p20_ms=low, p80_ms=high, samples=0, basis=Basis.PREDICTED)


def part_functions(candidate: Candidate) -> dict[str, Function]:
    """Return the function to time for each part of an FP32 or BF16 layer: the GEMMs of a linear.

    Backward of other layers is run as training runs it: torch 2.13's GroupNorm ends the process
    where a channels-last input's weight alone wants a gradient.
    """
    if not is_linear(candidate.layer):
        return {}
    functions: dict[str, Function] = {Gemm.OUTPUT: candidate.forward}
    if candidate.inputs:
        functions[Gemm.GRAD_INPUT] = candidate.backward_to(candidate.inputs)
    if candidate.parameters:
        functions[Gemm.GRAD_WEIGHT] = candidate.backward_to(candidate.parameters)
    return functions


def sum_parts(operations: Sequence[Operation]) -> dict[str, float]:
    """Return the ms of each part of an FP8 linear layer; a bias belongs to its GEMM.

    torchao multiplies grad_input first and grad_weight second, whether or not both are needed.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    backward_gemms = cycle((Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT))
    for operation in operations:
        if operation.is_gemm and operation.is_backward:
            part = next(backward_gemms).value
        elif operation.is_gemm or (operation.name == "add" and not operation.is_backward):
            part = Gemm.OUTPUT.value
        elif operation.name == "sum" and operation.is_backward:
            part = Gemm.GRAD_WEIGHT.value  # the bias's gradient
        else:
            part = CAST
        parts[part] += operation.ms
    return parts


def promising_gemms_hp(rows: Sequence[LayerTiming]) -> list[Option]:
    """Return the options with GEMMs kept in BF16 that should beat BF16 and FP32, by others' parts.

    A GEMM kept in BF16 takes BF16's time for it instead of FP8's, and saves its share of the casts.
    What is timed then, decides. None should where BF16 is far slower than FP32.
    """
    bf16 = next((row for row in rows if row.option == BF16_O2), None)
    total_ms = {row.option: row.total.median_ms for row in rows if row.total}
    if bf16 is None or bf16.total is None or BF16_O2 in far_slower_than_fp32(total_ms):
        return []
    least_ms = min(ms for option, ms in total_ms.items() if not option.is_fp8)
    known = [row.option for row in rows]
    in_fp8 = {row.option.recipe: row for row in rows if row.option.is_fp8 and row.total}
    return [
        option
        for option in with_gemms_hp(known)
        if option not in known
        and option.recipe in in_fp8
        and _guessed_ms(in_fp8[option.recipe], bf16, option) < SUM_ERROR * least_ms
    ]


def _guessed_ms(in_fp8: LayerTiming, bf16: LayerTiming, option: Option) -> float:
    ms = in_fp8.total.median_ms if in_fp8.total else math.inf
    for gemm in option.gemms_hp:
        own, other = getattr(in_fp8, gemm), getattr(bf16, gemm)  # the rows' fields are the GEMMs'
        if own is not None and other is not None:
            ms += other.median_ms - own.median_ms
    casts = in_fp8.cast.median_ms if in_fp8.cast else 0.0
    return ms - casts * len(option.gemms_hp) / len(Gemm)
