"""What each layer can take on the target, whatever the captured machine could run.

Shapes decide, by the rule of `model.options`, and the device's recipes. A layer that the capture
refused for what it is (its own forward, a parametrized weight) stays refused.
"""

from collections.abc import Sequence

from autoprec.common.recipes import Gemm, Precision
from autoprec.model.options import FP8_MULTIPLE, layer_options
from autoprec.predict.linear import recipe_refusal
from autoprec.predict.parallel import Parallel, shard_gemm
from autoprec.records.devices import DeviceProfile
from autoprec.records.model import LayerKind, LayerSpec, ModelSpec, Option

PLAIN_LINEAR = "torch.nn.modules.linear.Linear"


def retarget_model(
    spec: ModelSpec, profile: DeviceProfile, options: Sequence[Option], parallel: Parallel
) -> ModelSpec:
    """Return the model with the options and refusals that its layers have on the target."""
    refusals = {o: recipe_refusal(profile, o.recipe) for o in options if o.recipe is not None}
    fp8 = [option for option, refusal in refusals.items() if not refusal]
    unavailable = next(filter(None, refusals.values()), "")

    def retargeted(layer: LayerSpec) -> LayerSpec:
        obstacle = _obstacle(layer) or ("" if profile.has_fp8 else profile.fp8_reason)
        gemm, wanted = layer.gemm, fp8
        if gemm is not None and not obstacle:
            gemm = shard_gemm(layer, parallel)
            if any(m % FP8_MULTIPLE for m in (gemm.M, *layer.tokens)):
                # First those that run as they are, then those whose grad_weight leaves FP8 for it.
                wanted = sorted(fp8, key=lambda option: Gemm.GRAD_WEIGHT in option.fp8_gemms)
        found, why = layer_options(
            kind=layer.kind,
            gemm=gemm,
            tokens=layer.tokens,
            fp8_options=wanted,
            obstacle=obstacle,
            unavailable=unavailable,
        )
        return layer.model_copy(update={"options": found, "refusals": why})

    return spec.model_copy(update={"layers": tuple(map(retargeted, spec.layers))})


def _obstacle(layer: LayerSpec) -> str:
    """Return why a layer is out of FP8 on any device, or an empty string."""
    captured = layer.refusal(Precision.FP8_O1) or ""
    if layer.kind is not LayerKind.LINEAR or layer.gemm is None or not layer.calls:
        return captured or "FP8 is for nn.Linear layers that the step calls"
    could_run = any(option.is_fp8 for option in layer.options)
    if not could_run and layer.type_name != PLAIN_LINEAR:
        return captured or f"{layer.type_name} is no plain nn.Linear"
    return ""
