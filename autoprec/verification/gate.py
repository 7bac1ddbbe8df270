"""Prove or refute plans by training: the sequential test over branches of paired seeds.

    warm-up        the FP32 reference, once, to a checkpoint (or the user's checkpoint)
    per seed       reference, BF16 O2 control and plan branch from it, on the same batches, annealed
    after a seed   gap = (plan - reference) / |reference|; interval over seeds; decided, or one more

A NaN or a diverged branch of the plan refutes it at once. Branches are kept by what they trained
with (session.py), so that a plan that equals the control, and the next plan after a refuted one,
train nothing twice.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from autoprec.common.files import file_digest
from autoprec.common.text import short_digest
from autoprec.common.versions import software_versions
from autoprec.device.random_state import random_state_kept, seeded
from autoprec.device.ranks import world_size
from autoprec.device.timing import Stopping
from autoprec.errors import RecordError
from autoprec.model.context import Context
from autoprec.profiler import Planned, open_compilation, time_steps, written_variants
from autoprec.records.cost import BASELINES, Profile, StepTiming
from autoprec.records.model import FP32, Basis, ModelSpec
from autoprec.records.plan import Plan
from autoprec.records.sensitivity import Sensitivity
from autoprec.records.verification import MetricTolerance, Verdict, Verification
from autoprec.runtime.checkpoint import Checkpoint, read_checkpoint
from autoprec.runtime.sharded_state import shards_of
from autoprec.sensitivity.warm_up import restore
from autoprec.verification.branches import evaluate, state_of, train_seed, warm_up
from autoprec.verification.evidence import Evidence, exceeds_limit, make_verification
from autoprec.verification.ladder import climb, with_horizons
from autoprec.verification.sequential import Terms
from autoprec.verification.session import WRITTEN, BranchStore, Session, Variant, Workers
from autoprec.verification.workers import check_room_of_branches, train_branches
from autoprec.workload.functions import Batch, check_batches, move_batch
from autoprec.workload.training import Training

FEWEST_SEEDS = 2  # of a plan that no seed can show a gap of; one alone has no spread
TIMING_SAMPLES = 12  # per variant; the median's interval is then about the 3rd to the 10th sample
STATE_RTOL = 1e-3  # a saved warm-up must evaluate to what it did, up to another thread count

logger = logging.getLogger(__name__)


@random_state_kept()
def verify_plans(
    context: Context,
    plans: Sequence[Plan],
    *,
    loss_tolerance: float,
    metrics: Sequence[MetricTolerance] = (),
    profile: Profile | None = None,
    spec: ModelSpec | None = None,
    sensitivity: Sensitivity | None = None,
    state_dir: Path | None = None,
    checkpoint: Path | None = None,
    terms: Terms | None = None,
    workers: Workers | None = None,
) -> Verification:
    """Train with plans beside the reference, in order of rank, until one is not refuted.

    Plans whose gradient error is too much by what a refuted one showed are passed over; when all
    are refuted, the last one's record is returned. Costs a warm-up and three branches per seed,
    and one with the user's own 16-bit parameters, if any, until its gap is decided as well.

    Args:
        context: whose workload is trained, and where; branches use the seeds after its own.
        plans: to prove, best first; one at least.
        loss_tolerance: the largest relative loss gap that is acceptable; 0.001 is 0.1 %.
        metrics: how far the user's may differ; others are shown.
        profile: tells which layers the BF16 O2 control covers, and whether to time steps here.
        spec: the model, where there is no profile to tell it.
        sensitivity: gives the predicted gap beside the measured one.
        state_dir: where finished branches are kept, to go on after a kill.
        checkpoint: start here, not from scratch: a state dict, or `model` and `optimizer` ones.
        terms: how far the test may go; None: as far as the product goes.
        workers: train branches in other processes; None: one after the other in this one.

    Raises:
        WorkerError: a worker was lost.
        WorkloadError: the reference does not train, or its loss does not move.
        RecordError: the checkpoint or a saved state does not fit.
    """
    reopen = partial(
        open_session,
        context,
        loss_tolerance=loss_tolerance,
        metrics=metrics,
        spec=profile.model if profile else spec,
        state_dir=state_dir,
        checkpoint=checkpoint,
        workers=workers,
    )
    return _prove(reopen, terms or Terms(), plans, profile, sensitivity)


def _prove(
    reopen: Callable[..., Session],
    terms: Terms,
    plans: Sequence[Plan],
    profile: Profile | None,
    sensitivity: Sensitivity | None,
) -> Verification:
    """Return what became of the plans; `reopen` gives the session of any terms.

    Its warm-up goes on from the longest one before it.
    """
    began = time.monotonic()
    session = reopen(terms)
    evidence, refuted, skipped = _try_plans(session, plans)
    spent_s = time.monotonic() - began
    steps = time_plan(session, evidence.plan, profile)
    found = make_verification(session, evidence, steps, sensitivity, refuted, skipped=skipped)
    if evidence.verdict is Verdict.REFUTED or evidence.plan.is_fp32:
        return found
    longest = session.checkpoint

    def gaps_of(own: Terms) -> list[float] | None:
        nonlocal longest
        rung = reopen(own, earlier=longest)
        longest = max(longest, rung.checkpoint, key=lambda each: len(each.curve))
        found = gather_evidence(rung, evidence.plan, with_control=False)
        return None if found.diverged("plan") else found.gaps("plan")

    # the same plan over other lengths, as far as was asked for; the reference has no gap at any;
    # a checkpoint with optimizer state has no warm-up
    own_terms = replace(session.terms, warmup_steps=len(session.checkpoint.curve))
    rungs = climb(own_terms, gaps_of, spent_s=spent_s)
    return with_horizons(found, evidence, tuple(rungs))


def open_session(
    context: Context,
    terms: Terms,
    *,
    loss_tolerance: float,
    metrics: Sequence[MetricTolerance] = (),
    spec: ModelSpec | None = None,
    state_dir: Path | None = None,
    checkpoint: Path | None = None,
    workers: Workers | None = None,
    earlier: Checkpoint | None = None,
) -> Session:
    """Read or make the checkpoint that all branches of a verification start from.

    A warm-up goes on from an `earlier` one that is the same so far: not where the learning rates
    still rise in the one, and so faster than in the other.
    """
    if spec is not None:
        check_room_of_branches(context, spec, workers or Workers())
    check_batches(context.workload, seed=context.seed)
    evaluation = [move_batch(b, context.device) for b in context.workload.eval_batches()]
    start = None if checkpoint is None else read_checkpoint(checkpoint)
    steps = 0 if start is not None and start.optimizer is not None else terms.warmup_steps
    store = BranchStore(_setup_of(context, terms, checkpoint, steps=steps), state_dir)
    common = store.find_warm_up(partial(_fresh_shards, context) if world_size() > 1 else None)
    if common is None:
        if earlier is not None and 0 < len(earlier.curve) < steps and earlier.is_at_pace:
            start = earlier
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
        checkpoint_path=str(checkpoint or ""),
        workers=workers or Workers(),
        metrics=tuple(metrics),
    )


def keep_warm_up(
    context: Context,
    terms: Terms,
    state_dir: Path,
    training: Training,
    curve: Sequence[tuple[int, float]],
) -> None:
    """Keep sensitivity's reference for a proof whose warm-up is the same, step by step.

    The training is left as it is. One process's alone: ranks share their buffers in a proof.
    """
    if world_size() > 1 or len(curve) != terms.warmup_steps:
        return
    evaluation = [move_batch(b, context.device) for b in context.workload.eval_batches()]
    with seeded(context.seed):
        state = state_of(context, training, evaluation, [loss for _, loss in curve])
    BranchStore(_setup_of(context, terms, None, steps=len(curve)), state_dir).add_warm_up(state)


def _setup_of(context: Context, terms: Terms, checkpoint: Path | None, *, steps: int) -> str:
    """Return a digest of everything that branches share: another digest, other branches."""
    digest = file_digest(checkpoint) if checkpoint is not None else ""
    workload = [context.workload.name, context.workload.digest]
    settings = [steps, terms.branch_steps, context.seed]
    if world_size() > 1:
        settings += [world_size(), context.workload.part.ranks]
    settings += [1] if context.workload.defines("evaluate") else []  # branches know its metrics
    return short_digest(workload, settings, context.device.type, digest, software_versions())


def _fresh_shards(context: Context) -> Checkpoint:
    """Return this rank's part of a fresh model and optimizer, for a saved state to be read into."""
    with seeded(context.seed):
        fresh = restore(context, None)
        return shards_of(fresh.model, fresh.optimizer)


