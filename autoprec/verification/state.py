"""What a killed verification keeps: the warm-up checkpoint and one file per finished branch.

    STATE_DIR/warmup-SETUP.pt           model and optimizer state where the branches start
    STATE_DIR/branch-SETUP-ARM-SEED.json

SETUP is a digest of everything the branches share (workload, settings, device, software), ARM one
of the options a branch trained with. So nothing made under other conditions is ever picked up, and
plans tried one after the other share the reference and the control. Files are written to the side
and renamed: a kill leaves a whole file or none, and costs at most the branch in flight.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from autoprec.errors import RecordError
from autoprec.records import Branch
from autoprec.records.verification import BranchFile
from autoprec.runtime.checkpoint import Checkpoint, read_checkpoint
from autoprec.verification.branches import Arm

DIGEST_LENGTH = 16


@dataclass
class BranchStore:
    """Finished branches by arm and seed, in memory and, with a folder, on disk."""

    setup: str
    folder: Path | None
    _branches: dict[tuple[str, int], Branch] = field(default_factory=dict)

    def find(self, arm: Arm, seed: int) -> Branch | None:
        """Return the branch, under the arm's own label, if it was finished."""
        key = (arm_digest(arm), seed)
        if key not in self._branches and self.folder is not None:
            path = self._path(*key)
            if path.is_file():
                self._branches[key] = self._read(path)
        found = self._branches.get(key)
        return None if found is None else found.model_copy(update={"label": arm.label})

    def add(self, arm: Arm, branch: Branch) -> None:
        """Keep a finished branch."""
        key = (arm_digest(arm), branch.seed)
        self._branches[key] = branch
        if self.folder is not None:
            BranchFile(setup=self.setup, arm=key[0], branch=branch).save(self._path(*key))

    def find_warm_up(self) -> Checkpoint | None:
        """Return the saved warm-up checkpoint, if there is one."""
        path = self._warm_up_path()
        return read_checkpoint(path) if path is not None and path.is_file() else None

    def add_warm_up(self, checkpoint: Checkpoint) -> None:
        """Keep the warm-up checkpoint."""
        path = self._warm_up_path()
        if path is not None:
            _save_atomically(path, checkpoint)

    def _read(self, path: Path) -> Branch:
        file = BranchFile.load(path)
        if file.setup != self.setup:
            raise RecordError(
                f"a branch file must be of this verification ({self.setup}), but {path} is of "
                f"{file.setup}; delete it"
            )
        return file.branch

    def _path(self, arm: str, seed: int) -> Path:
        name = f"branch-{self.setup}-{arm}-{seed}.json"
        return Path(name) if self.folder is None else self.folder / name

    def _warm_up_path(self) -> Path | None:
        return None if self.folder is None else self.folder / f"warmup-{self.setup}.pt"


def open_store(setup: Mapping[str, object], folder: Path | None) -> BranchStore:
    """Open the store of a setup, making the folder where there is none.

    Raises:
        RecordError: the folder cannot be made.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(
                f"the verification's folder must be writable, but {folder} cannot be made "
                f"({error.strerror}); choose another with --out"
            ) from error
    return BranchStore(setup=_digest(setup), folder=folder)


def arm_digest(arm: Arm) -> str:
    """Return a digest of the options; all-FP32 arms are the reference, whatever their label."""
    if arm.is_reference:
        return "reference"
    return _digest({name: option.key for name, option in arm.options.items()})


def file_digest(path: Path | None) -> str:
    """Return a digest of a file's bytes, or "" where there is no file."""
    if path is None or not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]


def _digest(value: Mapping[str, object]) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def _save_atomically(path: Path, checkpoint: Checkpoint) -> None:
    content = {
        "model": checkpoint.model,
        "optimizer": checkpoint.optimizer,
        "curve": list(checkpoint.curve),
        "eval_losses": list(checkpoint.eval_losses),
    }
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RecordError(
            f"the warm-up checkpoint must be writable, but {path} is not ({error.strerror}); "
            "free some space or choose another folder with --out"
        ) from error
