"""Train branches: from the common checkpoint, on the seed's batches, the learning rate annealed.

Two runs that differ by rounding drift apart chaotically while the learning rate is high, and their
losses with them. Annealing brings each branch down to the floor of the basin that both are in; the
difference that is left there is what the precision did:

    lr_k = schedule's lr * (branch_steps - k) / branch_steps        k = 0 ... branch_steps - 1

The branch of the user's own training, where that has 16-bit parameters without FP32 masters, takes
the checkpoint in its own dtypes, the optimizer's states as `load_state_dict` casts them.

Everything else is common to the branches of a seed: the checkpoint (model and optimizer state), the
batches, and torch's generators, which are seeded anew before every step, so that dropout masks are
paired and the comparison measures precision. Evaluation is one FP32 forward of the master weights
in eval mode on fixed held-out batches, whatever the branch trained in, and the user's `evaluate`
where there is one. Beside it the same batches go through the branch's own forward, as it trained.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from itertools import islice

import torch
from torch import nn

from autoprec.common.text import error_line
from autoprec.device.random_state import seeded
from autoprec.device.ranks import set_as_on_first_rank, world_size
from autoprec.device.tf32 import tf32_off
from autoprec.errors import AutoprecError, WorkloadError
from autoprec.model.context import Context
from autoprec.model.state import kept_state, packed_state, put_back_state
from autoprec.records import Branch
from autoprec.runtime import attach_optimizer, install_options, undo
from autoprec.runtime.checkpoint import Checkpoint, on_cpu
from autoprec.runtime.finite import StepWatch
from autoprec.runtime.sharded_state import shards_of
from autoprec.sensitivity.gemm import fast_gemms
from autoprec.sensitivity.warm_up import restore, seed_of, stream_after, train_steps
from autoprec.verification.metrics import check_finite, check_names, measure_metrics
from autoprec.verification.session import REFERENCE, Session, Variant
from autoprec.workload.functions import Batch, move_batch
from autoprec.workload.training import Training, step_batches
from autoprec.workload.written import plain_model

logger = logging.getLogger(__name__)

# a branch whose loss exceeds this many times the reference's largest one, held-out ones among them,
# has diverged: chaos moves a training loss by percents
DIVERGED_RATIO = 3.0
REPLAY_STEPS = 2  # the second loss already depends on a whole forward, backward and update
NEARLY_ZERO = 1e-6  # of the losses in training: a gap relative to less is relative to rounding
EVAL_STEP = 2**40  # evaluation draws from streams that no training step uses


def train_seed(session: Session, variants: Sequence[Variant], seed: int) -> tuple[Branch, ...]:
    """Return the seed's branch of the reference and of every variant, trained where it is new.

    Raises:
        WorkloadError: the reference does not train, or its loss does not move.
    """
    reference = _branch(session, REFERENCE, seed, ())
    _check_reference(session, reference)
    if session.floor is None:
        session.floor = _floor(session, reference)
    return (reference, *(_branch(session, each, seed, reference.curve) for each in variants))


def warm_up(
    context: Context, evaluation: Sequence[Batch], *, steps: int, start: Checkpoint | None
) -> Checkpoint:
    """Train the FP32 reference for `steps` (from `start`, or from scratch) and return its state.

    A `start` that is a warm-up of fewer steps is one on the way.

    Raises:
        WorkloadError: the loss becomes NaN or infinite.
    """
    known = () if start is None or start.optimizer is None else start.curve[:steps]
    with seeded(context.seed), tf32_off():
        training = restore(context, start, warmup_steps=steps)
        stream, numbers = stream_after(context, len(known)), range(len(known) + 1, steps + 1)
        curve, _ = train_steps(training, context, stream, numbers, of=steps, stage="verify")
        return state_of(context, training, evaluation, [*known, *(loss for _, loss in curve)])


def state_of(
    context: Context, training: Training, evaluation: Sequence[Batch], curve: Sequence[float]
) -> Checkpoint:
    """Return the state of a reference that was warmed up with these losses, and evaluate it."""
    model, optimizer, schedule = training.model, training.optimizer, training.schedule
    losses = evaluate(context, model, evaluation)  # first: it makes buffers the same
    if world_size() > 1:
        state = shards_of(model, optimizer)
    else:
        state = Checkpoint(on_cpu(model.state_dict()), on_cpu(optimizer.state_dict()))
        state = replace(state, moving=on_cpu(packed_state(model)))
    position = None if schedule is None else (schedule.position, schedule.pace)
    return replace(state, curve=tuple(curve), eval_losses=losses, schedule=position)


def train_branch(
    session: Session, variant: Variant, *, seed: int, reference: Sequence[float] = ()
) -> Branch:
    """Train and evaluate one branch.

    `reference` is the training curve of the seed's reference branch, the yardstick of divergence.
    """
    context, steps = session.context, session.terms.branch_steps
    losses: tuple[float, ...] = ()
    metrics: dict[str, float] = {}
    with seeded(context.seed):
        training = restore(context, session.checkpoint, in_fp32=not variant.is_written)
        branch = _train_with(session, training, variant, seed=seed, reference=reference)
        # the plan is taken out again: what is evaluated are the FP32 master weights
        if variant.is_written:
            plain_model(training.model)
        diverged_at = branch.diverged_at
        if diverged_at is None:
            losses = evaluate(context, training.model, session.evaluation)
            with _evaluating(training.model):
                metrics = measure_metrics(context, training.model)
    if not all(map(math.isfinite, (*losses, *metrics.values()))):
        if variant.is_reference:
            check_finite(metrics, where=f"after the branch of seed {seed}")
        diverged_at, losses, metrics = steps, (), {}
    found = {"eval_loss": mean_of(losses), "eval_losses": losses, "metrics": metrics}
    return branch.model_copy(update={**found, "diverged_at": diverged_at})


def _train_written(
    session: Session, variant: Variant, *, seed: int, reference: Sequence[float]
) -> Branch:
    """Train the branch of the user's own training, which no proof fails for."""
    try:
        return train_branch(session, variant, seed=seed, reference=reference)
    except (AutoprecError, RuntimeError) as error:  # PyTorch may lack a 16-bit kernel here
        logger.warning("what is trained now is not measured: it fails (%s)", error_line(error))
    return Branch(label=variant.label, seed=seed, eval_loss=None, diverged_at=None, curve=())


