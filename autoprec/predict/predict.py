"""A captured model and a device profile -> that model's profile on that device, all predicted."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from autoprec.common.recipes import Gemm, Precision, Recipe
from autoprec.model.options import (
    FP8_MULTIPLE,
    NO_PLAIN_WEIGHT,
    ON_ANY_DEVICE,
    layer_options,
    without_slow_gemms_hp,
)
from autoprec.predict.layers import Setting, element_bytes, predicted, time_layers
from autoprec.predict.linear import recipe_refusal
from autoprec.predict.parallel import Parallel, shard_gemm, unsplit_note
from autoprec.predict.registry import profile_digest
from autoprec.predict.step import (
    autocast_extra_us,
    first_fp8,
    gather_savings_us,
    step_times,
    uniform_times,
)
from autoprec.records import Basis, LayerKind, LayerSpec, ModelSpec, Option
from autoprec.records.cost import DeviceFacts, LayerTiming, Profile, StepTiming
from autoprec.records.devices import DeviceProfile
from autoprec.records.model import BF16_O2, FP32, AsWritten, fp8_option, with_gemms_hp

logger = logging.getLogger(__name__)
BOUNDARY_BYTES = 12  # FP32 to BF16 and back: 4 + 2 in the forward, 2 + 4 in the backward
OUTSIDE_BYTES = 8  # parameter, gradient, master: 2 + 2 + 4 in BF16, 4 + 4 in FP32
STATE_BYTES = 4  # an optimizer state is FP32


def predict_profile(
    spec: ModelSpec,
    device_profile: DeviceProfile,
    *,
    parallel: Parallel | None = None,
    compiled: bool = False,
    options: Sequence[Option] = (),
    gemms_hp: bool = False,
) -> Profile:
    """Predict every layer x option of a captured model, and its whole steps, on a device.

    Args:
        spec: the model, captured anywhere; shapes are those of one device's batch.
        device_profile: the target.
        parallel: degrees of parallelism; default: one device.
        compiled: torch.compile fuses casts, or eager.
        options: the FP8 options to consider; those that the target or a shape refuses drop out.
        gemms_hp: consider them also with one or two GEMMs in BF16, where that beats plain BF16.

    Raises:
        DeviceError: the tensor-parallel degree does not divide a layer or its heads.
    """
    parallel = parallel or Parallel()
    if note := unsplit_note(spec.layers, parallel):
        logger.warning("%s", note)
    considered = with_gemms_hp(options) if gemms_hp else options
    model = retarget_model(spec, device_profile, considered, parallel)
    facts = device_facts(device_profile, spec.as_written or AsWritten(), compiled=compiled)
    states, tf32 = spec.optimizer_state_numel_ratio, (facts.allow_tf32, facts.allow_tf32_conv)
    setting = Setting(device_profile.machine, parallel, compiled, states, *tf32)
    # What FP8 gathers save of a step is a cost of the layers' other options, not of the rest.
    savings = gather_savings_us(model, fp8_option(Recipe.TENSORWISE), setting)
    layers, in_layers = time_layers(model.layers, setting, savings), sum(savings.values())
    if gemms_hp:
        model, layers = without_slow_gemms_hp(model, layers)
    fp32, bf16 = (uniform_times(model, option, setting) for option in (FP32, BF16_O2))
    return Profile(
        model=model,
        device=facts,
        basis=Basis.PREDICTED,
        layers=layers,
        steps=_steps(model, layers, setting, fp32=fp32.total, bf16=bf16.total),
        boundary_cast_ms_per_melement=BOUNDARY_BYTES * 1e6 / setting.machine.bytes_per_us / 1e3,
        fixed_ms=max(fp32.total - fp32.layers - in_layers, 0.0) / 1e3,
        fixed_bf16_ms=max(bf16.total - bf16.layers - in_layers, 0.0) / 1e3,
        step_equivalents=0.0,
        parallel=str(parallel),
        communication=bf16.communication(setting),
        speedup_error=-setting.machine.speedup_error_low,
    )


def retarget_model(
    spec: ModelSpec, profile: DeviceProfile, options: Sequence[Option], parallel: Parallel
) -> ModelSpec:
    """Return the model with the options and refusals that its layers have on the target.

    Shapes decide, by the rule of `model.options`, and the device's recipes. A layer that the
    capture refused for what it is (its own forward, a parametrized weight) stays refused.
    """
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
        reasons = {"obstacle": obstacle, "unavailable": unavailable}
        found, why = layer_options(
            kind=layer.kind, gemm=gemm, tokens=layer.tokens, fp8_options=wanted, **reasons
        )
        return layer.model_copy(update={"options": found, "refusals": why})

    return spec.model_copy(update={"layers": tuple(map(retargeted, spec.layers))})


def _obstacle(layer: LayerSpec) -> str:
    """Return the reason that a layer is out of FP8 on any device, or an empty string."""
    captured = layer.refusal(Precision.FP8_O1) or ""
    if layer.kind is not LayerKind.LINEAR or layer.gemm is None or not layer.calls:
        return captured or "FP8 is for nn.Linear layers that the step calls"
    if not layer.is_torchs_linear and not layer.takes_fp8:
        return captured or f"{layer.type_name} is no plain nn.Linear"
    if captured in ON_ANY_DEVICE or captured.startswith(NO_PLAIN_WEIGHT):
        return captured
    return ""


def _steps(
    model: ModelSpec, layers: Sequence[LayerTiming], setting: Setting, *, fp32: float, bf16: float
) -> tuple[StepTiming, ...]:
    """Return the uniform steps: each with its time, and the memory of its parameters' option."""
    autocast = bf16 + autocast_extra_us(model, setting)
    steps: list[tuple[str, float, Option | None]]
    steps = [("fp32", fp32, FP32), ("bf16_o2", bf16, BF16_O2), ("autocast_bf16", autocast, FP32)]
    steps += _step_as_written(model, setting)
    has_fp8 = any(layer.takes_fp8 for layer in model.layers)
    if has_fp8:
        steps.append(("fp8_o1", step_times(model, first_fp8, setting).total, BF16_O2))
    if has_fp8 and setting.compiled:  # beside them, how much of the gain is torch.compile's
        eager = replace(setting, compiled=False)
        eager_bf16 = uniform_times(model, BF16_O2, eager).total
        steps.append(("eager_bf16_o2", eager_bf16, BF16_O2))
        steps.append(("eager_fp8_o1", step_times(model, first_fp8, eager).total, BF16_O2))
    return tuple(
        StepTiming(
            label=label,
            timing=predicted(us, setting.machine),
            peak_bytes=option and peak_bytes(model, layers, option, fsdp=setting.parallel.fsdp),
        )
        for label, us, option in steps
    )


