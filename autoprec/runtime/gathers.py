"""FP8 weights through FSDP2's all-gather: what `apply` leaves on weights for `fully_shard` to find.

    apply         a weight's class becomes `GatheredInFp8`; it stays the BF16 Parameter that it was
    fully_shard   makes its shards with the weight's `new_zeros`: these are `Fp8Shard`s, still BF16
    all-gather    asks a shard what to send (`fsdp_pre_all_gather`): its elements in FP8, one byte
                  each, under one scale for the whole weight, and makes the weight of what arrives
                  (`fsdp_post_all_gather`): a `WholeWeight`, which torchao's GEMMs take as it is

With W the whole weight and W_r the rows of it on rank r, torchao casts tensorwise as

    scale = 448 / max |W| = 448 / max_r max |W_r|,    FP8 = e4m3(W * scale), element by element

so one all-reduce of a scalar gives every rank the bits that a cast of the gathered BF16 weight
would give: what a layer computes does not depend on how its weight came. Masters, optimizer and
checkpoints see shards of BF16; nothing of this is in a `state_dict` or in a file. Where
`fully_shard` came before `apply`, the shards are FP32, and W is what they are in BF16.

FSDP's buffers keep the size of the first gather. A layer that a guard has moved to BF16 therefore
gathers its BF16 weight beside the FP8 one, in a buffer that FSDP frees with its own.

Tested with gloo on CPUs; not yet run on CUDA.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import tree_map_only

from autoprec.common.text import first_and_more
from autoprec.device.torchao import import_torchao
from autoprec.errors import PlanMismatchError
from autoprec.model.kinds import is_transposed
from autoprec.model.layers import layer_named
from autoprec.records import Option, Recipe
from autoprec.runtime.shards import change_shard, fsdp_modules, gathers_of, plain_shards
from autoprec.workload.written import dtype_name

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

aten = torch.ops.aten
ON_LAYER = "gathers_fp8"  # on layers that shall; an attribute of the object, as `fp8_active` is
MOST_LISTED = 8  # layers that a message names
# What FSDP, DTensor and copies do with a shard; all else gives plain tensors.
_ON_SHARDS = "detach new_zeros empty_like clone slice view as_strided copy_ _to_copy _pin_memory"
STAYS_SHARD = frozenset(getattr(aten, name) for name in _ON_SHARDS.split())


def install_gathers(model: nn.Module, options: Mapping[str, Option]) -> None:
    """Mark the weights that `fully_shard` shall gather in FP8, and log which FP8 layers' it cannot.

    The model has these options (by layer name) installed.
    """
    owners = Counter(p for module in model.modules() for p in module._parameters.values())
    shards = plain_shards(model)
    in_fp8 = {name: option for name, option in options.items() if option.is_fp8}
    kept: list[str] = []
    for name, option in in_fp8.items():
        layer: Any = layer_named(model, name)  # Any: a linear
        reason = _refusal(option, layer, owners, shards)
        if reason:
            kept.append(f"{name!r} ({reason})")
            continue
        vars(layer)[ON_LAYER] = True
        weight: Any = layer.weight  # Any: mypy knows no change of class
        if weight in shards:
            change_shard(model, weight, Fp8Shard)
        else:
            weight.__class__ = GatheredInFp8
    says = "FSDP gathers the weights of %d layers in FP8%s"
    if not fsdp_modules(model):
        says = (
            "fully_shard will gather the weights of %d layers in FP8; "
            "without it nothing is gathered%s"
        )
    logger.info(
        says,
        len(in_fp8) - len(kept),
        f"; FP8 layers with BF16 gathers: {first_and_more(kept, most=MOST_LISTED)}" if kept else "",
    )


def check_gathers(model: nn.Module) -> None:
    """Log one warning if weights that should be gathered in FP8 were sharded as BF16 ones."""
    marked = [(name, m) for name, m in model.named_modules() if ON_LAYER in vars(m)]
    gathers = gathers_of(model) if marked else {}
    lost = [name for name, layer in marked if gathered_dtype(layer, gathers) == "bfloat16"]
    if lost:
        logger.warning(
            "the plan counts on FP8 gathers, but the weights of %s are sharded as BF16: something "
            "replaced them after apply (parallelize_module, to_empty, unpickling); their GEMMs "
            "are as planned",
            first_and_more(map(repr, lost), most=MOST_LISTED),
        )


def gathered_dtype(layer: nn.Module, gathers: Mapping[nn.Parameter, torch.dtype]) -> str:
    """Return the dtype in which FSDP gathers a layer's weight; empty if it is not sharded.

    `gathers` are the dtypes in which it gathers what keeps a dtype of torch (`gathers_of`).
    """
    weight: Any = getattr(layer, "weight", None)
    shard = getattr(weight, "_local_tensor", None)  # a DTensor has one
    if shard is None:
        return ""
    is_fp8 = isinstance(shard, Fp8Shard)
    return dtype_name(torch.float8_e4m3fn if is_fp8 else gathers.get(weight, shard.dtype))


def plain_gathers(model: nn.Module) -> None:
    """Make weights that `install_gathers` marked plain ones."""
    for module in model.modules():
        vars(module).pop(ON_LAYER, None)
        for parameter in module._parameters.values():
            if isinstance(getattr(parameter, "_local_tensor", None), Fp8Shard):
                change_shard(model, parameter, lambda shard: shard.plain)
            elif type(parameter) is GatheredInFp8:
                own: Any = parameter  # Any: mypy knows no change of class
                own.__class__ = nn.Parameter


def _refusal(
    option: Option,
    layer: Any,  # a linear
    owners: Mapping[Any, int],
    shards: Set[nn.Parameter],
) -> str:
    weight = layer.weight
    reasons = {
        f"{option.recipe} scales": option.recipe is not Recipe.TENSORWISE,
        f"{', '.join(option.gemms_hp)} in BF16": option.gemms_hp,
        "its weight is shared": owners[weight] > 1,
        "its weight is stored transposed": is_transposed(layer),
        f"its weight is a {type(weight).__name__}": type(weight) is not nn.Parameter
        and weight not in shards,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


@dataclass(frozen=True)
class Sent:
    """What the hook before a gather tells the one after it; `mesh` of ranks that hold shards."""

    config: Any  # the layer's `linear_mm_config`
    scale: Tensor
    size: torch.Size
    mesh: "DeviceMesh"
    in_fp8: bool


class GatheredInFp8(nn.Parameter):
    """A whole BF16 weight of which FSDP shall gather FP8; in all else a Parameter."""

    def new_zeros(self, *size: Any, **kwargs: Any) -> Tensor:  # Any: torch's own
        """Return zeros, as a shard: `fully_shard` copies this rank's rows into them."""
        zeros = super().new_zeros(*size, **kwargs)
        return Fp8Shard(zeros) if zeros.dim() == self.dim() and not kwargs else zeros


