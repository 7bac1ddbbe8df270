"""What a guard remembers from step to step, as it goes into a checkpoint."""

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from autoprec.errors import RecordError
from autoprec.records.base import Record


class Moved(Record):
    """A layer that was moved to BF16: when, and after how many quiet steps it may return."""

    since: NonNegativeInt
    quiet_steps: PositiveInt
    is_back: bool = False


class GuardState(Record):
    """Everything: the step that comes, alarms, moved layers, and both bands."""

    step: NonNegativeInt
    moves: NonNegativeInt
    last_alarm: int
    moved: dict[str, Moved]
    losses: tuple[float, ...] = Field(max_length=100_000)
    norms: tuple[float, ...] = Field(max_length=100_000)
    loss_run: NonNegativeInt
    norm_run: NonNegativeInt


def parse_state(state: dict[str, Any]) -> GuardState:  # Any: JSON values
    """Return the state that `Guard.state_dict` gave.

    Raises:
        RecordError: it is something else.
    """
    try:
        return GuardState.model_validate(state)
    except ValidationError as error:
        raise RecordError(
            f"a guard loads what Guard.state_dict() returned, but this is not "
            f"({error.errors()[0]['msg']}); start without it, or load the right checkpoint"
        ) from error
