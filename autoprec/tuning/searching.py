"""The search stage of a run: alone, or by many processes on one study.

    autoprec search OUT --workload MODEL.py --storage URL             makes the plan
    autoprec search OUT --workload MODEL.py --storage URL --worker    measures plans for it

What a worker needs is in the run folder, or a copy of it: profile.json, sensitivity.json and, from
the first that measures on, reference.pt: the trained reference, so that all have the same bits.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from autoprec import __version__
from autoprec.common.versions import software_versions
from autoprec.errors import RecordError
from autoprec.records import Profile, Search, Sensitivity
from autoprec.tuning.ranks import is_launched, led_by_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from autoprec.records import Estimate, Option
    from autoprec.search.workers import Team
    from autoprec.sensitivity.joint import JointMeter
    from autoprec.tuning.run import Run


def search_tables(run: "Run") -> tuple[Profile, Sensitivity]:
    """Return the times and gradient errors that plans are made of.

    Raises:
        RecordError: they are of two models.
    """
    from autoprec.search import sensitivity_for

    profile, sensitivity = run.profile, run.sensitivity
    if sensitivity.structure != profile.model.structure:
        raise RecordError(
            "profile and sensitivity must be of one model, but their structures are "
            f"{profile.model.structure} and {sensitivity.structure}; make both from the same file"
        )
    return profile, sensitivity_for(profile, sensitivity, run.settings.constraint)


def make_search(run: "Run") -> Search:
    """Return the plans that were looked at, and the chosen one; of a worker, those so far."""
    from autoprec.search import between_notes, search_plan
    from autoprec.search.storage import storage_in

    (profile, sensitivity), settings = run.tables, run.settings
    has_workload = run.is_live or settings.workload or settings.script
    can_measure = has_workload and profile.model.device != "meta" and run.proxy is None

    @cache  # a resumed study may need no measurement: the reference is trained for the first one
    def meter() -> "JointMeter":
        from autoprec.sensitivity.joint import JointMeter

        return JointMeter(run.reference, islands=sensitivity.islands)

    def find(ask: "Callable[[tuple[tuple[Option, ...], int]], Estimate]") -> Search:
        def measure(options: "tuple[Option, ...]", batches: int) -> "Estimate":
            return ask((options, batches))

        found = search_plan(
            profile,
            sensitivity,
            constraint=settings.constraint,
            evaluate=measure if can_measure else None,
            trials=settings.trials,
            time_budget_s=settings.time_budget,
            seed=settings.seed,
            storage=settings.storage or storage_in(settings.out),
            study_name=settings.study,
            team=_team(run) if can_measure else None,
            progress=run.progress,
        )
        notes = (*found.notes, *between_notes(run.sensitivity, sensitivity))
        return found.model_copy(update={"notes": notes})

    return led_by_first(find, lambda asked: meter().measure(*asked))


def kept_reference(run: "Run") -> Path | None:
    """Return where the trained reference is kept for other processes; None where there are none."""
    return run.settings.out / "reference.pt" if run.settings.storage and not is_launched() else None


def _team(run: "Run") -> "Team | None":
    """Return what all processes on the study must share; None where this one is alone on it."""
    if kept_reference(run) is None:
        return None
    from autoprec.search.workers import Team

    versions = ", ".join(f"{name} {version}" for name, version in software_versions().items())
    return Team(
        software=f"autoprec {__version__}, {versions}",
        reference=lambda: run.reference.digest,
        is_worker=run.settings.worker,
    )
