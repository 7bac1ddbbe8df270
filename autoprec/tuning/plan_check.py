"""A plan file, a workload and a device -> whether the plan can be trusted there, check by check."""

import functools
from pathlib import Path

import torch

from autoprec.device.fp8 import fp8_self_test, fp8_support
from autoprec.device.local import resolve_device
from autoprec.errors import PlanMismatchError
from autoprec.records import APPLICABLE_RECIPES, Check, Plan, PlanCheck, Precision, Verdict
from autoprec.report.promise import Promise
from autoprec.runtime import apply, check_applied
from autoprec.sensitivity.gemm import fast_gemms
from autoprec.workload.functions import Workload, take_batches
from autoprec.workload.loading import load_workload


def check_plan(plan: Path, *, model: str, target: str) -> PlanCheck:
    """Check that a plan file is valid, and with a workload that it fits and is what runs.

    Without a `model` (`model.py` or `model.py:name`) only the file and the target's FP8 are looked
    at. What cannot be read or is not here is an AutoprecError, no check that failed.
    """
    loaded = Plan.load(plan)
    device = resolve_device(target)
    counts = ", ".join(f"{loaded.count(p)} {p}" for p in Precision if loaded.count(p))
    checks = [Check(name="file", is_good=True, detail=f"{len(loaded.layers)} layers: {counts}")]
    if proof := loaded.certificate:
        promise = Promise.of(proof, loaded)
        said = f"{promise.words}: {proof.seeds} seeds; {promise.expectation}".removesuffix("; ")
        is_good = proof.verdict is not Verdict.REFUTED
        checks.append(Check(name="certificate", is_good=is_good, detail=said))
    # with a model: does it fit, and is what runs what the plan says
    if model:
        checks += _model_checks(loaded, load_workload(model), device)
    if loaded.count(Precision.FP8_O1):
        checks += _fp8_checks(loaded, device)
    return PlanCheck(plan=str(plan), checks=tuple(checks))


def _model_checks(plan: Plan, workload: Workload, device: torch.device) -> list[Check]:
    model = workload.build_model().to(device)
    batch = take_batches(workload, seed=0, count=1, device=device)[0]
    try:
        apply(plan, model)
    except PlanMismatchError as error:
        return [Check(name="fits the model", is_good=False, detail=str(error))]
    fits = Check(name="fits the model", is_good=True, detail="every layer by name, kind and shape")
    with fast_gemms():
        ran = check_applied(model, batch, loss_fn=workload.loss_fn)
    return [fits, *(c.model_copy(update={"name": f"runs: {c.name or 'the model'}"}) for c in ran)]


def _fp8_checks(plan: Plan, device: torch.device) -> list[Check]:
    """Test the recipes that the plan uses, numerically; on a GPU compiled too, if the plan is."""
    if not fp8_support(device).recipes:
        reason = f"{fp8_support(device).reason}; set these layers to bf16_o2, or use another device"
        return [Check(name="fp8 on this device", is_good=False, detail=reason)]
    used = {layer.recipe for layer in plan.layers}
    recipes = sorted(recipe for recipe in APPLICABLE_RECIPES if recipe in used)
    checks = fp8_self_test(device, recipes=recipes)
    mode = plan.fingerprint.compile_mode
    if device.type != "cpu" and mode not in ("", "eager"):
        compiler = functools.partial(torch.compile, mode=mode)
        checks += fp8_self_test(device, recipes=recipes, compiler=compiler)
    return checks
