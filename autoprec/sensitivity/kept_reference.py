"""A warmed-up reference in a file, so that several processes measure against the same bits."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprec.errors import RecordError
from autoprec.model.state import packed_state
from autoprec.runtime.checkpoint import Checkpoint, on_cpu, save_content
from autoprec.workload.training import Training


@dataclass(frozen=True)
class Kept:
    """A checkpoint after the warm-up, with the warm-up's losses and the time of a step.

    `gradients` are the last step's, by parameter, and `norm` what clipping found: P is read there.
    """

    checkpoint: Checkpoint
    curve: tuple[tuple[int, float], ...]
    step_s: float
    gradients: dict[str, Tensor]
    norm: Tensor | None

    def put_gradients(self, training: Training) -> None:
        """Give a restored training the gradients that its optimizer saw last."""
        for name, parameter in training.model.named_parameters():
            if name in self.gradients:
                parameter.grad = self.gradients[name].to(parameter.device)
        training.norm = self.norm


@contextmanager
def one_at_a_time(path: Path) -> Iterator[Kept | None]:
    """Give what is kept in a file, None if nothing is; others wait until it is left."""
    with FileLock(f"{path}.lock"):
        yield _read(path) if path.exists() else None


def keep_reference(
    path: Path, training: Training, *, curve: tuple[tuple[int, float], ...], step_s: float
) -> None:
    """Write a reference to a file."""
    named = training.model.named_parameters()
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    content = {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "moving": packed_state(training.model),
        "curve": curve,
        "step_s": step_s,
        "gradients": gradients,
        "norm": training.norm,
    }
    save_content(path, on_cpu(content))


def digest_of(model: nn.Module, batches: list[Any]) -> str:  # Any: the user's batches
    """Return 16 hex digits of a model's weights and buffers, and of the tensors in batches."""
    found = hashlib.sha256()
    for leaf in tree_leaves([dict(model.state_dict()), batches]):
        if isinstance(leaf, Tensor):
            found.update(
                leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
    return found.hexdigest()[:16]


def _read(path: Path) -> Kept:
    content = torch.load(path, map_location="cpu", weights_only=True)
    try:
        states = {name: content.pop(name) for name in ("model", "optimizer", "moving")}
        return Kept(Checkpoint(**states), **content)
    except (KeyError, TypeError) as error:
        raise RecordError(
            f"{path} must be a reference that a search has kept, but it is not; remove it"
        ) from error
