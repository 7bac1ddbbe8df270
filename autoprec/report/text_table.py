"""Lines and tables of text, and how a terminal draws them; the page draws the same tables in HTML.

Every cell becomes a rich `Text`: nothing in a name is markup. Output is ASCII apart from what users
named and from rich's box, which turns ASCII by itself where the terminal cannot show lines.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from autoprec.records import Precision, Verdict
from autoprec.report.formats import UNKNOWN, clean_text

GAP = 2  # columns between those of a table
INDENT = (0, 0, 0, 2)  # of a row's numbers, where they stand below it
NARROWEST = 14  # columns that a text may be folded into
GOOD, BAD = "bold green", "bold red"
STYLES = {
    Precision.FP8_O1: GOOD,
    Precision.BF16_O2: "cyan",
    Precision.FP32: "yellow",
    Verdict.VERIFIED: GOOD,
    Verdict.REFUTED: BAD,
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.NOT_RUN: "dim",
}


@dataclass(frozen=True)
class Line:
    """A paragraph, wrapped at words unless it `is_whole`, to be pasted."""

    text: str
    style: str = ""
    is_whole: bool = False


Cell = str | Line


@dataclass(frozen=True)
class Table:
    """Cells under headings. Columns of `numbers` are right-aligned and never wrapped.

    Where a table is wider than the terminal its longest texts are folded. `has_total`: the last row
    sums the others.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Collection[int] = ()
    has_total: bool = False


Part = Line | Table


def section(title: str) -> list[Part]:
    """Return an empty line and a heading."""
    return [Line(""), Line(title, "bold")]


def notes(texts: Iterable[str]) -> list[Part]:
    """Return the notes that belong to the numbers, line by line."""
    return [Line(f"note: {text}", "dim") for text in texts]


def print_parts(parts: Iterable[Part], console: Console) -> None:
    """Print lines and tables one below the other."""
    for part in parts:
        if isinstance(part, Line):
            console.print(shown_text(part, console), highlight=False, soft_wrap=part.is_whole)
        elif _least_width(part) <= console.width:
            console.print(_rich_table(part, console), highlight=False)
        else:
            for head, numbers in _stacked(part):
                print_parts([head], console)
                if numbers.text:
                    console.print(Padding(shown_text(numbers, console), INDENT), highlight=False)


def _least_width(table: Table) -> int:
    """Return the columns that a table takes if its texts are folded into NARROWEST each."""
    widths = []
    for index, head in enumerate(table.heads):
        cells = (_plain(row[index]) for row in table.rows)
        longest = max(map(len, (*cells, *head.split("\n"))))
        widths.append(longest if index in table.numbers else min(longest, NARROWEST))
    return sum(widths) + GAP * (len(widths) - 1)


def _stacked(table: Table) -> Iterator[tuple[Line, Line]]:
    """Yield two lines a row: what it is about and its texts, then its numbers by their names."""
    for row in table.rows:
        texts, numbers = list[str](), list[str]()
        for i, cell in enumerate(row[1:], start=1):
            text = " ".join(_plain(cell).split())
            if text in ("", UNKNOWN):
                continue
            is_number, head = i in table.numbers, " ".join(table.heads[i].split())
            (numbers if is_number else texts).append(f"{head} {text}" if is_number else text)
        first = row[0] if isinstance(row[0], Line) else Line(_plain(row[0]))
        said = f"{first.text}: {', '.join(texts)}" if texts else first.text
        yield Line(said, first.style), Line(", ".join(numbers))


def _plain(cell: Cell) -> str:
    return cell.text if isinstance(cell, Line) else cell


def _rich_table(table: Table, console: Console) -> RichTable:
    drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for index, head in enumerate(table.heads):
        is_number = index in table.numbers
        drawn.add_column(
            Text(head), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
        )
    for left, row in zip(reversed(range(len(table.rows))), table.rows, strict=True):
        cells = (shown_text(cell, console) for cell in row)
        drawn.add_row(*cells, end_section=table.has_total and left == 1)
    return drawn


def shown_text(cell: Cell, console: Console) -> Text:
    """Return a cell as the console's encoding can show it, hidden characters made visible."""
    line = cell if isinstance(cell, Line) else Line(cell)
    encoding = console.encoding
    shown = clean_text(line.text).encode(encoding, "backslashreplace").decode(encoding)
    return Text(shown, style=line.style)
