"""When the guard acts and how, what it remembers from step to step, and what it says happened."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from autoprec.device.ranks import rank
from autoprec.errors import RecordError
from autoprec.records.base import Record

logger = logging.getLogger(__name__)
Log = Callable[[str, float, int], object]  # name, value, step


class Action(StrEnum):
    """What to do about a step that went wrong; suspects run in BF16 after it in all but `stop`."""

    SWITCH = "switch"  # let the step happen
    SKIP = "skip"  # drop its gradients, so that optimizer.step() changes nothing
    STOP = "stop"  # raise TrainingStoppedError, for a run that a person should look at


@dataclass(frozen=True)
class Limits:
    """When to act. Steps are optimizer steps; widths are in (robust) standard deviations.

    `loss_floor` is the least standard deviation of the loss, relative to it, and `norm_floor` of
    the norm's logarithm: with the defaults a loss must rise by 8 % and a norm sixfold at least.
    `underflow` is the allowed share of an operand that FP8 flushes to zero. `quiet_steps` None: a
    demoted layer stays in BF16. After `most_bad` bad steps in a row the run is stopped, because it
    no longer trains.
    """

    window: int = 128
    patience: int = 3
    loss_width: float = 8.0
    loss_floor: float = 0.01
    norm_width: float = 12.0
    norm_floor: float = 0.15
    underflow: float = 0.5
    sample_every: int = 100
    quiet_steps: int | None = 1000
    most_demotions: int = 3  # dynamo keeps 8 graphs, and each set of FP8 layers takes two
    most_bad: int = 50


class Demotion(Record):
    """A layer that was taken out of FP8: when, and after how many quiet steps it may return."""

    since: NonNegativeInt
    quiet_steps: PositiveInt
    is_promoted: bool = False  # back in FP8; the next time it waits twice as long


class GuardState(Record):
    """What goes into a checkpoint: the step that comes, alarms, demoted layers, and both bands.

    `active` are the layers that it runs in FP8 and `is_sampled` whether it is looked at, which a
    guard that is told a step later has not changed yet.
    """

    step: NonNegativeInt
    demotions: NonNegativeInt
    last_alarm: int
    demoted: dict[str, Demotion]
    losses: tuple[float, ...] = Field(max_length=100_000)
    norms: tuple[float, ...] = Field(max_length=100_000)
    loss_run: NonNegativeInt
    norm_run: NonNegativeInt
    active: tuple[str, ...]
    is_sampled: bool


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


def write_event(
    event: GuardEvent | None, path: Path | None, log: Log | None = None, *, fp8_layers: int = 0
) -> None:
    """Warn of an event, tell a logger and append it to a file as JSON, on rank 0 alone.

    `log` gets `guard/KIND`, the number of layers that changed precision (0: only the step was dealt
    with), and `guard/fp8_layers`, those in FP8 from now on.

    None tries the file, so that one that cannot be written is an error now, not in an alarm.
    """
    if rank() != 0:
        return
    if event is not None:
        logger.warning("step %d: %s", event.step, event.message)
    if event is not None and log is not None:
        log(f"guard/{event.kind}", float(len(event.layers)), event.step)
        log("guard/fp8_layers", float(fp8_layers), event.step)
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("" if event is None else event.model_dump_json() + "\n")
    except OSError as error:
        raise RecordError(
            f"the guard's event file must be writable, but {path} is not "
            f"({error.strerror}); give another path as events="
        ) from error
