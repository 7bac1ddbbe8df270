"""The folder of a run: which stages are finished, and what each was made from.

`run.json` holds a digest of every finished stage's inputs; `--resume` loads a stage whose digest
has not changed instead of making it again.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar

from autoprec import __version__
from autoprec.errors import RecordError
from autoprec.predict.registry import load_device_profile, profile_digest
from autoprec.records import FileRecord
from autoprec.tuning.settings import Settings

STAGES = ("profile", "sensitivity", "search", "verification")
STAGE_SETTINGS = {
    "profile": (
        "target",
        "recipes",
        "gemms_hp",
        "seed",
        "parallel",
        "is_compiled",
        "meta",
        "batch",
        "sequence",
    ),
    "sensitivity": ("recipes", "seed", "checkpoint", "meta"),
    "search": ("loss_tolerance", "keep", "trials", "time_budget_s", "seed", "storage", "study"),
    "verification": ("loss_tolerance", "seed", "checkpoint"),
}
R = TypeVar("R", bound=FileRecord)


class RunState(FileRecord):
    """`run.json`: a digest of the inputs of every finished stage."""

    KIND: ClassVar[str] = "run"
    VERSION: ClassVar[int] = 2
    REMAKE: ClassVar[str] = "`autoprec tune`, without --resume"

    stages: dict[str, str]


def open_folder(folder: Path) -> Path:
    """Make the output folder.

    Raises:
        RecordError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".autoprec-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RecordError(
            f"--out must be a folder that can be written, but {folder} is not "
            f"({error.strerror}); choose another"
        ) from error
    return folder


def staged(
    settings: Settings,
    stage: str,
    record: type[R],
    make: Callable[[], R],
    *,
    after: tuple[str, ...] = (),
) -> R:
    """Return the stage's record: loaded when resuming with unchanged inputs, else made and saved.

    `after` names the stages whose records this one is made from.
    """
    path = settings.out / f"{stage}.json"
    done = _finished_stages(settings)
    digest = _stage_digest(settings, stage, inputs=[done.get(name, "") for name in after])
    if settings.resume and done.get(stage) == digest and path.exists():
        return record.load(path)
    made = make()
    made.save(path)
    done = {name: value for name, value in done.items() if _order(name) < _order(stage)}
    RunState(stages={**done, stage: digest}).save(settings.out / "run.json")
    return made


def _order(stage: str) -> int:
    return STAGES.index(stage)


def _finished_stages(settings: Settings) -> dict[str, str]:
    path = settings.out / "run.json"
    return dict(RunState.load(path).stages) if path.exists() else {}


def _stage_digest(settings: Settings, stage: str, *, inputs: list[str]) -> str:
    """Hash all that decides a stage's record: settings, files it is made of, versions, inputs."""
    chosen = {name: str(getattr(settings, name)) for name in STAGE_SETTINGS[stage]}
    module = Path(settings.workload.partition(".py:")[0].removesuffix(".py") + ".py")
    file = settings.config or module
    if settings.script:
        file = Path(settings.script)
        inputs = [*inputs, *settings.script_args, str(settings.script_steps)]
    source = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    if stage == "sensitivity" and settings.sensitivity and settings.sensitivity.is_file():
        inputs = [*inputs, hashlib.sha256(settings.sensitivity.read_bytes()).hexdigest()]
    if stage == "profile" and not settings.is_local:
        inputs = [*inputs, profile_digest(load_device_profile(settings.target))]
    text = json.dumps(
        [stage, chosen, source, settings.workload or settings.script, __version__, inputs]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