class Fp8Shard(Tensor):
    """This rank's rows of a weight (BF16, or FP32), with FSDP2's hooks; plain to all else."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> "Fp8Shard":
        """Wrap `plain`, whose storage it shares."""
        same = {
            name: getattr(plain, name) for name in ("dtype", "layout", "device", "requires_grad")
        }
        shard: Fp8Shard = Tensor._make_wrapper_subclass(
            cls, plain.size(), strides=plain.stride(), storage_offset=plain.storage_offset(), **same
        )
        shard.plain = plain
        return shard

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as no classmethod
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Run the operation on plain tensors; a shard stays one in those that FSDP needs."""
        first: Any = args[0] if args else None
        args, kwargs = tree_map_only(cls, lambda shard: shard.plain, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if func is aten.copy_.default:
            return first
        stays = func.overloadpacket in STAYS_SHARD and result.dtype is first.dtype
        return cls(result) if stays else result

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Name the inner tensor, for torch.compile."""
        return ["plain"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> "Fp8Shard":
        """Make it of its inner tensor, for torch.compile."""
        return Fp8Shard(inner["plain"])

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes contents to print
        return f"Fp8Shard({self.plain!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # Any: pickle's own
        """Be saved as the plain tensor."""
        return self.plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's

    @torch.no_grad()
    def fsdp_pre_all_gather(
        self, mesh: "DeviceMesh", size: torch.Size, _stride: object, layer: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], Sent]:  # Any: one of our FP8 layers; FSDP's policy
        """Return the FP8 that FSDP sends of this shard, in as many rows as on other ranks."""
        is_low = self.plain.dtype is torch.bfloat16  # else the plan decides what is gathered
        if is_low and mp_policy.param_dtype not in (None, torch.bfloat16):
            raise PlanMismatchError(
                "FP8 gathers start from the BF16 weights of the plan, but fully_shard's mp_policy "
                f"has param_dtype={mp_policy.param_dtype}; leave param_dtype out"
            )
        # The scale of the whole weight, as torchao computes it.
        utils, config = import_torchao().float8_utils, layer.config
        dtype = config.cast_config_weight.target_dtype
        shard = self.plain.to(torch.bfloat16)
        amax = shard.abs().max() if shard.numel() else shard.new_zeros(())
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=mesh.get_group())
        scale = utils.amax_to_scale(amax, dtype, config.round_scales_to_power_of_2)
        bits = utils.to_fp8_saturated(shard.to(torch.float32) * scale, dtype)
        sent = Sent(layer.linear_mm_config, scale, size, mesh, layer.fp8_active)
        return (_padded(bits, size, mesh),), sent

    @torch.no_grad()
    def fsdp_post_all_gather(
        self, all_gather_outputs: Any, metadata: Sent, param_dtype: torch.dtype, *, out: Any = None
    ) -> Any:  # Any: tensors; the WholeWeight of before
        """Make the whole weight of what all ranks sent; later ones in place, in FSDP's buffers."""
        (bits,) = all_gather_outputs
        if metadata.scale.is_cuda:  # made on FSDP's stream for copies, read on this one
            metadata.scale.record_stream(torch.cuda.current_stream(metadata.scale.device))
        whole = out
        if out is None:
            from autoprec.runtime.whole_weights import whole_weight

            empty = bits.new_empty(0, dtype=param_dtype)
            whole = whole_weight(bits, metadata.scale, metadata.config, bf16=empty)
        whole._scale = metadata.scale
        _fill(whole.bf16, None if metadata.in_fp8 else _gather_bf16(self.plain, metadata))
        return None if out is not None else (whole, (bits, whole.bf16))


def _padded(shard: Tensor, size: torch.Size, mesh: "DeviceMesh") -> Tensor:
    """Return a shard with the rows of the largest one: a gather takes equally many of each rank."""
    if shard.dim() > 1 and shard.shape[1:] != size[1:]:
        return shard  # sharded by columns, which FSDP splits evenly only
    rows = -(-size[0] // mesh.size())
    if shard.shape[0] == rows:
        return shard
    padded = shard.new_zeros(rows, *size[1:])
    padded[: shard.shape[0]].copy_(shard)
    return padded


def _gather_bf16(shard: Tensor, sent: Sent) -> Tensor:
    """Return the weight itself, of what all ranks hold of it."""
    shard = _padded(shard.to(sent.scale.device, torch.bfloat16), sent.size, sent.mesh)
    parts = [torch.empty_like(shard) for _ in range(sent.mesh.size())]
    dist.all_gather(parts, shard, group=sent.mesh.get_group())
    return torch.cat(parts, dim=int(shard.shape[1:] != sent.size[1:]))


def _fill(buffer: Tensor, whole: Tensor | None) -> None:
    """Make a buffer hold these elements, or none.

    Compiled code saves it for backward, before which it is filled again with the same elements: so
    autograd must not count that as a write, as in FSDP's own buffers.
    """
    elements = 0 if whole is None else whole.numel()
    kept = () if buffer.is_inference() else (buffer,)
    with _unsafe_preserve_version_counter(kept):
        if buffer.numel() != elements:
            buffer.resize_(elements)
        if whole is not None:
            buffer.copy_(whole.view(-1))
