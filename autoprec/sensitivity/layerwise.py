"""The exact mode: one layer x option at a time, everything else FP32."""

from collections.abc import Sequence

import torch

from autoprec.progress import Progress
from autoprec.records import LayerSensitivity, Option
from autoprec.runtime import install_options
from autoprec.sensitivity.estimates import bias_estimate, mean_estimate, ratio_estimate
from autoprec.sensitivity.reference import Baseline, Perturbation, Reference

Cell = tuple[str, Option]  # a layer's name and an option of it other than FP32


def measure_layerwise(
    reference: Reference, cells: Sequence[Cell], *, progress: Progress
) -> tuple[tuple[LayerSensitivity, ...], list[Baseline]]:
    """Return one row per cell, and the baselines without their gradients.

    Costs one pass per batch for the reference and one per batch and cell. Batches are the outer
    loop, so that one reference gradient is held at a time.
    """
    samples: dict[Cell, list[Perturbation]] = {cell: [] for cell in cells}
    baselines: list[Baseline] = []
    total = len(reference.batches) * len(cells)
    for index in range(len(reference.batches)):
        baseline = reference.baseline(index)
        for count, cell in enumerate(cells):
            progress("sensitivity: layer by layer", index * len(cells) + count, total)
            samples[cell].append(measure_cell(reference, cell, index=index, baseline=baseline))
        baselines.append(Baseline(baseline.loss, {}, baseline.squared, baseline.sketch))
    progress("sensitivity: layer by layer", total, total)
    scale = [baseline.squared for baseline in baselines]
    return tuple(_row(cell, samples[cell], scale) for cell in cells), baselines


def measure_cell(
    reference: Reference, cell: Cell, *, index: int, baseline: Baseline
) -> Perturbation:
    """Run one batch with one layer in one option, the others FP32 in an FP32 flow."""
    name, option = cell
    with install_options(reference.model, {name: option}, flow=torch.float32):
        return reference.perturbation(index, baseline)


def _row(cell: Cell, samples: Sequence[Perturbation], scale: Sequence[float]) -> LayerSensitivity:
    name, option = cell
    return LayerSensitivity(
        name=name,
        option=option,
        e=ratio_estimate([s.squared for s in samples], scale),
        bias=bias_estimate([s.sketch for s in samples], scale),
        loss_delta=mean_estimate([s.loss_delta for s in samples]),
    )
