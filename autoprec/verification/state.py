"""What a killed verification keeps: the warm-up checkpoint and one file per finished branch.

    STATE_DIR/warmup-SETUP.pt           model and optimizer state where the branches start
    STATE_DIR/branch-SETUP-VARIANT-SEED.json

SETUP is a digest of everything the branches share (workload, settings, device, software), VARIANT
one of the options a branch trained with. So nothing made under other conditions is ever picked up,
and plans tried one after the other share the reference and the control. Files are written to the
side and renamed: a kill leaves a whole file or none, and costs at most the branch in flight.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from autoprec.common.files import replace_file
from autoprec.errors import RecordError
from autoprec.records import Branch
from autoprec.records.verification import BranchFile
from autoprec.runtime.checkpoint import Checkpoint, read_checkpoint


@dataclass
class BranchStore:
    """Finished branches by the digest of their variant and seed: in memory and, maybe, on disk."""

    setup: str
    folder: Path | None
    _branches: dict[tuple[str, int], Branch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the folder where there is none.

        Raises:
            RecordError: it cannot be made.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(
                f"the verification's folder must be writable, but {self.folder} cannot be made "
                f"({error.strerror}); choose another with --out"
            ) from error

    def find(self, variant: str, seed: int) -> Branch | None:
        """Return the branch if it was finished."""
        path = self._path(f"branch-{self.setup}-{variant}-{seed}.json")
        if (variant, seed) not in self._branches and path is not None and path.is_file():
            file = BranchFile.load(path)
            if file.setup != self.setup:
                raise RecordError(
                    f"a branch file must be of this verification ({self.setup}), but {path} is of "
                    f"{file.setup}; delete it"
                )
            self._branches[variant, seed] = file.branch
        return self._branches.get((variant, seed))

    def add(self, variant: str, branch: Branch) -> None:
        """Keep a finished branch."""
        self._branches[variant, branch.seed] = branch
        path = self._path(f"branch-{self.setup}-{variant}-{branch.seed}.json")
        if path is not None:
            BranchFile(setup=self.setup, variant=variant, branch=branch).save(path)

    def find_warm_up(self) -> Checkpoint | None:
        """Return the saved warm-up checkpoint, if there is one."""
        path = self._path(f"warmup-{self.setup}.pt")
        return read_checkpoint(path) if path is not None and path.is_file() else None

    def add_warm_up(self, checkpoint: Checkpoint) -> None:
        """Keep the warm-up checkpoint."""
        path = self._path(f"warmup-{self.setup}.pt")
        if path is not None:
            content = {
                "model": checkpoint.model,
                "optimizer": checkpoint.optimizer,
                "curve": list(checkpoint.curve),
                "eval_losses": list(checkpoint.eval_losses),
            }
            replace_file(path, lambda file: torch.save(content, file))

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


def file_digest(path: Path | None) -> str:
    """Return a digest of a file's bytes, or "" where there is no file."""
    if path is None or not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
