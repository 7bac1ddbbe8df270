"""Whole training steps in turns: each variant has a model and an optimizer of its own.

A step is zero_grad, forward, backward and optimizer.step on a batch that is already on the device;
all variants see the same batches in the same order. Where the user accumulates gradients it is a
batch's share of an optimizer step with all its batches. Under torch.compile the model is compiled
(as its user does it, else by `model.compile()`), for every shape of these batches, before the first
sample; a variant that does not compile runs eagerly, and its timing says so.

Only one variant is in the device's memory at a time: training with one of them must fit, and no
more. The others wait elsewhere, and all are timed in several turns in an order of their own, so
that a drift of the machine falls on all of them alike:

    turn 0   A A | B B | C C      turn 1   B B | C C | A A     ...
"""

import logging
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from autoprec.common.progress import NOW
from autoprec.common.text import first_line
from autoprec.device.local import find_monitor, release_memory
from autoprec.device.memory import is_out_of_memory
from autoprec.device.random_state import random_state_kept
from autoprec.device.ranks import check_all_failed
from autoprec.device.timing import Function, Monitor, Samples, Stopping, sample_interleaved
from autoprec.errors import DeviceError, WorkloadError
from autoprec.model.context import Context
from autoprec.model.layers import model_layers, unwrapped
from autoprec.profiler.candidates import WORTH_TIMING
from autoprec.profiler.compiling import (
    INDUCTOR,
    Compilation,
    GraphMonitor,
    forget_failed_trace,
)
from autoprec.profiler.kept import STEP, KeptRows
from autoprec.profiler.parking import Parking
from autoprec.records import FP32, AsWritten, Option, StepTiming
from autoprec.runtime import attach_optimizer, install_options
from autoprec.workload.functions import Batch, move_batch, take_batches
from autoprec.workload.training import Training
from autoprec.workload.written import is_compiled, no_autocast

AUTOCAST, AS_WRITTEN = "autocast_bf16", "as_written"


@dataclass(frozen=True)
class Eager:
    """A variant that is run eagerly though others are compiled."""

    variant: "Variant"


@dataclass(frozen=True)
class Planned:
    """A plan: options by layer name, and what stays FP32 beside them (see `install_options`)."""

    options: Mapping[str, Option]
    fp32_outputs: Sequence[str]


# Options by layer name (none: plain FP32), AUTOCAST of an FP32 model, or AS_WRITTEN by the user.
Variant = Mapping[str, Option] | str | Planned | Eager
BATCHES = 4  # different ones, taken in turn
LEAST_ON_GPU_MS = 1000.0  # of samples for each variant: it slows down under a load that lasts
TURNS = 3  # of each variant, if it shall have as many samples
LONG_STEP_MS = 1000.0  # a step this long is dear, and needs no warm-up
# What compiling may end in; so does a lack of memory, which is told apart.
COMPILE_ERRORS = (RuntimeError, FailOnRecompileLimitHit, WorkloadError, DeviceError)
log = logging.getLogger(__name__)


def written_variants(written: AsWritten | None, *, compiled: bool) -> dict[str, Variant]:
    """Return the step as the user runs it as a variant; none where it is that of plain FP32."""
    if written is None or (written.is_fp32 and written.is_compiled == compiled):
        return {}
    return {AS_WRITTEN: AS_WRITTEN}


@random_state_kept()
def time_steps(
    context: Context,
    variants: Mapping[str, Variant],
    *,
    stopping: Stopping,
    monitor: Monitor | None = None,
    compilation: Compilation | None = None,
    kept: KeptRows | None = None,
) -> tuple[tuple[StepTiming, ...], dict[str, str]]:
    """Time a whole training step of every variant, in turns.

    With the timings come the baselines that were not timed, and why: those that are no assignment
    may be left out (autocast fails on some functions of the user's, does not fit into memory, or
    is hopeless where a step in BF16 O2 takes many times as long as in FP32).

    Without a monitor the device's own rejects dirty samples; without a compilation
    (`open_compilation`) the models run eagerly, but for one that is to be as its user wrote it.

    Raises:
        DeviceError: FP32 or a plan does not fit into the device's memory.
    """
    release_memory(context.device)  # what was timed or recorded before: whole steps need the room
    batches = take_batches(context.workload, seed=context.seed, count=BATCHES)
    monitor = monitor or find_monitor(context.device)
    comparison = _Comparison(context, batches, stopping, monitor, compilation, kept or KeptRows())
    return comparison.time_in_turns(variants), comparison.left_out


