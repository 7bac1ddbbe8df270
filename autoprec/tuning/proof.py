"""A run's plans -> their proof by training, here or on the run's proxy."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from autoprec.records import ModelSpec, Plan, Profile, Sensitivity, Verification
from autoprec.tuning.ranks import made_on_all

if TYPE_CHECKING:
    from autoprec.sensitivity.warm_up import OnWarm
    from autoprec.tuning.run import Run


def check_evaluate(run: "Run") -> None:
    """Check the user's metrics before any work, where a proof will ask for them."""
    trained, settings = run.proxy or run, run.settings
    asks = settings.verify and "verification" in run.stages
    # a resumed run may be done: nothing would be trained
    if not asks or settings.resume or (settings.meta and run.proxy is None):
        return
    from autoprec.verification.metrics import check_metrics

    made_on_all(lambda: check_metrics(trained.context, settings.metric_tolerances))


def prove_plans(
    run: "Run", plans: Sequence[Plan], profile: Profile | None, sensitivity: Sensitivity | None
) -> Verification:
    """Train with the first plan; a refuted one gives way to the next."""
    if run.proxy is not None:
        from autoprec.tuning.proxy import verify_on_proxy

        return verify_on_proxy(run.proxy, plans, name=run.settings.proxy, model=run.spec)
    vars(run).pop("reference", None)  # nothing measures against it any more
    return train_plans(run, plans, profile=profile, sensitivity=sensitivity)


def keeper_of_warm_up(run: "Run") -> "OnWarm | None":
    """Return what keeps sensitivity's reference for the proof; None where that trains its own."""
    settings = run.settings
    if not run.proves or run.is_live or settings.checkpoint is not None:
        return None
    from autoprec.verification import keep_warm_up

    return partial(keep_warm_up, run.context, settings.terms, settings.out / "branches")


def train_plans(
    run: "Run",
    plans: Sequence[Plan],
    *,
    sensitivity: Sensitivity | None,
    profile: Profile | None = None,
    spec: ModelSpec | None = None,
) -> Verification:
    """Prove or refute plans of a run's own model, as its settings say.

    Finished branches are kept for a later run, but not of live functions, which have no name.
    """
    from autoprec.verification import Workers, verify_plans

    settings = run.settings
    return verify_plans(
        run.context,
        plans,
        loss_tolerance=settings.loss_tolerance,
        metrics=settings.metric_tolerances,
        profile=profile,
        spec=spec,
        sensitivity=sensitivity,
        state_dir=None if run.is_live else settings.out / "branches",
        checkpoint=settings.checkpoint,
        terms=settings.terms,
        workers=Workers(settings.workers, settings.launcher),
    )
