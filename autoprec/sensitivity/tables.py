"""The two ways to the same table, and the choice between them.

layerwise     exact: one layer x option at a time, everything else FP32
sign_coded    all of them from a few probes; the few that these leave in doubt, exactly
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import nn

from autoprec.errors import PlanMismatchError
from autoprec.records import (
    FP32,
    Estimate,
    LayerSensitivity,
    LayerSpec,
    ModelSpec,
    OperandStatistics,
    Option,
    Recipe,
)
from autoprec.runtime import install_options
from autoprec.sensitivity.delayed import emulated_layer
from autoprec.sensitivity.operands import operand_statistics
from autoprec.sensitivity.probes import probe_batches
from autoprec.sensitivity.reference import Reference
from autoprec.sensitivity.rows import make_rows

PROBED_PASSES = 8  # what probing a batch takes, in passes (char GPT, 3 recipes, CPU)
LAYERS_PER_PROBE = 16  # in deep models layers are alike: their order takes more probes
MOST_PROBES = 9  # per batch; 101 linears: 4 found 21 of the top 25 of a recipe, 9 found 23
REFINED_SHARE = 0.05  # a standard error above this part of its option's sum is not left at that
REFINED_CELLS = 3  # of these the LM head takes one per recipe
REFINED_BATCHES = 2
# Probes are linear in a layer's error. A healthy layer has a gradient error below 0.3 %; in layers
# with 1 % and more in some option (planted outliers, on a GPT), the exact one was 1 to 25 times as
# large.
LARGE_ERROR = 0.01
LARGE_CELLS = 24

Cell = tuple[str, Option]  # a layer's name and an option of it other than FP32


class Method(StrEnum):
    """How the table is measured."""

    LAYERWISE = "layerwise"
    SIGN_CODED = "sign_coded"


@dataclass(frozen=True)
class Table:
    """The rows and what came out beside them."""

    method: Method
    rows: tuple[LayerSensitivity, ...]
    statistics: tuple[OperandStatistics, ...]
    refined: tuple[Cell, ...] = ()


def list_cells(spec: ModelSpec, options: Sequence[Option] | None) -> list[Cell]:
    """Return what to measure: every layer in each of its options but FP32.

    `options` limits the FP8 recipes; `delayed` is added to every layer that takes FP8 at all.
    """
    return [
        (layer.name, option)
        for layer in spec.layers
        for option in _layer_options(layer, options)
        if option != FP32
    ]


def make_table(reference: Reference, cells: Sequence[Cell], method: Method | None = None) -> Table:
    """Measure all cells, by the method that takes fewer passes unless one is given."""
    if method is None:
        method = Method.LAYERWISE if len(cells) < PROBED_PASSES else Method.SIGN_CODED
    if method is Method.LAYERWISE:
        return _layerwise_table(reference, cells)
    return _sign_coded_table(reference, cells)


def _layerwise_table(reference: Reference, cells: Sequence[Cell]) -> Table:
    """Measure every cell on its own."""
    found = _exact_errors(
        reference, cells, batches=len(reference.batches), stage="sensitivity: layer by layer"
    )
    return Table(
        method=Method.LAYERWISE,
        rows=tuple(LayerSensitivity(name=n, option=o, grad_error=found[n, o]) for n, o in cells),
        statistics=tuple(operand_statistics(reference, _fp8_by_layer(cells))),
    )


def _sign_coded_table(reference: Reference, cells: Sequence[Cell]) -> Table:
    """Measure all cells with probes, then the few that these leave in doubt one by one."""
    count = min(max(len(reference.spec.layers) // LAYERS_PER_PROBE, 1), MOST_PROBES)
    probes = probe_batches(reference, _fp8_by_layer(cells), probes=count)
    rows = {(row.name, row.option): row for row in make_rows(probes, cells)}
    large = large_cells(tuple(rows.values()))
    refined = (*large, *(c for c in uncertain_cells(tuple(rows.values())) if c not in large))
    batches = min(REFINED_BATCHES, len(reference.batches))
    exact: dict[Cell, Estimate] = {}
    if refined:
        exact = _exact_errors(
            reference, refined, batches=batches, stage="sensitivity: largest rows"
        )
    rows |= {cell: _refined(rows[cell], exact[cell]) for cell in refined}
    return Table(
        method=Method.SIGN_CODED,
        rows=tuple(rows.values()),
        statistics=probes[0].statistics,
        refined=refined,
    )


def large_cells(rows: Sequence[LayerSensitivity]) -> tuple[Cell, ...]:
    """Return the FP8 cells of layers whose error is too large for probes to be linear in it.

    The most precise come first: a plan may still choose them.
    """
    fp8 = [row for row in rows if row.option.is_fp8]
    broken = {row.name for row in fp8 if row.grad_error.mean > LARGE_ERROR}
    large = sorted((r for r in fp8 if r.name in broken), key=lambda row: row.grad_error.mean)
    return tuple((row.name, row.option) for row in large[:LARGE_CELLS])


def uncertain_cells(rows: Sequence[LayerSensitivity]) -> tuple[Cell, ...]:
    """Return the cells whose standard error matters for their option's sum, worst first."""
    sums: dict[Option, float] = {}
    for row in rows:
        sums[row.option] = sums.get(row.option, 0.0) + max(row.grad_error.mean, 0.0)
    doubts = {
        (row.name, row.option): (row.grad_error.stderr or 0.0) / sums[row.option]
        for row in rows
        if row.option.is_fp8 and sums[row.option] > 0.0
    }
    worst = sorted(doubts, key=lambda cell: -doubts[cell])[:REFINED_CELLS]
    return tuple(cell for cell in worst if doubts[cell] > REFINED_SHARE)


