"""The exact mode: one layer x option at a time, everything else FP32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from autoprec.errors import PlanMismatchError
from autoprec.records import Estimate, Option, Recipe
from autoprec.runtime import install_options
from autoprec.sensitivity.delayed import emulated_layer
from autoprec.sensitivity.estimates import ratio_estimate
from autoprec.sensitivity.gemm import fast_fp8_gemms
from autoprec.sensitivity.reference import Reference

Cell = tuple[str, Option]  # a layer's name and an option of it other than FP32


def measure_cells(
    reference: Reference, cells: Sequence[Cell], *, batches: int, what: str
) -> dict[Cell, Estimate]:
    """Return the gradient error of every cell on the first `batches`; `what` is told as progress.

    Costs one pass per batch for the reference and one per batch and cell. Batches are the outer
    loop, so that one reference gradient is held at a time.
    """
    squared: dict[Cell, list[float]] = {cell: [] for cell in cells}
    scale: list[float] = []
    for index in range(batches):
        gradient = reference.gradient(index)
        scale.append(gradient.squared_norm)
        for count, cell in enumerate(cells):
            reference.context.progress(what, index * len(cells) + count, batches * len(cells))
            with _installed(reference, cell):
                squared[cell].append(reference.squared_error(index, gradient))
    reference.context.progress(what, batches * len(cells), batches * len(cells))
    return {cell: ratio_estimate(squared[cell], scale) for cell in cells}


@contextmanager
def _installed(reference: Reference, cell: Cell) -> Iterator[None]:
    """Run one layer in one option inside, the others and all activations in FP32."""
    name, option = cell
    if option.recipe is not Recipe.DELAYED:
        options = {name: option}
        with (
            install_options(reference.model, options, activation_dtype=torch.float32),
            fast_fp8_gemms(reference.context.device),
        ):
            yield
        return
    layer = reference.model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise PlanMismatchError(
            f"{option.key} is for nn.Linear, but {name!r} is {type(layer).__name__}; leave it out"
        )
    with emulated_layer(layer, option, reference.amax_history(name)):
        yield
