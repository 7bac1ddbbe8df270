"""How far predictions are from published or measured speedups of linears."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoprec.errors import DeviceError
from autoprec.predict.tables import Table, predict_table
from autoprec.records.devices import Prediction, SpeedupScore

SCORED_COLUMNS = ("device", "M", "K", "N", "speedup")


@dataclass(frozen=True)
class Pair:
    """A predicted speedup beside the real one."""

    predicted: Prediction
    actual: float

    @property
    def error(self) -> float:
        """The relative error."""
        return self.predicted.value / self.actual - 1

    @property
    def is_right_side(self) -> bool:
        """Whether both say the same about FP8 being faster."""
        return (self.predicted.value >= 1) == (self.actual >= 1)

    @property
    def is_covered(self) -> bool:
        """Whether the interval holds the real one."""
        return self.predicted.low <= self.actual <= self.predicted.high


def score_table(table: Table) -> SpeedupScore:
    """Score the predictions for a table whose column `speedup` holds the real ones.

    Raises:
        DeviceError: no row has a speedup and can be predicted.
    """
    pairs = []
    answers = predict_table(table)
    for row, answer in zip(table.rows, answers, strict=True):
        actual = _number(table.cell(row, "speedup"))
        if actual and answer.prediction and answer.prediction.speedup:
            pairs.append(Pair(answer.prediction.speedup, actual))
    if not pairs:
        refusals = (answer.refusal for answer in answers if answer.refusal)
        first = next((f" (the first refusal: {refusal})" for refusal in refusals), "")
        raise DeviceError(
            "a table to score must have a positive `speedup` in some row that FP8 can run, "
            f"but none has one{first}; write BF16 time / FP8 time there"
        )
    return score_pairs(pairs, left_out=len(table.rows) - len(pairs))


def score_pairs(pairs: Sequence[Pair], *, left_out: int = 0) -> SpeedupScore:
    """Return the score of predictions against real speedups (at least one)."""
    count = len(pairs)
    return SpeedupScore(
        rows=count,
        left_out=left_out,
        mean_absolute_error=sum(abs(pair.error) for pair in pairs) / count,
        bias=math.exp(sum(math.log1p(pair.error) for pair in pairs) / count) - 1,
        right_side=sum(pair.is_right_side for pair in pairs) / count,
        coverage=sum(pair.is_covered for pair in pairs) / count,
    )


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and value > 0 else 0.0
