"""What a run measures with the user's model: imports torch, so `run` imports it when it must."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from autoprec.device.local import resolve_device
from autoprec.integrations.launch import Script, record_workload
from autoprec.model.capture import capture_model
from autoprec.model.meta import capture_on_meta
from autoprec.profiler import profile_model
from autoprec.records import (
    Estimate,
    ModelSpec,
    Option,
    Plan,
    Profile,
    Recipe,
    Sensitivity,
    Verification,
)
from autoprec.records.devices import DeviceProfile
from autoprec.sensitivity.measure import JointMeter, measure_sensitivity
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.tuning.settings import Settings
from autoprec.verification import verify_plans
from autoprec.workload.functions import Workload, load_workload, workload_from
from autoprec.workload.hf_config import config_model

if TYPE_CHECKING:
    from autoprec.tuning.run import Run

logger = logging.getLogger(__name__)


def open_workload(settings: Settings) -> Workload:
    """Execute the user's file, read the config, or record the script, as the settings ask for."""
    if settings.config and settings.meta:
        model = config_model(settings.config, batch=settings.batch, sequence=settings.sequence)
        return workload_from(model, name=settings.workload)
    if settings.script:
        script = Script(settings.script, settings.script_args)
        return record_workload(script, steps=settings.script_steps)
    return load_workload(settings.workload)


def open_device(settings: Settings, target: DeviceProfile | None) -> torch.device:
    """Return the target, or the machine at hand where that is a device profile."""
    if target is None:
        return resolve_device(settings.target)
    device = resolve_device("auto")
    logger.warning("%s is predicted; what is measured runs on %s", target.name, device)
    return device


def capture(run: "Run") -> ModelSpec:
    """Return the model as one training step shows it: run here, or without storage."""
    if run.settings.meta:
        return capture_on_meta(run.workload, seed=run.settings.seed, progress=run.progress)
    return capture_model(run.context)


def measured_profile(run: "Run") -> Profile:
    """Measure what each layer costs here."""
    settings = run.settings
    return profile_model(
        run.context,
        run.spec,
        options=settings.fp8_options,
        gemms_hp=settings.gemms_hp,
        compiled=settings.is_compiled,
    )


def warmed_up(run: "Run") -> Reference:
    """Train the FP32 model for its warm-up, from scratch or from the checkpoint."""
    has_delayed = Recipe.DELAYED in run.settings.recipes
    return prepare_reference(
        run.context, run.spec, checkpoint=run.settings.checkpoint, with_history=has_delayed
    )


def measured_sensitivity(run: "Run") -> Sensitivity:
    """Measure what each option does to the gradient."""
    return measure_sensitivity(run.reference, options=run.settings.measured_options)


def evaluator(run: "Run") -> Callable[[tuple[Option, ...]], Estimate]:
    """Return the measurement of a whole plan's gradient error; a resumed study may need none."""
    open_meter = cache(lambda: JointMeter(run.reference))
    return lambda options: open_meter().measure(options)


def verified(
    run: "Run", plans: Sequence[Plan], profile: Profile | None, sensitivity: Sensitivity | None
) -> Verification:
    """Train with the first plan; a refuted one gives way to the next.

    Finished branches are kept for a later run, but not of live functions, which have no name.
    """
    return verify_plans(
        run.context,
        plans,
        loss_tolerance=run.settings.loss_tolerance,
        profile=profile,
        sensitivity=sensitivity,
        state_dir=None if run.is_live else run.settings.out / "branches",
        checkpoint=run.settings.checkpoint,
    )
