"""Prove or refute plans by training: the sequential test over branches of paired seeds.

    warm-up        the FP32 reference, once, to a checkpoint (or the user's checkpoint)
    per seed       reference, BF16 O2 control and plan branch from it, on the same batches, annealed
    after a seed   gap = (plan - reference) / |reference|; interval over seeds; decided, or one more

A NaN or a diverged branch of the plan refutes it at once. Branches are kept by what they trained
with (state.py), so that a plan that equals the control, and the next plan after a refuted one,
train nothing twice.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from autoprec.device.random_state import random_state_kept
from autoprec.device.timing import Stopping
from autoprec.errors import InfeasibleError
from autoprec.model.context import Context
from autoprec.profiler import open_compilation, time_steps
from autoprec.records import Basis, Plan, Profile, Sensitivity, StepTiming, Verdict, Verification
from autoprec.verification.branches import Session
from autoprec.verification.evidence import Evidence, exceeds_limit, make_verification
from autoprec.verification.sequential import Terms
from autoprec.verification.session import open_session, train_seed, variants_of

TIMING_SAMPLES = 12  # per variant; the median's interval is then about the 3rd to the 10th sample

logger = logging.getLogger(__name__)


@random_state_kept()
def verify_plans(
    context: Context,
    plans: Sequence[Plan],
    *,
    loss_tolerance: float,
    profile: Profile | None = None,
    sensitivity: Sensitivity | None = None,
    state_dir: Path | None = None,
    checkpoint: Path | None = None,
    terms: Terms | None = None,
) -> Verification:
    """Train with plans beside the reference, in order of rank, until one is not refuted.

    Says whether its loss gap is within the tolerance. Plans whose gradient error is too much by
    what a refuted one showed are passed over; when all are refuted, the last one's record is
    returned. Costs the warm-up in FP32 steps, the steps of three branches per seed (a plan that
    equals the control is trained once), and about 60 steps of timing.

    Args:
        context: whose workload is trained, and where: every option of the plans must run there.
            Branches use the seeds after the context's.
        plans: to prove, best first.
        loss_tolerance: the largest relative loss gap that is acceptable; 0.001 is 0.1 %.
        profile: tells which layers the BF16 O2 control covers (else: every layer of the plan), and
            whether the target is the device at hand, so that timing steps makes sense.
        sensitivity: gives the predicted gap beside the measured one.
        state_dir: where finished branches are kept, to go on after a kill.
        checkpoint: start here, not from scratch: a state dict, or `model` and `optimizer` ones.
        terms: how far the test may go; None: as far as the product goes.

    Raises:
        InfeasibleError: no plan, or a tolerance below zero.
        WorkloadError: the reference does not train, or its loss does not move.
        RecordError: the checkpoint or a saved state does not fit.
    """
    if not plans:
        raise InfeasibleError("verification needs at least one plan, but got none; search first")
    session = open_session(
        context,
        terms or Terms(),
        loss_tolerance=loss_tolerance,
        spec=profile.model if profile else None,
        state_dir=state_dir,
        checkpoint=checkpoint,
    )
    evidence, refuted, skipped = _first_not_refuted(session, plans)
    steps = time_plan(session, evidence, profile)
    return make_verification(
        session, evidence, steps, sensitivity, refuted=refuted, skipped=skipped
    )


def _first_not_refuted(
    session: Session, plans: Sequence[Plan]
) -> tuple[Evidence, list[Evidence], int]:
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


def gather_evidence(session: Session, plan: Plan) -> Evidence:
    """Train seed after seed until the plan is decided, or the seeds end."""
    variants = variants_of(session, plan)
    evidence = Evidence(plan, variants, session.terms, session.loss_tolerance)
    for index in range(session.terms.seeds_max):
        seed = session.context.seed + 1 + index
        evidence = evidence.with_seed(train_seed(session, evidence.variants[1:], seed))
        if evidence.verdict is not Verdict.INCONCLUSIVE:
            break
    return evidence


def time_plan(
    session: Session, evidence: Evidence, profile: Profile | None
) -> tuple[StepTiming, ...]:
    """Time FP32, BF16 O2, autocast and plan in turn; nothing when the target is not here.

    They are compiled if the profile is. A plan that equals uniform BF16 O2 is timed as a variant of
    its own all the same: the two intervals then show how well equal ones agree.
    """
    fingerprint = evidence.plan.fingerprint
    basis = fingerprint.time_basis if profile is None else profile.basis
    if basis is not Basis.MEASURED:
        return ()
    mode = fingerprint.compile_mode if profile is None else profile.device.compile_mode
    _, control, chosen = evidence.variants
    with open_compilation(session.context.device, mode) as compilation:
        return time_steps(
            session.context,
            {
                "fp32": {},
                "bf16_o2": control.options,
                "autocast_bf16": "autocast_bf16",
                "plan": chosen.options,
            },
            stopping=Stopping(TIMING_SAMPLES),
            compilation=compilation,
        )
