"""The stages in order, with their files: what `tune` runs, and what each stage alone runs.

    capture + profile -> profile.json -> sensitivity.json -> search.json + plan.json
    -> verification.json (+ plan.json with its certificate) -> layers.csv + report.html

Torch is imported only by the stages that need it, so that searching and
reporting saved records starts at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from autoprec.errors import RecordError
from autoprec.records import (
    Certificate,
    Estimate,
    ModelSpec,
    Option,
    Plan,
    Profile,
    Search,
    Sensitivity,
    Verdict,
    Verification,
    write_atomically,
)
from autoprec.runstate import open_folder, staged
from autoprec.settings import Settings, constraint_of, fp8_options

if TYPE_CHECKING:
    import torch

Evaluate = Callable[[tuple[Option, ...]], Estimate]


@dataclass(frozen=True)
class Outcome:
    """The records of a finished `tune`."""

    plan: Plan
    profile: Profile
    sensitivity: Sensitivity
    search: Search
    verification: Verification | None

    @property
    def exit_code(self) -> int:
        """0 when the constraint was shown to hold (or nobody asked), 1 when it was not."""
        if self.verification is None:
            return 0
        return 0 if self.verification.verdict is Verdict.VERIFIED else 1


def tune_workload(settings: Settings) -> Outcome:
    """Run every stage, save what each made, and write the report."""
    open_folder(settings.out)
    profile = staged(settings, "profile", Profile, lambda: make_profile(settings))
    sensitivity = (
        Sensitivity.load(settings.sensitivity)
        if settings.sensitivity
        else staged(
            settings,
            "sensitivity",
            Sensitivity,
            lambda: make_sensitivity(settings, profile.model),
            after=("profile",),
        )
    )
    search = staged(
        settings,
        "search",
        Search,
        lambda: make_search(
            settings, profile, sensitivity, evaluate=joint_meter(settings, profile.model)
        ),
        after=("profile", "sensitivity"),
    )
    plan = make_plan(settings, profile, sensitivity, search)
    plan.save(settings.out / "plan.json")
    verification = None
    if settings.verify:
        verification = staged(
            settings,
            "verification",
            Verification,
            lambda: make_verification(settings, profile, sensitivity, search),
            after=("search",),
        )
        plan = certified_plan(settings, profile, sensitivity, search, verification)
        plan.save(settings.out / "plan.json")
    write_report(settings.out)
    return Outcome(plan, profile, sensitivity, search, verification)


def profile_stage(settings: Settings) -> Profile:
    """Make profile.json alone."""
    open_folder(settings.out)
    return staged(settings, "profile", Profile, lambda: make_profile(settings))


def sensitivity_stage(settings: Settings) -> Sensitivity:
    """Make sensitivity.json alone; the model is captured again when there is no profile."""
    open_folder(settings.out)
    path = settings.out / "profile.json"
    spec = Profile.load(path).model if path.exists() else captured_model(settings)
    return staged(settings, "sensitivity", Sensitivity, lambda: make_sensitivity(settings, spec))


def search_stage(settings: Settings) -> Plan:
    """Make search.json and plan.json from a folder's profile.json and sensitivity.json."""
    profile = Profile.load(settings.out / "profile.json")
    sensitivity = Sensitivity.load(settings.sensitivity or settings.out / "sensitivity.json")
    evaluate = joint_meter(settings, profile.model)
    search = make_search(settings, profile, sensitivity, evaluate=evaluate)
    search.save(settings.out / "search.json")
    plan = make_plan(settings, profile, sensitivity, search)
    plan.save(settings.out / "plan.json")
    return plan


def verify_stage(settings: Settings, plan_path: Path) -> Verification:
    """Prove or refute one plan; writes verification.json and the plan with its certificate."""
    from autoprec.verification import verify_plan
    from autoprec.workload import load_workload

    open_folder(settings.out)
    plan = Plan.load(plan_path)
    verification = verify_plan(
        load_workload(settings.workload),
        plan,
        device=numerics_device(settings),
        tolerance=settings.loss_tolerance,
        state_dir=settings.out / "branches",
        checkpoint=settings.checkpoint,
        seed=settings.seed,
        progress=settings.progress,
    )
    verification.save(settings.out / "verification.json")
    certify(plan, verification).save(settings.out / "plan.json")
    return verification


def make_profile(settings: Settings) -> Profile:
    """Capture the workload and measure its cost here, or predict it for a device profile."""
    if not settings.is_local:
        return predicted_profile(settings)
    from autoprec.profiler import profile_model
    from autoprec.workload import load_workload

    return profile_model(
        load_workload(settings.workload),
        captured_model(settings),
        device=numerics_device(settings),
        options=fp8_options(settings),
        seed=settings.seed,
        progress=settings.progress,
    )


def predicted_profile(settings: Settings) -> Profile:
    """Capture the workload on the machine at hand and predict its cost on the target device."""
    from autoprec.costmodel import load_device_profile, parse_parallel, predict_profile

    target = load_device_profile(settings.target)  # an unknown name fails before the capture
    return predict_profile(
        captured_model(settings),
        target,
        parallel=parse_parallel(settings.parallel) if settings.parallel else None,
        compiled=settings.compiled,
        options=fp8_options(settings),
    )