def _check_saved(
    context: Context, evaluation: Sequence[Batch], saved: Checkpoint, store: BranchStore
) -> None:
    """Refuse a saved warm-up that does not evaluate to what it did when it was saved."""
    with seeded(context.seed):
        losses = evaluate(context, restore(context, saved).model, evaluation)
    most = STATE_RTOL * max(map(abs, saved.eval_losses), default=0.0)
    same = len(losses) == len(saved.eval_losses) and all(
        abs(now - then) <= most for now, then in zip(losses, saved.eval_losses, strict=True)
    )
    if not same:
        raise RecordError(
            f"the saved branches in {store.folder} must be of this workload, but their warm-up "
            "evaluates to another loss now (its code or data changed, or it keeps a state where "
            "autoprec does not look, outside of its modules); delete the folder"
        )


def _try_plans(session: Session, plans: Sequence[Plan]) -> tuple[Evidence, list[Evidence], int]:
    """Return the evidence of the plan that stands, of the refuted ones, and how many were skipped.

    The last plan is tried whatever the refuted ones imply: one record has to come of it.
    """
    refuted: list[Evidence] = []
    skipped = 0
    for number, plan in enumerate(plans[:-1], start=1):
        if exceeds_limit(plan, refuted):
            skipped += 1
            continue
        evidence = gather_evidence(session, plan)
        if evidence.verdict is not Verdict.REFUTED:
            return evidence, refuted, skipped
        logger.info("plan %d of %d is refuted; trying the next", number, len(plans))
        refuted.append(evidence)
    return gather_evidence(session, plans[-1]), refuted, skipped


