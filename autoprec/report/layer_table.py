"""The frame of layers as a table of texts; many equal rows as one: `blocks.{0-31}.qkv (x32)`.

Rows fold when their names differ in numbers only and their kind, shape and option agree. Times,
bytes and gradient errors of a folded row are sums, so that a folded table has the totals of the
unfolded one. A narrow terminal has the reason below the name, a wide one in a column of its own. A
column that nothing is known for is left out.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from autoprec.records import Option
from autoprec.report import formats
from autoprec.report.formats import UNKNOWN, count_of
from autoprec.report.layer_frame import (
    BASELINES,
    COLUMNS,
    Column,
    Row,
    View,
    columns_of,
    frame_rows,
)
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
    folded = frame_rows(fold_layers(frame) if len(frame) > FOLD_ABOVE else frame)
    shown, total = _longest(folded), total_row(frame)
    columns = known_columns(columns_of(view), [*shown, total])
    rows = [_cells(row, columns, view) for row in (*shown, total)]
    heads = [column.title for column in columns]
    if view is View.NARROW:
        heads[0] = "layer: why"
    numbers = [index for index, column in enumerate(columns) if column.is_number]
    widest = 0 if view is View.NARROW else len(columns) - 1
    table = Table(heads, rows, numbers, widest, has_total=True)
    parts: list[Part] = [Line("Layers", "bold"), table]
    if len(shown) < len(folded):
        rest = len(frame) - sum(row.get("layers", 1) for row in shown)
        parts.append(Line(f"... and {count_of(rest, 'layer')} that take less time; see layers.csv"))
    return parts


def known_columns(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Return the columns without the numbers that no row knows."""
    return [
        column
        for column in columns
        if not column.is_number or any(column.show(row[column.name]) != UNKNOWN for row in rows)
    ]


def fold_layers(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return the rows with equal ones folded, in the order of each group's first layer.

    The column `layers` says how many layers a row stands for.
    """
    patterns = (_NUMBER.sub("{}", name) for name in frame["name"])
    alike = zip(patterns, frame["kind"], frame["shape"], frame["option"].fillna(""), strict=True)
    return _summed(frame, list(alike), _common_name)


def total_row(frame: "pd.DataFrame") -> Row:
    """Return all rows as one: sums, and the speedups of the sums."""
    summed = _summed(frame, [0] * len(frame), lambda names: f"all {len(names)} layers")
    (row,) = frame_rows(summed) or [dict.fromkeys(frame.columns)]
    untimed = int(frame["total_ms"].fillna(frame["bf16_o2_total_ms"]).isna().sum())
    about = dict.fromkeys(("shape", "option", "reason", "type"), "")
    return row | about | {"untimed": untimed}


def _summed(
    frame: "pd.DataFrame", keys: Sequence[Hashable], named: Callable[[list[str]], str]
) -> "pd.DataFrame":
    """Return one row per key, in the order in which the keys come; `named` joins their names."""
    import pandas as pd

    codes = {key: code for code, key in enumerate(dict.fromkeys(keys))}
    groups = pd.Series([codes[key] for key in keys], index=frame.index, dtype="int64")
    grouped = frame.groupby(groups)
    folded = grouped.first().reindex(columns=[column.name for column in COLUMNS])
    sums = [column.name for column in COLUMNS if column.is_sum]
    folded[sums] = grouped[sums].sum(min_count=1)
    # a ratio is that of the sums over the layers that both times are known of
    for label in BASELINES:
        pair = frame[[f"{label}_total_ms", "total_ms"]].dropna()
        both = pair.groupby(groups.loc[pair.index]).sum()
        own_ms = both["total_ms"]
        folded[f"speedup_vs_{label}"] = both[f"{label}_total_ms"] / own_ms.where(own_ms > 0.0)
    squares = frame["grad_error_stderr"].pow(2).groupby(groups)
    folded["grad_error_stderr"] = squares.agg(lambda each: each.sum(skipna=False)).pow(0.5)
    folded["layers"] = grouped.size()
    folded["name"] = grouped["name"].agg(lambda names: named(list(names)))
    folded["reason"] = grouped["reason"].agg(lambda reasons: _common_reason(list(reasons)))
    return folded


def _longest(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that take the most time, at most MOST_ROWS, in model order."""
    by_time = sorted(range(len(rows)), key=lambda at: rows[at]["total_ms"] or 0.0, reverse=True)
    return [rows[at] for at in sorted(by_time[:MOST_ROWS])]


def _cells(row: Row, columns: Sequence[Column], view: View) -> list[Cell]:
    """Return a row's cells; its name is bold, its reason dim, its option in its own colour."""
    drawn: dict[str, Cell] = {column.name: column.show(row[column.name]) for column in columns}
    name, why = Line(row["name"], "bold"), Line(row["reason"] or "", "dim")
    drawn["name"] = (name, why) if view is View.NARROW and why.text else name
    drawn["reason"] = why
    drawn["option"] = _option_cell(row["option"], view)
    return [drawn[column.name] for column in columns]


def _option_cell(key: str | None, view: View) -> Cell:
    if not key:
        return UNKNOWN if key is None else ""
    style, text = STYLES[Option.parse(key).precision], formats.option(key)
    lines = text.split(" ", 1) if view is View.NARROW else [text]
    return tuple(Line(line, style) for line in lines)


def _common_name(names: Sequence[str]) -> str:
    """Return one name, with ranges for the numbers that differ, and the number of layers."""
    if len(names) == 1:
        return names[0]
    numbers = list(zip(*(_NUMBER.findall(name) for name in names), strict=True))
    values = [sorted({int(number) for number in column}) for column in numbers]
    covered = 1
    for column in values:
        covered *= len(column)
    shown = iter(_ranges(column) for column in values)
    name = _NUMBER.sub(lambda _: next(shown), names[0])
    count = f"x{len(names)}" if covered == len(names) else f"{len(names)} of {covered}"
    return f"{name} ({count})"


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


def _common_reason(reasons: Sequence[str]) -> str:
    """Return the reason, or the most frequent one where they differ."""
    ((reason, count),) = Counter(reasons).most_common(1)
    return reason if count == len(reasons) else f"e.g. {reason}"
