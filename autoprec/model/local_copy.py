"""A layer of a model that ranks hold parts of -> a copy that one rank runs alone, on plain tensors.

What FSDP gathers before the layer runs is whole in the copy; what tensor parallelism divides is
this rank's part. Hooks stay behind: they are those of FSDP and tensor parallelism, which would
talk to other ranks. A `Split` says how the parts of a linear make the whole: with x_MK, weight_NK
and grad_MN, ranks divide N (ColwiseParallel), K (RowwiseParallel), M (weights that all ranks hold,
tokens of their own), or nothing.
"""

import copy
from dataclasses import dataclass, replace
from types import CellType, FunctionType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from autoprec.common.text import first_and_more
from autoprec.device.ranks import local_part, placed_like, sharded_tensor
from autoprec.errors import WorkloadError
from autoprec.model.kinds import is_linear, matrix_sizes
from autoprec.model.layers import own_type

MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "__composable_api_state_key")
STATE = ("_parameters", "_buffers", "_modules")
# A lock has no copy, nor a writer's queue of another process (a RuntimeError) or a pointer of C's
# (a ValueError); a config whose `__getattr__` is a look-up in its dict has no `__deepcopy__`.
REFUSALS = (TypeError, AttributeError, LookupError, RuntimeError, ValueError, copy.Error)
Memo = dict[int, Any]  # Any: `deepcopy` finds its copies there, by the originals' ids


def is_divided(layer: nn.Module) -> bool:
    """Whether ranks hold parts of a layer's parameters."""
    return any(isinstance(p, sharded_tensor()) for p in layer.parameters())


