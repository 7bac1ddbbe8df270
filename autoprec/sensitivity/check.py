"""The table against itself: sums of its rows beside joint measurements, both ways.

FP8 wherever it goes, in the least precise recipe of each layer, sets the table's scale. Where the
sum is not within a factor of two of what was measured, rows are measured one by one, the largest
first, until it is. Where rows of it were measured one by one, their agreement says little of the
others, and the most precise recipe of each layer is compared as well.

A sum may be too high without a wrong row. Errors of several layers cross the same kinks of a ReLU,
and what kinks add grows as the error's size, not its square (see kinks.py): n layers add up to
sqrt(sum F^2) and not to sum F.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprec.records import APPLICABLE_RECIPES, BF16_O2, JointMeasurement, Option
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.local import Cell, partly_fp8
from autoprec.sensitivity.tables import Method, Table, is_whole, refine_table

LEAST, MOST = 0.5, 2.0  # sum over joint measurement; beyond, rows are measured
CHECKED_CELLS = 12  # that are measured at most, a pass each
AT_ONCE = 3


@dataclass(frozen=True)
class Checked:
    """The table, its rows measured where that was needed; `sentence` says what stays outside."""

    table: Table
    joint: tuple[JointMeasurement, ...]
    sentence: str


def check_table(meter: JointMeter, table: Table, *, outside: float) -> Checked:
    """Compare the table with joint measurements; measure rows where they are far apart.

    `outside` is what a plan's error has beside its rows. Costs a pass per batch of the meter for
    each of one or two assignments where they agree, and nothing where no layer takes FP8.
    """
    budget, joint, sentences = CHECKED_CELLS, [], []
    for label, plan in _telling_plans(meter.reference.spec.names, table).items():
        measured = meter.measure(plan)
        cells = tuple(zip(meter.reference.spec.names, plan, strict=True))
        found = _compared(cells, table, outside, measured_error=measured.mean)
        # rows are measured until sum and joint error agree, the joint error is measured once
        asked, left = 0, _unmeasured(cells, table)
        while not LEAST <= found.ratio <= MOST and left and budget:
            chosen = left[: min(AT_ONCE, budget)]
            table = refine_table(meter.reference, table, chosen, batches=1)
            budget, asked = budget - len(chosen), asked + len(chosen)
            found = _compared(cells, table, outside, measured_error=measured.mean)
            left = _unmeasured(cells, table)
        joint.append(
            JointMeasurement(
                label=label,
                options=plan,
                grad_error=measured,
                predicted_grad_error=found.summed,
                overlap=found.overlap,
            )
        )
        if not LEAST <= found.ratio <= MOST:
            after = f", {asked} rows measured one by one" if asked else ""
            sentences.append(
                f"{label.replace('_', ' ')}: {found.ratio:.2g} times the joint error{after}"
            )
        # where measured rows made it agree, the others are still to be looked at
        elif not set(cells) & set(table.refined):
            break
    return Checked(table, tuple(joint), _sentence(sentences))


@dataclass(frozen=True)
class _Compared:
    summed: float
    overlap: float  # of that sum: kinks that are counted more than once
    measured: float

    @property
    def ratio(self) -> float:
        found = self.summed - self.overlap
        return found / self.measured if self.measured > 0.0 else (1.0 if found <= 0.0 else math.inf)


def _compared(
    cells: Sequence[Cell], table: Table, outside: float, *, measured_error: float
) -> _Compared:
    rows = {(row.name, row.option): row.grad_error.mean for row in table.rows}
    # F of each row: the share that the probes found of what is now known of it
    kinks = [table.kinks.get(cell, 0.0) * rows.get(cell, 0.0) for cell in cells]
    summed = outside + math.fsum(rows.get(cell, 0.0) for cell in cells)
    overlap = math.fsum(kinks) - math.hypot(*kinks)
    return _Compared(summed, max(overlap, 0.0), measured_error)


def _telling_plans(names: Sequence[str], table: Table) -> dict[str, tuple[Option, ...]]:
    """Return FP8 wherever it goes, in the least precise whole recipe and in the most precise."""
    along = partly_fp8((row.name, row.option) for row in table.rows)
    applied = (row for row in table.rows if row.option.recipe in APPLICABLE_RECIPES)
    fp8 = [row for row in applied if (row.name, row.option) not in along]
    ranked = sorted(fp8, key=lambda row: -row.grad_error.mean)
    # the last of each layer stays
    best = {row.name: row.option for row in ranked}
    worst = {row.name: row.option for row in reversed(ranked) if is_whole(row.option)}
    plans = {"fp8_least_precise": {**best, **worst}, "fp8_most_precise": best}
    found: dict[str, tuple[Option, ...]] = {}
    for label, chosen in plans.items() if fp8 else ():
        plan = tuple(chosen.get(name, BF16_O2) for name in names)
        if plan not in found.values():
            found[label] = plan
    return found


def _unmeasured(cells: Sequence[Cell], table: Table) -> list[Cell]:
    """Return the FP8 cells of a plan that were only probed, whole recipes and large ones first."""
    if table.method is Method.LAYERWISE:
        return []
    rows: Mapping[Cell, float] = {(r.name, r.option): r.grad_error.mean for r in table.rows}
    left = [cell for cell in cells if cell[1].is_fp8 and cell not in table.refined]
    return sorted(left, key=lambda cell: (not is_whole(cell[1]), -rows.get(cell, 0.0)))


def _sentence(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return (
        "the table of gradient errors is off by more than a factor of two where its sum was "
        f"measured jointly ({'; '.join(sentences)}): an error from the table is no more than a "
        "guess here, trust those that were measured"
    )
