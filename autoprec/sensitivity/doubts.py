"""Which rows of the probes are worth a pass of their own."""

import math
from collections.abc import Sequence

from autoprec.records import Gemm, LayerSensitivity, Operand, OperandStatistics, Option
from autoprec.sensitivity.casts import Sides, gemm_casts
from autoprec.sensitivity.estimates import DIVERGED
from autoprec.sensitivity.local import Cell, partly_fp8

# Where the response has few dimensions, two codes differ by more than this part of their mean in
# all rows at once: 0.1 to 0.2 in decoders, 0.4 to 0.7 in a regression of images.
SCATTERED = 0.3
# Probes are linear in a layer's error. A healthy layer has a gradient error below 0.3 %; in layers
# with 1 % and more in some option (planted outliers, on a GPT), the exact one was 1 to 25 times as
# large.
LARGE_ERROR = 0.01
LARGE_CELLS = 24
# Probes add the squares of channels, as if their errors were independent, and take backward for
# the derivative of forward. A step of e4m3 is 1/16 to 1/8 of a value: from a mean of 4 spreads on
# it is half a spread, and channels round alike (an offset of 16: 5 times the probed error). What
# backward scales up again (straight-through estimators, scaled gradients) no probe sees: of a
# recipe that lost 35 % of the gradients 40 to 600 times the probed error.
ALIKE = 4.0  # |mean| / std
LOST = 0.1  # of an operand's values, by underflow
DOUBTFUL_CELLS = 8  # of many, in a deep model


def large_cells(rows: Sequence[LayerSensitivity]) -> tuple[Cell, ...]:
    """Return the FP8 cells of layers whose error is too large for probes to be linear in it.

    The most precise come first: a plan may still choose them.
    """
    fp8 = on_their_own(rows)
    broken = {row.name for row in fp8 if row.grad_error.mean > LARGE_ERROR}
    large = sorted((r for r in fp8 if r.name in broken), key=lambda row: row.grad_error.mean)
    return tuple(row.cell for row in large[:LARGE_CELLS])


def doubtful_cells(
    rows: Sequence[LayerSensitivity], statistics: Sequence[OperandStatistics]
) -> tuple[Cell, ...]:
    """Return the whole recipes whose operands are not what probes assume, at any size of a row."""
    doubts: dict[Cell, float] = {}  # in parts of what makes a cell doubtful
    for row in on_their_own(rows):
        for found in statistics:
            if found.name == row.name and found.operand is not Operand.WEIGHT:
                lost = found.underflow.get(str(row.option.recipe), 0.0) / LOST
                doubt = max((found.mean_over_std or 0.0) / ALIKE, lost)
                doubts[row.cell] = max(doubts.get(row.cell, 0.0), doubt)
    worst = sorted(doubts, key=lambda cell: -doubts[cell])[:DOUBTFUL_CELLS]
    return tuple(cell for cell in worst if doubts[cell] >= 1.0)


def guessed_cells(
    rows: Sequence[LayerSensitivity], *, is_kinked: bool, codes: int = 1
) -> tuple[Cell, ...]:
    """Return one whole recipe of each layer and casts forward, where probes only guess; else none.

    The least certain come first, by their standard errors in parts of the row. Each batch's rows
    are means over so many `codes`, which scatter less than one, and than one rounding to FP8.
    """
    whole = [row for row in on_their_own(rows) if row.grad_error.mean > 0.0]
    if not is_kinked and scatter(whole) * math.sqrt(codes) < SCATTERED:
        return ()
    return one_of_each([row.cell for row in sorted(whole, key=_doubt, reverse=True)])


def _doubt(row: LayerSensitivity) -> float:
    return (row.grad_error.stderr or 0.0) / row.grad_error.mean


def scatter(rows: Sequence[LayerSensitivity]) -> float:
    """Return the root mean square of the rows' relative standard errors."""
    known = [row.grad_error for row in rows if 0.0 < row.grad_error.mean < DIVERGED]
    parts = [(error.stderr or 0.0) / error.mean for error in known]
    return math.hypot(*parts) / math.sqrt(max(len(parts), 1))


def on_their_own(rows: Sequence[LayerSensitivity]) -> list[LayerSensitivity]:
    """Return the FP8 rows that do not go along with another, the whole recipe's."""
    along = partly_fp8(row.cell for row in rows)
    return [row for row in rows if row.option.is_fp8 and row.cell not in along]


def one_of_each(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return the first of the cells of each layer and casts forward: their errors are alike."""
    first: dict[tuple[str, Sides], Cell] = {}
    for name, option in cells:
        first.setdefault((name, forward_casts(option)), (name, option))
    return tuple(first.values())


def forward_casts(option: Option) -> Sides:
    """Return what an option's recipe casts to FP8 forward, or would if it kept no GEMM in BF16."""
    return gemm_casts(option.model_copy(update={"gemms_hp": ()})).get(Gemm.OUTPUT, ())
