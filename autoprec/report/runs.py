"""The records of one run, from its folder; those of another model or plan are set aside."""

from dataclasses import dataclass, replace
from pathlib import Path

from autoprec.common.files import read_text
from autoprec.errors import RecordError
from autoprec.records import Certificate, Plan, Profile, Search, Sensitivity, Verification
from autoprec.records.base import FileRecord, parse_object
from autoprec.records.run import RunState

FILES: dict[str, type[FileRecord]] = {
    "plan": Plan,
    "profile": Profile,
    "sensitivity": Sensitivity,
    "search": Search,
    "verification": Verification,
}


@dataclass(frozen=True)
class RunRecords:
    """What the stages of one run left; None where a stage did not run.

    `script` is the training script that was tuned, with its arguments; `notes` say which files of
    the folder were set aside, and why.
    """

    plan: Plan | None = None
    profile: Profile | None = None
    sensitivity: Sensitivity | None = None
    search: Search | None = None
    verification: Verification | None = None
    script: str = ""
    notes: tuple[str, ...] = ()

    @property
    def proof(self) -> Verification | Certificate | None:
        """The verification, or what the plan says of one."""
        return self.verification or (self.plan.certificate if self.plan else None)

    @property
    def structures(self) -> dict[str, str]:
        """The hash of the model that each record is about, by file; the first is the run's."""
        found = {
            "plan": self.plan.fingerprint.structure if self.plan else None,
            "profile": self.profile.model.structure if self.profile else None,
            "sensitivity": self.sensitivity.structure if self.sensitivity else None,
            "search": self.search.structure if self.search else None,
        }
        return {name: structure for name, structure in found.items() if structure is not None}


def load_run(path: Path | str) -> RunRecords:
    """Read the records of a run folder, or one record's file.

    A record of another model than the plan's (or, without a plan, the profile's), and a
    verification of another plan, are set aside with a note: a stage was run again, later ones not.

    Raises:
        RecordError: there are no records, or one that cannot be read.
    """
    if Path(path).is_file():
        kind = parse_object(read_text(Path(path), what="record"), source=str(path)).get("kind")
        files = {str(kind): Path(path)} if kind in FILES else {}
        state = RunState(stages={})
    else:
        files = {name: Path(path) / f"{name}.json" for name in FILES}
        ran = Path(path) / "run.json"
        state = RunState.load(ran) if ran.exists() else RunState(stages={})
    found = {name: FILES[name].load(file) for name, file in files.items() if file.exists()}
    if not found:
        names = ", ".join(f"{name}.json" for name in FILES)
        raise RecordError(
            f"a run folder must hold one of {names}, but {path} has none; "
            "give the folder that `autoprec tune MODEL.py --out FOLDER` wrote"
        )
    run = RunRecords(**found, script=state.script)  # type: ignore[arg-type]  # FILES maps the types
    return consistent_run(run)


def consistent_run(run: RunRecords) -> RunRecords:
    """Return the run without the records that are of another model or of another plan."""
    apart: dict[str, str] = {}  # file -> why
    own = next(iter(run.structures.values()), "")
    for name, structure in run.structures.items():
        if structure != own:
            apart[name] = (
                f"model ({structure}) than this run ({own}) and is left out; run that stage"
            )
    if run.plan and run.verification and run.verification.plan != run.plan.digest:
        apart["verification"] = (
            f"plan ({run.verification.plan}) than plan.json ({run.plan.digest}) and is left out; "
            "run `autoprec verify`"
        )
    notes = [f"{name}.json is of another {why} again" for name, why in apart.items()]
    kept = replace(run, **dict.fromkeys(apart))  # type: ignore[arg-type]  # record fields
    return replace(kept, notes=(*run.notes, *notes))
