"""How far predictions are from measured speedups of linears."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoprec.records.devices import Prediction


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


def score_pairs(pairs: Sequence[Pair], *, left_out: int = 0) -> dict[str, float]:
    """Return the score of predictions against real speedups (at least one).

    `right_side` is the share that agree on whether FP8 is faster, `coverage` the share whose
    80 % interval holds the real speedup.
    """
    count = len(pairs)
    return {
        "rows": count,
        "left_out": left_out,
        "mean_absolute_error": sum(abs(pair.error) for pair in pairs) / count,
        "bias": math.exp(sum(math.log1p(pair.error) for pair in pairs) / count) - 1,
        "right_side": sum(pair.is_right_side for pair in pairs) / count,
        "coverage": sum(pair.is_covered for pair in pairs) / count,
    }