def _loss_limit(reference: Sequence[float], held_out: Sequence[float]) -> float:
    """Return the loss from which a branch has diverged.

    A loss may be negative (likelihoods), and rounding alone multiplies that of data known by heart.
    """
    if not reference:
        return math.inf
    losses = (*reference, *held_out)
    return max(losses) + (DIVERGED_RATIO - 1.0) * max(map(abs, losses))


def _train_with(
    session: Session, training: Training, variant: Variant, *, seed: int, reference: Sequence[float]
) -> Branch:
    """Train in the variant's precisions, which are installed for it alone; nothing is evaluated."""
    context, model, optimizer = session.context, training.model, training.optimizer
    curve, not_finite = list[float](), tuple[str, ...]()
    diverged_at: int | None = None
    own_loss: float | None = None
    is_planned = not (variant.is_reference or variant.is_written)
    with fast_gemms(), ExitStack() as plan:
        if variant.is_reference:  # the plan's FP32 layers run as the process has TF32
            plan.enter_context(tf32_off())
        elif is_planned:
            install_options(
                model,
                variant.options,
                uncovered=variant.uncovered,
                fp32_outputs=variant.fp32_outputs,
            )
            attach_optimizer(model, optimizer)
            plan.callback(undo, model, optimizer)
        # the reference saw the same batches: what is far above its worst has diverged
        limit = _loss_limit(reference, session.checkpoint.eval_losses)
        first = None if variant.is_reference else StepWatch(model)
        for step, loss in enumerate(_train(session, training, variant, seed=seed)):
            if first is not None and step == 0:
                not_finite = first.end(model, over_ranks=True)
            if not_finite or not math.isfinite(loss) or loss > limit:
                diverged_at = step
                break
            curve.append(loss)
        if diverged_at is None and is_planned:
            own_loss = mean_of(evaluate(context, model, session.evaluation))
            own_loss = own_loss if own_loss and math.isfinite(own_loss) else None
    return Branch(
        label=variant.label,
        seed=seed,
        eval_loss=None,
        diverged_at=diverged_at,
        curve=tuple(curve),
        not_finite=not_finite,
        own_loss=own_loss,
    )


def evaluate(context: Context, model: nn.Module, evaluation: Sequence[Batch]) -> tuple[float, ...]:
    """Return the loss of every held-out batch in eval mode, in FP32, with the same draws.

    Of several ranks all take rank 0's buffers, such as running statistics, as DDP does. Gradients
    are on where loss_fn fails without: a loss may be made of some. Where it fails all the same (a
    detector has losses in training alone), the model is in training mode.
    """
    set_as_on_first_rank(model.buffers())
    for has_grad, is_training in ((False, False), (True, False)):
        with suppress(WorkloadError):  # one of another reason comes again
            return _losses(context, model, evaluation, has_grad, is_training)
    _say_training_mode()
    return _losses(context, model, evaluation, True, True)


