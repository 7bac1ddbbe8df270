"""Whole training steps, interleaved: each arm has a model and an optimizer of its own.

A step is zero_grad, forward, backward and optimizer.step on a batch that is already on the device;
all arms see the same batches in the same order. Under torch.compile the model is compiled, for
every shape of these batches, before the first sample.

Arms that do not fit into a device's memory side by side are timed one after another: a drift of the
machine in between is then in their ratio, which the log says.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autoprec.common.progress import Progress, report_nothing
from autoprec.device.local import find_monitor, find_sensor, release_memory
from autoprec.device.nvml import Sensor
from autoprec.device.timing import (
    Clock,
    Function,
    Monitor,
    Samples,
    Stopping,
    merge_conditions,
    sample_interleaved,
)
from autoprec.errors import DeviceError, WorkloadError
from autoprec.model.layers import model_layers
from autoprec.profiler.compiling import Compilation, GraphMonitor
from autoprec.records import FP32, Option, StepTiming
from autoprec.runtime import attach_optimizer, install_options
from autoprec.workload.functions import Batch, Workload, take_batches

Arm = Mapping[str, Option] | str  # options by layer name (none: plain FP32), or AUTOCAST
AUTOCAST = "autocast_bf16"
BATCHES = 4  # different ones, taken in turn
ENERGY_MS = 1000.0  # NVML's counter moves every 20 to 100 ms
log = logging.getLogger(__name__)


@dataclass
class Shared:
    """What the arms of one comparison share: the batches, and which one is next."""

    workload: Workload
    device: torch.device
    batches: Sequence[Batch]
    seed: int
    compilation: Compilation | None = None  # None: eager
    position: int = 0

    @property
    def batch(self) -> Batch:
        """The batch of this round."""
        return self.batches[self.position % len(self.batches)]


@dataclass(frozen=True)
class _Sampling:
    clock: Clock
    stopping: Stopping
    warmup: int
    monitor: Monitor | None
    progress: Progress


def time_steps(
    workload: Workload,
    arms: Mapping[str, Arm],
    *,
    device: torch.device,
    clock: Clock,
    samples: int,
    seed: int,
    progress: Progress = report_nothing,
    stopping: Stopping | None = None,
    monitor: Monitor | None = None,
    compilation: Compilation | None = None,
    warmup: int = 2,
) -> tuple[StepTiming, ...]:
    """Time a whole training step of every arm, in turns.

    Args:
        workload: builds the model, the batches and the optimizer of every arm.
        arms: label -> options by layer name (none: plain FP32), or `autocast_bf16`.
        device: where to train.
        clock: how to time.
        samples: timed steps per arm; `stopping`, when given, decides instead.
        seed: of models, batches and turns.
        progress: told of every round.
        stopping: when an arm is done.
        monitor: rejects dirty samples; default: the device's own.
        compilation: compiles the models, see `open_compilation`; None: eager.
        warmup: untimed steps per arm.

    Raises:
        DeviceError: an arm alone does not fit into the device's memory.
    """
    batches = take_batches(workload, seed=seed, count=BATCHES, device=device)
    shared = Shared(workload, device, batches, seed, compilation)
    monitor = monitor or find_monitor(device)
    if compilation is not None:
        monitor = GraphMonitor(compilation, monitor)
    sampling = _Sampling(clock, stopping or Stopping(samples), warmup, monitor, progress)
    try:
        return _time_arms(shared, arms, sampling)
    except (torch.OutOfMemoryError, WorkloadError) as error:
        if not is_out_of_memory(error):
            raise
        log.warning(
            "%d arms do not fit into the memory of %s side by side and are timed one after "
            "another, so their ratios are less exact (%s)",
            len(arms),
            device,
            " ".join(str(error).split()),
        )
    return tuple(_time_alone(shared, label, arm, sampling) for label, arm in arms.items())


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, in our code or in a function of the user's file."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(
        error.__cause__, torch.OutOfMemoryError
    )


def _time_alone(shared: Shared, label: str, arm: Arm, sampling: _Sampling) -> StepTiming:
    release_memory(shared.device)  # what the arm before held
    try:
        return _time_arms(shared, {label: arm}, sampling)[0]
    except (torch.OutOfMemoryError, WorkloadError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            f"a step of every arm must fit into the memory of {shared.device}, but {label!r} does "
            "not; tune with a smaller batch or model, or on a larger device"
        ) from error


def _time_arms(
    shared: Shared, arms: Mapping[str, Arm], sampling: _Sampling
) -> tuple[StepTiming, ...]:
    built = {label: _build_arm(shared, arm) for label, arm in arms.items()}
    found = sample_interleaved(
        {label: one.step for label, one in built.items()},
        clock=sampling.clock,
        stopping=sampling.stopping,
        warmup=sampling.warmup - 1,  # building an arm runs its first step
        prepare=_turn_batches(shared, sampling.progress, sampling.stopping.samples),
        monitor=sampling.monitor,
        seed=shared.seed,
    )
    sensor = find_sensor(shared.device)
    return tuple(
        _step_timing(label, built[label], samples, clock=sampling.clock, sensor=sensor)
        for label, samples in found.items()
    )


def _turn_batches(shared: Shared, progress: Progress, rounds: int) -> Callable[[int], None]:
    def prepare(number: int) -> None:
        shared.position = number
        progress("steps", min(number, rounds), rounds)

    return prepare


@dataclass(frozen=True)
class _Built:
    step: Function
    peak_bytes: int | None


def _build_arm(shared: Shared, arm: Arm) -> _Built:
    """Build an arm and run its first step, which makes the optimizer's state and compiles."""
    on_cuda = shared.device.type == "cuda"
    before = torch.cuda.memory_allocated(shared.device) if on_cuda else 0
    step = _make_step(shared, arm)
    if shared.compilation is None:
        step()
    else:
        for number in range(len(shared.batches)):
            shared.position = number
            shared.compilation.run_first(step)
    if not on_cuda:
        return _Built(step, None)
    torch.cuda.reset_peak_memory_stats(shared.device)
    step()
    return _Built(step, torch.cuda.max_memory_allocated(shared.device) - before)


