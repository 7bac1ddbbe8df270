"""What each layer can take on the target, whatever the captured machine could run.

Shape decides, by the rule of `linear.fp8_refusal`: K and N multiples of 16, and every M too where
grad_weight runs in FP8. A layer that the capture refused for what it is (its own forward, a
parametrized weight) stays refused.
"""

import math
from collections.abc import Sequence

from autoprec.predict.linear import FP8_MULTIPLE, fp8_refusal
from autoprec.predict.parallel import Parallel, shard_gemm
from autoprec.records.devices import DeviceProfile
from autoprec.records.model import (
    BF16_O2,
    FP32,
    Gemm,
    LayerKind,
    LayerSpec,
    ModelSpec,
    Option,
    Precision,
    Recipe,
    Refusal,
    fp8_option,
)

PLAIN_LINEAR = "torch.nn.modules.linear.Linear"


def retarget_model(
    spec: ModelSpec, profile: DeviceProfile, options: Sequence[Option], parallel: Parallel
) -> ModelSpec:
    """Return the model with the options and refusals that its layers have on the target."""
    layers = tuple(_retargeted(layer, profile, options, parallel) for layer in spec.layers)
    return spec.model_copy(update={"layers": layers})


def _retargeted(
    layer: LayerSpec, profile: DeviceProfile, options: Sequence[Option], parallel: Parallel
) -> LayerSpec:
    fp8, reason = _fp8_options(layer, profile, options, parallel)
    refusals = () if fp8 else (Refusal(precision=Precision.FP8_O1, reason=reason),)
    return layer.model_copy(update={"options": (FP32, BF16_O2, *fp8), "refusals": refusals})


def _fp8_options(
    layer: LayerSpec, profile: DeviceProfile, options: Sequence[Option], parallel: Parallel
) -> tuple[tuple[Option, ...], str]:
    captured = layer.refusal(Precision.FP8_O1) or ""
    could_run = any(option.is_fp8 for option in layer.options)
    if layer.kind is not LayerKind.LINEAR or layer.gemm is None or not layer.calls:
        return (), captured or "FP8 is for nn.Linear layers that the step calls"
    if not could_run and layer.type_name != PLAIN_LINEAR:
        return (), captured or f"{layer.type_name} is no plain nn.Linear"
    if not profile.has_fp8:
        return (), profile.fp8_reason
    wanted = [option for option in options if option.is_fp8]
    if _has_uneven_tokens(layer):
        wanted = [*wanted, *(_without_grad_weight(option) for option in wanted)]
    reasons = {option: _refusal(layer, option, profile, parallel) for option in wanted}
    fitting = tuple(dict.fromkeys(option for option, reason in reasons.items() if not reason))
    return fitting, next(iter(reasons.values()), "no FP8 option was asked for")


def _refusal(layer: LayerSpec, option: Option, profile: DeviceProfile, parallel: Parallel) -> str:
    if option.recipe is None:
        return "it is no FP8 option"
    gemm = shard_gemm(layer, parallel)
    tokens = [math.prod(call.inputs[0].shape[:-1]) for call in layer.calls if call.inputs]
    uneven = FP8_MULTIPLE + 1 if _has_uneven_tokens(layer) else gemm.M
    worst = next((m for m in tokens if m % FP8_MULTIPLE), uneven)
    return fp8_refusal(
        profile,
        worst,
        gemm.K,
        gemm.N,
        recipe=option.recipe,
        gemms_hp=option.gemms_hp,
    )


def _has_uneven_tokens(layer: LayerSpec) -> bool:
    """Return whether some M is no multiple of 16, seen in the step or in the capture's scan.

    Of other batches (a short last one) the spec keeps only what they did to the options.
    """
    tokens = [math.prod(call.inputs[0].shape[:-1]) for call in layer.calls if call.inputs]
    if any(m % FP8_MULTIPLE for m in tokens):
        return True
    captured = [option for option in layer.options if option.is_fp8]
    return bool(captured) and all(not _runs_grad_weight(option) for option in captured)


def _runs_grad_weight(option: Option) -> bool:
    return (
        Gemm.GRAD_WEIGHT not in option.gemms_hp and option.recipe is not Recipe.ROWWISE_WITH_GW_HP
    )


def _without_grad_weight(option: Option) -> Option:
    if option.recipe is None or not _runs_grad_weight(option):
        return option
    kept = tuple(g for g in Gemm if g in option.gemms_hp or g is Gemm.GRAD_WEIGHT)
    return option if len(kept) == len(Gemm) else fp8_option(option.recipe, *kept)