def _losses(
    context: Context,
    model: nn.Module,
    evaluation: Sequence[Batch],
    has_grad: bool,
    is_training: bool,
) -> tuple[float, ...]:
    losses = []
    with _evaluating(model, is_training=is_training), torch.set_grad_enabled(has_grad):
        for index, batch in enumerate(evaluation):
            # every branch evaluates with the same draws, whatever its training drew
            with seeded(seed_of(context.seed, EVAL_STEP + index)):
                losses.append(float(context.workload.loss_fn(model, batch).detach()))
    return tuple(losses)


@cache
def _say_training_mode() -> None:
    logger.warning(
        "loss_fn gives no loss of a model in eval mode: plans are evaluated in training mode, with "
        "the same dropout for all"
    )


@contextmanager
def _evaluating(model: nn.Module, *, is_training: bool = False) -> Iterator[None]:
    """Let the model be evaluated inside: in eval mode, in FP32, without gradients.

    What forward changes (a queue of keys, a teacher) is put back.
    """
    kept = kept_state(model)
    was_training = [module for module in model.modules() if module.training]
    if not is_training:
        model.eval()
    try:
        with torch.no_grad(), tf32_off():
            yield
    finally:
        for module in was_training:
            module.training = True
        put_back_state(model, kept)


def mean_of(losses: Sequence[float]) -> float | None:
    """Return the mean loss of the held-out batches; None where there is none."""
    return math.fsum(losses) / len(losses) if losses else None


def _branch(session: Session, variant: Variant, seed: int, reference: Sequence[float]) -> Branch:
    own = _train_written if variant.is_written else train_branch
    train = partial(own, session, variant, seed=seed, reference=reference)
    found = session.store.branch(variant.digest, seed, train)
    return found.model_copy(update={"label": variant.label})  # it may be another variant's


def _check_reference(session: Session, branch: Branch) -> None:
    """Refuse a reference that no gap can be taken against."""
    if branch.diverged_at is not None or branch.eval_loss is None:
        raise WorkloadError(
            f"the FP32 reference must train, but its loss became NaN or infinite at step "
            f"{branch.diverged_at} of the branch of seed {branch.seed}; lower the learning rate"
        )
    check_names(session.context.workload, branch.metrics, session.metrics)
    trained = map(abs, (*session.checkpoint.curve, *branch.curve))
    if abs(branch.eval_loss) <= NEARLY_ZERO * max(trained, default=1.0):
        raise WorkloadError(
            "a relative loss gap needs an evaluation loss away from zero, but the "
            f"reference's is {branch.eval_loss:.3g}; evaluate on harder held-out batches, or leave "
            "the proof out (--no-verify)"
        )
    if branch.eval_losses == session.checkpoint.eval_losses:
        raise WorkloadError(
            f"training must move the evaluation loss, but it stays {branch.eval_loss:.6g} over "
            f"{len(branch.curve)} steps; check that the loss depends on the parameters"
        )


def _floor(session: Session, first: Branch) -> float:
    """Return the relative gap between two runs of one reference: 0.0 when bit for bit."""
    context, seed = session.context, first.seed
    with seeded(context.seed):
        training = restore(context, session.checkpoint)
        replay = tuple(islice(_train(session, training, REFERENCE, seed=seed), REPLAY_STEPS))
    if replay == first.curve[: len(replay)]:
        return 0.0
    again = train_branch(session, REFERENCE, seed=seed)
    if again.eval_loss is None or first.eval_loss is None:
        raise WorkloadError(
            "two runs of the FP32 reference must both train, but one became NaN or infinite; "
            "lower the learning rate"
        )
    return abs(again.eval_loss - first.eval_loss) / abs(first.eval_loss)


def _train(session: Session, training: Training, variant: Variant, *, seed: int) -> Iterator[float]:
    """Train on the seed's batches and yield every step's loss."""
    context, steps = session.context, session.terms.branch_steps
    loss_fn = context.workload.written_loss if variant.is_written else None
    stream = context.workload.train_batches(seed)
    for step, batches in enumerate(step_batches(context.workload, stream, count=steps)):
        moved = move_batch(batches, context.device)
        # lr_k = lr * (branch_steps - k) / branch_steps: down to the floor of the basin
        with seeded(seed_of(seed, step)), torch.compiler.set_stance("force_eager"):
            loss = float(training.step(moved, rate=(steps - step) / steps, loss_fn=loss_fn))
        yield loss
        context.progress(f"verify: {variant.label}, seed {seed}", step + 1, steps)