def _exact_errors(
    reference: Reference, cells: Sequence[Cell], *, batches: int, stage: str
) -> dict[Cell, Estimate]:
    """Return the gradient error of every cell on the first `batches`."""
    settings = {cell: partial(_installed, reference, *cell) for cell in cells}
    return reference.measure_errors(settings, batches=batches, stage=stage)


def _installed(reference: Reference, name: str, option: Option) -> AbstractContextManager[object]:
    """Run one layer in one option inside, the others and all activations in FP32."""
    if option.recipe is not Recipe.DELAYED:
        return install_options(reference.model, {name: option}, activation_dtype=torch.float32)
    layer = reference.model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise PlanMismatchError(
            f"{option.key} is for nn.Linear, but {name!r} is {type(layer).__name__}; leave it out"
        )
    return emulated_layer(layer, option, reference.history.get(name, {}))


def _refined(probed: LayerSensitivity, exact: Estimate) -> LayerSensitivity:
    """Return a row with its exact gradient error; its GEMMs keep their proportions."""
    ratio = exact.mean / probed.grad_error.mean
    by_gemm = {
        gemm: Estimate(
            mean=part.mean * ratio, stderr=None if part.stderr is None else part.stderr * ratio
        )
        for gemm, part in probed.by_gemm.items()
    }
    return probed.model_copy(update={"grad_error": exact, "by_gemm": by_gemm})


def _layer_options(layer: LayerSpec, options: Sequence[Option] | None) -> list[Option]:
    if options is None:
        return list(layer.options)
    recipes = {option.recipe for option in options}
    chosen = [o for o in layer.options if not o.is_fp8 or o.recipe in recipes]
    takes_fp8 = any(option.is_fp8 for option in layer.options)
    extra = [o for o in options if o.recipe is Recipe.DELAYED and takes_fp8]
    return chosen + [option for option in extra if option not in chosen]


def _fp8_by_layer(cells: Sequence[Cell]) -> Mapping[str, list[Option]]:
    found: dict[str, list[Option]] = {}
    for name, option in cells:
        if option.is_fp8:
            found.setdefault(name, []).append(option)
    return found
