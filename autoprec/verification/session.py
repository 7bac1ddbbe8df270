"""Open what the plans of one verification share, and train their branches seed by seed."""

from collections.abc import Sequence
from pathlib import Path

from autoprec.common.text import short_digest
from autoprec.common.versions import software_versions
from autoprec.errors import InfeasibleError, RecordError, WorkloadError
from autoprec.model.context import Context
from autoprec.records import BF16_O2, Branch, ModelSpec, Plan
from autoprec.runtime.checkpoint import Checkpoint, read_checkpoint
from autoprec.sensitivity.reference import restore, seeded
from autoprec.verification.branches import (
    REFERENCE,
    Session,
    Variant,
    evaluate,
    replay_reference,
    train_branch,
    warm_up,
)
from autoprec.verification.sequential import Terms
from autoprec.verification.state import BranchStore, file_digest
from autoprec.workload.functions import Batch, check_batches, move_batch

REPLAY_STEPS = 2  # the second loss already depends on a whole forward, backward and update
STATE_RTOL = 1e-3  # a saved warm-up must evaluate to what it did, up to another thread count
SMALLEST_LOSS = 1e-6  # a gap relative to less than this is a gap relative to rounding


def open_session(
    context: Context,
    terms: Terms,
    *,
    loss_tolerance: float,
    spec: ModelSpec | None = None,
    state_dir: Path | None = None,
    checkpoint: Path | None = None,
) -> Session:
    """Read or make the checkpoint that all branches start from."""
    if not loss_tolerance >= 0.0:
        raise InfeasibleError(
            f"the loss tolerance must be zero or more, but it is {loss_tolerance}; 0.001 is 0.1 %"
        )
    check_batches(context.workload, seed=context.seed)
    evaluation = [move_batch(b, context.device) for b in context.workload.eval_batches()]
    start = None if checkpoint is None else read_checkpoint(checkpoint)
    steps = 0 if start is not None and start.optimizer is not None else terms.warmup_steps
    # everything that the branches share: another digest, other branches
    setup = short_digest(
        [context.workload.name, context.workload.digest],
        [steps, terms.branch_steps, context.seed],
        context.device.type,
        file_digest(checkpoint),
        software_versions(),
    )
    store = BranchStore(setup, state_dir)
    common = store.find_warm_up()
    if common is None:
        common = warm_up(context, evaluation, steps=steps, start=start)
        store.add_warm_up(common)
    else:
        _check_saved(context, evaluation, common, store)
    return Session(
        context=context,
        terms=terms,
        loss_tolerance=loss_tolerance,
        evaluation=evaluation,
        checkpoint=common,
        store=store,
        control=None if spec is None else spec.bf16_options,
        checkpoint_path="" if checkpoint is None else str(checkpoint),
    )


def variants_of(session: Session, plan: Plan) -> tuple[Variant, Variant, Variant]:
    """Return reference, control and plan."""
    options = {layer.name: layer.option for layer in plan.layers}
    control = dict.fromkeys(options, BF16_O2) if session.control is None else session.control
    return (
        REFERENCE,
        Variant(label="bf16_o2", options=control, uncovered=plan.uncovered),
        Variant(label="plan", options=options, uncovered=plan.uncovered),
    )


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


def _branch(session: Session, variant: Variant, seed: int, reference: Sequence[float]) -> Branch:
    found = session.store.find(variant.digest, seed)
    if found is None:
        found = train_branch(session, variant, seed=seed, reference=reference)
        session.store.add(variant.digest, found)
    return found.model_copy(update={"label": variant.label})  # it may be another variant's


def _check_reference(session: Session, branch: Branch) -> None:
    """Refuse a reference that no gap can be taken against."""
    if branch.diverged_at is not None or branch.eval_loss is None:
        raise WorkloadError(
            f"the FP32 reference must train, but its loss became NaN or infinite at step "
            f"{branch.diverged_at} of the branch of seed {branch.seed}; lower the learning rate"
        )
    if abs(branch.eval_loss) < SMALLEST_LOSS:
        raise WorkloadError(
            "a relative loss gap needs an evaluation loss away from zero, but the "
            f"reference's is {branch.eval_loss:.3g}; evaluate on harder held-out batches"
        )
    if branch.eval_losses == session.checkpoint.eval_losses:
        raise WorkloadError(
            f"training must move the evaluation loss, but it stays {branch.eval_loss:.6g} over "
            f"{len(branch.curve)} steps; check that the loss depends on the parameters"
        )


def _check_saved(
    context: Context, evaluation: Sequence[Batch], saved: Checkpoint, store: BranchStore
) -> None:
    """Refuse a saved warm-up that does not evaluate to what it did when it was saved."""
    with seeded(context.seed, context.device):
        model, _ = restore(context, saved)
        losses = evaluate(context, model, evaluation)
    same = len(losses) == len(saved.eval_losses) and all(
        abs(now - then) <= STATE_RTOL * max(abs(then), SMALLEST_LOSS)
        for now, then in zip(losses, saved.eval_losses, strict=True)
    )
    if not same:
        raise RecordError(
            f"the saved branches in {store.folder} must be of this workload, but their warm-up "
            "evaluates to another loss now (its code or data changed); delete the folder"
        )


def _floor(session: Session, first: Branch) -> float:
    """Return the relative gap between two runs of one reference: 0.0 when bit for bit."""
    replay = replay_reference(session, seed=first.seed, steps=REPLAY_STEPS)
    if replay == first.curve[: len(replay)]:
        return 0.0
    again = train_branch(session, REFERENCE, seed=first.seed)
    if again.eval_loss is None or first.eval_loss is None:
        raise WorkloadError(
            "two runs of the FP32 reference must both train, but one became NaN or infinite; "
            "lower the learning rate"
        )
    return abs(again.eval_loss - first.eval_loss) / abs(first.eval_loss)
