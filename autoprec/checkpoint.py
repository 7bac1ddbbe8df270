"""The user's checkpoint file -> state dicts, and state dicts -> model and optimizer.

Files are loaded with `weights_only=True`: nothing in them can run code.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.errors import RecordError

# what torch.load raises on truncated, foreign or unsafe bytes
BROKEN_FILE = (
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    pickle.UnpicklingError,
)
BROKEN_STATE = (RuntimeError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Checkpoint:
    """State dicts on the CPU; `curve` and `eval_losses` are there in a checkpoint of our own."""

    model: dict[str, Any]  # Any: a state dict may hold extra state of the user's
    optimizer: dict[str, Any] | None  # Any: an optimizer's state dict
    curve: tuple[float, ...] = ()
    eval_losses: tuple[float, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint: a bare state dict, or a dict with `model` and maybe `optimizer`.

    Raises:
        RecordError: the file is missing, is no checkpoint, or holds more than tensors and data.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RecordError(
            f"a checkpoint must be readable, but {path} is not ({error.strerror}); check the path"
        ) from error
    except BROKEN_FILE as error:
        raise RecordError(
            f"a checkpoint must load with torch.load(weights_only=True), but {path} does not "
            f"({type(error).__name__}); save a state dict, or model= and optimizer= state dicts"
        ) from error
    if not isinstance(content, dict):
        raise RecordError(
            f"a checkpoint must be a state dict or a dict with 'model', but {path} holds "
            f"{type(content).__name__}; save model.state_dict()"
        )
    if not isinstance(content.get("model"), dict):
        return Checkpoint(model=content, optimizer=None)
    return Checkpoint(
        model=content["model"],
        optimizer=content.get("optimizer"),
        curve=tuple(content.get("curve", ())),
        eval_losses=tuple(content.get("eval_losses", ())),
    )


def load_state(
    target: nn.Module | torch.optim.Optimizer, state: dict[str, Any], *, what: str
) -> None:
    """Load a copy of a state dict into a model or an optimizer; `what` names it in errors.

    Raises:
        RecordError: the state is of another model or optimizer.
    """
    try:
        target.load_state_dict(on_cpu(state))
    except BROKEN_STATE as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordError(
            f"the checkpoint must fit the {what} that the workload builds, but it does not "
            f"({reason}); give a checkpoint of this workload"
        ) from error


def on_cpu(value: Any) -> Any:  # Any: a state dict is a tree of anything
    """Return a copy of a state dict with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(item) for item in value)
    return value
