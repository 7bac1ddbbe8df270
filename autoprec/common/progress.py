"""How a long stage says how far it is; the command line draws it, the library stays silent.

progress("layers", 3, 12)        3 of 12 are done
NOW.measures = "head in fp32"    what the fourth is at, which may take minutes
NOW.waits(...), NOW.goes_on()    around the user's code, which may wait for a network
"""

import time
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Receives `done` of `total` steps of what `label` names."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """Report progress; called from the stage's own thread."""


def report_nothing(label: str, done: int, total: int) -> None:
    """Drop the report: the default of every stage."""


@dataclass
class Now:
    """What this process is at."""

    measures: str = ""
    waiting: list[tuple[str, float]] = field(default_factory=list)  # for what, since when; nested

    def waits(self, what: str) -> None:
        """Note that the user's code begins: it is run within timed steps, so this is short."""
        self.waiting.append((what, time.monotonic()))

    def goes_on(self) -> None:
        """Note that the user's code that began last has ended."""
        self.waiting.pop()

    def waited(self) -> tuple[str, float]:
        """Return what is waited for, and the seconds since it began; of nothing, "" and 0."""
        for what, since in self.waiting[-1:]:
            return what, time.monotonic() - since
        return "", 0.0


NOW = Now()