@dataclass
class _Arm:
    """One variant, ready to run; `note` says why it is not compiled though it should be."""

    step: Function
    parking: Parking
    is_compiled: bool
    first_ms: float  # of a CPU's first step, if eager, which makes the optimizer's state; else 0
    note: str = ""
    peak_bytes: int | None = None
    samples: list[Samples] = field(default_factory=list)  # by turn

    def is_hopeless(self, fp32: "_Arm | None") -> bool:
        """Whether a step takes seconds, and many times as long as in FP32.

        A CPU without BF16 instructions takes 22 times as long in BF16 (a GPT on AVX2).
        """
        least_ms = WORTH_TIMING * fp32.first_ms if fp32 else math.inf
        return self.first_ms > max(least_ms, LONG_STEP_MS)


@dataclass
class _Comparison:
    """What the variants of one comparison share."""

    context: Context
    batches: Sequence[Batch]  # where they were made
    stopping: Stopping
    monitor: Monitor
    compilation: Compilation | None
    kept: KeptRows  # told which variant is in flight
    ready: Sequence[Batch] = ()  # those of the next step, on the device
    left_out: dict[str, str] = field(default_factory=dict)  # baselines, and why

    def time_in_turns(self, variants: Mapping[str, Variant]) -> tuple[StepTiming, ...]:
        """Time the variants, one of them in memory at a time."""
        # as many turns as every variant has samples, each with its share of them
        turns = max(min(TURNS, self.stopping.least), 1)
        arms: dict[str, _Arm] = {}
        built = len(variants)  # each takes about as long as a turn
        for place, (label, variant) in enumerate(variants.items()):
            self.context.progress("steps", place, built + turns * built)
            if variant == AUTOCAST and (reason := why_hopeless(arms)):
                self.left_out[label] = reason
                continue
            arm = self._build_if_it_runs(label, variant)
            if arm is not None:
                arms[label] = arm
                if arm.is_hopeless(arms.get("fp32")):  # its first step tells enough
                    arm.samples.append(Samples([arm.first_ms]))
        least_ms = LEAST_ON_GPU_MS if self.context.device.type == "cuda" else 0.0
        own = _share(replace(self.stopping, least_ms=least_ms), turns)
        order = [label for label, arm in arms.items() if not arm.samples]
        draw = random.Random(self.context.seed)
        total = built + turns * len(order)
        for turn in range(turns):
            draw.shuffle(order)
            for place, label in enumerate(order):
                self.context.progress("steps", built + turn * len(order) + place, total)
                arms[label] = self._take_turn(arms[label], label, variants[label], own, turn)
        NOW.measures = ""
        self.context.progress("steps", total, total)
        return tuple(_timing(label, arm) for label, arm in arms.items())

    def _take_turn(
        self, arm: _Arm, label: str, variant: Variant, stopping: Stopping, turn: int
    ) -> _Arm:
        """Take one turn's samples of a variant; eagerly from now on if it compiles in them."""
        self.kept.begin(STEP, label)
        first = turn * stopping.samples  # every variant sees the same batches in a turn

        def prepare(number: int) -> None:
            self._prepare(first + number)

        arm.parking.come_back()
        try:
            with self._around(variant, arm.is_compiled):
                found = sample_interleaved(
                    {label: arm.step},
                    clock=self.context.timer,
                    stopping=stopping,
                    # after it came back, caches and allocator are cold: milliseconds of a step
                    warmup=0 if arm.first_ms > LONG_STEP_MS else 1,
                    prepare=prepare,
                    monitor=self._monitor(arm.is_compiled),
                    seed=self.context.seed,
                )
            share = self.context.workload.accumulation_steps
            arm.samples.append(found[label].divided_by(share))
            arm.parking.leave()
            if self.context.device.type == "cuda":
                torch.cuda.empty_cache()  # the next one's tensors have other sizes
            return arm
        except COMPILE_ERRORS as error:  # it compiled again and again: no time of its own
            if not arm.is_compiled or is_out_of_memory(error):
                raise
            check_all_failed(f"the step {label} compiled", error)
            note = _failure(error)
        arm.parking.leave()  # for good: another model takes its place
        eager = self._build_eagerly(label, variant, note)
        return self._take_turn(eager, label, variant, stopping, turn)

    def _monitor(self, compiled: bool) -> Monitor:
        if not compiled:
            return self.monitor
        return GraphMonitor(self.compilation or Compilation(self.context.device), self.monitor)

    # --- building --------------------------------------------------------------------------------

    def _build_if_it_runs(self, label: str, variant: Variant) -> _Arm | None:
        """Return a variant's arm, or None for a baseline that fails here."""
        if reason := self.kept.why_ended(STEP, label):
            if isinstance(variant, Mapping | Planned):
                raise DeviceError(
                    f"a step must run to its end, but the process ended in {label!r}, as it does "
                    "when memory runs out; use a smaller batch or model, and leave --resume out"
                )
            self.left_out[label] = reason
            return None
        self.kept.begin(STEP, label)
        try:
            return self._build_compiled_or_not(label, variant)
        except (RuntimeError, WorkloadError) as error:
            is_full, is_plan = is_out_of_memory(error), isinstance(variant, Mapping | Planned)
            if is_plan and not is_full:
                raise
            if is_plan:
                raise DeviceError(
                    f"a step must fit into the memory of {self.context.device}, but that of "
                    f"{label!r} does not; tune with a smaller batch or model, or on a larger device"
                ) from error
            check_all_failed(f"the step {label}", error)
            what = "it does not fit into memory" if is_full else "it fails"
            self.left_out[label] = f"{what} ({_first_cause(error)})"
        # Here the error is gone, and with it the frames that hold the model.
        release_memory(self.context.device)
        log.warning("the step %s is not timed: %s", label, self.left_out[label])
        return None

    def _build_compiled_or_not(self, label: str, variant: Variant) -> _Arm:
        try:
            return self._build(label, variant, eagerly=isinstance(variant, Eager))
        except COMPILE_ERRORS as error:
            is_full, is_eager = is_out_of_memory(error), isinstance(variant, Eager)
            if is_full or is_eager or (self.compilation is None and variant != AS_WRITTEN):
                raise
            check_all_failed(f"the step {label} compiled", error)
            note = _failure(error)
        return self._build_eagerly(label, variant, note)

    def _build_eagerly(self, label: str, variant: Variant, note: str) -> _Arm:
        """Build what does not compile as it runs without; what fails then as well is an error."""
        release_memory(self.context.device)
        forget_failed_trace()
        arm = self._build(label, variant, eagerly=True)
        log.warning("the step %s is timed eagerly: %s", label, note)
        return replace(arm, note=note)

    def _build(self, label: str, variant: Variant, *, eagerly: bool) -> _Arm:
        """Return a variant, run and compiled for every batch, away from the device."""
        device = self.context.device
        on_cuda = device.type == "cuda"
        self._prepare(0)
        before = torch.cuda.memory_allocated(device) if on_cuda else 0
        model, optimizer, compiled = self._make_model(variant, eagerly=eagerly)
        step = self._make_step(model, optimizer, variant)
        peak, first_ms = None, 0.0
        with self._around(variant, compiled):
            # The first step makes the optimizer's state, which the peak of a later one includes.
            if compiled:
                compilation = self.compilation or Compilation(device)
                for number in range(len(self.batches)):
                    self._prepare(number)
                    compilation.run_first(step)
            elif on_cuda:
                step()
            else:
                first_ms = self.context.timer.measure(step)
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(device)
                step()
                peak = torch.cuda.max_memory_allocated(device) - before
        optimizer.zero_grad(set_to_none=True)
        parking = Parking(unwrapped(model), optimizer)
        parking.leave()
        release_memory(device)
        return _Arm(step, parking, compiled, first_ms, peak_bytes=peak)

    def _make_model(
        self, variant: Variant, *, eagerly: bool
    ) -> tuple[nn.Module, torch.optim.Optimizer, bool]:
        """Return a variant's model and optimizer, and whether the model is compiled."""
        workload, seed = self.context.workload, self.context.seed
        is_written = variant == AS_WRITTEN
        asked = not eagerly and (self.compilation is not None or is_written)
        # As the user compiles it, where the user does; what is not FP32 is kept as written alone.
        keeps = is_written or (asked and not workload.written.is_low)
        model = workload.written_model(seed=seed) if keeps else workload.build_model(seed=seed)
        if keeps and not is_written and workload.written.is_low:  # not known until it was built
            model = workload.build_model(seed=seed)
        compiled = asked and is_compiled(model)
        model = model.to(self.context.device)
        optimizer = workload.build_optimizer(model)
        plan = variant.variant if isinstance(variant, Eager) else variant
        if isinstance(plan, Mapping):
            plan = Planned(plan, ())
        if isinstance(plan, Planned) and set(plan.options.values()) - {FP32}:
            inner = unwrapped(model)
            uncovered, kept = model_layers(inner).uncovered, plan.fp32_outputs
            install_options(inner, plan.options, uncovered=uncovered, fp32_outputs=kept)
            attach_optimizer(inner, optimizer)
        if asked and not compiled and (not is_written or workload.written.script_compiles):
            model.compile(backend=self.compilation.backend if self.compilation else INDUCTOR)
            compiled = True  # in place: the user's loss knows the model
        return model, optimizer, compiled

    def _make_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, variant: Variant
    ) -> Function:
        workload = self.context.workload
        autocast = self._autocast if variant == AUTOCAST else nullcontext()
        training = Training(workload, model, optimizer)

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            with autocast:  # as torch advises: backward outside, in the dtypes of forward
                return workload.written_loss(model, batch)

        def step() -> None:
            training.step(self.ready, loss_fn=loss_fn)

        return step

    def _prepare(self, number: int) -> None:
        """Bring the batches of a round's step to the device, and let go of those before."""
        self.ready, count = (), self.context.workload.accumulation_steps
        own = (
            self.batches[n % len(self.batches)] for n in range(number * count, (number + 1) * count)
        )
        self.ready = [move_batch(batch, self.context.device) for batch in own]

    @cached_property
    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.context.device.type, dtype=torch.bfloat16)

    @contextmanager
    def _around(self, variant: Variant, compiled: bool) -> Iterator[None]:
        """Let the steps of a variant run inside: no autocast of the user's, unless as written.

        Entered once for many steps: what it costs is no part of a step.
        """
        with ExitStack() as stack:
            if variant != AS_WRITTEN:
                written = self.context.workload.written
                stack.enter_context(no_autocast(written, besides=self._autocast))
            if not compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield


