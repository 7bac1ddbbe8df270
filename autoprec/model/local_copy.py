"""A layer of a model that ranks hold parts of -> a copy that one rank runs alone, on plain tensors.

What FSDP gathers before the layer runs is whole in the copy; what tensor parallelism divides is
this rank's part. Hooks stay behind: they are those of FSDP and tensor parallelism, which would
talk to other ranks.
"""

import copy
from typing import Any, cast

from torch import nn

from autoprec.device.ranks import local_part, sharded_tensor
from autoprec.model.layers import own_type

MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "__composable_api_state_key")
Memo = dict[int, Any]  # Any: `deepcopy` finds its copies there, by the originals' ids


def is_divided(layer: nn.Module) -> bool:
    """Whether ranks hold parts of a layer's parameters."""
    return any(isinstance(p, sharded_tensor()) for p in layer.parameters())


def local_copy(model: nn.Module, layer: nn.Module) -> nn.Module:
    """Return a copy of a divided layer as this rank computes it; all ranks call it together."""
    gathering = _gathering(model, layer)
    for module in gathering:
        module.reshard()
    dtypes = [parameter.dtype for parameter in layer.parameters()]  # a policy gathers in another
    for module in gathering:
        module.unshard()
    memo: Memo = {}
    for parameter, dtype in zip(layer.parameters(), dtypes, strict=True):
        data = local_part(parameter.detach()).to(dtype, copy=True)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    copied = _plain_copy(layer, memo)
    for module in gathering:
        module.reshard()
    if isinstance(copied, nn.Linear):
        copied.out_features, copied.in_features = copied.weight.shape
    return copied


def computed_features(model: nn.Module, layer: nn.Linear) -> tuple[int, int]:
    """Return the inputs and outputs of a linear that this rank multiplies; on all ranks."""
    gathering = _gathering(model, layer)
    for module in gathering:
        module.reshard()  # what FSDP has gathered says nothing of its own mesh
    weight: Any = layer.weight  # Any: a DTensor where the layer is divided
    if is_divided(layer) and (weight.device_mesh.ndim > 1 or not gathering):
        layer = cast("nn.Linear", local_copy(model, layer))  # what tensor parallelism leaves of it
    return layer.in_features, layer.out_features


def _gathering(model: nn.Module, layer: nn.Module) -> list[Any]:  # Any: FSDPModule, if imported
    """Return the module whose FSDP group holds the layer: the innermost, which is the last."""
    holders = [m for m in model.modules() if own_type(m) is not type(m) and hasattr(m, "unshard")]
    return [m for m in holders if any(inner is layer for inner in m.modules())][-1:]


def _plain_copy(module: nn.Module, memo: Memo) -> nn.Module:
    cls = own_type(module)
    copied: nn.Module = cls.__new__(cls)
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            vars(copied)[name] = type(value)()
        elif name == "_modules":
            vars(copied)[name] = {n: c and _plain_copy(c, memo) for n, c in value.items()}
        elif not name.startswith(MARKS):
            vars(copied)[name] = copy.deepcopy(value, memo)
    return copied
