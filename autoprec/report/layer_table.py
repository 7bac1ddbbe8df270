"""The frame of layers as a table of texts; many equal rows as one: `blocks.{0-31}.qkv (x32)`.

Rows fold when their names differ in numbers only and their kind, shape and option agree. Times,
bytes and gradient errors of a folded row are sums, so that a folded table has the totals of the
unfolded one. A column that nothing is known for is left out.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from autoprec.common.grouping import grouped
from autoprec.records import Basis, Option
from autoprec.report import formats
from autoprec.report.formats import and_more, count_of
from autoprec.report.layer_frame import (
    BASELINES,
    COLUMNS,
    PARTS,
    Row,
    View,
    columns_of,
    frame_rows,
    used_codes,
)
from autoprec.report.text_table import GAP, STYLES, Cell, Line, Part, Table

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 60  # after folding; the rest is in layers.csv
WIDE_FROM = 124  # columns from which shapes and times are shown
ONE_LINE_FROM = 100  # columns from which a row is one line, and long names lose their middle
SHORTEST_NAME = 16
CODE_WIDTH = 12
OPTION_SUMS = [*(f"{part}_ms" for part in (*PARTS, "total")), "p20_ms", "p80_ms"]
OPTION_SUMS += ["samples", "grad_error", "memory_bytes"]
WEAKEST_LAST = (Basis.MEASURED, Basis.TRANSFERRED, Basis.PREDICTED)  # of what has a value
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of the name: blocks.7.fc1, not fc1


class LayerGroup(NamedTuple):
    """Alike layers: their folded row, the rows of each, and every option's sums over them."""

    row: Row
    layers: list[Row]
    options: list[Row]

    @property
    def options_table(self) -> Table:
        """What each option takes, without the columns that nothing is known for."""
        bases = {row["time_basis"] for row in self.options} - {None}
        spread = "p20..p80" if any(row["samples"] for row in self.options) else "80 % interval"
        heads = ["option", *PARTS, "ms", spread, "gradient error", "memory", ""]
        heads[len(PARTS) + 1] += f" ({bases.pop()})" if len(bases) == 1 else ""
        rows = [
            _option_texts(
                row, is_chosen=row["option"] == self.row["option"], with_basis=bool(bases)
            )
            for row in self.options
        ]
        known = [i for i in range(len(heads)) if any(row[i] not in ("-", "") for row in rows)]
        texts = [[row[i] for i in known] for row in rows]
        numbers = [place for place, i in enumerate(known) if 0 < i < len(heads) - 1]
        return Table([heads[i] for i in known], texts, numbers)

    @property
    def layers_table(self) -> Table:
        """Each layer on its own."""
        shown = {"ms": "total_ms", "saved, ms": "saved_vs_bf16_o2_ms"}
        rows = [
            (
                row["name"],
                *(formats.ms(row[column]) for column in shown.values()),
                formats.share(row["grad_error"]),
            )
            for row in self.layers
        ]
        return Table(("layer", *shown, "gradient error"), rows, (1, 2, 3))


def layers_parts(frame: "pd.DataFrame", width: int) -> list[Part]:
    """Return the layers for a terminal of that width, alike ones in one line, and their totals.

    Why a layer has its option is a code, said below; its own sentence where codes are not known.
    """
    folded = fold_layers(frame)
    longest = folded.sort_values("total_ms", ascending=False, kind="stable").head(MOST_ROWS)
    shown, total = frame_rows(longest.sort_index()), total_row(frame)
    columns = columns_of(View.WIDE if width >= WIDE_FROM else View.NARROW, [*shown, total])
    texts = [[column.show(row[column.name]) for column in columns] for row in (*shown, total)]
    heads = [column.title.replace("gradient ", "gradient\n") for column in columns]
    used = used_codes(shown).items()
    below = [Line(f"{code:{CODE_WIDTH}}{said}", "dim") for code, said in used]
    if width >= ONE_LINE_FROM:  # what the other columns leave is the name's
        others = [
            max(len(part) for text in (head, *cells) for part in text.split("\n")) + GAP
            for head, *cells in list(zip(heads, *texts, strict=True))[1:]
        ]
        names = [fitted(row[0], max(width - sum(others) - 1, SHORTEST_NAME)) for row in texts]
        texts = [[name, *rest] for name, (_, *rest) in zip(names, texts, strict=True)]
    rows = [_styled(row, text) for row, text in zip((*shown, total), texts, strict=True)]
    numbers = [index for index, column in enumerate(columns) if column.is_number]
    rest = len(frame) - sum(row["layers"] for row in shown)
    return [
        Line("Layers", "bold"),
        Table(heads, rows, numbers, has_total=True),
        *map(Line, and_more(rest, "layer", " that take less time; see layers.csv")),
        *(below or _sentences(shown)),
    ]


