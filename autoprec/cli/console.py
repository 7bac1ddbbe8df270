"""What the command line draws while it works: bars on stderr; a line every few seconds without."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from autoprec.common.progress import Progress

EVERY_S = 5.0  # between two lines of one stage


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """Draw a bar per stage on stderr, with the time that is left; in a pipe, lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield progress_lines(lambda line: console.print(line, markup=False, highlight=False))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tasks: dict[str, TaskID] = {}  # by label
    with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:

        def draw(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield draw


def progress_lines(
    write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Progress:
    """Return a progress that writes a line as a stage starts, and one every EVERY_S seconds.

    The time left is that of the share done: left = elapsed * (total - done) / done.
    """
    begun: dict[str, tuple[float, int]] = {}  # by label: when, and what was done by then
    last = [float("-inf")]

    def show(label: str, done: int, total: int) -> None:
        now = clock()
        if label not in begun:
            begun[label], last[0] = (now, done), now
            write(f"{label} ...")
        elif now - last[0] >= EVERY_S:
            last[0] = now
            since, first = begun[label]
            left = (now - since) * (total - done) / (done - first) if done > first else None
            about = "" if left is None or done >= total else f", about {left:.0f} s left"
            write(f"{label}: {done} of {total} ({100 * done / max(total, 1):.0f} %){about}")

    return show
