"""The records of one run, from its folder; those of another model or plan are set aside."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from autoprec.errors import RecordError
from autoprec.records import Plan, Profile, Search, Sensitivity, Verification

FILES: dict[str, type[Plan] | type[Profile] | type[Sensitivity] | type[Search] | type[Verification]]
FILES = {
    "plan": Plan,
    "profile": Profile,
    "sensitivity": Sensitivity,
    "search": Search,
    "verification": Verification,
}


@dataclass(frozen=True)
class RunRecords:
    """What the stages of one run left; None where a stage did not run.

    `notes` say which files of the folder were set aside, and why.
    """

    plan: Plan | None = None
    profile: Profile | None = None
    sensitivity: Sensitivity | None = None
    search: Search | None = None
    verification: Verification | None = None
    notes: tuple[str, ...] = ()

    @property
    def structure(self) -> str | None:
        """The hash of the model that the run is about: the plan's, else the earliest stage's."""
        return next((structure for _, structure in _structures(self)), None)


def load_run(folder: Path | str) -> RunRecords:
    """Read the records of a run folder.

    A record of another model than the plan's (or, without a plan, the profile's), and a
    verification of another plan, are set aside with a note: a stage was run again, later ones not.

    Raises:
        RecordError: the folder has none of the records, or one that cannot be read.
    """
    found = {
        name: record.load(path)
        for name, record in FILES.items()
        if (path := Path(folder) / f"{name}.json").exists()
    }
    if not found:
        names = ", ".join(f"{name}.json" for name in FILES)
        raise RecordError(
            f"a run folder must hold one of {names}, but {folder} has none; "
            "give the folder that `autoprec tune MODEL.py --out FOLDER` wrote"
        )
    return consistent_run(RunRecords(**found))  # type: ignore[arg-type]  # FILES maps the types


def consistent_run(run: RunRecords) -> RunRecords:
    """Return the run without the records that are of another model or of another plan."""
    notes = list(run.notes)
    kept = run
    for name, structure in _structures(run):
        if structure != run.structure:
            kept = replace(kept, **{name: None})  # type: ignore[arg-type]  # a record field
            notes.append(
                f"{name}.json is of another model ({structure}) than this run ({run.structure}) "
                "and is left out; run that stage again"
            )
    if run.plan and run.verification and run.verification.plan != run.plan.digest:
        kept = replace(kept, verification=None)
        notes.append(
            f"verification.json is of another plan ({run.verification.plan}) than plan.json "
            f"({run.plan.digest}) and is left out; run `autoprec verify` again"
        )
    return replace(kept, notes=tuple(notes))


def _structures(run: RunRecords) -> Iterator[tuple[str, str]]:
    if run.plan:
        yield "plan", run.plan.fingerprint.structure
    if run.profile:
        yield "profile", run.profile.model.structure
    if run.sensitivity:
        yield "sensitivity", run.sensitivity.structure
    if run.search:
        yield "search", run.search.structure
