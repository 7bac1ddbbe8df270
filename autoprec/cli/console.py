"""What the command line draws while it works: bars on stderr; lines of what is new without.

A thread looks once a second at what the process is at, so that a layer that takes a minute, or a
`train_batches` that waits for a network, is not silent.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from autoprec.cli.ending import stdout_for_results
from autoprec.common.progress import NOW, Progress

EVERY_S = 5.0  # between two lines of one stage; the user's code is waited for so long in silence
BEAT_S = 1.0
Clock = Callable[[], float]


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """Draw the bar of what is at work on stderr, with the time left; in a pipe, lines.

    What is printed meanwhile goes there, too: stdout is for results.
    """
    console = Console(stderr=True)

    def write(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        lines = Lines(write)
        with _beating(lines.beat), stdout_for_results():
            yield lines
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
    bars = Bars(*columns, *times, console=console, transient=True)
    with stdout_for_results(), bars:
        drawn = Drawn(bars, write, time.monotonic)
        with _beating(drawn.beat):
            try:
                yield drawn
            finally:
                drawn.end_for()


@contextmanager
def _beating(beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` every BEAT_S in a thread of its own while the context is open."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(BEAT_S):
            beat()

    thread = threading.Thread(target=run, daemon=True, name="autoprec-progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Begins:
    """Says when a stage begins: at first, and again after it ended (the proof's next length)."""

    def __init__(self) -> None:
        """Begin with none."""
        self.reached: dict[str, tuple[int, int]] = {}  # by label: done, total

    def __call__(self, label: str, done: int, total: int) -> bool:
        """Note how far a stage is, and return whether it begins with that."""
        known, self.reached[label] = self.reached.get(label), (done, total)
        if known is None:
            return True
        last, end = known
        return done < last or (last >= end and done < total)


class Drawn:
    """A progress that is one bar, of what is at work; a stage that has ended is a line above it.

    Bars of all that was done would be more than a terminal has lines for.
    """

    def __init__(self, bars: Bars, write: Callable[[str], None], clock: Clock) -> None:
        """Take where the bar and the lines are."""
        self.bars, self.write, self.clock, self.waits = bars, write, clock, Waits(write)
        self.begins, self.label, self.since = Begins(), "", clock()
        self.bar = bars.add_task("", visible=False, now="")

    def __call__(self, label: str, done: int, total: int) -> None:
        """Report progress."""
        if self.begins(label, done, total) or label != self.label:
            self.end_for(label)
            self.bars.reset(self.bar, description=label, visible=True, now="")
        self.bars.update(self.bar, completed=done, total=total)

    def end_for(self, label: str = "") -> None:
        """Say how long the stage at work took, if `label` is of another; "": hide the bar."""
        ended, begun = (each.partition(":")[0] for each in (self.label, label))
        self.label = label
        self.bars.update(self.bar, visible=bool(label))
        if ended != begun:
            now, since = self.clock(), self.since
            self.since = now
            if ended:
                self.write(f"{ended}: {now - since:.0f} s")

    def beat(self) -> None:
        """Say what the stage is at, and what is waited for."""
        self.waits.beat()
        self.bars.update(self.bar, now=NOW.measures)


class Waits:
    """Says what of the user's is waited for: after EVERY_S, and whenever that time has doubled."""

    def __init__(self, write: Callable[[str], None]) -> None:
        """Take where a line goes."""
        self.write, self.next_s = write, EVERY_S

    def beat(self) -> None:
        """Write a line if it is time for one."""
        what, seconds = NOW.waited()
        if seconds < EVERY_S:
            self.next_s = EVERY_S
        elif seconds >= self.next_s:
            self.next_s = 2 * seconds
            self.write(f"waiting for {what} since {seconds:.0f} s")


class Lines:
    """A progress that writes a line as a stage starts, and at most one every EVERY_S seconds.

    The time left is that of the share done: left = elapsed * (total - done) / done.
    """

    def __init__(self, write: Callable[[str], None], clock: Clock = time.monotonic) -> None:
        """Take where a line goes."""
        self.write, self.clock, self.waits = write, clock, Waits(write)
        self.begun: dict[str, tuple[float, int]] = {}  # by label: when, and what was done by then
        self.begins = Begins()
        self.at, self.last, self.pause_s = ("", 0, 0), float("-inf"), EVERY_S
        self.said = (self.at, "")

    def __call__(self, label: str, done: int, total: int) -> None:
        """Report progress."""
        self.at = label, done, total
        if self.begins(label, done, total):
            self.begun[label] = self.last, _ = self.clock(), done
            self.said, self.pause_s = (self.at, NOW.measures), EVERY_S
            self.write(f"{label} ...")
        elif self.clock() - self.last >= EVERY_S:
            self.say()

    def say(self) -> None:
        """Write how far the stage is, for how long by now, and what it is at."""
        now, (label, done, total) = self.clock(), self.at
        since, first = self.begun[label]
        self.last, self.said = now, (self.at, NOW.measures)
        left = (now - since) * (total - done) / (done - first) if done > first else None
        about = "" if left is None or done >= total else f", about {left:.0f} s left"
        what = f": {NOW.measures}" if NOW.measures else ""
        share = f"{100 * done / max(total, 1):.0f} %"
        self.write(f"{label}: {done} of {total} ({share}), {now - since:.0f} s{about}{what}")

    def beat(self) -> None:
        """Write a line every EVERY_S where there is news, and else whenever that has doubled."""
        self.waits.beat()
        is_waiting = NOW.waited()[1] >= EVERY_S  # that is said instead
        has_news = self.said != (self.at, NOW.measures)
        self.pause_s = EVERY_S if has_news else self.pause_s
        if self.at[1] >= self.at[2] or is_waiting or self.clock() - self.last < self.pause_s:
            return
        self.pause_s *= 2
        self.say()
