"""A model's state that training changes beside its trained weights: kept, and put back.

    buffers     all of them, also where forward has bound other tensors in their place
    followers   parameters that nobody trains and forward or the optimizer writes into: a teacher
    attributes  of its modules, plain values that forward sets: a hidden state, a memory, a counter,
                and random number generators of its own

The last two are found at capture, and noted on the models that the workload builds
(`workload.written`). A forward that keeps its state between steps (`self.hidden = hidden.detach()`)
or casts a table leaves it in BF16 once a plan made its activations so.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from autoprec.common.text import first_and_more
from autoprec.device.random_state import generator_state, set_generator_state
from autoprec.device.ranks import local_part
from autoprec.errors import WorkloadError
from autoprec.workload.functions import Batch, Workload
from autoprec.workload.written import noted_on

log = logging.getLogger(__name__)

AWAY = 0.01  # from any weight; nothing is learned of the loss there
TORCHS = frozenset(vars(nn.Module()))  # what every module has
PLAIN = (Tensor, int, float, complex, bool, str, type(None))
State = dict[str, Any]  # Any: tensors, and trees of plain values


class _Seen:
    """A plain value as it was seen; a tensor is the same if it is the one, and was not written."""

    def __init__(self, value: Any) -> None:  # Any: a leaf of an attribute
        self.value, self.version = value, getattr(value, "_version", 0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Seen) or self.version != other.version:
            return False
        own, their = self.value, other.value
        is_tensor = isinstance(own, Tensor) or isinstance(their, Tensor)
        return own is their if is_tensor else bool(own == their)

    __hash__ = None  # type: ignore[assignment]  # it compares what may change


Signatures = dict[str, list[_Seen]]


def signatures(model: nn.Module) -> Signatures:
    """Return by name what tells that a plain attribute or an untrained weight was written."""
    found = attribute_signatures(model)
    for name, parameter in model.named_parameters():
        data = local_part(parameter.detach())
        if not parameter.requires_grad and data.dtype is torch.float32:
            bits = data.contiguous().view(torch.int32)  # by value: nothing counts p.data's writes
            found[name] = [_Seen(int(bits.sum(dtype=torch.int64)))]
    return found


def attribute_signatures(model: nn.Module) -> Signatures:
    """Return by name what tells that a plain attribute was written."""
    found: Signatures = {}
    for path, module in model.named_modules():
        for own, value in vars(module).items():
            drawn = generator_state(value)
            leaves = [] if own in TORCHS else tree_leaves(value if drawn is None else drawn)
            if all(type(leaf) in PLAIN for leaf in leaves):
                found[f"{path}.{own}".lstrip(".")] = [_Seen(leaf) for leaf in leaves]
    return found


def changed_since(before: Signatures, model: nn.Module) -> set[str]:
    """Return the names of what was written since signatures were taken."""
    return {name for name, own in signatures(model).items() if before.get(name, []) != own}


def find_moving(workload: Workload, model: nn.Module, batch: Batch, before: Signatures) -> bool:
    """Note on the workload what its training writes into beside weights that it trains, buffers.

    Returns whether the model was changed for that: a teacher is its student until that is moved,
    and so is an average of both. `before` is from before the model's first pass.
    """
    known = workload.written.moving
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    are_all = len(trained) == len([*model.parameters()])
    if are_all and not known and not changed_since(before, model):
        return False
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.rand_like(parameter), alpha=AWAY)
    before = signatures(model)
    with suppress(WorkloadError):  # a model may take no weights but those that training gives it
        workload.loss_fn(model, batch)
    moved = changed_since(before, model)
    if between := sorted(known - moved):
        log.warning(
            "%s: the script writes into them between steps, and no optimizer trains them; tuning "
            "trains with them as they were",
            first_and_more(between),
        )
    known |= moved
    return True


def kept_state(model: nn.Module) -> State:
    """Return copies of a model's buffers, and of what is noted on it, by name."""
    kept: State = dict(model.named_buffers())
    for name, module, own in _noted(model):
        if hasattr(module, own):
            drawn = generator_state(value := getattr(module, own))
            kept[name] = value if drawn is None else drawn
    copied: State = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), kept)
    return copied


def packed_state(model: nn.Module) -> State:
    """Return the state that the model's state dict does not have, in what any file can hold."""
    saved = model.state_dict()
    apart = {name: value for name, value in kept_state(model).items() if name not in saved}
    trees = {name: tree_flatten(value) for name, value in apart.items()}
    return {name: [leaves, treespec_dumps(spec)] for name, (leaves, spec) in trees.items()}


def unpacked_state(packed: State) -> State:
    """Return the state that `packed_state` has packed."""
    found = packed.items()
    return {name: tree_unflatten(leaves, treespec_loads(spec)) for name, (leaves, spec) in found}


@torch.no_grad()
def put_back_state(model: nn.Module, kept: Mapping[str, Any]) -> None:
    """Give state its kept values, buffers in place where they still are of that dtype and shape."""
    for name, module, own in _noted(model):
        if name not in kept:  # forward has set it since, for the first time
            vars(module).pop(own, None)
    for name, value in kept.items():
        module, own = place_of(model, name)
        parameter, buffer = module._parameters.get(own), module._buffers.get(own)
        if parameter is not None:
            parameter.copy_(value)
        elif generator_state(held := vars(module).get(own)) is not None:
            set_generator_state(held, value)
        elif own not in module._buffers:
            vars(module)[own] = tree_map_only(Tensor, Tensor.clone, value)
        elif buffer is None or (buffer.dtype, buffer.shape) != (value.dtype, value.shape):
            module._buffers[own] = value.clone()
        else:
            buffer.copy_(value)


def put_back_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give buffers the dtypes that they had, and noted attributes FP32; their values stay."""
    for name, buffer in list(model.named_buffers()):
        if (dtype := dtypes.get(name, buffer.dtype)) is not buffer.dtype:
            module, own = place_of(model, name)
            module._buffers[own] = buffer.to(dtype)
    for _, module, own in _noted(model):
        if own in vars(module):
            vars(module)[own] = tree_map_only(Tensor, _in_fp32, vars(module)[own])


def _noted(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    return [(name, *place_of(model, name)) for name in noted_on(model)]


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds an attribute of a full name, and the attribute's own name."""
    owner, _, own = name.rpartition(".")
    return model.get_submodule(owner), own


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor
