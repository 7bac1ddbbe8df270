"""The terminal's table of layers: every layer with its precision, what it gains and costs, and why.

A narrow terminal has the reason below the name, a wide one in a column of its own. A column that
nothing is known for is left out. Equal rows of many blocks are folded into one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from autoprec.report.folding import FoldedRow, fold_rows, total_row, unfolded_rows
from autoprec.report.formats import (
    UNKNOWN,
    count_of,
    shown_ms,
    shown_option,
    shown_ratio,
    shown_share,
)
from autoprec.report.table import LayerRow
from autoprec.report.tables import PRECISION_STYLES, WIDE, Column, cell, new_table, say

FOLD_ABOVE = 40  # layers; more than a screen of rows is folded
MOST_ROWS = 60  # after folding; the rest is in layers.csv
NUMBERS: dict[str, Callable[[FoldedRow], str]] = {
    "ms": lambda row: shown_ms(row.chosen_ms),
    "vs FP32": lambda row: shown_ratio(row.speedup_vs_fp32),
    "vs BF16": lambda row: shown_ratio(row.speedup_vs_bf16_o2),
    "gradient error": lambda row: shown_share(row.grad_error.mean) if row.grad_error else UNKNOWN,
}


@dataclass(frozen=True)
class _Layout:
    """How the table looks on this console, for these rows."""

    console: Console
    is_wide: bool
    numbers: tuple[str, ...]  # of NUMBERS

    def columns(self) -> list[Column]:
        numbers = [Column(name, is_number=True) for name in self.numbers]
        if not self.is_wide:
            return [Column("layer: why", ratio=1), Column("precision"), *numbers]
        first = [Column("layer"), Column("shape"), Column("precision")]
        return [*first, *numbers, Column("why", ratio=1)]

    def cells(self, row: FoldedRow) -> list[Text]:
        name, why = cell(self.console, row.name, "bold"), cell(self.console, row.reason, "dim")
        numbers = [cell(self.console, NUMBERS[number](row)) for number in self.numbers]
        if not self.is_wide:
            both = Text("\n").join((name, why)) if row.reason else name
            return [both, self.option(row), *numbers]
        return [name, cell(self.console, row.first.shape), self.option(row), *numbers, why]

    def total_cells(self, row: FoldedRow) -> list[Text]:
        numbers = [cell(self.console, NUMBERS[number](row)) for number in self.numbers]
        name, empty = cell(self.console, row.name, "bold"), Text("")
        return [name, empty, empty, *numbers, empty] if self.is_wide else [name, empty, *numbers]

    def option(self, row: FoldedRow) -> Text:
        option = row.first.option
        if option is None:
            return Text(UNKNOWN)
        style, text = PRECISION_STYLES[option.precision], shown_option(option)
        lines = [text] if self.is_wide else text.split(" ", 1)
        return Text("\n").join(cell(self.console, line, style) for line in lines)


def print_layers(rows: Sequence[LayerRow], console: Console) -> None:
    """Print the table of layers, with a line of totals."""
    folded = unfolded_rows(rows) if len(rows) <= FOLD_ABOVE else fold_rows(rows)
    shown, total = _longest(folded), total_row(rows)
    layout = _layout(console, (*shown, total))
    table = new_table(layout.columns(), title="Layers")
    for row in shown:
        table.add_row(*layout.cells(row))
    table.add_section()
    table.add_row(*layout.total_cells(total))
    console.print(table, highlight=False)
    if len(shown) < len(folded):
        rest = len(rows) - sum(len(row.rows) for row in shown)
        say(console, f"... and {count_of(rest, 'layer')} that take less time; see layers.csv")


def _layout(console: Console, rows: Sequence[FoldedRow]) -> _Layout:
    is_wide = console.width >= WIDE
    known = [name for name, show in NUMBERS.items() if any(show(row) != UNKNOWN for row in rows)]
    numbers = tuple(name for name in known if is_wide or name != "ms")
    return _Layout(console, is_wide, numbers)


def _longest(rows: Sequence[FoldedRow]) -> list[FoldedRow]:
    """Return the rows that take the most time, at most MOST_ROWS, in model order."""
    by_time = sorted(range(len(rows)), key=lambda at: rows[at].chosen_ms or 0.0, reverse=True)
    return [rows[at] for at in sorted(by_time[:MOST_ROWS])]
