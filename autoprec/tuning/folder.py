"""The folder of a run: one writer at a time, and which stages are finished from what.

`run.json` holds a digest of every finished stage's inputs; `--resume` loads a stage whose digest
has not changed instead of making it again.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from autoprec import __version__
from autoprec.common.files import file_digest, text_digest
from autoprec.common.text import short_digest
from autoprec.common.versions import software_versions
from autoprec.errors import RecordError
from autoprec.predict.registry import profile_digest
from autoprec.records import FileRecord, Plan, Profile, Sensitivity
from autoprec.records.devices import DeviceProfile
from autoprec.records.run import RunState
from autoprec.tuning.settings import STAGES, Settings, all_settings

Table = TypeVar("Table", Profile, Sensitivity)

LOCK = ".autoprec.lock"
INPUTS = {  # the stages whose records each stage's record is made of
    "profile": (),
    "sensitivity": ("profile",),
    "search": ("profile", "sensitivity"),
    "verification": ("search",),
}


class Folder:
    """The files of a run.

    Raises:
        RecordError: the folder cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cwd = Path.cwd()  # that the settings' paths are from: the user's code may change it
        try:
            self._is_new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".autoprec-probe"
            probe.touch()
            probe.unlink()
        except (OSError, ValueError) as error:  # ValueError: no file can have that name
            raise RecordError(
                f"--out must be a folder that can be written, but {path} is not "
                f"({getattr(error, 'strerror', error)}); choose another"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from writing into the folder while the context is open.

        The lock is the operating system's: it ends with the process, however that ends.
        """
        lock = FileLock(self.path / LOCK)
        try:
            with lock.acquire(timeout=0):
                try:
                    yield
                finally:  # while it is held: whoever opened it before sees that it is gone
                    (self.path / LOCK).unlink(missing_ok=True)
                    if self._is_new:
                        with suppress(OSError):  # not empty: something was finished
                            self.path.rmdir()
        except Timeout as error:
            raise RecordError(
                f"a folder takes one run at a time, but another is writing to {self.path}; "
                "wait for it, or choose another folder with --out"
            ) from error

    @property
    def state(self) -> RunState:
        """What `run.json` says; without one, that nothing was run."""
        path = self.path / "run.json"
        return RunState.load(path) if path.exists() else RunState(stages={})

    def has(self, stage: str, digest: str) -> bool:
        """Whether the stage's record is here, made of the inputs of this digest."""
        is_same = bool(digest) and self.state.stages.get(stage) == digest
        return is_same and (self.path / f"{stage}.json").exists()

    def keep(self, made: FileRecord, digest: str, *, script: str) -> None:
        """Write a stage's record, and note that the stage is finished; later ones are no more."""
        stage = made.KIND
        made.save(self.path / f"{stage}.json")
        earlier = STAGES[: STAGES.index(stage)]
        state = self.state if earlier else RunState(stages={})  # the first stage begins another run
        done = {name: value for name, value in state.stages.items() if name in earlier}
        stages, script = {**done, stage: digest}, script or state.script
        RunState(stages=stages, script=script).save(self.path / "run.json")

    def digest(
        self, stage: str, settings: Settings, target: DeviceProfile | None, *, device: str = ""
    ) -> str:
        """Return a hash of all that decides a stage's record.

        That is the settings that say so, the files they name, the device profile where times are
        predicted, or the name of the device that they are measured on with torch's and torchao's
        versions, autoprec's version, and the stages before.
        """
        chosen = {
            name: str(getattr(settings, name))
            for name, known in all_settings().items()
            if stage in known.stages
        }
        # the text of the files and of what they import beside them counts, not their names alone
        files = [_own_file(settings)]
        if settings.proxy and stage in all_settings()["proxy"].stages:
            files.append(_file_of(settings.proxy))
        if stage == "sensitivity" and settings.sensitivity is not None:
            files.append(settings.sensitivity)
        root = self._cwd if settings.script == "-m" else None
        contents = [text_digest(self._cwd / file, root=root) for file in files]
        if "checkpoint" in chosen and settings.checkpoint is not None:
            contents.append(file_digest(self._cwd / settings.checkpoint))
        device = profile_digest(target) if target and stage == "profile" else device
        versions = software_versions() if device and not target else __version__
        done = self.state.stages
        inputs = [done.get(name, "") for name in INPUTS[stage]]
        return short_digest(stage, chosen, contents, device, versions, inputs)


def saved_beside(plan_path: Path, plan: Plan, record: type[Table]) -> Table | None:
    """Return the profile or sensitivity in the plan's folder, if it is there and of its model."""
    path = plan_path.parent / f"{record.KIND}.json"
    if not path.exists():
        return None
    found = record.load(path)
    structure = found.model.structure if isinstance(found, Profile) else found.structure
    return found if structure == plan.fingerprint.structure else None


def _own_file(settings: Settings) -> Path:
    """Return the workload's file; of a module, where it is in the folder that it is run from."""
    if settings.script != "-m":
        return Path(settings.script or settings.config or _file_of(settings.workload))
    path = Path(*"".join(settings.script_args[:1]).split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def _file_of(workload: str) -> Path:
    """Return the file of `model.py` or `model.py:name`."""
    return Path(workload.partition(".py:")[0].removesuffix(".py") + ".py")
