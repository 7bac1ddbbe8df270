"""The frame of layers as a table of texts; many equal rows as one: `blocks.{0-31}.qkv (x32)`.

Rows fold when their names differ in numbers only and their kind, shape and option agree. Times,
bytes and gradient errors of a folded row are sums, so that a folded table has the totals of the
unfolded one. A narrow terminal has the reason below the name, a wide one in a column of its own. A
column that nothing is known for is left out.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from autoprec.records import Option
from autoprec.report import formats
from autoprec.report.formats import and_more
from autoprec.report.layer_frame import BASELINES, COLUMNS, Row, View, columns_of, frame_rows
from autoprec.report.text_table import STYLES, Cell, Line, Part, Table

if TYPE_CHECKING:
    import pandas as pd

FOLD_ABOVE = 40  # layers; more than a screen of rows is folded
MOST_ROWS = 60  # after folding; the rest is in layers.csv
WIDE_FROM = 124  # columns from which reasons get a column of their own
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of the name: blocks.7.fc1, not fc1


def layers_parts(frame: "pd.DataFrame", width: int) -> list[Part]:
    """Return the table of layers for a terminal of that width, with a line of totals."""
    view = View.WIDE if width >= WIDE_FROM else View.NARROW
    folded = fold_layers(frame) if len(frame) > FOLD_ABOVE else frame.assign(layers=1)
    longest = folded.sort_values("total_ms", ascending=False, kind="stable").head(MOST_ROWS)
    shown, total = frame_rows(longest.sort_index()), total_row(frame)
    columns = columns_of(view, [*shown, total])
    rows = []
    for row in (*shown, total):
        cells: dict[str, Cell] = {column.name: column.show(row[column.name]) for column in columns}
        name, why = Line(row["name"], "bold"), Line(row["reason"] or "", "dim")
        cells["name"] = (name, why) if view is View.NARROW and why.text else name
        cells["reason"] = why
        if row["option"]:  # in the colour of its precision
            option = Option.parse(row["option"])
            text, style = formats.option(option), STYLES[option.precision]
            lines = text.split(" ", 1) if view is View.NARROW else [text]
            cells["option"] = tuple(Line(line, style) for line in lines)
        rows.append([cells[column.name] for column in columns])
    heads = [column.title for column in columns]
    if view is View.NARROW:
        heads[0] = "layer: why"
    numbers = [index for index, column in enumerate(columns) if column.is_number]
    widest = 0 if view is View.NARROW else len(columns) - 1
    rest = len(frame) - sum(row["layers"] for row in shown)
    return [
        Line("Layers", "bold"),
        Table(heads, rows, numbers, widest, has_total=True),
        *map(Line, and_more(rest, "layer", " that take less time; see layers.csv")),
    ]


def fold_layers(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return the rows with equal ones folded, in the order of each group's first layer.

    The column `layers` says how many layers a row stands for.
    """
    alike = [frame["name"].str.replace(_NUMBER, "{}", regex=True), "kind", "shape", "option"]
    groups = frame.groupby(alike, sort=False, dropna=False).ngroup()
    folded = _summed(frame, groups)
    for column, common in (("name", _common_name), ("reason", _common_reason)):
        folded[column] = [common(list(texts)) for _, texts in frame[column].groupby(groups)]
    return folded


def fold_names(names: Iterable[str]) -> list[str]:
    """Return names, those that differ in numbers only as one: `blocks.{0-31}.qkv (x32)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub("{}", name), []).append(name)
    return [_common_name(alike) for alike in groups.values()]


def total_row(frame: "pd.DataFrame") -> Row:
    """Return all rows as one: sums, and the speedups of the sums."""
    import pandas as pd

    summed = _summed(frame, pd.Series(0, index=frame.index))
    (row,) = frame_rows(summed) or [dict.fromkeys(frame.columns)]
    untimed = int(frame["total_ms"].fillna(frame["bf16_o2_total_ms"]).isna().sum())
    about = dict.fromkeys(("shape", "option", "reason", "type"), "")
    return row | about | {"name": f"all {len(frame)} layers", "untimed": untimed}


def _summed(frame: "pd.DataFrame", groups: "pd.Series[int]") -> "pd.DataFrame":
    """Return one row per group: its sums, and of other columns the first value that is known."""
    grouped = frame.groupby(groups)
    folded = grouped.first()
    sums = [column.name for column in COLUMNS if column.is_sum]
    folded[sums] = grouped[sums].sum(min_count=1)
    # a ratio is that of the sums over the layers that both times are known of
    for label in BASELINES:
        pair = frame[[f"{label}_total_ms", "total_ms"]].dropna()
        both = pair.groupby(groups).sum()
        own_ms = both["total_ms"]
        folded[f"speedup_vs_{label}"] = both[f"{label}_total_ms"] / own_ms.where(own_ms > 0.0)
    squares = frame["grad_error_stderr"].pow(2).groupby(groups)
    folded["grad_error_stderr"] = squares.agg(lambda each: each.sum(skipna=False)).pow(0.5)
    folded["layers"] = grouped.size()
    return folded


def _common_name(names: Sequence[str]) -> str:
    """Return one name, with ranges for the numbers that differ, and the number of layers."""
    if len(names) == 1:
        return names[0]
    numbers = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    values = [sorted({int(number) for number in column}) for column in numbers]
    shown = iter(map(_ranges, values))
    name, covered = _NUMBER.sub(lambda _: next(shown), names[0]), math.prod(map(len, values))
    count = f"x{len(names)}" if covered == len(names) else f"{len(names)} of {covered}"
    return f"{name} ({count})"


def _ranges(numbers: Sequence[int]) -> str:
    """Return `{0,2-5}` for 0, 2, 3, 4, 5; a single number as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    # consecutive numbers are those that differ from their positions by the same
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    parts = []
    for _, pairs in runs:
        first, *others = (number for _, number in pairs)
        parts.append(f"{first}-{others[-1]}" if others else f"{first}")
    return f"{{{','.join(parts)}}}"


def _common_reason(reasons: Sequence[str]) -> str:
    """Return the reason, or the most frequent one where they differ."""
    ((reason, count),) = Counter(reasons).most_common(1)
    return reason if count == len(reasons) else f"e.g. {reason}"
