"""How a long stage says how far it is; the command line draws it, the library stays silent."""

from typing import Protocol


class Progress(Protocol):
    """Receives `done` of `total` steps of what `label` names."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """Report progress; called from the stage's own thread."""


def report_nothing(label: str, done: int, total: int) -> None:
    """Drop the report: the default of every stage."""
