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

from autoprec.common.text import short_digest
from autoprec.errors import WorkloadError
from autoprec.model.context import Context
from autoprec.records import Branch, Option, Precision
from autoprec.runtime import attach_optimizer, install_options, undo
from autoprec.runtime.checkpoint import Checkpoint, on_cpu
from autoprec.sensitivity.gemm import fast_fp8_gemms
from autoprec.sensitivity.reference import restore, seeded
from autoprec.verification.sequential import Terms
from autoprec.verification.state import BranchStore
from autoprec.workload.functions import Batch, check_loss, move_batch

# a branch whose loss exceeds this many times the reference's largest one has diverged: chaos moves
# a training loss by percents
DIVERGED_RATIO = 3.0
SEED_STRIDE = 1_000_003  # a prime, so that (seed, step) pairs do not meet for any usual step count
EVAL_STEP = 2**40  # evaluation draws from streams that no training step uses


@dataclass(frozen=True)
class Variant:
    """What a branch trains with: an option per layer; without any 16-bit layer, plain FP32."""

    label: str
    options: Mapping[str, Option]
    uncovered: tuple[str, ...] = ()  # parameters outside of layers: BF16 where any layer is 16-bit

    @property
    def is_reference(self) -> bool:
        """Whether nothing is installed: every layer is FP32."""
        return all(option.precision is Precision.FP32 for option in self.options.values())

    @property
    def digest(self) -> str:
        """A digest of the options; all-FP32 variants are the reference, whatever their label."""
        if self.is_reference:
            return "reference"
        return short_digest(sorted((name, option.key) for name, option in self.options.items()))


REFERENCE = Variant(label="reference", options={})


@dataclass
class Session:
    """What all branches of one verification share.

    Attributes:
        context: whose workload is trained, and where.
        terms: how far the test may go.
        loss_tolerance: the relative loss gap that is tested.
        evaluation: the held-out batches.
        checkpoint: where the branches start, with the curve of the steps that ran to it.
        store: the branches that are finished.
        control: the options of uniform BF16 O2; None: every layer of the plan in BF16 O2.
        checkpoint_path: the user's own checkpoint, or "".
        floor: the gap between two runs of a reference; known once the first one has run.
    """

    context: Context
    terms: Terms
    loss_tolerance: float
    evaluation: Sequence[Batch]
    checkpoint: Checkpoint
    store: BranchStore
    control: dict[str, Option] | None
    checkpoint_path: str
    floor: float | None = None


def warm_up(
    context: Context, evaluation: Sequence[Batch], *, steps: int, start: Checkpoint | None
) -> Checkpoint:
    """Train the FP32 reference for `steps` (from `start`, or from scratch) and return its state.

    Raises:
        WorkloadError: the loss becomes NaN or infinite.
    """
    with seeded(context.seed, context.device):
        model, optimizer = restore(context, start)
        curve = []
        for step, batch in enumerate(_batches(context, context.seed, steps)):
            loss = _train_step(context, model, optimizer, batch, seed=context.seed, step=step)
            curve.append(check_loss(loss, where=f"at step {step} of the warm-up"))
            context.progress("verify: warm-up", step + 1, steps)
        return Checkpoint(
            model=on_cpu(model.state_dict()),
            optimizer=on_cpu(optimizer.state_dict()),
            curve=tuple(curve),
            eval_losses=evaluate(context, model, evaluation),
        )


