"""The stage: a workload and its model spec -> Sensitivity."""

import contextlib
import time
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from autoprec import __version__
from autoprec.progress import Progress, report_nothing
from autoprec.records import (
    BF16_O2,
    FP32,
    Estimate,
    JointMeasurement,
    LayerSensitivity,
    LayerSpec,
    ModelSpec,
    Option,
    Sensitivity,
)
from autoprec.sensitivity.estimates import DIVERGED_E, gradient_noise, ratio_estimate
from autoprec.sensitivity.joint import DEFAULT_BATCHES, DEFAULT_WARMUP_STEPS, JointMeter
from autoprec.sensitivity.layerwise import Cell, measure_layerwise
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.workload import Workload


class Method(StrEnum):
    """How the table is measured; `auto` takes the cheaper one."""

    AUTO = "auto"
    LAYERWISE = "layerwise"
    SIGN_CODED = "sign_coded"


def measure_sensitivity(
    workload: Workload,
    spec: ModelSpec,
    *,
    device: torch.device,
    options: Sequence[Option] | None = None,
    batches: int = DEFAULT_BATCHES,
    warmup_steps: int = DEFAULT_WARMUP_STEPS,
    method: str = Method.AUTO,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress = report_nothing,
    reference: Reference | None = None,
) -> Sensitivity:
    """Measure the gradient perturbation of every layer x option, with standard errors.

    Args:
        workload: whose model, batches, loss and optimizer are measured.
        spec: the captured model; its layers' options are the columns of the table.
        device: where to run. Numerics of FP8 are the same on a CPU.
        options: the FP8 options to measure; default: all that the spec's layers list.
        batches: to measure on, at least two; they follow the warm-up's in the stream.
        warmup_steps: FP32 steps before measuring, for the optimizer's state and the loss curve.
        method: `layerwise`, `sign_coded` or `auto`.
        checkpoint: start from this state dict instead of fresh weights.
        seed: of weights, batches and dropout.
        progress: told what is going on.
        reference: one that is prepared already; the four arguments about it are then not used.
    """
    started = time.perf_counter()
    prepared = reference or prepare_reference(
        workload,
        spec,
        device=device,
        batches=batches,
        warmup_steps=warmup_steps,
        checkpoint=checkpoint,
        seed=seed,
        progress=progress,
    )
    cells = list_cells(spec, options)
    rows, baselines = measure_layerwise(prepared, cells, progress=progress)
    meter = JointMeter(workload, spec, device=device, reference=prepared)
    flow = meter.measure_flow()
    joint = measure_uniform(meter, spec, rows, flow=flow)
    prepared_s = 0.0 if reference is None else reference.spent_s
    spent_s = time.perf_counter() - started + prepared_s
    return Sensitivity(
        structure=spec.structure,
        reference=FP32,
        method=Method.LAYERWISE,
        preconditioner=prepared.preconditioner.name,
        batches=len(prepared.batches),
        passes=prepared.passes,
        step_equivalents=spent_s / prepared.step_s,
        warmup_steps=prepared.warmup_steps,
        checkpoint=prepared.checkpoint,
        seed=prepared.seed,
        rows=rows,
        flow=flow,
        floor=measure_floor(prepared),
        statistics=(),
        joint=joint,
        loss_curve=prepared.loss_curve,
        gradient_noise=gradient_noise(
            [b.sketch for b in baselines], [b.squared for b in baselines]
        ),
        software=_software(),
        notes=tuple(_notes(prepared, rows)),
    )


def list_cells(spec: ModelSpec, options: Sequence[Option] | None) -> list[Cell]:
    """Return what to measure: each called layer in each of its options but FP32."""
    return [
        (layer.name, option)
        for layer in spec.layers
        if layer.calls
        for option in layer.options
        if option != FP32 and (options is None or not option.is_fp8 or option in options)
    ]


def measure_floor(reference: Reference) -> Estimate:
    """Return the e between two runs of the reference on one batch; 0 when deterministic."""
    baseline = reference.baseline(0)
    return ratio_estimate([reference.perturbation(0, baseline).squared], [baseline.squared])


def measure_uniform(
    meter: JointMeter, spec: ModelSpec, rows: Sequence[LayerSensitivity], *, flow: Estimate
) -> tuple[JointMeasurement, ...]:
    """Measure the uniform plans as they would run, beside the sums of their parts."""
    table = {(row.name, row.option): row.e.mean for row in rows}
    fp8 = dict.fromkeys(row.option for row in rows if row.option.is_fp8)
    measured = []
    for option in (BF16_O2, *fp8):
        plan = tuple(_wherever_eligible(layer, option, table) for layer in spec.layers)
        predicted = flow.mean + sum(
            table.get((name, chosen), 0.0) for name, chosen in zip(spec.names, plan, strict=True)
        )
        measured.append(meter.measure_joint(plan, label=option.key, predicted_e=predicted))
    return tuple(measured)


def _wherever_eligible(
    layer: LayerSpec, option: Option, table: dict[tuple[str, Option], float]
) -> Option:
    return option if (layer.name, option) in table else BF16_O2


def _notes(reference: Reference, rows: Sequence[LayerSensitivity]) -> list[str]:
    notes = [reference.preconditioner.note] if reference.preconditioner.note else []
    diverged = [f"{row.name} {row.option.key}" for row in rows if row.e.mean >= DIVERGED_E]
    if diverged:
        notes.append(f"gradients are not finite (e is set to {DIVERGED_E:g}): {diverged}")
    return notes


def _software() -> dict[str, str]:
    found = {"autoprec": __version__, "torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):
        found["torchao"] = version("torchao")
    return found
