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
from typing import TYPE_CHECKING, TypeVar

from autoprec.errors import DeviceError, RecordError
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
from autoprec.tuning.folder import open_folder, staged
from autoprec.tuning.settings import Settings, constraint_of, fp8_options, measured_options

if TYPE_CHECKING:
    import torch

    from autoprec.model.context import Context
    from autoprec.sensitivity.reference import Reference
    from autoprec.workload.functions import Workload

R = TypeVar("R", Profile, Sensitivity)
OpenReference = Callable[[], "Reference"]
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
    reference = reference_opener(settings, profile.model)
    sensitivity = staged(
        settings,
        "sensitivity",
        Sensitivity,
        lambda: make_sensitivity(settings, profile.model, reference),
        after=("profile",),
    )
    search = staged(
        settings,
        "search",
        Search,
        lambda: make_search(
            settings,
            profile,
            sensitivity,
            evaluate=joint_meter(settings, profile.model, reference),
        ),
        after=("profile", "sensitivity"),
    )
    plan = make_plan(settings, profile, sensitivity, search)
    plan.save(settings.out / "plan.json")
    verification = None
    if settings.verify and not settings.meta:
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
    reference = reference_opener(settings, spec)
    return staged(
        settings, "sensitivity", Sensitivity, lambda: make_sensitivity(settings, spec, reference)
    )


def search_stage(settings: Settings) -> Plan:
    """Make search.json and plan.json from a folder's profile.json and sensitivity.json."""
    profile = Profile.load(settings.out / "profile.json")
    sensitivity = (
        given_sensitivity(settings.sensitivity, profile.model)
        if settings.sensitivity
        else Sensitivity.load(settings.out / "sensitivity.json")
    )
    evaluate = joint_meter(settings, profile.model, reference_opener(settings, profile.model))
    search = make_search(settings, profile, sensitivity, evaluate=evaluate)
    search.save(settings.out / "search.json")
    plan = make_plan(settings, profile, sensitivity, search)
    plan.save(settings.out / "plan.json")
    return plan


def verify_stage(settings: Settings, plan_path: Path) -> Verification:
    """Prove or refute one plan; writes verification.json and the plan with its certificate."""
    from autoprec.verification import verify_plan

    open_folder(settings.out)
    plan = Plan.load(plan_path)
    verification = verify_plan(
        open_workload(settings),
        plan,
        device=numerics_device(settings),
        tolerance=settings.loss_tolerance,
        profile=saved_beside(plan_path, plan, Profile),
        sensitivity=saved_beside(plan_path, plan, Sensitivity),
        state_dir=settings.out / "branches",
        checkpoint=settings.checkpoint,
        seed=settings.seed,
        progress=settings.progress,
    )
    verification.save(settings.out / "verification.json")
    certify(plan, verification).save(settings.out / "plan.json")
    return verification


def saved_beside(plan_path: Path, plan: Plan, record: type[R]) -> R | None:
    """Return the profile or sensitivity in the plan's folder, if it is there and of its model."""
    path = plan_path.parent / f"{record.KIND}.json"
    if not path.exists():
        return None
    found = record.load(path)
    structure = found.model.structure if isinstance(found, Profile) else found.structure
    return found if structure == plan.fingerprint.structure else None


def make_profile(settings: Settings) -> Profile:
    """Capture the workload and measure its cost here, or predict it for a device profile."""
    if not settings.is_local:
        return predicted_profile(settings)
    from autoprec.profiler import profile_model

    return profile_model(
        open_context(settings),
        captured_model(settings),
        options=fp8_options(settings),
        gemms_hp=settings.gemms_hp,
        compiled=settings.is_compiled,
    )


def predicted_profile(settings: Settings) -> Profile:
    """Capture the workload on the machine at hand and predict its cost on the target device."""
    from autoprec.predict import load_device_profile, parse_parallel, predict_profile

    target = load_device_profile(settings.target)  # an unknown name fails before the capture
    return predict_profile(
        captured_model(settings),
        target,
        parallel=parse_parallel(settings.parallel) if settings.parallel else None,
        compiled=settings.is_compiled,
        options=fp8_options(settings),
        gemms_hp=settings.gemms_hp,
    )


