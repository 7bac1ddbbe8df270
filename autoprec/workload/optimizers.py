"""What a user's optimizer is made of: optimizers inside it, and the tensors of all their states."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_BY_ROW = ("crow_indices", "col_indices", "values")
_BY_COLUMN = ("ccol_indices", "row_indices", "values")
SPARSE = {  # the methods that return the tensors of a sparse one
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROW,
    torch.sparse_bsr: _BY_ROW,
    torch.sparse_csc: _BY_COLUMN,
    torch.sparse_bsc: _BY_COLUMN,
}


def optimizers_in(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it holds in its attributes, innermost first."""
    found: list[Optimizer] = []
    _collect(optimizer, found)
    return found


def _collect(optimizer: Optimizer, found: list[Optimizer]) -> None:
    for value in vars(optimizer).values():
        held = value.values() if isinstance(value, dict) else value
        for other in held if isinstance(value, dict | list | tuple) else (value,):
            if isinstance(other, Optimizer) and other is not optimizer and other not in found:
                _collect(other, found)
    found.append(optimizer)


def rated_groups(optimizer: Optimizer) -> list[dict[str, Any]]:  # Any: torch's own
    """Return the parameter groups with a learning rate, of the optimizers inside as well.

    One without sets its own, as Adafactor does with relative steps.
    """
    groups = (group for each in optimizers_in(optimizer) for group in each.param_groups)
    every = {id(group): group for group in groups}.values()
    return [group for group in every if group.get("lr") is not None]


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Return every tensor in the states of an optimizer and of those inside it, each once."""
    states = [list(each.state.values()) for each in optimizers_in(optimizer)]
    leaves = (leaf for leaf in tree_leaves(states) if isinstance(leaf, Tensor))
    return list({id(leaf): leaf for leaf in leaves}.values())


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that have the memory of one: itself, or the parts of one that wraps them.

    Quantised tensors and DTensors do; these name their mesh as well. Sparse ones are indices and
    values.
    """
    if tensor.layout in SPARSE:
        yield from (getattr(tensor, name)() for name in SPARSE[tensor.layout])
        return
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), Tensor):
            yield from plain_parts(part)