def layer_groups(frame: "pd.DataFrame", options: "pd.DataFrame") -> list[LayerGroup]:
    """Return the folded rows, those that the plan saves most time in first, with what is in them.

    `options` are those of `options_frame`. A sum is None where a layer's own is not known.
    """
    groups = _alike(frame)
    own = options.assign(group=options["name"].map(dict(zip(frame["name"], groups, strict=True))))
    grouped = own.groupby(["group", "option"], sort=False)
    sums, known = grouped[OPTION_SUMS].sum(), grouped[OPTION_SUMS].count()
    summed = sums.where(known.eq(grouped.size(), axis=0)).join(grouped[["infeasible"]].first())
    summed["time_basis"] = _weakest(own["time_basis"], [own["group"], own["option"]])
    summed = summed.reset_index()
    inside = [LayerGroup(row, [], []) for row in frame_rows(fold_layers(frame))]
    for number, row in zip(groups, frame_rows(frame), strict=True):
        inside[number].layers.append(row)
    for row in frame_rows(summed):
        inside[row["group"]].options.append(row)
    return sorted(inside, key=lambda group: saving_order(group.row))


def saving_order(row: Row) -> tuple[float, float]:
    """Return the key that sorts rows by what the plan saves in them, then by BF16 O2's time."""
    saved, base = row["saved_vs_bf16_o2_ms"], row["bf16_o2_total_ms"]
    return (math.inf if saved is None else -saved, -(base or 0.0))


def fitted(name: str, width: int) -> str:
    """Return a name in that many characters, without its middle if it is longer."""
    left = width - 3
    return name if len(name) <= width else f"{name[: left // 3]}...{name[-(left - left // 3) :]}"


def _styled(row: Row, texts: Sequence[str]) -> list[Cell]:
    """Return the cells of a row: its name in bold, its option in the colour of its precision."""
    if not row["option"]:
        return [Line(texts[0], "bold"), *texts[1:]]
    option = Option.parse(row["option"])
    shown, style = formats.option(option), STYLES[option.precision]
    others = (Line(text, style) if text == shown else text for text in texts[1:])
    return [Line(texts[0], "bold"), *others]


def _option_texts(row: Row, *, is_chosen: bool, with_basis: bool) -> list[str]:
    """Return what is shown of one option of a group."""
    spread = formats.interval(row["p20_ms"], row["p80_ms"], formats.ms).replace(" to ", "..")
    basis = row["time_basis"] or "" if with_basis else ""
    return [
        formats.option(row["option"]) + (" (chosen)" if is_chosen else ""),
        *(formats.ms(row[f"{part}_ms"]) for part in (*PARTS, "total")),
        spread,
        formats.share(row["grad_error"]),
        formats.size(row["memory_bytes"]),
        row["infeasible"] or ("not timed" if row["total_ms"] is None else basis),
    ]


def _sentences(rows: Iterable[Row]) -> Iterator[Line]:
    """Yield each reason once, with the layers that have it."""
    names = grouped((row["reason"], row["name"]) for row in rows if row["reason"])
    yield from (Line(f"{', '.join(own)}: {reason}") for reason, own in names.items())


def fold_layers(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return the rows with equal ones folded, in the order of each group's first layer.

    The column `layers` says how many layers a row stands for.
    """
    groups = _alike(frame)
    folded = _summed(frame, groups)
    for column, common in (("name", _common_name), ("reason", _common_reason)):
        folded[column] = [common(list(texts)) for _, texts in frame[column].groupby(groups)]
    return folded


def _alike(frame: "pd.DataFrame") -> "pd.Series[int]":
    """Return the number of each row's group, in the order of the groups' first layers."""
    pattern = frame["name"].str.replace(_NUMBER, "{}", regex=True)
    return frame.groupby(
        [pattern, "kind", "shape", "option", "code"], sort=False, dropna=False
    ).ngroup()


def fold_names(names: Iterable[str]) -> list[str]:
    """Return names, those that differ in numbers only as one: `blocks.{0-31}.qkv (x32)`."""
    groups = grouped((_NUMBER.sub("{}", name), name) for name in names)
    return [_common_name(alike) for alike in groups.values()]


def total_row(frame: "pd.DataFrame") -> Row:
    """Return all rows as one: sums, and the speedups of the sums."""
    import pandas as pd

    summed = _summed(frame, pd.Series(0, index=frame.index))
    (row,) = frame_rows(summed) or [dict.fromkeys(frame.columns)]
    untimed = int(frame["total_ms"].fillna(frame["bf16_o2_total_ms"]).isna().sum())
    about = dict.fromkeys(("shape", "option", "reason", "code", "type"), "")
    return row | about | {"name": f"all {count_of(len(frame), 'layer')}", "untimed": untimed}


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
    for column in ("time_basis", "grad_error_basis"):
        folded[column] = _weakest(frame[column], groups)
    return folded


def _weakest(bases: "pd.Series[str]", by: Any) -> "pd.Series[str]":  # Any: groupby takes it
    """Return the basis of each group's sum: measured only if all of it is."""
    ranks = {basis.value: rank for rank, basis in enumerate(WEAKEST_LAST)}
    return bases.map(ranks).groupby(by, sort=False).max().map(dict(enumerate(ranks)))


def _common_name(names: Sequence[str]) -> str:
    """Return one name, with ranges for the numbers that differ, and the number of layers."""
    if len(names) == 1:
        return names[0] or "(the model itself)"
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
