"""What the terminal tables share. Every cell is a rich `Text`: nothing in a name is markup.

Output is ASCII apart from what users named and from rich's box, which turns ASCII by itself where
the terminal cannot show lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoprec.records import Precision, Verdict
from autoprec.report.formats import clean_text

PRECISION_STYLES = {
    Precision.FP8_O1: "bold green",
    Precision.BF16_O2: "cyan",
    Precision.FP32: "yellow",
}
VERDICT_STYLES = {
    Verdict.VERIFIED: "bold green",
    Verdict.REFUTED: "bold red",
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.NOT_RUN: "dim",
}
WIDE = 124  # columns from which reasons get a column of their own


@dataclass(frozen=True)
class Column:
    """One column: its heading, and whether it holds numbers (right-aligned, never wrapped)."""

    heading: str
    is_number: bool = False
    ratio: int | None = None


def new_table(columns: Sequence[Column], *, title: str = "") -> Table:
    """Return an empty table; a column with a `ratio` takes up the width that is left."""
    table = Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
        expand=any(column.ratio for column in columns),
    )
    for column in columns:
        table.add_column(
            Text(column.heading),
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="fold",
            ratio=column.ratio,
        )
    return table


def cell(console: Console, text: object, style: str = "") -> Text:
    """Return a cell that shows exactly `text`, escaped where the terminal cannot show it."""
    return Text(plain(console, str(text)), style=style)


def plain(console: Console, text: str) -> str:
    """Return `text` as the console's encoding can show it, hidden characters made visible."""
    encoding = console.encoding
    return clean_text(text).encode(encoding, "backslashreplace").decode(encoding)


def say(console: Console, text: str, style: str = "") -> None:
    """Print one paragraph, wrapped at words."""
    console.print(cell(console, text, style), highlight=False)


def say_line(console: Console, text: str, style: str = "") -> None:
    """Print one line that must stay whole, to be pasted."""
    console.print(cell(console, text, style), highlight=False, soft_wrap=True)


def heading(console: Console, text: str) -> None:
    """Print a section's heading after an empty line."""
    console.print()
    say(console, text, "bold")
