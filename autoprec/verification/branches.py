"""Train one branch: from the common checkpoint, on the seed's batches, the learning rate annealed.

Two runs that differ by rounding drift apart chaotically while the learning rate is high, and their
losses with them. Annealing brings each branch down to the floor of the basin that both are in; the
difference that is left there is what the precision did:

    lr_k = lr * (branch_steps - k) / branch_steps        k = 0 ... branch_steps - 1

Everything else is common to the branches of a seed: the checkpoint (model and optimizer state), the
batches, and torch's generators, which are seeded anew before every step, so that dropout masks are
paired and the comparison measures precision. Evaluation is one FP32 forward of the master weights
in eval mode on fixed held-out batches, whatever the branch trained in.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.common.progress import Progress, report_nothing
from autoprec.errors import WorkloadError
from autoprec.records import Branch, Option, Precision
from autoprec.runtime import attach_optimizer, install_options, undo
from autoprec.runtime.checkpoint import Checkpoint, load_state, on_cpu
from autoprec.sensitivity.gemm import fast_fp8_gemms
from autoprec.workload.functions import Batch, Workload, check_loss, move_batch

# a branch whose loss exceeds this many times the reference's largest one has diverged: chaos moves
# a training loss by percents, and the reference saw the same batches
DIVERGED_RATIO = 3.0
SEED_STRIDE = 1_000_003  # a prime, so that (seed, step) pairs do not meet for any usual step count
EVAL_STEP = 2**40  # evaluation draws from streams that no training step uses


@dataclass(frozen=True)
class Arm:
    """What a branch trains with: an option per layer; without any 16-bit layer, plain FP32."""

    label: str
    options: Mapping[str, Option]
    uncovered: tuple[str, ...] = ()  # parameters outside of layers: they follow the flow

    @property
    def is_reference(self) -> bool:
        """Whether nothing is installed: every layer is FP32."""
        return all(option.precision is Precision.FP32 for option in self.options.values())


@dataclass(frozen=True)
class Bench:
    """What all branches of one verification share."""

    workload: Workload
    device: torch.device
    seed: int
    branch_steps: int
    evaluation: Sequence[Batch]
    progress: Progress = report_nothing


def warm_up(bench: Bench, *, steps: int, start: Checkpoint | None = None) -> Checkpoint:
    """Train the FP32 reference for `steps` (from `start`, or from scratch) and return its state.

    Raises:
        WorkloadError: the loss becomes NaN or infinite.
    """
    with seeded(bench.device):
        model, optimizer = restore(bench, start)
        curve = []
        for step, batch in enumerate(_batches(bench, bench.seed, steps)):
            loss = _train_step(bench, model, optimizer, batch, seed=bench.seed, step=step)
            curve.append(check_loss(loss, where=f"at step {step} of the warm-up"))
            bench.progress("verify: warm-up", step + 1, steps)
        return Checkpoint(
            model=on_cpu(model.state_dict()),
            optimizer=on_cpu(optimizer.state_dict()),
            curve=tuple(curve),
            eval_losses=evaluate(bench, model),
        )


def train_branch(
    bench: Bench,
    checkpoint: Checkpoint,
    arm: Arm,
    *,
    seed: int,
    reference: Sequence[float] = (),
) -> Branch:
    """Train and evaluate one branch.

    `reference` is the training curve of the seed's reference branch, the yardstick of divergence.
    """
    with seeded(bench.device):
        model, optimizer = restore(bench, checkpoint)
        with installed(model, optimizer, arm), fast_fp8_gemms(bench.device):
            limit = DIVERGED_RATIO * max(reference, default=math.inf)
            curve, diverged_at = _train(bench, model, optimizer, arm.label, seed, limit)
        losses = () if diverged_at is not None else evaluate(bench, model)
    if losses and not all(math.isfinite(loss) for loss in losses):
        diverged_at, losses = bench.branch_steps, ()
    return Branch(
        label=arm.label,
        seed=seed,
        eval_loss=math.fsum(losses) / len(losses) if losses else None,
        diverged_at=diverged_at,
        curve=curve,
        eval_losses=losses,
    )


def replay_reference(
    bench: Bench, checkpoint: Checkpoint, *, seed: int, steps: int
) -> tuple[float, ...]:
    """Return the first training losses of the seed's FP32 branch, trained anew."""
    with seeded(bench.device):
        model, optimizer = restore(bench, checkpoint)
        return _train(bench, model, optimizer, "replay", seed, math.inf, steps=steps)[0]


