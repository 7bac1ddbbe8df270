"""Whole training steps, interleaved: each variant has a model and an optimizer of its own.

A step is zero_grad, forward, backward and optimizer.step on a batch that is already on the device;
all variants see the same batches in the same order. Under torch.compile the model is compiled, for
every shape of these batches, before the first sample.

Variants that do not fit into a device's memory side by side are timed one after another: a drift of
the machine in between is then in their ratio, which the log says.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from autoprec.common.text import error_line
from autoprec.device.local import find_monitor, release_memory
from autoprec.device.random_state import random_state_kept
from autoprec.device.timing import Function, Monitor, Stopping, sample_interleaved
from autoprec.errors import DeviceError, WorkloadError
from autoprec.model.context import Context
from autoprec.model.layers import model_layers
from autoprec.profiler.compiling import Compilation, GraphMonitor
from autoprec.records import FP32, Option, StepTiming
from autoprec.runtime import attach_optimizer, install_options
from autoprec.workload.functions import Batch, take_batches
from autoprec.workload.written import no_autocast

Variant = Mapping[str, Option] | str  # options by layer name (none: plain FP32), or AUTOCAST
AUTOCAST = "autocast_bf16"
BATCHES = 4  # different ones, taken in turn
LEAST_ON_GPU_MS = 1000.0  # of samples for each variant
WARMUP = 2  # after one only, FP32 steps of a small CNN were 6 % slow (CPU, torch 2.13)
log = logging.getLogger(__name__)


@random_state_kept()
def time_steps(
    context: Context,
    variants: Mapping[str, Variant],
    *,
    stopping: Stopping,
    monitor: Monitor | None = None,
    compilation: Compilation | None = None,
) -> tuple[StepTiming, ...]:
    """Time a whole training step of every variant, in turns.

    Without a monitor the device's own rejects dirty samples; without a compilation
    (`open_compilation`) the models run eagerly.

    Raises:
        DeviceError: a variant alone does not fit into the device's memory.
    """
    device = context.device
    monitor = monitor or find_monitor(device)
    release_memory(device)  # what was timed or recorded before: whole steps need the room
    try:  # side by side first, since only samples of one round have the same clocks and heat
        batches = take_batches(context.workload, seed=context.seed, count=BATCHES, device=device)
        watched = monitor if compilation is None else GraphMonitor(compilation, monitor)
        comparison = _Comparison(context, batches, stopping, watched, compilation)
        return comparison.time_in_turns(variants)
    except (torch.OutOfMemoryError, WorkloadError) as error:
        # Memory runs out in our code, or in a function of the user's file.
        if torch.OutOfMemoryError not in (type(error), type(error.__cause__)):
            raise
        if len(variants) == 1:
            (label,) = variants
            raise DeviceError(
                f"a step must fit into the memory of {device}, but that of {label!r} does "
                "not; tune with a smaller batch or model, or on a larger device"
            ) from error
        log.warning(
            "%d models do not fit into the memory of %s side by side and are timed one after "
            "another, so their ratios are less exact (%s)",
            len(variants),
            device,
            error_line(error),
        )
    alone = partial(
        time_steps, context, stopping=stopping, monitor=monitor, compilation=compilation
    )
    return tuple(alone({label: variant})[0] for label, variant in variants.items())


@dataclass
class _Comparison:
    """What the variants of one comparison share; `round` says which batch is next."""

    context: Context
    batches: Sequence[Batch]
    stopping: Stopping
    monitor: Monitor
    compilation: Compilation | None
    round: int = 0

    def time_in_turns(self, variants: Mapping[str, Variant]) -> tuple[StepTiming, ...]:
        """Time variants side by side: all of their models are in memory at once."""
        built = {label: self._build(variant) for label, variant in variants.items()}
        found = sample_interleaved(
            {label: step for label, (step, _) in built.items()},
            clock=self.context.timer,
            stopping=self._loaded(),
            warmup=WARMUP - 1,  # building a variant runs its first step
            prepare=self._turn_batches,
            monitor=self.monitor,
            seed=self.context.seed,
        )
        return tuple(
            StepTiming(
                label=label,
                timing=samples.timing(as_trained=True),
                peak_bytes=built[label][1],
                conditions=samples.merged_conditions(),
                is_host_bound=samples.is_host_bound,
            )
            for label, samples in found.items()
        )

    def _loaded(self) -> Stopping:
        """Return when to stop; on a GPU not before it has felt the load of every variant."""
        least_ms = LEAST_ON_GPU_MS if self.context.device.type == "cuda" else 0.0
        return replace(self.stopping, least_ms=least_ms)

    def _turn_batches(self, number: int) -> None:
        self.round = number
        rounds = self.stopping.samples
        self.context.progress("steps", min(number, rounds), rounds)

    def _build(self, variant: Variant) -> tuple[Function, int | None]:
        """Return a variant's step, run once and compiled, and the peak bytes of a step."""
        device = self.context.device
        on_cuda = device.type == "cuda"
        before = torch.cuda.memory_allocated(device) if on_cuda else 0
        step = self._make_step(variant)
        # The first step makes the optimizer's state, which the peak of a later one includes; what
        # other variants hold meanwhile does not count.
        if self.compilation is None:
            step()
        else:
            for number in range(len(self.batches)):
                self.round = number
                self.compilation.run_first(step)
        if not on_cuda:
            return step, None
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return step, torch.cuda.max_memory_allocated(device) - before

    def _make_step(self, variant: Variant) -> Function:
        workload, device = self.context.workload, self.context.device
        model = workload.build_model(seed=self.context.seed).to(device).train()
        optimizer = workload.build_optimizer(model)
        autocast = None
        if isinstance(variant, str):
            autocast = torch.autocast(device.type, dtype=torch.bfloat16)
        elif any(option != FP32 for option in variant.values()):
            install_options(model, variant, uncovered=model_layers(model).uncovered)
            attach_optimizer(model, optimizer)
        if self.compilation is not None:
            model.compile(backend=self.compilation.backend)  # in place: the user's loss knows it

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            batch = self.batches[self.round % len(self.batches)]
            # as torch advises: backward outside, in the dtypes of forward
            with no_autocast(workload.written, instead=autocast):
                loss = workload.written_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own stub
            optimizer.step()

        return step
