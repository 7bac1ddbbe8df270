"""The stage: a workload and its model spec -> Sensitivity."""

import contextlib
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from autoprec import __version__
from autoprec.common.progress import Progress, report_nothing
from autoprec.records import (
    BF16_O2,
    FP32,
    Estimate,
    JointMeasurement,
    LayerSensitivity,
    ModelSpec,
    Option,
    Recipe,
    Sensitivity,
)
from autoprec.sensitivity.estimates import DIVERGED_E, ratio_estimate
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.reference import (
    DEFAULT_BATCHES,
    DEFAULT_WARMUP_STEPS,
    Reference,
    prepare_reference,
)
from autoprec.sensitivity.tables import (
    Method,
    Table,
    choose_method,
    layerwise_table,
    list_cells,
    sign_coded_table,
)
from autoprec.workload.functions import Workload


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
    passes = 0 if reference is None else reference.passes
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
    chosen = choose_method(method, cells=len(cells))
    if chosen is Method.LAYERWISE:
        table = layerwise_table(prepared, cells, progress=progress)
    else:
        table = sign_coded_table(prepared, spec, cells, progress=progress)
    meter = JointMeter(workload, spec, device=device, reference=prepared)
    flow = meter.measure_flow(table.rows)
    joint = measure_gentlest(meter, spec, table.rows, flow=flow)
    floor = measure_floor(prepared, spec)
    prepared_s = 0.0 if reference is None else reference.spent_s
    spent_s = time.perf_counter() - started + prepared_s
    return Sensitivity(
        structure=spec.structure,
        reference=FP32,
        method=table.method,
        preconditioner=prepared.preconditioner.name,
        batches=len(prepared.batches),
        passes=prepared.passes - passes,
        step_equivalents=spent_s / prepared.step_s,
        warmup_steps=prepared.warmup_steps,
        checkpoint=prepared.checkpoint,
        seed=prepared.seed,
        rows=table.rows,
        activation_error=flow,
        floor=floor,
        statistics=table.statistics,
        joint=joint,
        loss_curve=prepared.loss_curve,
        software=_software(),
        notes=tuple(_notes(prepared, table, floor)),
    )


def measure_floor(reference: Reference, spec: ModelSpec) -> Estimate:
    """Return the e between two runs of the reference on one batch; 0 when deterministic.

    Nothing is run when the capture found that two runs agree bit for bit on this device.
    """
    if spec.is_deterministic and spec.device == str(reference.device):
        return Estimate(mean=0.0)
    baseline = reference.baseline(0)
    return ratio_estimate([reference.squared_error(0, baseline)], [baseline.squared])


def measure_gentlest(
    meter: JointMeter, spec: ModelSpec, rows: Sequence[LayerSensitivity], *, flow: Estimate
) -> tuple[JointMeasurement, ...]:
    """Measure FP8 wherever it goes, each layer in its gentlest recipe, beside the sum of parts.

    It says how far the table adds up. Nothing is measured when no layer takes FP8.
    """
    best: dict[str, LayerSensitivity] = {}
    for row in rows:
        if row.option.is_fp8 and row.option.recipe is not Recipe.DELAYED:
            before = best.get(row.name)
            best[row.name] = (
                row if before is None or row.grad_error.mean < before.grad_error.mean else before
            )
    if not best:
        return ()
    table = {(row.name, row.option): row.grad_error.mean for row in rows}
    plan = tuple(
        best[layer.name].option if layer.name in best else BF16_O2 for layer in spec.layers
    )
    predicted = flow.mean + sum(
        table.get((name, option), 0.0) for name, option in zip(spec.names, plan, strict=True)
    )
    return (meter.measure_joint(plan, label="fp8_gentlest", predicted_grad_error=predicted),)


def _notes(reference: Reference, table: Table, floor: Estimate) -> list[str]:
    notes = [reference.preconditioner.note] if reference.preconditioner.note else []
    if floor.mean > 0.0:
        notes.append(
            f"two runs of the reference differ: no e below {floor.mean:.1e} can be told from noise"
        )
    diverged = [
        f"{row.name} {row.option.key}" for row in table.rows if row.grad_error.mean >= DIVERGED_E
    ]
    if diverged:
        notes.append(f"not finite, so e is set to {DIVERGED_E:g}: {', '.join(diverged)}")
    if table.refined:
        cells = ", ".join(f"{name} {option.key}" for name, option in table.refined)
        notes.append(f"measured one by one after the probes: {cells}")
    if any(row.option.recipe is Recipe.DELAYED for row in table.rows):
        notes.append("delayed scaling is emulated, for comparison; no plan applies it")
    return notes


def _software() -> dict[str, str]:
    found = {"autoprec": __version__, "torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):
        found["torchao"] = version("torchao")
    return found