def evaluate(bench: Bench, model: nn.Module) -> tuple[float, ...]:
    """Return the loss of every held-out batch in eval mode, with the same random draws."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    losses = []
    with torch.no_grad():
        for index, batch in enumerate(bench.evaluation):
            _seed_step(bench.seed, EVAL_STEP + index)
            losses.append(float(bench.workload.loss_fn(model, batch)))
    for module in was_training:
        module.training = True
    return tuple(losses)


def restore(bench: Bench, checkpoint: Checkpoint | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build the user's model and optimizer and load the checkpoint into them.

    Raises:
        RecordError: the checkpoint is of another model or optimizer.
    """
    model = bench.workload.build_model(seed=bench.seed).to(bench.device)
    if checkpoint is not None:
        load_state(model, checkpoint.model, what="model")
    model.train()
    optimizer = bench.workload.build_optimizer(model)
    if checkpoint is not None and checkpoint.optimizer is not None:
        load_state(optimizer, checkpoint.optimizer, what="optimizer")
    return model, optimizer


@contextmanager
def installed(model: nn.Module, optimizer: torch.optim.Optimizer, arm: Arm) -> Iterator[None]:
    """Train in the arm's precisions inside; leave plain FP32 with the master weights behind."""
    if arm.is_reference:
        yield
        return
    install_options(model, arm.options, uncovered=arm.uncovered)
    attach_optimizer(model, optimizer)
    try:
        yield
    finally:
        undo(model, optimizer)


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were found."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _train(
    bench: Bench,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    label: str,
    seed: int,
    limit: float,
    *,
    steps: int | None = None,
) -> tuple[tuple[float, ...], int | None]:
    """Return the losses, and the step at which one was not finite or above `limit`."""
    rates = [_rate(group) for group in optimizer.param_groups]
    curve: list[float] = []
    for step, batch in enumerate(_batches(bench, seed, steps or bench.branch_steps)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            _set_rate(group, rate * (bench.branch_steps - step) / bench.branch_steps)
        loss = float(_train_step(bench, model, optimizer, batch, seed=seed, step=step))
        if not math.isfinite(loss) or loss > limit:
            return tuple(curve), step
        curve.append(loss)
        bench.progress(f"verify: {label}, seed {seed}", step + 1, bench.branch_steps)
    return tuple(curve), None


def _train_step(
    bench: Bench,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    seed: int,
    step: int,
) -> Tensor:
    _seed_step(seed, step)
    optimizer.zero_grad()
    loss = bench.workload.loss_fn(model, batch)
    torch.autograd.backward(loss)
    try:
        optimizer.step()
    except TypeError as error:
        raise WorkloadError(
            "build_optimizer(model) must return an optimizer whose step() takes no closure, but "
            f"{type(optimizer).__name__} refused ({error}); use a first-order optimizer"
        ) from error
    return loss.detach()


def _batches(bench: Bench, seed: int, count: int) -> Iterator[Batch]:
    for batch in islice(bench.workload.train_batches(seed), count):
        yield move_batch(batch, bench.device)


def _seed_step(seed: int, step: int) -> None:
    torch.manual_seed((seed * SEED_STRIDE + step) % 2**63)


def _rate(group: dict[str, Any]) -> float:  # Any: a param group
    if "lr" not in group:
        raise WorkloadError(
            "build_optimizer(model) must return an optimizer whose param groups have an 'lr' to "
            f"anneal, but one has only {sorted(set(group) - {'params'})}; use one of torch.optim"
        )
    return float(group["lr"])


def _set_rate(group: dict[str, Any], rate: float) -> None:  # Any: a param group
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
