"""A weight that FSDP gathered in FP8: torchao's FP8 tensor, that is BF16 to everything else.

torchao's own knows the operations of its FP8 linears and refuses all others. This one also stands
where a layer's weight is used in BF16: in the layer itself while a guard has switched FP8 off, and
in user code that reads the weight. Such an operation gets the gathered BF16 weight where there is
one, else the FP8 elements divided by their scale; autograd saves this tensor, never the BF16 one,
so that FSDP can free both after forward and fill them again before backward. Not yet run on CUDA.

Imported when the first such weight arrives, because torchao's import takes two seconds.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from autoprec.device.torchao import import_torchao

_torchao = import_torchao().float8_training_tensor
Float8TrainingTensor: Any = _torchao.Float8TrainingTensor  # Any: torchao ships no types
aten = torch.ops.aten
_DEFAULT = "detach alias as_strided t view"  # overloads
VIEWS = {aten.transpose.int, *(getattr(aten, name).default for name in _DEFAULT.split())}


class WholeWeight(Float8TrainingTensor):  # type: ignore[misc]  # a class of torchao is Any
    """The whole weight; `bf16` holds its BF16 elements in their order in memory, or nothing."""

    bf16: Tensor

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Keep views what they are, give torchao its GEMM of two FP8 operands, be BF16 else."""
        kwargs = kwargs or {}
        if func in VIEWS:
            weight = args[0]
            data = func(weight._data, *args[1:], **kwargs)
            # `bf16` stays the same object: a later gather resizes it.
            return whole_weight(data, weight._scale, weight._linear_mm_config, bf16=weight.bf16)
        if func is aten.mm.default and all(isinstance(x, Float8TrainingTensor) for x in args):
            return super().__torch_dispatch__(func, types, args, kwargs)
        args, kwargs = tree_map_only(cls, _in_bf16, (args, kwargs))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Name the inner tensors, for torch.compile."""
        names, settings = super().__tensor_flatten__()
        return [*names, "bf16"], settings

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], settings: Any, *_: object) -> "WholeWeight":
        """Make it of its inner tensors, for torch.compile."""
        config = settings["_linear_mm_config"]
        return whole_weight(inner["_data"], inner["_scale"], config, bf16=inner["bf16"])


def whole_weight(data: Tensor, scale: Tensor, config: Any, *, bf16: Tensor) -> WholeWeight:
    """Return FP8 elements under a scale as a weight; `config` is a layer's `linear_mm_config`."""
    weight = WholeWeight(data, scale, bf16.dtype, config, _torchao.GemmInputRole.WEIGHT)
    weight.bf16 = bf16
    return weight


def _in_bf16(weight: WholeWeight) -> Tensor:
    data: Tensor = weight._data
    if weight.bf16.numel():
        return weight.bf16.as_strided(data.size(), data.stride(), data.storage_offset())
    rounded: Tensor = data.to(torch.float32) / weight._scale
    return rounded.to(weight._orig_dtype)
