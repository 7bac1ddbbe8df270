"""A captured model and a device profile -> that model's profile on that device, all predicted."""

import logging
from collections.abc import Sequence

from autoprec.model.gemms_hp import without_slow_gemms_hp
from autoprec.predict.eligible import retarget_model
from autoprec.predict.layers import Setting, element_bytes, predicted, time_layers
from autoprec.predict.machine import Machine, machine_of
from autoprec.predict.parallel import Parallel, unsplit_note
from autoprec.predict.registry import profile_digest
from autoprec.predict.step import (
    autocast_us,
    first_fp8,
    fsdp_communication,
    gather_savings_us,
    step_times,
)
from autoprec.records.cost import DeviceFacts, LayerTiming, Profile, StepTiming
from autoprec.records.devices import DeviceProfile
from autoprec.records.model import (
    BF16_O2,
    FP32,
    Basis,
    ModelSpec,
    Option,
    Recipe,
    fp8_option,
    with_gemms_hp,
)

logger = logging.getLogger(__name__)
BOUNDARY_BYTES = 12  # FP32 to BF16 and back: 4 + 2 in the forward, 2 + 4 in the backward
MEGA = 1e6
OUTSIDE_BYTES = 8  # parameter, gradient, master: 2 + 2 + 4 in a BF16 flow, 4 + 4 in FP32
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
    machine = machine_of(device_profile)
    considered = with_gemms_hp(options) if gemms_hp else options
    target = retarget_model(spec, device_profile, considered, parallel)
    setting = Setting(machine, parallel, compiled, spec.optimizer_state_numel_ratio)
    gathers = gather_savings_us(target, fp8_option(Recipe.TENSORWISE), setting)
    layers = time_layers(target.layers, setting, gathers)
    in_layers = sum(gathers.values())
    if gemms_hp:
        target, layers = without_slow_gemms_hp(target, layers)
    fp32 = step_times(target, lambda _: FP32, setting)
    bf16 = step_times(target, lambda _: BF16_O2, setting)
    fp8 = step_times(target, first_fp8, setting)
    autocast = bf16.total + autocast_us(target, setting)
    steps = [("fp32", fp32.total), ("bf16_o2", bf16.total), ("autocast_bf16", autocast)]
    if any(option.is_fp8 for layer in target.layers for option in layer.options):
        steps.append(("fp8_o1", fp8.total))
    chosen = {"fp32": FP32, "bf16_o2": BF16_O2, "autocast_bf16": FP32, "fp8_o1": BF16_O2}
    return Profile(
        model=target,
        device=device_facts(device_profile, compiled=compiled),
        basis=Basis.PREDICTED,
        layers=layers,
        steps=tuple(
            StepTiming(
                label=label,
                timing=predicted(us, machine),
                peak_bytes=peak_bytes(target, layers, chosen[label], fsdp=parallel.fsdp),
            )
            for label, us in steps
        ),
        boundary_cast_ms_per_melement=boundary_cast_us(machine) / 1e3,
        fixed_ms=max(fp32.total - fp32.layers - in_layers, 0.0) / 1e3,
        fixed_bf16_ms=max(bf16.total - bf16.layers - in_layers, 0.0) / 1e3,
        step_equivalents=0.0,
        parallel=str(parallel),
        communication=fsdp_communication(target, bf16, setting),
    )


def device_facts(profile: DeviceProfile, *, compiled: bool) -> DeviceFacts:
    """Return what a record says of a device that is not here."""
    return DeviceFacts(
        name=profile.name,
        kind="profile",
        capability=profile.capability,
        memory_bytes=int(profile.value("memory_capacity_gb") * 1e9),
        driver="",
        threads=0,
        allow_tf32=False,
        compile_mode="default" if compiled else "eager",
        software={},
        fp8_recipes=tuple(recipe.value for recipe in profile.fp8_recipes),
        fp8_reason=profile.fp8_reason,
        missing=(("driver", "the device is not here"),),
        digest=profile_digest(profile),
    )


def boundary_cast_us(machine: Machine) -> float:
    """Return the time to cast a million elements between FP32 and BF16, there and back."""
    return BOUNDARY_BYTES * MEGA / machine.bytes_per_us


def peak_bytes(
    spec: ModelSpec, layers: Sequence[LayerTiming], option: Option, *, fsdp: int = 1
) -> int:
    """Return the memory of a uniform plan on one device, at least.

    It counts parameters, gradients, optimizer states with FP32 masters, and the inputs that layers
    save: not what attention and activations save, the logits, gathered weights or fragmentation.
    """
    own = [row for row in layers if row.option == option]
    timed = {name for row in layers for name in row.names}
    others = [p for layer in spec.layers if layer.name not in timed for p in layer.parameters]
    numel = {False: 0, True: 0}
    for parameter in (*others, *spec.uncovered):
        numel[parameter.is_trainable] += parameter.numel * (parameter.shared_with is None)
    trained = OUTSIDE_BYTES + STATE_BYTES * spec.optimizer_state_numel_ratio
    outside = (trained * numel[True] + element_bytes(option) * numel[False]) / fsdp
    return round(outside) + sum(
        len(row.names)
        * (row.parameter_bytes + row.gradient_bytes + row.optimizer_bytes + row.activation_bytes)
        for row in own
    )