def make_sensitivity(settings: Settings, spec: ModelSpec) -> Sensitivity:
    """Measure what each option does to loss and gradient, on the machine at hand."""
    from autoprec.sensitivity import measure_sensitivity
    from autoprec.workload import load_workload

    return measure_sensitivity(
        load_workload(settings.workload),
        spec,
        device=numerics_device(settings),
        options=fp8_options(settings),
        checkpoint=settings.checkpoint,
        seed=settings.seed,
        progress=settings.progress,
    )


def joint_meter(settings: Settings, spec: ModelSpec) -> Evaluate | None:
    """Return the measurement of a whole plan's e, opened on first use; None without a workload."""
    if not settings.workload:
        return None

    @cache
    def open_meter() -> Evaluate:
        from autoprec.sensitivity import JointMeter
        from autoprec.workload import load_workload

        workload = load_workload(settings.workload)
        device = numerics_device(settings)
        return JointMeter(workload, spec, device=device, seed=settings.seed).measure

    return lambda options: open_meter()(options)


def numerics_device(settings: Settings) -> "torch.device":
    """Return where numerics are measured: the target, or the machine at hand for a profile."""
    from autoprec.device import resolve_device

    return resolve_device(settings.target if settings.is_local else "auto")


def captured_model(settings: Settings) -> ModelSpec:
    """Capture the workload on the machine at hand."""
    from autoprec.capture import capture_model
    from autoprec.workload import load_workload

    return capture_model(
        load_workload(settings.workload),
        device=numerics_device(settings),
        seed=settings.seed,
        progress=settings.progress,
    )


def make_search(
    settings: Settings,
    profile: Profile,
    sensitivity: Sensitivity,
    *,
    evaluate: Callable[[tuple[Option, ...]], Estimate] | None,
) -> Search:
    """Search the plan; `evaluate` measures a whole plan's e (None: the table's sum is used)."""
    from autoprec.search import search_plan

    if sensitivity.structure != profile.model.structure:
        raise RecordError(
            "profile and sensitivity must be of one model, but their structures are "
            f"{profile.model.structure} and {sensitivity.structure}; make both from the same file"
        )
    return search_plan(
        profile,
        sensitivity,
        constraint=constraint_of(settings),
        evaluate=evaluate,
        trials=settings.trials,
        time_budget_s=settings.time_budget_s,
        seed=settings.seed,
        storage=settings.storage or f"sqlite:///{settings.out / 'study.db'}",
        study_name=settings.study,
        progress=settings.progress,
    )


def make_plan(
    settings: Settings, profile: Profile, sensitivity: Sensitivity, search: Search
) -> Plan:
    """Build the plan of the search's choice, with the reason for every layer."""
    return candidate_plans(settings, profile, sensitivity, search)[0]


def candidate_plans(
    settings: Settings, profile: Profile, sensitivity: Sensitivity, search: Search
) -> list[Plan]:
    """Build the plans to verify, best first: the chosen one, then the next on the front."""
    from autoprec.search import build_plan

    points = dict.fromkeys((search.chosen, *search.ranked))
    constraint = constraint_of(settings)
    return [
        build_plan(profile, sensitivity, search, point, constraint=constraint) for point in points
    ]


def make_verification(
    settings: Settings, profile: Profile, sensitivity: Sensitivity, search: Search
) -> Verification:
    """Train with the plan and prove or refute it; a refuted plan gives way to the next."""
    from autoprec.verification import verify_front
    from autoprec.workload import load_workload

    _, verification = verify_front(
        load_workload(settings.workload),
        candidate_plans(settings, profile, sensitivity, search),
        profile=profile,
        sensitivity=sensitivity,
        device=numerics_device(settings),
        tolerance=settings.loss_tolerance,
        state_dir=settings.out / "branches",
        checkpoint=settings.checkpoint,
        seed=settings.seed,
        progress=settings.progress,
    )
    return verification


def certified_plan(
    settings: Settings,
    profile: Profile,
    sensitivity: Sensitivity,
    search: Search,
    verification: Verification,
) -> Plan:
    """Return the plan that the verification is about, with its certificate."""
    plans = candidate_plans(settings, profile, sensitivity, search)
    plan = next((p for p in plans if p.digest == verification.plan), None)
    if plan is None:
        raise RecordError(
            f"the verification must be of a plan of this search, but it is of {verification.plan}; "
            "run the search again, then verify"
        )
    return certify(plan, verification)


def certify(plan: Plan, verification: Verification) -> Plan:
    """Return the plan with the verification's certificate in it."""
    certificate = Certificate(
        verdict=verification.verdict,
        tolerance=verification.tolerance,
        gap=verification.gap,
        step_ms={step.label: step.timing.median_ms for step in verification.steps},
        seeds=verification.gap.seeds if verification.gap else 0,
        branch_steps=verification.branch_steps,
    )
    return plan.model_copy(update={"certificate": certificate})


def write_report(folder: Path) -> Path:
    """Write layers.csv and report.html from the records in a run folder."""
    from autoprec.report import layers_frame, load_run, render_html

    run = load_run(folder)
    if run.plan is not None or run.profile is not None:
        write_atomically(folder / "layers.csv", layers_frame(run).to_csv(index=False))
    return write_atomically(folder / "report.html", render_html(run))