def make_sensitivity(settings: Settings, spec: ModelSpec, reference: OpenReference) -> Sensitivity:
    """Measure what each option does to loss and gradient, or take it from where it is known."""
    if settings.sensitivity:
        return given_sensitivity(settings.sensitivity, spec)
    if settings.meta:
        from autoprec.predict.transfer import unknown_sensitivity

        return unknown_sensitivity(spec)
    from autoprec.sensitivity.measure import measure_sensitivity

    return measure_sensitivity(
        open_workload(settings),
        spec,
        device=numerics_device(settings),
        options=measured_options(settings),
        progress=settings.progress,
        reference=reference(),
    )


def reference_opener(settings: Settings, spec: ModelSpec) -> OpenReference:
    """Return what prepares the warmed-up reference on first use: two stages share it."""

    @cache
    def open_reference() -> "Reference":
        from autoprec.sensitivity.reference import prepare_reference

        return prepare_reference(
            open_workload(settings),
            spec,
            device=numerics_device(settings),
            checkpoint=settings.checkpoint,
            seed=settings.seed,
            progress=settings.progress,
        )

    return open_reference


def given_sensitivity(path: Path, spec: ModelSpec) -> Sensitivity:
    """Return a saved sensitivity; one of another model is transferred by role and depth."""
    from autoprec.predict.transfer import transfer_sensitivity

    given = Sensitivity.load(path)
    return given if given.structure == spec.structure else transfer_sensitivity(given, spec)


def joint_meter(settings: Settings, spec: ModelSpec, reference: OpenReference) -> Evaluate | None:
    """Return the measurement of a whole plan's e, opened on first use; None where it cannot be."""
    if not (settings.workload or settings.script) or spec.device == "meta":
        return None

    @cache
    def open_meter() -> Evaluate:
        from autoprec.sensitivity.joint import JointMeter

        opened = reference()
        return JointMeter(opened.workload, spec, device=opened.device, reference=opened).measure

    return lambda options: open_meter()(options)


def open_workload(settings: Settings) -> "Workload":
    """Load the user's file or config, or record the user's script (once in a process)."""
    if settings.config and settings.meta:
        from autoprec.workload.functions import workload_from
        from autoprec.workload.hf_config import config_model

        model = config_model(settings.config, batch=settings.batch, sequence=settings.sequence)
        return workload_from(model, name=settings.workload)
    if not settings.script:
        from autoprec.workload.functions import load_workload

        return load_workload(settings.workload)
    from autoprec.integrations.launch import Script, record_workload

    script = Script(settings.script, settings.script_args)
    return record_workload(script, steps=settings.script_steps)


def open_context(settings: Settings) -> "Context":
    """Return the context of the stages that run the user's model."""
    from autoprec.model.context import Context

    return Context(
        open_workload(settings), numerics_device(settings), settings.seed, settings.progress
    )


def numerics_device(settings: Settings) -> "torch.device":
    """Return where numerics are measured: the target, or the machine at hand for a profile."""
    from autoprec.device.local import resolve_device

    return resolve_device(settings.target if settings.is_local else "auto")


def captured_model(settings: Settings) -> ModelSpec:
    """Capture the workload on the machine at hand, or without storage on the meta device."""
    if settings.meta:
        return captured_on_meta(settings)
    from autoprec.model.capture import capture_model

    return capture_model(open_context(settings))


def captured_on_meta(settings: Settings) -> ModelSpec:
    """Capture the workload without storage, for a target that is not here.

    Raises:
        DeviceError: the target is the machine at hand, which can time nothing of it.
    """
    from autoprec.model.capture_meta import capture_on_meta

    if settings.is_local:
        raise DeviceError(
            "--meta needs a device profile as its target, since nothing is run that could be "
            f"timed, but the target is {settings.target!r}; add e.g. --target h100-sxm"
        )
    return capture_on_meta(open_workload(settings), seed=settings.seed, progress=settings.progress)


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

    _, verification = verify_front(
        open_workload(settings),
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
        loss_tolerance=verification.loss_tolerance,
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
