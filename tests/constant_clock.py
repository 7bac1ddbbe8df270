"""What profiler tests share: a clock that nothing depends on, and whether this CPU runs FP8."""

from collections.abc import Callable

import pytest
import torch

from autoprec.device.fp8 import fp8_support
from autoprec.records import Recipe, fp8_option

CPU = torch.device("cpu")
TENSORWISE = fp8_option(Recipe.TENSORWISE)
RUNS_FP8 = TENSORWISE.recipe in fp8_support(CPU).recipes
needs_fp8 = pytest.mark.skipif(not RUNS_FP8, reason=f"no FP8 here: {fp8_support(CPU).reason}")


class ConstantClock:
    """Every call takes 1 ms, so nothing depends on the machine."""

    def __init__(self) -> None:
        self.calls = 0

    def measure(self, fn: Callable[[], object]) -> float:
        fn()
        self.calls += 1
        return 1.0
