"""What is usual for a number that falls and jitters -> whether the next one is too high.

The band ends at median + width * s, over the last `window` values, with s = 1.4826 * MAD (which is
the standard deviation of a normal distribution) and at least `floor`, absolute or relative to the
median, so that a very quiet stretch does not turn ordinary noise into an alarm. Median and MAD bear
a window that is half outliers, so values above the band count too: after a lasting change of level
it follows.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

FEWEST_VALUES = 20  # before which nothing is unusual
MAD_TO_SIGMA = 1.4826  # of a normal distribution


class RunningBand:
    """The upper end of what is usual, and how often in a row values lay above it."""

    def __init__(
        self, window: int, width: float, *, floor: float = 0.0, relative_floor: float = 0.0
    ) -> None:
        self.width, self.floor, self.relative_floor = width, floor, relative_floor
        self.values: deque[float] = deque(maxlen=window)
        self.run = 0  # values in a row above the band

    def is_above(self, value: float) -> bool:
        """Take a finite value in; say whether it lies above the band of those before it."""
        above = value > self.upper
        self.run = self.run + 1 if above else 0
        self.values.append(value)
        return above

    @property
    def upper(self) -> float:
        """The end of the band; infinity while there are too few values."""
        if len(self.values) < min(FEWEST_VALUES, self.values.maxlen or FEWEST_VALUES):
            return math.inf
        middle = statistics.median(self.values)
        spread = statistics.median([abs(value - middle) for value in self.values])
        floor = max(self.floor, self.relative_floor * abs(middle))
        return middle + self.width * max(MAD_TO_SIGMA * spread, floor)

    def restore(self, values: Sequence[float], run: int) -> None:
        """Go on from saved values."""
        self.values.clear()
        self.values.extend(values)
        self.run = run
