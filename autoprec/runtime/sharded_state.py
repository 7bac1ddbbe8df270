"""The state of a model and its optimizer on many ranks: each has its part, in memory or on disk.

In memory a rank keeps its own shards on its host; on disk they are a distributed checkpoint
(torch.distributed.checkpoint): every rank writes its part, and a rank whose parts lie elsewhere (in
a run of other ranks) reads what it needs. Its folder must be one that all ranks see.
"""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from autoprec.common.files import PARTIAL, refusal_to_write, write_atomically
from autoprec.common.text import error_line
from autoprec.device.ranks import local_part, made_on_first_rank
from autoprec.errors import RecordError
from autoprec.runtime.checkpoint import BROKEN_STATE, Checkpoint, misfit
from autoprec.workload.optimizers import trained_by

LOSSES = "losses.json"  # beside the shards: what was seen on the way to them
PARTS = ("model", "optimizer")
PLAIN = ("curve", "eval_losses", "schedule")
SOME = StateDictOptions(strict=False)  # weights without a state: those of SGD, and unused ones


def shards_of(model: nn.Module, optimizer: Optimizer) -> Checkpoint:
    """Return a copy of this rank's part of the state, on the host."""
    states = get_state_dict(model, optimizer, options=StateDictOptions(cpu_offload=True))
    model_state, optimizer_state = tree_map_only(Tensor, torch.clone, states)
    return Checkpoint(model_state, optimizer_state, is_sharded=True)


def load_shards(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Load a copy of this rank's part into a model that is sharded alike, and its optimizer."""
    states = tree_map_only(Tensor, torch.clone, (checkpoint.model, checkpoint.optimizer))
    set_model_state_dict(model, states[0])
    set_optimizer_state_dict(model, optimizer, states[1], options=SOME)


def write_shards(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the parts of all ranks into a folder, which appears when it is complete.

    Raises:
        RecordError: it cannot be written; NoRoomError: the disk is full. On every rank.
    """
    partial = folder.with_name(folder.name + PARTIAL)

    def drop() -> None:
        shutil.rmtree(partial, ignore_errors=True)

    def finish() -> None:
        plain = {name: getattr(checkpoint, name) for name in PLAIN}
        write_atomically(partial / LOSSES, json.dumps(plain))
        try:
            partial.rename(folder)
        except OSError as error:
            raise refusal_to_write(folder, error) from error

    made_on_first_rank(drop)  # what a killed run left
    try:
        save({part: getattr(checkpoint, part) for part in PARTS}, checkpoint_id=partial)
        made_on_first_rank(finish)
    except (CheckpointException, RecordError) as error:
        made_on_first_rank(drop)
        if isinstance(error, RecordError):
            raise
        # every rank has it, with what each one met
        raise _unwritten(folder, error, checkpoint) from error


def _unwritten(folder: Path, error: CheckpointException, checkpoint: Checkpoint) -> BaseException:
    """Return what to tell of a folder that ranks could not write."""
    causes = [cause for cause, _ in error.failures.values()]
    own = next((cause for cause in causes if isinstance(cause, OSError)), None)
    # torch's writer has an error of its own for what did not fit, and drops the system's
    if own is None and any("inline_container" in str(cause) for cause in causes):
        own = OSError(errno.ENOSPC, "a rank was stopped as it wrote its part, or could not")
    leaves = tree_leaves((checkpoint.model, checkpoint.optimizer))
    size = sum(local_part(leaf).nbytes for leaf in leaves if isinstance(leaf, Tensor))
    return error if own is None else refusal_to_write(folder, own, size)


def read_shards(folder: Path, like: Checkpoint) -> Checkpoint:
    """Return this rank's part of what a folder holds, in the place of the values in `like`.

    A fresh optimizer's state, which torch makes for all weights, has entries of weights that are
    never used; where the folder has none, it has none here.
    """
    states = {part: getattr(like, part) for part in PARTS}
    try:
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        for name in list(states["optimizer"]["state"]):
            if not any(key.startswith(f"optimizer.state.{name}.") for key in saved):
                del states["optimizer"]["state"][name]
        load(states, checkpoint_id=folder)
        plain = json.loads((folder / LOSSES).read_text())
    except (CheckpointException, OSError, *BROKEN_STATE) as error:
        raise RecordError(
            f"a distributed checkpoint must be whole and of this model, but {folder} is not "
            f"({error_line(error)}); delete it"
        ) from error
    seen: Any = {name: plain[name] and tuple(plain[name]) for name in PLAIN}  # Any: fields
    return Checkpoint(states["model"], states["optimizer"], **seen, is_sharded=True)


def load_whole(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Load whole tensors, which every rank has read, into a sharded model and its optimizer."""
    whole = StateDictOptions(full_state_dict=True)
    what = "model"
    try:
        set_model_state_dict(model, checkpoint.model, options=whole)
        if checkpoint.optimizer is not None:
            what = "optimizer"
            named = _by_name(checkpoint.optimizer, model, optimizer)
            some = replace(whole, strict=False)
            set_optimizer_state_dict(model, optimizer, named, options=some)
    except BROKEN_STATE as error:
        raise misfit(what, error) from error


def _by_name(
    state: dict[str, Any], model: nn.Module, optimizer: Optimizer
) -> dict[str, Any]:  # Any: an optimizer's state dict
    """Return an optimizer's state dict with parameters' names in the place of their numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for parameter in trained_by(optimizer)]
    groups = [{**g, "params": [order[n] for n in g["params"]]} for g in state["param_groups"]]
    return {"state": {order[n]: v for n, v in state["state"].items()}, "param_groups": groups}
