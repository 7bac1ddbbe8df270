"""The exact mode: one layer x option at a time, everything else FP32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from autoprec.common.progress import Progress
from autoprec.errors import PlanMismatchError
from autoprec.records import LayerSensitivity, Option, Recipe
from autoprec.runtime import install_options
from autoprec.sensitivity.casts import emulated_linear
from autoprec.sensitivity.estimates import ratio_estimate
from autoprec.sensitivity.gemm import fast_fp8_gemms
from autoprec.sensitivity.reference import Baseline, Reference

Cell = tuple[str, Option]  # a layer's name and an option of it other than FP32


def measure_layerwise(
    reference: Reference, cells: Sequence[Cell], *, progress: Progress
) -> tuple[LayerSensitivity, ...]:
    """Return one row per cell.

    Costs one pass per batch for the reference and one per batch and cell. Batches are the outer
    loop, so that one reference gradient is held at a time.
    """
    samples: dict[Cell, list[float]] = {cell: [] for cell in cells}
    scale: list[float] = []
    total = len(reference.batches) * len(cells)
    for index in range(len(reference.batches)):
        baseline = reference.baseline(index)
        for count, cell in enumerate(cells):
            progress("sensitivity: layer by layer", index * len(cells) + count, total)
            samples[cell].append(measure_cell(reference, cell, index=index, baseline=baseline))
        scale.append(baseline.squared)
    progress("sensitivity: layer by layer", total, total)
    return tuple(make_row(cell, samples[cell], scale) for cell in cells)


def measure_cell(reference: Reference, cell: Cell, *, index: int, baseline: Baseline) -> float:
    """Run one batch with one layer in one option, the others FP32 in an FP32 flow."""
    name, option = cell
    if option.recipe is Recipe.DELAYED:
        with emulated_layer(reference, name, option):
            return reference.squared_error(index, baseline)
    installed = install_options(reference.model, {name: option}, activation_dtype=torch.float32)
    with installed, fast_fp8_gemms(reference.device):
        return reference.squared_error(index, baseline)


def make_row(cell: Cell, samples: Sequence[float], scale: Sequence[float]) -> LayerSensitivity:
    """Return a cell's row from its samples and the |g_ref|^2 of the same batches."""
    name, option = cell
    return LayerSensitivity(
        name=name,
        option=option,
        grad_error=ratio_estimate(samples, scale),
    )


@contextmanager
def emulated_layer(reference: Reference, name: str, option: Option) -> Iterator[None]:
    """Run one linear with emulated casts inside: for what torchao does not have."""
    layer = reference.model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise PlanMismatchError(
            f"{option.key} is for nn.Linear, but {name!r} is {type(layer).__name__}; leave it out"
        )
    run = emulated_linear(option, partial(reference.history.amax, name))
    vars(layer)["forward"] = lambda x: run(x, layer.weight, layer.bias)
    try:
        yield
    finally:
        del vars(layer)["forward"]