def _make_step(shared: Shared, arm: Arm) -> Function:
    workload = shared.workload
    model = workload.build_model(seed=shared.seed).to(shared.device).train()
    optimizer = workload.build_optimizer(model)
    if not isinstance(arm, str) and any(option != FP32 for option in arm.values()):
        install_options(model, arm, uncovered=model_layers(model).uncovered)
        attach_optimizer(model, optimizer)
    if shared.compilation is not None:
        shared.compilation.compile_model(model)
    loss_of = _loss_function(shared, model, is_autocast=isinstance(arm, str))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()  # type: ignore[no-untyped-call]  # torch's own stub
        optimizer.step()

    return step


def _loss_function(
    shared: Shared, model: nn.Module, *, is_autocast: bool
) -> Callable[[], torch.Tensor]:
    def loss() -> torch.Tensor:
        return shared.workload.loss_fn(model, shared.batch)

    def autocast_loss() -> torch.Tensor:
        with torch.autocast(shared.device.type, dtype=torch.bfloat16):
            return loss()

    return autocast_loss if is_autocast else loss


def _step_timing(
    label: str, built: _Built, samples: Samples, *, clock: Clock, sensor: Sensor | None
) -> StepTiming:
    return StepTiming(
        label=label,
        timing=samples.timing(),
        peak_bytes=built.peak_bytes,
        energy_j=None if sensor is None else measure_energy(built.step, sensor, clock=clock),
        conditions=merge_conditions(samples.conditions, pauses=samples.pauses),
    )


def measure_energy(step: Function, sensor: Sensor, *, clock: Clock) -> float | None:
    """Return joules per step, over as many steps as the counter needs; None without a counter."""
    clock.synchronize()
    before, elapsed, steps = sensor.energy_j(), 0.0, 0
    if before is None:
        return None
    while elapsed < ENERGY_MS:
        elapsed += max(clock.measure(step), 1e-3)
        steps += 1
    after = sensor.energy_j()
    return None if after is None else max(after - before, 0.0) / steps
