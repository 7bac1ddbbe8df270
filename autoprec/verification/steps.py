"""The measured step time of the plan, interleaved with what the user would run otherwise."""

from autoprec.device.timing import Stopping
from autoprec.model.context import Context
from autoprec.profiler import open_compilation, time_steps
from autoprec.records import Basis, Plan, Profile, StepTiming
from autoprec.verification.evidence import Evidence
from autoprec.verification.session import Session

TIMING_SAMPLES = 12  # per arm; the median's interval is then about the 3rd to the 10th sample


def time_plan(
    session: Session, evidence: Evidence, plan: Plan, profile: Profile | None
) -> tuple[StepTiming, ...]:
    """Time FP32, BF16 O2, autocast and plan in turn; nothing when the target is not here.

    They are compiled if the profile is.

    A plan that equals uniform BF16 O2 is timed as an arm of its own all the same: the two
    intervals then show how well equal arms agree.
    """
    basis = plan.fingerprint.time_basis if profile is None else profile.basis
    if basis is not Basis.MEASURED:
        return ()
    mode = plan.fingerprint.compile_mode if profile is None else profile.device.compile_mode
    bench = session.bench
    context = Context(bench.workload, bench.device, session.terms.seed, bench.progress)
    _, control, chosen = evidence.arms
    with open_compilation(context.device, mode) as compilation:
        return time_steps(
            context,
            {
                "fp32": {},
                "bf16_o2": control.options,
                "autocast_bf16": "autocast_bf16",
                "plan": chosen.options,
            },
            stopping=Stopping(TIMING_SAMPLES),
            compilation=compilation,
        )
