"""When the guard acts, and what it then does to the step."""

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What to do about a step that went wrong; suspects move to BF16 in all but `stop`."""

    SWITCH = "switch"  # let the step happen
    SKIP = "skip"  # drop its gradients, so that optimizer.step() changes nothing
    ROLLBACK = "rollback"  # drop them, and go back to the last snapshot
    STOP = "stop"  # raise TrainingStoppedError, for a run that a person should look at


@dataclass(frozen=True)
class Limits:
    """When to act. Steps are optimizer steps; widths are in (robust) standard deviations.

    `loss_floor` is the least standard deviation of the loss, relative to it, and `norm_floor` of
    the norm's logarithm: with the defaults a loss must rise by 8 % and a norm sixfold at least.
    `underflow` is the allowed share of an operand that FP8 flushes to zero. `quiet_steps` None: a
    layer that was moved stays in BF16. After `most_bad` bad steps in a row the run is stopped,
    because it no longer trains. `snapshot_every` is for `Action.ROLLBACK` only.
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
    most_moves: int = 3  # dynamo keeps 8 graphs, and each set of FP8 layers takes two
    most_bad: int = 50
    snapshot_every: int = 200
