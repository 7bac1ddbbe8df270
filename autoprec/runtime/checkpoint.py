"""A training run -> one checkpoint file, and back; and the user's own checkpoint files.

Model, optimizer (with its FP32 masters) and guard are one file that takes the last one's place in
one step when it is complete. So a kill at any moment leaves a pair that belongs together, the last
or the one before. Files are loaded with `weights_only=True`: nothing in them can run code.
"""

import glob
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map_only

from autoprec.common.files import PARTIAL, replace_file
from autoprec.common.text import error_line, first_and_more, shown_value
from autoprec.device.ranks import rank
from autoprec.errors import RecordError
from autoprec.model.layers import unwrapped
from autoprec.runtime.finite import not_finite
from autoprec.workload.optimizers import trains

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

PARTS = ("model", "optimizer", "guard", "step", "extra")  # of a file of save_checkpoint
SCHEDULES = ("scheduler", "lr_scheduler")  # what a user's file calls the schedule's state dict
BROKEN_STATE = (RuntimeError, ValueError, KeyError, TypeError, AttributeError)
# What torch.load raises on truncated, foreign or unsafe bytes.
BROKEN_FILE = (*BROKEN_STATE, EOFError, LookupError, ImportError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Checkpoint:
    """State dicts on the CPU; `curve` and `eval_losses` are there in a checkpoint of our own.

    `schedule` is the position and pace of a `workload.training.Schedule`, where they are known.
    One that `is_sharded` holds this rank's part, by names, see sharded_state. `moving` is the state
    of the model that its state dict does not have (`model.state`).
    """

    model: dict[str, Any]  # Any: a state dict may hold extra state of the user's
    optimizer: dict[str, Any] | None  # Any: an optimizer's state dict
    curve: tuple[float, ...] = ()
    eval_losses: tuple[float, ...] = ()
    schedule: tuple[int, int] | None = None
    is_sharded: bool = False
    moving: dict[str, Any] = field(default_factory=dict)  # Any: plain values

    @property
    def is_at_pace(self) -> bool:
        """Whether each step of the training was one step of its schedule."""
        return self.schedule is None or self.schedule[1] == 1


def save_checkpoint(
    path: Path | str,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    guard: "Stateful | None" = None,
    step: int = 0,
    extra: Mapping[str, Any] | None = None,  # Any: tensors and plain data
    must_be_finite: bool = True,
) -> Path:
    """Write model, optimizer and guard to one file, which a kill leaves whole: the old or the new.

    The model's state is in its dtypes, the optimizer's has the FP32 masters. Where
    `torch.distributed` runs, rank 0 writes and the others return; for sharded models use
    `torch.distributed.checkpoint` instead.

    Args:
        path: the file; the one that is there stays until the new one is complete.
        model: inside DDP or `torch.compile` or not: keys are those of the plain model.
        optimizer: what trains it.
        guard: a guard of the run, if any.
        step: how many steps were done.
        extra: more to save, of tensors and plain data: a scheduler's state, random states.
        must_be_finite: refuse parameters, masters and moments with a NaN or an infinity.

    Raises:
        RecordError: the file cannot be written, the model is sharded, the optimizer is another
            model's, or a value is not finite or could not be loaded again.

    Example: see `load_checkpoint`.
    """
    path = Path(path)
    content: dict[str, Any] = {
        "model": unwrapped(model, parallel=True).state_dict(),
        "optimizer": optimizer.state_dict(),
        "guard": None if guard is None else guard.state_dict(),
        "step": step,
        "extra": dict(extra or {}),
    }
    _refuse_foreign(optimizer, model)
    _refuse_unreadable(content)
    if must_be_finite:
        _refuse_poisoned(path, unwrapped(model, parallel=True), content["optimizer"])
    if rank() != 0:
        return path
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        leftover.unlink(missing_ok=True)  # of a writer that was killed
    return save_content(path, content)


def save_content(path: Path, content: Mapping[str, Any]) -> Path:  # Any: a tree with tensors
    """Write a tree of values to a file, in one step.

    Raises:
        RecordError: it cannot be written; NoRoomError: the disk is full.
    """
    size = sum(leaf.nbytes for leaf in tree_leaves(content) if isinstance(leaf, Tensor))
    return replace_file(path, lambda file: torch.save(content, file), size=size)


def _refuse_foreign(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise RecordError if the optimizer is another model's."""
    if not trains(optimizer, model):
        raise RecordError(
            "a checkpoint must be of a model and the optimizer that trains it, but "
            f"{type(optimizer).__name__} trains no parameter of this model; give its own"
        )


def _refuse_unreadable(content: Mapping[str, Any]) -> None:  # Any: a tree with tensors
    """Raise RecordError if a value is none that loading takes, which runs nothing."""
    if any(hasattr(tensor, "to_local") for tensor in tree_leaves(content)):
        raise RecordError(
            "one file holds whole tensors, but this model is sharded over ranks; save it with "
            "torch.distributed.checkpoint (get_state_dict gives it model and optimizer)"
        )
    for keys, leaf in tree_leaves_with_path(content):
        if isinstance(leaf, Tensor) or type(leaf) in (str, int, float, bool, NoneType):
            continue
        try:
            torch.save(leaf, file := io.BytesIO())
            torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        except (*BROKEN_FILE, pickle.PicklingError) as error:
            raise RecordError(
                "a checkpoint must hold tensors and plain data, which can be read without running "
                f"code, but {keystr(keys)} is {shown_value(leaf)} ({type(leaf).__name__}); "
                "save its numbers, as with float(x), x.tolist() or vars(x)"
            ) from error


def _refuse_poisoned(path: Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise RecordError if a parameter, or a tensor of the optimizer's state, is not finite."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for keys, leaf in tree_leaves_with_path(state):  # masters and moments
        if isinstance(leaf, Tensor):
            tensors[f"optimizer{keystr(keys)}"] = leaf
    bad = not_finite(tensors)
    if bad:
        way_out = f"{path} stays as it is: go on from that" if path.exists() else "nothing is saved"
        raise RecordError(
            "a checkpoint must hold finite values to go on from, but there is a NaN or an infinity "
            f"in {first_and_more(bad, most=4)}; {way_out}, or save all the same with "
            "must_be_finite=False"
        )


def load_checkpoint(
    path: Path | str, model: nn.Module, optimizer: Optimizer, *, guard: "Stateful | None" = None
) -> dict[str, Any]:  # Any: what was given to save_checkpoint
    """Load what `save_checkpoint` wrote, into a model and optimizer to which the plan was applied.

    The run then goes on bit for bit as if it had never stopped, given the same batches.

    Returns:
        `step`, how many steps were done, and the user's own `extra`.

    Raises:
        RecordError: the file is missing, is no such checkpoint, or is of another model.

    Example:
        >>> import tempfile, torch, autoprec
        >>> from autoprec.runtime import uniform_plan
        >>> model = torch.nn.Linear(16, 16)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> _ = autoprec.apply(uniform_plan(model, "bf16_o2"), model, optimizer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = autoprec.save_checkpoint(f"{folder}/run.pt", model, optimizer, step=100)
        ...     autoprec.load_checkpoint(path, model, optimizer)
        {'step': 100, 'extra': {}}
    """
    content = _read(Path(path))
    missing = [name for name in PARTS if name not in content]
    if missing:
        raise RecordError(
            f"a checkpoint must be one of autoprec.save_checkpoint, but {path} has no "
            f"{missing[0]!r}; load its state dicts with load_state_dict"
        )
    if guard is not None and content["guard"] is None:
        raise RecordError(
            f"a guard goes on from a guard's state, but {path} was saved without one; "
            "leave guard out, it then starts anew"
        )
    load_state(unwrapped(model, parallel=True), content["model"], what="model")
    load_state(optimizer, content["optimizer"], what="optimizer")
    if guard is not None:
        guard.load_state_dict(content["guard"])
    return {"step": content["step"], "extra": content["extra"]}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint: a bare state dict, or a dict with `model` and maybe `optimizer`.

    Raises:
        RecordError: the file is missing, is no checkpoint, or holds more than tensors and data.
    """
    content = _read(path)
    if not isinstance(content.get("model"), dict):
        return Checkpoint(model=content, optimizer=None)
    return Checkpoint(
        model=content["model"],
        optimizer=content.get("optimizer"),
        curve=tuple(content.get("curve", ())),
        eval_losses=tuple(content.get("eval_losses", ())),
        schedule=content.get("schedule") or _position(content),
        moving=content.get("moving", {}),
    )


def _position(content: dict[str, Any]) -> tuple[int, int] | None:  # Any: whatever was saved
    """Return where a user's schedule is, from the state dict of it that was saved along."""
    for name in SCHEDULES:
        state = content.get(name)
        if isinstance(state, dict) and isinstance(state.get("last_epoch"), int):
            return state["last_epoch"], 1
    return None


def load_state(target: nn.Module | Optimizer, state: dict[str, Any], *, what: str) -> None:
    """Load a copy of a state dict into a model or an optimizer; `what` names it in errors."""
    try:
        target.load_state_dict(on_cpu(state))
    except BROKEN_STATE as error:
        raise misfit(what, error) from error


def misfit(what: str, error: Exception) -> RecordError:
    """Return the error of a state that is of another model or optimizer."""
    return RecordError(
        f"the checkpoint must fit the {what} that the workload builds, but it does not "
        f"({error_line(error)}); give a checkpoint of this workload"
    )


def on_cpu(state: dict[str, Any]) -> dict[str, Any]:  # Any: a state dict is a tree of anything
    """Return a copy of a state dict with its tensors on the CPU."""
    copied: dict[str, Any] = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), state)
    return copied


def _read(path: Path) -> dict[str, Any]:  # Any: whatever was saved
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
    return content