def gather_evidence(session: Session, plan: Plan, *, with_control: bool = True) -> Evidence:
    """Train seed after seed until the plan is decided, or the seeds end or cannot decide it."""
    _, control, chosen = session.variants(plan)
    terms, predicted = session.terms, plan.predicted
    variants = [control, chosen] if with_control else [chosen]
    asks = with_control and not session.has_masters
    if chosen.is_reference and predicted and predicted.bf16_o2_ms >= predicted.fp32_ms:
        variants = [chosen]  # nobody asks what BF16 would do to the loss: it is no faster
        if not asks:
            terms = replace(terms, seeds_min=FEWEST_SEEDS)  # the reference's branch is the plan's
    evidence = Evidence(plan, terms, session.loss_tolerance, tolerances=session.metrics)

    def asked(so_far: Evidence) -> list[Variant]:
        return [*variants, WRITTEN] if asks and so_far.asks_for_written else variants

    seeds = range(session.context.seed + 1, session.context.seed + 1 + terms.seeds_max)
    # workers train the seeds up to the first look at once, and then all others
    for at_once in (seeds[: terms.seeds_min], seeds[terms.seeds_min :]):
        train_branches(session, asked(evidence), at_once)
        for seed in at_once:
            branches = (*evidence.branches, *train_seed(session, asked(evidence), seed))
            evidence = replace(evidence, branches=branches)
            if evidence.verdict is not Verdict.INCONCLUSIVE or evidence.unresolved:
                return evidence
    return evidence


def time_plan(session: Session, plan: Plan, profile: Profile | None) -> tuple[StepTiming, ...]:
    """Time the step as the user runs it, FP32, BF16 O2, autocast and the plan, in turn.

    Nothing is timed when the target is not the device at hand. Steps are compiled if the profile's
    are. A plan that equals FP32 or BF16 O2 throughout takes what that takes; nothing is timed again
    for one that is FP32, whose rivals may be slower by far.
    """
    basis = plan.fingerprint.time_basis if profile is None else profile.basis
    if basis is not Basis.MEASURED:
        return ()  # times of this device would say nothing about the target
    mode = plan.fingerprint.compile_mode if profile is None else profile.device.compile_mode
    _, control, chosen = session.variants(plan)
    written = None if profile is None else profile.model.as_written
    left_out = {} if profile is None else profile.steps_left_out  # baselines that fail
    known = () if profile is None else profile.steps
    profiled = {step.label: step for step in known if step.label in BASELINES}
    if chosen.is_reference and "fp32" in profiled:
        return (*profiled.values(), profiled["fp32"].model_copy(update={"label": "plan"}))
    with open_compilation(session.context.device, mode) as compilation:
        variants = {
            **written_variants(written, compiled=compilation is not None),
            "fp32": {},
            "bf16_o2": control.options,
            "autocast_bf16": "autocast_bf16",
        }
        uniform = {"fp32": dict.fromkeys(chosen.options, FP32), "bf16_o2": control.options}
        same = next((label for label, each in uniform.items() if each == chosen.options), None)
        if same is None or same in left_out or plan.fp32_outputs:
            variants["plan"] = Planned(chosen.options, plan.fp32_outputs)
        steps, _ = time_steps(
            session.context,
            {label: each for label, each in variants.items() if label not in left_out},
            stopping=Stopping(TIMING_SAMPLES),
            compilation=compilation,
        )
    equal = (step.model_copy(update={"label": "plan"}) for step in steps if step.label == same)
    return steps if "plan" in variants else (*steps, *equal)
