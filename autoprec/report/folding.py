"""Many equal rows as one: `blocks.{0-31}.qkv` for 32 layers that got the same answer.

Rows fold when their names differ in numbers only and their kind, shape and option agree. Times and
e of a folded row are sums, so that a folded table has the totals of the unfolded one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoprec.records import Estimate
from autoprec.report.formats import clean_text
from autoprec.report.table import LayerRow, table_totals

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of the name: blocks.7.fc1, not fc1


@dataclass(frozen=True)
class FoldedRow:
    """Rows that are shown as one; `name` covers them all."""

    name: str
    rows: tuple[LayerRow, ...]

    @property
    def first(self) -> LayerRow:
        """The row that comes first in the model."""
        return self.rows[0]

    @property
    def chosen_ms(self) -> float | None:
        """The summed time of the chosen options; None when a row has none."""
        return _all_ms(row.chosen for row in self.rows)

    @property
    def speedup_vs_fp32(self) -> float | None:
        """The summed FP32 time by the summed chosen time."""
        return _ratio(_all_ms(row.fp32 for row in self.rows), self.chosen_ms)

    @property
    def speedup_vs_bf16_o2(self) -> float | None:
        """The summed BF16 O2 time by the summed chosen time."""
        return _ratio(_all_ms(row.bf16_o2 for row in self.rows), self.chosen_ms)

    @property
    def grad_error(self) -> Estimate | None:
        """The summed e; None when a row has none."""
        estimates = [row.grad_error for row in self.rows]
        known = [estimate for estimate in estimates if estimate is not None]
        if not known or len(known) < len(estimates):
            return None
        errors = [estimate.stderr for estimate in known if estimate.stderr is not None]
        stderr = sum(error**2 for error in errors) ** 0.5 if len(errors) == len(known) else None
        return Estimate(mean=sum(estimate.mean for estimate in known), stderr=stderr)

    @property
    def reason(self) -> str:
        """The reason, or the most frequent one where they differ."""
        reasons = Counter(row.reason for row in self.rows)
        reason = reasons.most_common(1)[0][0]
        return reason if len(reasons) == 1 else f"e.g. {reason}"


def unfolded_rows(rows: Sequence[LayerRow]) -> tuple[FoldedRow, ...]:
    """Return every row alone."""
    return tuple(FoldedRow(clean_text(row.name), (row,)) for row in rows)


def fold_rows(rows: Sequence[LayerRow]) -> tuple[FoldedRow, ...]:
    """Return the rows with equal ones folded, in the order of each group's first layer."""
    groups: dict[tuple[object, ...], list[LayerRow]] = {}
    for row in rows:
        pattern = _NUMBER.sub("{}", row.name)
        groups.setdefault((pattern, row.kind, row.shape, row.option), []).append(row)
    return tuple(FoldedRow(_common_name(group), tuple(group)) for group in groups.values())


def total_row(rows: Sequence[LayerRow]) -> FoldedRow:
    """Return all rows as one."""
    return FoldedRow(f"all {table_totals(rows).layers} layers", tuple(rows))


def _common_name(rows: Sequence[LayerRow]) -> str:
    """Return one name, with ranges for the numbers that differ, and the number of layers."""
    if len(rows) == 1:
        return clean_text(rows[0].name)
    columns = list(zip(*(_NUMBER.findall(row.name) for row in rows), strict=True))
    values = [sorted({int(number) for number in column}) for column in columns]
    covered = 1
    for column in values:
        covered *= len(column)
    shown = iter(_ranges(column) for column in values)
    name = _NUMBER.sub(lambda _: next(shown), rows[0].name)
    count = f"x{len(rows)}" if covered == len(rows) else f"{len(rows)} of {covered}"
    return f"{clean_text(name)} ({count})"


def _ranges(numbers: Sequence[int]) -> str:
    """Return `{0,2-5}` for 0, 2, 3, 4, 5; a single number as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{{{','.join(parts)}}}"


def _all_ms(times: Iterable[object]) -> float | None:
    totals = [getattr(each, "total_ms", None) for each in times]
    known = [total for total in totals if total is not None]
    return sum(known) if len(known) == len(totals) else None


def _ratio(first: float | None, second: float | None) -> float | None:
    return first / second if first is not None and second else None
