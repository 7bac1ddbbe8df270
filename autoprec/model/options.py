"""Which options a layer can take on a device, and why not the rest.

FP8 has three GEMMs per linear layer, with M tokens, K in- and N out-features:

    output      [M, K] @ [K, N] -> [M, N]      inner dimension K
    grad_input  [M, N] @ [N, K] -> [M, K]      inner dimension N
    grad_weight [N, M] @ [M, K] -> [N, K]      inner dimension M

`torch._scaled_mm` wants the inner dimension and the second operand's outer one to be multiples of
16 (cuBLASLt's 16-byte rows at one byte per element). So K and N must always be, and M must be where
grad_weight runs in FP8: a layer called with any other M can keep that GEMM in BF16 instead.
The CPU kernel is not so strict, but a plan made on a CPU must mean the same on a GPU.
"""

from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from autoprec.device.fp8 import (
    Fp8Support,
)
from autoprec.records import (
    BF16_O2,
    FP32,
    Gemm,
    GemmShape,
    LayerKind,
    Option,
    Precision,
    Recipe,
    Refusal,
    fp8_option,
)

FP8_MULTIPLE = 16  # elements; cuBLASLt and torch._scaled_mm, see the module's docstring


def layer_options(
    *,
    kind: LayerKind,
    gemm: GemmShape | None,
    all_m: Sequence[int],
    support: Fp8Support,
    fp8_options: Sequence[Option] | None = None,
) -> tuple[tuple[Option, ...], tuple[Refusal, ...]]:
    """Return what a layer can take on a device, and why not the rest.

    Args:
        kind: what the layer computes.
        gemm: its output GEMM; None where it is no linear or was never called.
        all_m: every token count M that it is called with.
        support: what the device runs, see `fp8_support`.
        fp8_options: the FP8 options to consider; default: every supported recipe, unmasked, and
            where M rules all of these out, `tensorwise` and `rowwise` with grad_weight in BF16.
    """
    reason = _shape_refusal(kind=kind, gemm=gemm, support=support)
    if reason:
        return (FP32, BF16_O2), (Refusal(precision=Precision.FP8_O1, reason=reason),)
    uneven = sorted(m for m in set(all_m) if m % FP8_MULTIPLE)
    if fp8_options is None:
        masks = (Gemm.GRAD_WEIGHT,) if uneven else ()
        fp8_options = [
            fp8_option(recipe, *(() if recipe is Recipe.ROWWISE_WITH_GW_HP else masks))
            for recipe in support.recipes
        ]
    fitting = tuple(
        option
        for option in fp8_options
        if option.recipe in support.recipes and not (uneven and _has_fp8_grad_weight(option))
    )
    if fitting:
        return (FP32, BF16_O2, *fitting), ()
    reason = (
        f"called with M={uneven[0]}, not a multiple of {FP8_MULTIPLE} as FP8 grad_weight needs"
        if uneven
        else "none of the FP8 options asked for runs on this device"
    )
    return (FP32, BF16_O2), (Refusal(precision=Precision.FP8_O1, reason=reason),)


def linear_refusal(module: nn.Module, cls: type[nn.Module] | None = None) -> str:
    """Return why this module cannot run in FP8 whatever its shape, or an empty string.

    torchao computes what `nn.Linear.forward` does with a plain weight, and nothing else. `cls` is
    the class to judge by when it is not the module's present one.
    """
    cls = cls or type(module)
    if not issubclass(cls, nn.Linear):
        return f"{cls.__name__} is no nn.Linear, and FP8 is for nn.Linear"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized, and torchao casts plain weights only"
    if cls.forward is not nn.Linear.forward:
        return f"{cls.__name__} has its own forward, which FP8 would replace"
    return ""


_NOT_LINEAR = {
    LayerKind.CONV: "convolution",
    LayerKind.ATTENTION: "fused attention",
    LayerKind.OTHER: "kernel for a layer of this class",
}


def _has_fp8_grad_weight(option: Option) -> bool:
    in_bf16 = Gemm.GRAD_WEIGHT in option.gemms_hp
    return option.is_fp8 and not in_bf16 and option.recipe is not Recipe.ROWWISE_WITH_GW_HP


def _shape_refusal(*, kind: LayerKind, gemm: GemmShape | None, support: Fp8Support) -> str:
    if kind is not LayerKind.LINEAR:
        what = _NOT_LINEAR.get(kind, f"{kind.value} layer")
        return f"PyTorch has no FP8 {what}; FP8 is for nn.Linear"
    if gemm is None:
        return "the step did not call it, so the shape of its GEMMs is not known"
    for axis, size in (("K", gemm.K), ("N", gemm.N)):
        if size % FP8_MULTIPLE:
            return f"{axis}={size} is not a multiple of {FP8_MULTIPLE}, which FP8 GEMMs need"
    if not support.recipes:
        return support.reason
    return ""
