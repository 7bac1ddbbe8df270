"""What the command line draws while it works: bars on stderr, or a line per stage without one."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from autoprec.common.progress import Progress


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """Draw a bar per label on stderr; without a terminal, print each label once."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LinePerLabel(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console) as bars:
        yield _BarPerLabel(bars)


class _BarPerLabel:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, int] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        task = self._tasks[label]
        self._bars.update(task, completed=done, total=total)  # type: ignore[arg-type]  # TaskID


class _LinePerLabel:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: set[str] = set()

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self._seen:
            self._seen.add(label)
            self._console.print(f"{label} ...", markup=False, highlight=False)
