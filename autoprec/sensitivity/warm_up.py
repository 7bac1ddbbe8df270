"""A training to where it is measured: restored, warmed up, or read from a file."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from autoprec.device.random_state import seeded
from autoprec.device.ranks import world_size
from autoprec.errors import RecordError
from autoprec.model.context import Context
from autoprec.model.state import packed_state, put_back_dtypes, put_back_state, unpacked_state
from autoprec.records.sensitivity import StepError
from autoprec.runtime.checkpoint import Checkpoint, load_state, on_cpu, save_content
from autoprec.runtime.sharded_state import load_shards, load_whole
from autoprec.workload.functions import Batch, check_loss, move_batch
from autoprec.workload.training import Training, start_training, step_batches

OnWarm = Callable[[Training, Sequence[tuple[int, float]]], None]  # with the losses by step
SEED_STRIDE = 1_000_003  # a prime, so that (seed, step) pairs do not meet for any usual step count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmUp:
    """A trained reference, and the stream of the batches after those that it was trained on."""

    training: Training
    stream: Iterator[Batch]
    curve: tuple[tuple[int, float], ...]
    step_s: float
    early: tuple[StepError, ...] = ()


def read_or_trained(
    context: Context,
    kept: Path | None,
    train: Callable[..., WarmUp],
    on_warm: OnWarm | None,
    *,
    steps: int,
) -> WarmUp:
    """Return the reference that a file keeps; where it keeps none, one that is trained for it.

    So several processes measure against the same bits: one trains, the others wait for it.
    """
    with FileLock(f"{kept}.lock") if kept else nullcontext():
        if kept is not None and kept.exists():
            return _read(kept, context, steps=steps)
        made = train(steps=steps)
        if kept is not None:
            _keep(kept, made)
        if on_warm is not None:
            on_warm(made.training, made.curve)
        return made


def _keep(path: Path, made: WarmUp) -> None:
    """Write a reference to a file, with its last step's gradients: P is read at them."""
    training = made.training
    named = training.model.named_parameters()
    content = {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "moving": packed_state(training.model),
        "curve": made.curve,
        "step_s": made.step_s,
        "gradients": {name: p.grad for name, p in named if p.grad is not None},
        "norm": training.norm,
    }
    save_content(path, on_cpu(content))


def _read(path: Path, context: Context, *, steps: int) -> WarmUp:
    content = torch.load(path, map_location="cpu", weights_only=True)
    try:
        states = Checkpoint(**{name: content[name] for name in ("model", "optimizer", "moving")})
        gradients, norm = content["gradients"], content["norm"]
        curve, step_s = content["curve"], content["step_s"]
    except (KeyError, TypeError) as error:
        raise RecordError(
            f"{path} must be a reference that a search has kept, but it is not; remove it"
        ) from error
    training = restore(context, states, warmup_steps=steps)
    for name, parameter in training.model.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device)
    training.norm = norm
    return WarmUp(training, stream_after(context, steps), curve, step_s)


def stream_after(context: Context, steps: int) -> Iterator[Batch]:
    """Return the stream of the batches after those of so many steps."""
    stream = context.workload.train_batches(context.seed)
    deque(step_batches(context.workload, stream, count=steps), maxlen=0)
    return stream


def restore(
    context: Context,
    checkpoint: Checkpoint | None,
    *,
    warmup_steps: int = 0,
    in_fp32: bool = True,
) -> Training:
    """Build the user's model, optimizer and schedule, and load the checkpoint into them.

    `warmup_steps` is how many steps the caller then trains to get to where it measures. Not
    `in_fp32`, parameters and the optimizer's states of them are in the user's dtypes.

    Raises:
        RecordError: the checkpoint is of another model or optimizer.
    """
    is_split = world_size() > 1
    model = context.workload.build_model(seed=context.seed, in_fp32=in_fp32).to(context.device)
    if checkpoint is not None and not is_split:
        load_state(model, checkpoint.model, what="model")
        if checkpoint.moving:
            own = {} if in_fp32 else {name: b.dtype for name, b in model.named_buffers()}
            put_back_state(model, move_batch(unpacked_state(checkpoint.moving), context.device))
            put_back_dtypes(model, own)
    training = start_training(context.workload, model, warmup_steps=warmup_steps)
    if checkpoint is None:
        return training
    # a schedule at its step first: the optimizer's state has the rates of that step
    schedule = training.schedule
    if schedule is not None and checkpoint.schedule is not None:
        position, schedule.pace = checkpoint.schedule
        schedule.go_to(position)
    elif schedule is not None and checkpoint.optimizer is not None:
        logger.warning("the checkpoint has no schedule: its learning rates stay as they are")
        training.schedule = None
    if is_split:
        load = load_shards if checkpoint.is_sharded else load_whole
        load(checkpoint, model, training.optimizer)
    elif checkpoint.optimizer is not None:
        load_state(training.optimizer, checkpoint.optimizer, what="optimizer")
    return training


def seed_of(seed: int, step: int) -> int:
    """Return the seed of a step of a training, so that it draws the same in any other."""
    return (seed * SEED_STRIDE + step) % 2**63


def train_steps(
    training: Training,
    context: Context,
    stream: Iterator[Batch],
    steps: Sequence[int],
    *,
    of: int,
    stage: str,
) -> tuple[tuple[tuple[int, float], ...], float]:
    """Train these steps `of` all, from 1; return the losses and a step's median time in s."""
    curve: list[tuple[int, float]] = []
    times: list[float] = []
    drawn_by_step = step_batches(context.workload, stream, count=len(steps))
    for step in steps:
        context.progress(f"{stage}: warm-up", step - 1, of)
        batches = move_batch(next(drawn_by_step), context.device)
        with seeded(seed_of(context.seed, step - 1)):
            started = time.perf_counter()  # the user's data loading is no part of a step
            # of the last step P is read at them
            loss = training.step(batches, leave_gradients=step == steps[-1])
        curve.append((step, check_loss(loss, where=f"at warm-up step {step}")))
        times.append(time.perf_counter() - started)
        del batches  # before the next are drawn
    context.progress(f"{stage}: warm-up", max(steps, default=0), of)
    # what is measured later is a pass of one batch
    usual_s = statistics.median(times[1:] or times or [0.0])
    per_batch = usual_s / context.workload.accumulation_steps
    return tuple(curve), per_batch
