"""Prove or refute plans by training: the sequential test over branches of paired seeds.

    warm-up        the FP32 reference, once, to a checkpoint (or the user's checkpoint)
    per seed       reference, BF16 O2 control and plan branch from it, on the same batches, annealed
    after a seed   gap = (plan - reference) / |reference|; interval over seeds; decided, or one more

A NaN or a diverged branch of the plan refutes it at once. Branches are kept by what they trained
with (state.py), so that a plan that equals the control, and the next plan after a refuted one,
train nothing twice.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from autoprec.common.progress import Progress, report_nothing
from autoprec.errors import InfeasibleError
from autoprec.records import Plan, Profile, Sensitivity, Verdict, Verification
from autoprec.verification.evidence import Evidence, make_verification
from autoprec.verification.refuted import Refuted, is_hopeless, repair_notes
from autoprec.verification.sequential import Looks
from autoprec.verification.session import Session, Terms, open_session
from autoprec.verification.steps import time_plan
from autoprec.workload.functions import Workload

logger = logging.getLogger(__name__)


def verify_plan(
    workload: Workload,
    plan: Plan,
    *,
    device: torch.device,
    tolerance: float,
    profile: Profile | None = None,
    sensitivity: Sensitivity | None = None,
    seeds_max: int = 5,
    seeds_min: int = 3,
    warmup_steps: int = 50,
    branch_steps: int = 25,
    state_dir: Path | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    time_budget_s: float | None = None,
    progress: Progress = report_nothing,
) -> Verification:
    """Train with the plan beside the reference and say whether its loss gap is within `tolerance`.

    Costs `warmup_steps` FP32 steps, `branch_steps` steps for each of three arms per seed (a plan
    that equals the control is trained once), and about 60 steps of timing.

    Args:
        workload: The user's five functions.
        plan: The plan to prove; every option in it must run on `device`.
        device: Where to train.
        tolerance: The largest relative loss gap that is acceptable; 0.001 is 0.1 %.
        profile: Tells which layers the BF16 O2 control covers (else: every layer of the plan), and
            whether the target is the device at hand, so that timing steps makes sense.
        sensitivity: Gives the predicted gap beside the measured one.
        seeds_max: The seeds after which the test gives up.
        seeds_min: The seeds before the first look; two at least.
        warmup_steps: FP32 steps before the branches; none when `checkpoint` holds optimizer state.
        branch_steps: Steps of each branch, over which the learning rates fall to nearly zero.
        state_dir: Where finished branches are kept, to go on after a kill.
        checkpoint: Start here, not from scratch: a state dict, or `model` and `optimizer` ones.
        seed: Of the warm-up; branches use seed + 1, seed + 2, ...
        time_budget_s: No seed is begun that would end after it.
        progress: Told of every step.

    Raises:
        WorkloadError: the reference does not train, or its loss does not move.
        RecordError: the checkpoint or a saved state does not fit.
    """
    _, verification = verify_front(
        workload,
        [plan],
        device=device,
        tolerance=tolerance,
        profile=profile,
        sensitivity=sensitivity,
        seeds_max=seeds_max,
        seeds_min=seeds_min,
        warmup_steps=warmup_steps,
        branch_steps=branch_steps,
        state_dir=state_dir,
        checkpoint=checkpoint,
        seed=seed,
        time_budget_s=time_budget_s,
        progress=progress,
    )
    return verification


def verify_front(
    workload: Workload,
    plans: Sequence[Plan],
    *,
    device: torch.device,
    tolerance: float,
    profile: Profile | None = None,
    sensitivity: Sensitivity | None = None,
    seeds_max: int = 5,
    seeds_min: int = 3,
    warmup_steps: int = 50,
    branch_steps: int = 25,
    state_dir: Path | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    time_budget_s: float | None = None,
    progress: Progress = report_nothing,
) -> tuple[int, Verification]:
    """Verify plans in order of rank until one is not refuted; return its index and record.

    Plans whose e is too much by what a refuted one showed are passed over. When all are refuted,
    the last one's record is returned. Arguments as in `verify_plan`.
    """
    if not plans:
        raise InfeasibleError("verification needs at least one plan, but got none; search first")
    terms = Terms(
        tolerance=tolerance,
        looks=Looks(seeds_min=seeds_min, seeds_max=seeds_max),
        warmup_steps=warmup_steps,
        branch_steps=branch_steps,
        seed=seed,
        time_budget_s=time_budget_s,
    )
    session = open_session(
        workload,
        terms,
        device=device,
        spec=profile.model if profile else None,
        state_dir=state_dir,
        checkpoint=checkpoint,
        progress=progress,
    )
    return _first_not_refuted(session, plans, profile, sensitivity)


def _first_not_refuted(
    session: Session,
    plans: Sequence[Plan],
    profile: Profile | None,
    sensitivity: Sensitivity | None,
) -> tuple[int, Verification]:
    refuted: list[Refuted] = []
    for index, plan in enumerate(plans):
        is_last = index == len(plans) - 1
        if not is_last and is_hopeless(plan, refuted):
            continue
        evidence = gather_evidence(session, plan)
        if evidence.verdict is Verdict.REFUTED and not is_last:
            logger.info("plan %d of %d is refuted; trying the next", index + 1, len(plans))
            refuted.append(Refuted(plan, evidence))
            continue
        steps = time_plan(session, evidence, plan, profile)
        before = [each.plan for each in refuted]
        found = make_verification(session, plan, evidence, steps, before, sensitivity)
        said = repair_notes(plan, refuted, skipped=index - len(refuted))
        return index, found.model_copy(update={"notes": (*said, *found.notes)})
    raise InfeasibleError("verification needs at least one plan, but got none; search first")


def gather_evidence(session: Session, plan: Plan) -> Evidence:
    """Train seed after seed until the plan is decided, or the seeds or the time end."""
    evidence = Evidence(arms=session.arms(plan), terms=session.terms)
    slowest_s = 0.0
    for index in range(session.terms.looks.seeds_max):
        if session.is_out_of_time(slowest_s):
            return replace(evidence, is_out_of_time=True)
        began = time.monotonic()
        seed = session.terms.seed + 1 + index
        evidence = evidence.with_seed(session.train_seed(evidence.arms, seed))
        slowest_s = max(slowest_s, time.monotonic() - began)
        if evidence.verdict is not Verdict.INCONCLUSIVE:
            break
    return evidence