def train_branch(
    session: Session, variant: Variant, *, seed: int, reference: Sequence[float] = ()
) -> Branch:
    """Train and evaluate one branch.

    `reference` is the training curve of the seed's reference branch, the yardstick of divergence.
    """
    context, steps = session.context, session.terms.branch_steps
    with seeded(context.seed, context.device):
        model, optimizer = restore(context, session.checkpoint)
        with _installed(model, optimizer, variant), fast_fp8_gemms(context.device):
            # the reference saw the same batches: what is far above its worst has diverged
            limit = DIVERGED_RATIO * max(reference, default=math.inf)
            training = _train(session, model, optimizer, variant.label, seed=seed)
            curve, diverged_at = _until_diverged(training, limit=limit)
        # the plan is taken out again: what is evaluated are the FP32 master weights
        losses: tuple[float, ...] = ()
        if diverged_at is None:
            losses = evaluate(context, model, session.evaluation)
    if not all(math.isfinite(loss) for loss in losses):
        diverged_at, losses = steps, ()
    return Branch(
        label=variant.label,
        seed=seed,
        eval_loss=math.fsum(losses) / len(losses) if losses else None,
        diverged_at=diverged_at,
        curve=curve,
        eval_losses=losses,
    )


def replay_reference(session: Session, *, seed: int, steps: int) -> tuple[float, ...]:
    """Return the first training losses of the seed's FP32 branch, trained anew."""
    context = session.context
    with seeded(context.seed, context.device):
        model, optimizer = restore(context, session.checkpoint)
        return tuple(islice(_train(session, model, optimizer, "replay", seed=seed), steps))


def evaluate(context: Context, model: nn.Module, evaluation: Sequence[Batch]) -> tuple[float, ...]:
    """Return the loss of every held-out batch in eval mode, with the same random draws."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    losses = []
    with torch.no_grad():
        for index, batch in enumerate(evaluation):
            # every branch evaluates with the same draws, whatever its training drew
            _seed_step(context.seed, EVAL_STEP + index)
            losses.append(float(context.workload.loss_fn(model, batch)))
    for module in was_training:
        module.training = True
    return tuple(losses)


@contextmanager
def _installed(
    model: nn.Module, optimizer: torch.optim.Optimizer, variant: Variant
) -> Iterator[None]:
    """Train in the variant's precisions inside; leave plain FP32 with the master weights behind."""
    if variant.is_reference:
        yield
        return
    install_options(model, variant.options, uncovered=variant.uncovered)
    attach_optimizer(model, optimizer)
    try:
        yield
    finally:
        undo(model, optimizer)


def _train(
    session: Session, model: nn.Module, optimizer: torch.optim.Optimizer, label: str, *, seed: int
) -> Iterator[float]:
    """Train on the seed's batches and yield every step's loss."""
    context, steps = session.context, session.terms.branch_steps
    rates = [_rate(group) for group in optimizer.param_groups]
    for step, batch in enumerate(_batches(context, seed, steps)):
        # lr_k = lr * (branch_steps - k) / branch_steps: down to the floor of the basin
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            _set_rate(group, rate * (steps - step) / steps)
        yield float(_train_step(context, model, optimizer, batch, seed=seed, step=step))
        context.progress(f"verify: {label}, seed {seed}", step + 1, steps)


def _until_diverged(
    losses: Iterator[float], *, limit: float
) -> tuple[tuple[float, ...], int | None]:
    """Return the losses, and the step at which one was not finite or above `limit`."""
    curve: list[float] = []
    for step, loss in enumerate(losses):
        if not math.isfinite(loss) or loss > limit:
            return tuple(curve), step
        curve.append(loss)
    return tuple(curve), None


def _train_step(
    context: Context,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    seed: int,
    step: int,
) -> Tensor:
    _seed_step(seed, step)
    optimizer.zero_grad()
    loss = context.workload.loss_fn(model, batch)
    torch.autograd.backward(loss)
    try:
        optimizer.step()
    except TypeError as error:
        raise WorkloadError(
            "build_optimizer(model) must return an optimizer whose step() takes no closure, but "
            f"{type(optimizer).__name__} refused ({error}); use a first-order optimizer"
        ) from error
    return loss.detach()


def _batches(context: Context, seed: int, count: int) -> Iterator[Batch]:
    for batch in islice(context.workload.train_batches(seed), count):
        yield move_batch(batch, context.device)


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
