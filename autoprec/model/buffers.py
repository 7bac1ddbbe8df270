"""A model's state that forward changes, kept and put back: buffers, and weights that follow others.

Also where forward has bound other tensors in the place of buffers.

A forward that keeps its state between steps (`self.hidden = hidden.detach()`) or casts a table
(`self.table = self.table.to(x.dtype)`) leaves buffers in BF16 once a plan made its activations so.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoprec.workload.written import followers_of


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's buffers and followers (`workload.written`) by name."""
    noted, named = followers_of(model), model.named_parameters()
    kept = [*model.named_buffers(), *((n, p) for n, p in named if p in noted)]
    return {name: tensor.detach().clone() for name, tensor in kept}


@torch.no_grad()
def put_back_buffers(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Give buffers their kept values, in place where they still are of that dtype and shape."""
    for name, value in kept.items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        buffers, buffer = module._buffers, getattr(module, own, None)
        if buffer is None or (buffer.dtype, buffer.shape) != (value.dtype, value.shape):
            buffers[own] = value.clone()
        else:
            buffer.copy_(value)


def buffer_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of every buffer by name."""
    return {name: buffer.dtype for name, buffer in model.named_buffers()}


def put_back_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give buffers the dtypes that they had; their values stay."""
    for name, buffer in list(model.named_buffers()):
        if (dtype := dtypes.get(name, buffer.dtype)) is not buffer.dtype:
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._buffers[own] = buffer.to(dtype)