def why_hopeless(arms: Mapping[str, _Arm]) -> str:
    """Return why autocast needs no timing, by first steps of FP32 and BF16 O2; "" if it does."""
    fp32, bf16 = arms.get("fp32"), arms.get("bf16_o2")
    if fp32 is None or bf16 is None or not bf16.is_hopeless(fp32):
        return ""
    took = f"{bf16.first_ms / 1e3:.2g} s, and FP32's {fp32.first_ms / 1e3:.2g} s"
    return f"it runs the GEMMs of BF16 O2, whose first step took {took}"


def _failure(error: Exception) -> str:
    """Return the reason that something does not compile, in one line."""
    return f"it does not compile ({_first_cause(error)})"


def _first_cause(error: Exception) -> str:
    """Return the first line of an error, or of the user's own that it wraps."""
    is_users = isinstance(error, WorkloadError) and error.__cause__ is not None
    return first_line((is_users and error.__cause__) or error)


def _share(stopping: Stopping, turns: int) -> Stopping:
    """Return when one of several turns ends."""
    rejections = None if stopping.rejections is None else math.ceil(stopping.rejections / turns)
    return replace(
        stopping,
        samples=math.ceil(stopping.samples / turns),
        least=math.ceil(stopping.least / turns),
        budget_ms=stopping.budget_ms / turns,
        least_ms=stopping.least_ms / turns,
        rejections=rejections,
    )


