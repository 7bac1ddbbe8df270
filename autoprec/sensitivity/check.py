"""The table against itself: the sum of a plan's rows beside its joint measurement, both ways.

FP8 wherever it goes, each layer in the first recipe that it can run, sets the table's scale. Where
the sum is not within a factor of two of what was measured, rows are measured one by one, the
largest first, until it is near: of a table that was so far off, what is left is no better.

A sum may be off without a wrong row. Errors of several layers cross the same kinks of a ReLU, or
change the same choices, and what these add grows as the error's size, not its square (see
kinks.py): n layers add up to sqrt(sum F^2) and not to sum F. And where the response has few
dimensions, errors of layers have a sign: they cancel, or add up to more than their squares.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autoprec.common.text import significant
from autoprec.records import BF16_O2, Estimate, JointMeasurement
from autoprec.sensitivity.doubts import forward_casts, on_their_own, scatter
from autoprec.sensitivity.islands import TOO_COARSE
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.local import Cell
from autoprec.sensitivity.reference import Reference
from autoprec.sensitivity.tables import SPREAD, Method, Table, multiplied, refine_table

MOST = 2.0  # sum over joint measurement, or the other way; beyond, rows are measured
NEAR = 1.25  # and then until it is within this
CHECKED_PASSES = 12  # that measure rows at most
AT_ONCE = 3


@dataclass(frozen=True)
class Checked:
    """The table, its rows measured where that was needed; `sentence` says what stays outside."""

    table: Table
    joint: tuple[JointMeasurement, ...]
    sentence: str


def check_table(meter: JointMeter, table: Table, *, outside: float) -> Checked:
    """Compare the table with a joint measurement; measure rows where they are far apart.

    `outside` is what a plan's error has beside its rows. Costs a pass per batch of the reference
    where they agree, and nothing where no layer takes FP8.
    """
    reference, names = meter.reference, meter.reference.spec.names
    fp8 = on_their_own(table.rows)
    if not fp8:
        return Checked(table, (), "")
    first = {row.name: row.option for row in reversed(fp8)}  # the first of each layer stays
    plan = tuple(first.get(name, bf16) for name, bf16 in reference.spec.bf16_options.items())
    every = len(reference.batches)
    measured = meter.measure(plan, batches=every)
    cells = tuple(zip(names, plan, strict=True))
    found, asked = _compared(cells, table, outside, measured), 0
    left = _unmeasured(cells, table)
    while (
        _is_off(found, NEAR if asked else MOST) and left and (asked + 1) * every <= CHECKED_PASSES
    ):
        chosen = left[: min(AT_ONCE, CHECKED_PASSES // every - asked)]
        table, asked = refine_table(reference, table, chosen, batches=every), asked + len(chosen)
        found, left = _compared(cells, table, outside, measured), left[len(chosen) :]
    sentence = _sentence(_ratio(found), asked, left) if _is_off(found) else _single_rows(table)
    return Checked(table, (found,), sentence)


def measure_bf16(reference: Reference, table: Table, joint: Estimate) -> Table:
    """Return a table whose largest BF16 rows are measured one by one where they are in doubt.

    That is where their sum is too high for a joint error which may cost layers their BF16: which
    layers these are, guesses that `bf16_within` cuts to one size do not say.
    """
    own, summed = _bf16_rows(table)
    if joint.mean < TOO_COARSE or table.method is Method.LAYERWISE or summed <= MOST * joint.mean:
        return table
    left = sorted(own.keys() - set(table.refined), key=lambda cell: -own[cell])
    batches = len(reference.batches) if len(left) * len(reference.batches) <= CHECKED_PASSES else 1
    found = refine_table(reference, table, left[:CHECKED_PASSES], batches=batches)
    return replace(found, tested=table.tested)  # how far BF16's are off says nothing of FP8's


def bf16_within(table: Table, joint: Estimate) -> Table:
    """Return a table whose BF16 rows add up to no more than MOST times their joint error.

    What kinks and choices add to errors as small as BF16's the probes guess from larger ones. So
    the largest rows are cut to one size, at which the sum is the joint error.
    """
    own, counted = _bf16_rows(table)
    if table.method is Method.LAYERWISE or counted <= MOST * joint.mean:
        return table
    cut, left = math.inf, joint.mean * math.fsum(own.values()) / counted
    for place, value in enumerate(sorted(own.values())):
        cut = left / (len(own) - place)
        if value >= cut:
            break
        left -= value
    high = {cell for cell, value in own.items() if value > cut} - set(table.refined)
    rows = (multiplied(r, cut / own[r.cell]) if r.cell in high else r for r in table.rows)
    return replace(table, rows=tuple(rows))


def _bf16_rows(table: Table) -> tuple[dict[Cell, float], float]:
    """Return the error of each layer in BF16, and of all."""
    own = {row.cell: row.grad_error.mean for row in table.rows if row.option == BF16_O2}
    # choices whole: most of BF16's are guesses, and a search adds rows up
    summed, overlap = _summed(list(own), table, table.kinks)
    return own, summed - overlap


def _summed(
    cells: Sequence[Cell], table: Table, *added_by: Mapping[Cell, float]
) -> tuple[float, float]:
    """Return the sum of rows, and what kinks or choices that several of them change are less."""
    rows, shared = table.errors, 0.0
    for shares in added_by:
        # F of each row: the share that the probes found of what is now known of it
        added = [shares.get(cell, 0.0) * rows.get(cell, 0.0) for cell in cells]
        shared += max(math.fsum(added) - math.hypot(*added), 0.0)
    return math.fsum(rows.get(cell, 0.0) for cell in cells), shared


def _single_rows(table: Table) -> str:
    """Return that single rows are guesses, where what was measured says so.

    Of probes that is how far they are from it, of a table that was measured whole its batches.
    """
    known = {(name, forward_casts(option)) for name, option in table.exact}
    fp8 = on_their_own(table.rows)
    is_whole_table = table.method is Method.LAYERWISE
    if is_whole_table or known.issuperset((r.name, forward_casts(r.option)) for r in fp8):
        apart = scatter([row for row in fp8 if is_whole_table or row.cell in table.exact])
        which = "its batches differ"
    else:
        apart, which = table.spread, f"probes miss the {len(table.tested)} measured rows"
    if apart < SPREAD:
        return ""
    return (
        f"the table of gradient errors holds in sum, not layer by layer ({which} by a factor of "
        f"{significant(math.exp(apart), 2)}): trust measured plans"
    )


def _compared(
    cells: Sequence[Cell], table: Table, outside: float, measured: Estimate
) -> JointMeasurement:
    total, overlap = _summed(cells, table, table.kinks, table.choices)
    return JointMeasurement(
        label="fp8_everywhere",
        options=tuple(option for _, option in cells),
        grad_error=measured,
        predicted_grad_error=outside + total,
        overlap=overlap,
    )


def _ratio(joint: JointMeasurement) -> float:
    found, measured = joint.predicted_grad_error - joint.overlap, joint.grad_error.mean
    return found / measured if measured > 0.0 else (1.0 if found <= 0.0 else math.inf)


def _is_off(joint: JointMeasurement, most: float = MOST) -> bool:
    return not 1.0 / most <= _ratio(joint) <= most


def _unmeasured(cells: Sequence[Cell], table: Table) -> list[Cell]:
    """Return the FP8 cells of a plan that were only probed, whole recipes and large ones first."""
    if table.method is Method.LAYERWISE:
        return []
    rows = table.errors
    left = [cell for cell in cells if cell[1].is_fp8 and cell not in table.refined]
    return sorted(left, key=lambda cell: (not cell[1].is_whole_fp8, -rows.get(cell, 0.0)))


def _sentence(ratio: float, asked: int, left: Sequence[Cell]) -> str:
    if not left:
        why = "cancel" if ratio > 1.0 else "add up to more than their squares"
        why = f" (errors of layers {why})"
    else:
        why = f" ({asked} rows measured)" if asked else ""
    return (
        f"the table of gradient errors is a guess: {significant(ratio, 3)} times the joint error "
        f"of FP8 wherever it goes{why}; trust measured plans"
    )
