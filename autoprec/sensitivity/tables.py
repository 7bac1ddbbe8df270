"""The two ways to the same table, and the choice between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from autoprec.common.progress import Progress
from autoprec.errors import AutoprecError
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
from autoprec.sensitivity.layerwise import Cell, make_row, measure_cell, measure_layerwise
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
# Probes are linear in a layer's error. A healthy layer has e < 0.3 %; in layers where e was 1 % and
# more in some option (planted outliers, on a GPT), the exact e was 1 to 25 times as large.
LARGE_E = 0.01
LARGE_CELLS = 24


class Method(StrEnum):
    """How the table is measured; `auto` takes the cheaper one."""

    AUTO = "auto"
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


def choose_method(method: str, *, cells: int) -> Method:
    """Return the method asked for, or the cheaper one.

    Raises:
        AutoprecError: there is no such method.
    """
    if method not in tuple(Method):
        raise AutoprecError(
            f"the sensitivity method must be one of {', '.join(Method)}, but it is {method!r}"
        )
    if method == Method.AUTO:
        return Method.LAYERWISE if cells < PROBED_PASSES else Method.SIGN_CODED
    return Method(method)


def layerwise_table(reference: Reference, cells: Sequence[Cell], *, progress: Progress) -> Table:
    """Measure every cell on its own."""
    return Table(
        method=Method.LAYERWISE,
        rows=measure_layerwise(reference, cells, progress=progress),
        statistics=tuple(operand_statistics(reference, _fp8_by_layer(cells))),
    )


def sign_coded_table(
    reference: Reference,
    spec: ModelSpec,
    cells: Sequence[Cell],
    *,
    progress: Progress,
) -> Table:
    """Measure all cells with probes, then the few that these leave in doubt one by one."""
    probes = min(max(len(spec.layers) // LAYERS_PER_PROBE, 1), MOST_PROBES)
    fp8 = _fp8_by_layer(cells)
    shows = probe_batches(reference, spec.layers, fp8, probes=probes, progress=progress)
    rows = {(row.name, row.option): row for row in make_rows(shows, cells)}
    large = large_cells(tuple(rows.values()))
    refined = (*large, *(c for c in uncertain_cells(tuple(rows.values())) if c not in large))
    for number, cell in enumerate(refined):
        progress("sensitivity: largest rows", number, len(refined))
        rows[cell] = _refined(reference, cell, rows[cell])
    return Table(
        method=Method.SIGN_CODED,
        rows=tuple(rows.values()),
        statistics=tuple(shows[0].statistics),
        refined=refined,
    )


def large_cells(rows: Sequence[LayerSensitivity]) -> tuple[Cell, ...]:
    """Return the FP8 cells of layers whose error is too large for probes to be linear in it.

    The gentlest come first: a plan may still choose them.
    """
    broken = {row.name for row in rows if row.option.is_fp8 and row.grad_error.mean > LARGE_E}
    cells = {
        (r.name, r.option): r.grad_error.mean for r in rows if r.option.is_fp8 and r.name in broken
    }
    return tuple(sorted(cells, key=lambda cell: cells[cell])[:LARGE_CELLS])


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


def _refined(reference: Reference, cell: Cell, row: LayerSensitivity) -> LayerSensitivity:
    """Measure a cell by itself; the GEMMs keep their proportions."""
    used = range(min(REFINED_BATCHES, len(reference.batches)))
    baselines = [reference.baseline(index) for index in used]
    samples = [
        measure_cell(reference, cell, index=index, baseline=baseline)
        for index, baseline in zip(used, baselines, strict=True)
    ]
    exact = make_row(cell, samples, [baseline.squared for baseline in baselines])
    ratio = exact.grad_error.mean / row.grad_error.mean
    by_gemm = {
        gemm: Estimate(
            mean=part.mean * ratio, stderr=None if part.stderr is None else part.stderr * ratio
        )
        for gemm, part in row.by_gemm.items()
    }
    return exact.model_copy(update={"by_gemm": by_gemm})


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
