"""What the command line draws while it works: bars on stderr, or a line per stage without one."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from autoprec.common.progress import Progress


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """Draw a bar per label on stderr; without a terminal, print each label once."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tasks: dict[str, TaskID] = {}  # by label
    with Bars(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bars:

        def draw(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
                if bars.disable:
                    console.print(f"{label} ...", markup=False, highlight=False)
            bars.update(tasks[label], completed=done, total=total)

        yield draw