def _step_as_written(model: ModelSpec, setting: Setting) -> list[tuple[str, float, Option | None]]:
    """Return the step of a user who trains in 16 bits, or compiles what is to be priced eagerly.

    Of 16-bit parameters, whose optimizer states are no option's, no memory is told. FP16 takes what
    BF16 takes. Eager training is priced compiled where the others are: what torch.compile gains
    alone is no gain of a plan.
    """
    written = model.as_written
    if written is None or (written.is_fp32 and written.is_compiled <= setting.compiled):
        return []
    setting = replace(setting, compiled=setting.compiled or written.is_compiled)
    step = uniform_times(model, FP32 if written.is_fp32 else BF16_O2, setting)
    if written.parameters:  # and so are their optimizer's states: half the bytes of FP32 masters
        return [("as_written", step.total - step.optimizer / 2, None)]
    is_autocast = written.autocast and not written.gathered
    extra = autocast_extra_us(model, setting) if is_autocast else 0.0
    return [("as_written", step.total + extra, FP32)]


def device_facts(profile: DeviceProfile, written: AsWritten, *, compiled: bool) -> DeviceFacts:
    """Return the facts that a record states of a device that is not here.

    TF32 is as the user's process allows it, where the device has it; that of convolutions is
    cuDNN's.
    """
    has_tf32 = profile.value("tf32_peak_tflops") > 0.0
    has_cudnn = not profile.capability.startswith("gfx")
    return DeviceFacts(
        name=profile.name,
        kind="profile",
        capability=profile.capability,
        memory_bytes=int(profile.value("memory_capacity_gb") * 1e9),
        driver="",
        threads=0,
        allow_tf32=has_tf32 and written.allow_tf32,
        allow_tf32_conv=has_tf32 and written.allow_tf32_conv if has_cudnn else None,
        compile_mode="default" if compiled else "eager",
        software={"assumed": str(profile.software)},
        fp8_recipes=tuple(recipe.value for recipe in profile.fp8_recipes),
        fp8_reason=profile.fp8_reason,
        missing=(("driver", "the device is not here"),),
        digest=profile_digest(profile),
    )


def peak_bytes(spec: ModelSpec, rows: Sequence[LayerTiming], option: Option, *, fsdp: int) -> int:
    """Return the memory of a uniform plan on one device, at least.

    It counts parameters, gradients, optimizer states with FP32 masters, and the inputs that layers
    save: not what attention and activations save, the logits, gathered weights or fragmentation.
    """
    timed = {name for row in rows for name in row.names}
    others = [p for layer in spec.layers if layer.name not in timed for p in layer.parameters]
    numel = {False: 0, True: 0}
    for parameter in (*others, *spec.uncovered):
        numel[parameter.is_trainable] += parameter.numel * (parameter.shared_with is None)
    trained = OUTSIDE_BYTES + STATE_BYTES * spec.optimizer_state_numel_ratio
    outside = (trained * numel[True] + element_bytes(option) * numel[False]) / fsdp
    return round(outside) + sum(
        len(row.names)
        * (row.parameter_bytes + row.gradient_bytes + row.optimizer_bytes + row.activation_bytes)
        for row in rows
        if row.option == option
    )
