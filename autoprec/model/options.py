"""THE rule: which options a layer can take, and why not the rest. This module imports no torch.

FP8 has three GEMMs per linear layer, with M tokens, K in- and N out-features:

    output      [M, K] @ [K, N] -> [M, N]      inner dimension K
    grad_input  [M, N] @ [N, K] -> [M, K]      inner dimension N
    grad_weight [N, M] @ [M, K] -> [N, K]      inner dimension M

`torch._scaled_mm` wants the inner dimension and the second operand's outer one to be multiples of
16 (cuBLASLt's 16-byte rows at one byte per element). So K and N must always be, and M must be where
grad_weight runs in FP8: a layer called with any other M can keep that GEMM in BF16 instead.
The CPU kernel is not so strict, but a plan made on a CPU must mean the same on a GPU.

What a module's class has to do with it is `kinds.linear_refusal`.

Some of the three GEMMs in BF16 trade time for accuracy: the one that hurts runs in BF16, the others
stay in FP8. That is an option worth having only where it still beats plain BF16; whether a cheaper
and more precise one makes it superfluous, the search decides when it knows the gradient errors.
"""

from collections.abc import Collection, Iterable, Sequence

from autoprec.common.grouping import grouped
from autoprec.common.recipes import Gemm, Precision
from autoprec.records.cost import LayerTiming
from autoprec.records.model import BF16_O2, FP32, GemmShape, LayerKind, ModelSpec, Option, Refusal

FP8_MULTIPLE = 16  # elements; cuBLASLt and torch._scaled_mm, see the module's docstring
NO_PLAIN_WEIGHT = "its weight is "  # begins the reasons that hold on any device
USED_UNCALLED = (
    "its weight is used without a call of the layer, as a fused linear cross-entropy does, and FP8 "
    "runs in the layer's call"
)
HAS_EXPERTS = (
    "its matrices share one parameter of three dimensions, as experts of a mixture do, and FP8 is "
    "for nn.Linear"
)
TWICE_DIFFERENTIATED = (
    "its gradient is differentiated again (create_graph=True), and those of FP8 GEMMs cannot be"
)
WITHOUT_GRAD = "it runs under no_grad alone, as a teacher does, and FP8 is for what is trained"
IN_TRANSFORM = "it is called within a transform of torch.func, which FP8 GEMMs have no rule for"
CONVERTED = (
    "the model's own code moves it to another dtype in forward, as a router's that is to be in "
    "FP32, and so out of a plan's"
)
MULTIPLIED = (
    "the script computes with its weight itself, outside of the model, where torch takes no BF16 "
    "beside FP32"
)
IN_FP32_ALONE = (CONVERTED, MULTIPLIED)
# what the step does with a layer rules it out on any device
ON_ANY_DEVICE = frozenset(
    (USED_UNCALLED, HAS_EXPERTS, TWICE_DIFFERENTIATED, WITHOUT_GRAD, IN_TRANSFORM, *IN_FP32_ALONE)
)
ATTENTION = (
    "nn.MultiheadAttention holds its projections as parameters of its own, and FP8 is for "
    "nn.Linear; projections that are nn.Linear, around F.scaled_dot_product_attention, can take it"
)
UNCOMPILED = (
    "torch.compile has no gradient of a gradient, and the model's is differentiated again "
    "(create_graph=True)"
)
_NOT_LINEAR = {
    LayerKind.CONV: "convolution",
    LayerKind.OTHER: "kernel for a layer of this class",
}


def layer_options(
    *,
    kind: LayerKind,
    gemm: GemmShape | None,
    tokens: Iterable[int] = (),
    fp8_options: Sequence[Option],
    obstacle: str = "",
    unavailable: str = "",
) -> tuple[tuple[Option, ...], tuple[Refusal, ...]]:
    """Return the options of a layer, and why FP8 (or BF16 too) is not among them if it is not.

    Args:
        kind: what the layer computes.
        gemm: its output GEMM; None where it is no linear or was never called.
        tokens: every M that it is called with, `gemm.M` among them or not.
        fp8_options: those that the device runs; where some M rules one out, it is taken with
            grad_weight in BF16.
        obstacle: what else keeps the layer out of FP8, e.g. its class.
        unavailable: why the device runs none, if it does not.
    """
    if obstacle in IN_FP32_ALONE:
        ways = (Precision.BF16_O2, Precision.FP8_O1)
        return (FP32,), tuple(Refusal(precision=way, reason=obstacle) for way in ways)
    reason = obstacle or _refusal(kind, gemm)
    fitting: tuple[Option, ...] = ()
    if gemm is not None and not reason:
        # M is the inner dimension of grad_weight alone, so that GEMM can run in BF16 instead.
        uneven = any(m % FP8_MULTIPLE for m in (gemm.M, *tokens))
        wanted = [grad_weight_in_bf16(o) if uneven else o for o in fp8_options]
        fitting = tuple(dict.fromkeys(o for o in wanted if o is not None))
        reason = unavailable or "none of the FP8 options asked for can run it"
    refusals = () if fitting else (Refusal(precision=Precision.FP8_O1, reason=reason),)
    return (FP32, BF16_O2, *fitting), refusals


