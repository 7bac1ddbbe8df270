"""What the guard did: one JSON object a line in a file, and a warning in the log."""

import logging
from enum import StrEnum
from pathlib import Path

import torch.distributed as dist
from pydantic import NonNegativeInt

from autoprec.errors import RecordError
from autoprec.records.base import Record

logger = logging.getLogger(__name__)


class EventKind(StrEnum):
    """What happened."""

    NOT_FINITE = "not_finite"  # loss or a gradient is an infinity or a NaN
    LOSS = "loss"  # above its band, several steps in a row
    GRAD_NORM = "grad_norm"  # above its band
    RANGE = "range"  # layers lose too much to FP8's range
    PROMOTED = "promoted"  # layers run in FP8 again
    SCHEDULE = "schedule"  # the plan's schedule switched FP8 on or off


class GuardEvent(Record):
    """One event: `layers` changed precision at `step`; numbers that are not finite are None."""

    step: NonNegativeInt
    kind: EventKind
    message: str
    layers: tuple[str, ...] = ()
    is_skipped: bool = False
    loss: float | None = None
    grad_norm: float | None = None


class EventLog:
    """Where events go; on ranks other than 0 nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        self.path = path if self.is_first else None
        self._append("")  # a path that cannot be written fails now, not in an alarm

    def write(self, event: GuardEvent) -> None:
        """Append one line, complete when this returns."""
        if self.is_first:
            logger.warning("step %d: %s", event.step, event.message)
        self._append(event.model_dump_json() + "\n")

    def _append(self, line: str) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise RecordError(
                f"the guard's event file must be writable, but {self.path} is not "
                f"({error.strerror}); give another path as events="
            ) from error