@dataclass(frozen=True)
class Split:
    """How the ranks of one dimension of a mesh divide a linear: along `axis`, M, N or K; or not.

    Tensors are named by their axes: "MK" is x, "N" has an element for each output. All ranks of
    the mesh call a method together.
    """

    mesh: Any = None  # a DeviceMesh of one dimension
    axis: str = ""
    sizes: tuple[tuple[str, int], ...] = ()  # of N and K, of the whole linear

    def seen_in(self, x: Tensor) -> "Split":
        """Return the split of a linear that was called with x: its tokens may be divided."""
        placed: Any = x  # Any: a DTensor, whose class may not be imported
        is_tokens = not self.axis and self.mesh is not None and isinstance(x, sharded_tensor())
        return replace(self, axis="M") if is_tokens and placed.placements[0].is_shard() else self

    def whole(self, part: Tensor, axes: str, *, over: str = "MNK") -> Tensor:
        """Return the whole tensor: parts side by side, or their sum where `axis` is summed over.

        `over` are the axes of what it was made from; of one that is not divided each rank has all.
        """
        if not self.axis or self.axis not in over:
            return part
        from torch.distributed.tensor import DTensor, Partial, Shard

        if self.axis not in axes:
            return DTensor.from_local(part, self.mesh, [Partial()], run_check=False).full_tensor()
        sizes = dict(self.sizes)
        shape = [sizes.get(axis, size) for axis, size in zip(axes, part.shape, strict=True)]
        like = part.new_empty(shape, device="meta")
        placements = [Shard(axes.index(self.axis))]
        placed = DTensor.from_local(
            part.contiguous(),
            self.mesh,
            placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return placed.full_tensor()

    def largest(self, values: Tensor, *, over: str) -> Tensor:
        """Return the largest of the ranks' values, where these were taken over the divided axis."""
        if self.axis and self.axis in over:
            values = values.clone()
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return values

    def first(self, axis: str) -> int:
        """Return the place in the whole of this rank's first row along N or K."""
        if axis != self.axis or axis == "M":
            return 0
        place: int = self.mesh.get_local_rank()
        parts: int = self.mesh.size()
        return place * -(-dict(self.sizes)[axis] // parts)


WHOLE = Split()  # of a linear that every rank has


def local_copy(
    model: nn.Module, layer: nn.Module, *, placed: bool = False
) -> tuple[nn.Module, Split]:
    """Return a copy of a divided layer as this rank computes it; all ranks call it together.

    With `placed` the parameters that tensor parallelism divides stay DTensors; else they are plain,
    and of a linear whose inputs are divided the bias is this rank's part of the sum.
    """
    gathering = _gathering(model, layer)
    for module in gathering:
        module.reshard()
    dtypes = [parameter.dtype for parameter in layer.parameters()]  # a policy gathers in another
    for module in gathering:
        module.unshard()
    split = _split_of(layer) if is_linear(layer) else WHOLE
    memo: Memo = {}
    for parameter, dtype in zip(layer.parameters(), dtypes, strict=True):
        data = local_part(parameter.detach()).to(dtype, copy=True)
        if placed:
            data = placed_like(parameter.detach(), data)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    copied = _plain_copy(layer, memo)
    for module in gathering:
        module.reshard()
    if not placed:
        _fit_parts(copied, split)
    return copied, split


def _fit_parts(layer: nn.Module, split: Split) -> None:
    """Make a layer's other attributes fit the part of its weights that it has."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
        if split.axis == "K" and layer.bias is not None:  # as DTensor makes it a partial sum
            layer.bias.data.div_(split.mesh.size())
    elif isinstance(layer, nn.Embedding) and len(layer.weight) < layer.num_embeddings:
        layer.num_embeddings, layer.padding_idx = len(layer.weight), None
        layer.register_forward_pre_hook(_own_rows, with_kwargs=True)


def _own_rows(part: nn.Embedding, args: Any, kwargs: Any) -> Any:  # Any: whatever it is called with
    """Return the call with row numbers of the whole table as such of this rank's part."""
    return tree_map_only(Tensor, lambda rows: rows % part.num_embeddings, (args, kwargs))


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model; it shares what refuses to be copied (a lock, some configs).

    What a module keeps that was computed (a masked weight, an earlier output) has no graph there,
    and its functions that close over modules do so over the copies.

    Raises:
        WorkloadError: a parameter is computed from others, so that the copy's would not be.
    """
    if computed := [name for name, tensor in model.named_parameters() if not tensor.is_leaf]:
        raise WorkloadError(
            f"its weights must be its own, but {first_and_more(computed)} are computed from others "
            "as it is called (torch.func.functional_call does that)"
        )
    own = [item for module in model.modules() for item in vars(module).items()]
    kept = [value for name, value in own if name not in STATE]
    # what `deepcopy` finds in its memo it takes as it is
    tensors = (leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor))
    memo: Memo = {id(t): t.detach().clone() for t in tensors if not t.is_leaf}
    try:
        copied = copy.deepcopy(model, found := dict(memo))
    except REFUSALS:
        memo |= {id(value): value for value in kept if not _can_be_copied(value, dict(memo))}
        copied = copy.deepcopy(model, found := memo)
    for module in copied.modules():
        vars(module).update({n: _rebound(x, found) for n, x in vars(module).items()})
    return copied


def _rebound(value: Any, copies: Memo) -> Any:  # Any: an attribute of a module
    """Return a function that closes over modules as one that closes over their copies."""
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    try:
        inside = [cell.cell_contents for cell in value.__closure__]
    except ValueError:  # a name that is not bound yet
        return value
    if not any(isinstance(content, nn.Module) for content in inside):
        return value
    cells = tuple(CellType(copies.get(id(content), content)) for content in inside)
    names = value.__code__, value.__globals__, value.__name__, value.__defaults__
    rebound = FunctionType(*names, cells)
    rebound.__kwdefaults__ = value.__kwdefaults__
    return rebound


def _can_be_copied(value: object, memo: Memo) -> bool:
    try:
        copy.deepcopy(value, memo)
    except REFUSALS:
        return False
    return True


def whole_copy(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU of a model that ranks hold parts of, whole and without hooks.

    All ranks call it together; what FSDP has gathered must be freed before (`whole_again`).
    """
    memo: Memo = {}
    for parameter in model.parameters():
        found: Any = parameter.detach()  # Any: a DTensor where ranks divide it
        whole = found.full_tensor() if isinstance(found, sharded_tensor()) else found
        copied = nn.Parameter(whole.to("cpu", copy=True), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = copied
    return _plain_copy(model, memo).to("cpu")


def _split_of(layer: nn.Module) -> Split:
    """Return how tensor parallelism divides a linear whose weight FSDP has gathered."""
    weight: Any = layer.weight  # Any: a DTensor where ranks divide it
    if not isinstance(weight, sharded_tensor()):
        return WHOLE
    mesh, sizes = weight.device_mesh, tuple(zip("NK", weight.shape, strict=True))
    dims = [dim for dim, p in enumerate(weight.placements) if not p.is_replicate()]
    if len(dims) > 1:
        raise WorkloadError(
            "sensitivity takes linears that one dimension of a mesh divides, but "
            f"{weight.placements} divides a weight twice; use ColwiseParallel or RowwiseParallel"
        )
    if mesh.ndim > 1:
        mesh = mesh[(mesh.mesh_dim_names or ())[dims[0]]] if dims else None
    return Split(mesh, "NK"[weight.placements[dims[0]].dim] if dims else "", sizes)


def computed_features(model: nn.Module, layer: nn.Module) -> tuple[int, int]:
    """Return the inputs and outputs of a linear that this rank multiplies; on all ranks."""
    gathering = _gathering(model, layer)
    for module in gathering:
        module.reshard()  # what FSDP has gathered says nothing of its own mesh
    weight: Any = layer.weight  # Any: a DTensor where the layer is divided
    if is_divided(layer) and (weight.device_mesh.ndim > 1 or not gathering):
        layer, _ = local_copy(model, layer)  # what tensor parallelism leaves
    N, K = matrix_sizes(layer)
    return K, N


def _gathering(model: nn.Module, layer: nn.Module) -> list[Any]:  # Any: FSDPModule, if imported
    """Return the module whose FSDP group holds the layer: the innermost, which is the last."""
    holders = [m for m in model.modules() if own_type(m) is not type(m) and hasattr(m, "unshard")]
    return [m for m in holders if any(inner is layer for inner in m.modules())][-1:]


def _plain_copy(module: nn.Module, memo: Memo) -> nn.Module:
    if id(module) in memo:  # it is in several places
        found: nn.Module = memo[id(module)]
        return found
    cls = own_type(module)
    copied: nn.Module = cls.__new__(cls)
    memo[id(module)] = copied
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            vars(copied)[name] = type(value)()
        elif name == "_modules":
            vars(copied)[name] = {n: c and _plain_copy(c, memo) for n, c in value.items()}
        elif not name.startswith(MARKS):
            vars(copied)[name] = copy.deepcopy(value, memo)
    return copied
