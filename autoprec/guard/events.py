"""What the guard did, one JSON object a line, in the log, and in TensorBoard when it is given."""

import logging
import math
from enum import StrEnum
from pathlib import Path
from typing import Protocol

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
    GIVEN_BACK = "given_back"  # layers run in FP8 again
    SCHEDULE = "schedule"  # the plan's schedule switched FP8 on or off


class GuardEvent(Record):
    """One event: `layers` changed precision at `step`; numbers that are not finite are None."""

    step: NonNegativeInt
    kind: EventKind
    message: str
    layers: tuple[str, ...] = ()
    is_skipped: bool = False
    restored_step: NonNegativeInt | None = None
    loss: float | None = None
    grad_norm: float | None = None


class SummaryWriter(Protocol):
    """The part of torch.utils.tensorboard.SummaryWriter that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Draw a point."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> object:
        """Write a text."""


class EventLog:
    """Where events go; on ranks other than 0 nothing is written."""

    def __init__(self, path: Path | None, writer: SummaryWriter | None) -> None:
        is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        self.path, self.writer = (path, writer) if is_first else (None, None)
        self.is_first = is_first
        if self.path is not None:
            _append(self.path, "")  # a path that cannot be written fails now, not in an alarm

    def write(self, event: GuardEvent) -> None:
        """Append one line, complete when this returns."""
        if self.is_first:
            logger.warning("step %d: %s", event.step, event.message)
        if self.path is not None:
            _append(self.path, event.model_dump_json() + "\n")
        if self.writer is not None:
            self.writer.add_text("autoprec/guard", event.message, event.step)

    def draw(self, step: int, **values: float) -> None:
        """Draw values in TensorBoard, if there is one."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"autoprec/{name}", value, step)


def finite(value: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return value if math.isfinite(value) else None


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise RecordError(
            f"the guard's event file must be writable, but {path} is not ({error.strerror}); "
            "give another path as events="
        ) from error