def shape_refusal(
    K: int,
    N: int,
    *,
    tokens: Iterable[int] = (),
    gemms: Collection[Gemm] = tuple(Gemm),
    multiple: int = FP8_MULTIPLE,
    needed_by: str = "FP8 GEMMs",
) -> str:
    """Return the reason that FP8 cannot run a linear of these sizes, or an empty string.

    `tokens` are every M that it is called with, as far as known, and `gemms` those that run in FP8.
    Blockwise scales need a larger `multiple`; `needed_by` says whose rule that is.
    """
    for axis, size in (("K", K), ("N", N)):
        if size % multiple:
            return f"{axis}={size} is not a multiple of {multiple}, which {needed_by} need"
    uneven = min((m for m in tokens if m % multiple), default=None)
    if uneven is not None and Gemm.GRAD_WEIGHT in gemms:
        return f"M={uneven} is not a multiple of {multiple}, which the FP8 grad_weight GEMM needs"
    return ""


def grad_weight_in_bf16(option: Option) -> Option | None:
    """Return an FP8 option with its grad_weight GEMM in BF16, None if no GEMM is then in FP8."""
    if Gemm.GRAD_WEIGHT not in option.fp8_gemms:
        return option
    in_bf16 = (*option.gemms_hp, Gemm.GRAD_WEIGHT)  # the last in the order of `Gemm`
    return None if len(in_bf16) == len(Gemm) else option.model_copy(update={"gemms_hp": in_bf16})


def _refusal(kind: LayerKind, gemm: GemmShape | None) -> str:
    if kind is LayerKind.ATTENTION:
        return ATTENTION
    if kind is not LayerKind.LINEAR:
        what = _NOT_LINEAR.get(kind, f"{kind.value} layer")
        return f"PyTorch has no FP8 {what}; FP8 is for nn.Linear"
    if gemm is None:
        return "it was not called in the captured step, so its shapes are not known"
    return shape_refusal(gemm.K, gemm.N)


def without_slow_gemms_hp(
    spec: ModelSpec, rows: Iterable[LayerTiming]
) -> tuple[ModelSpec, tuple[LayerTiming, ...]]:
    """Drop options with GEMMs kept in BF16 that are no faster than BF16, from rows and layers.

    They stay where a layer has no other FP8 option: then they are the answer to "why not FP8?".
    """
    by_names = grouped((row.names, row) for row in rows)
    kept = tuple(row for group in by_names.values() for row in _worthwhile(group))
    options = grouped((name, row.option) for row in kept for name in row.names)
    layers = tuple(
        layer.model_copy(update={"options": tuple(options.get(layer.name, layer.options))})
        for layer in spec.layers
    )
    return spec.model_copy(update={"layers": layers}), kept


def _worthwhile(group: Sequence[LayerTiming]) -> Sequence[LayerTiming]:
    plain = next((row.total for row in group if row.option == BF16_O2), None)
    if plain is None or not any(row.option.is_whole_fp8 for row in group):
        return group
    return [
        row
        for row in group
        if not row.option.gemms_hp
        or (row.total is not None and row.total.median_ms < plain.median_ms)
    ]


def compile_obstacle(spec: ModelSpec) -> str:
    """Return why torch.compile cannot train the whole model, if it is known that it cannot.

    A model that its user compiles has parts that are not differentiated twice.
    """
    is_users = spec.as_written is not None and spec.as_written.is_compiled
    reasons = (layer.refusal(Precision.FP8_O1) for layer in spec.layers)
    return UNCOMPILED if not is_users and TWICE_DIFFERENTIATED in reasons else ""