def _timing(label: str, arm: _Arm) -> StepTiming:
    """Return the timing of all turns of a variant."""
    samples = Samples(
        rounds=[sample for taken in arm.samples for sample in taken.rounds],
        rejected=sum(taken.rejected for taken in arm.samples),
        pauses=sum(taken.pauses for taken in arm.samples),
        conditions=[seen for taken in arm.samples for seen in taken.conditions],
        hosts=[host for taken in arm.samples for host in taken.hosts],
    )
    timing = samples.timing(as_trained=True)
    return StepTiming(
        label=label,
        timing=timing.model_copy(update={"turn_error": turn_error(arm.samples)}),
        peak_bytes=arm.peak_bytes,
        conditions=samples.merged_conditions(),
        is_host_bound=samples.is_host_bound,
        is_compiled=arm.is_compiled,
        note=arm.note,
    )


def turn_error(turns: Sequence[Samples]) -> float:
    """Return the relative standard error of a time by the medians of its turns; 0 of one turn.

    A machine that drifts between turns makes variants differ by more than their samples do.
    """
    medians = [statistics.median(clean) for taken in turns if (clean := taken.clean)]
    if len(medians) < 2:
        return 0.0
    return statistics.stdev(medians) / math.sqrt(len(medians)) / statistics.median(medians)
