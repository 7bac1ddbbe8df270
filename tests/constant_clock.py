"""What profiler tests share: clocks that no machine has part in, and whether this CPU runs FP8."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autoprec.device.fp8 import fp8_support
from autoprec.device.timing import Clock
from autoprec.device.tracing import PLAIN_TENSORS
from autoprec.records import Recipe, fp8_option

CPU = torch.device("cpu")
TENSORWISE = fp8_option(Recipe.TENSORWISE)
RUNS_FP8 = TENSORWISE.recipe in fp8_support(CPU).recipes
needs_fp8 = pytest.mark.skipif(not RUNS_FP8, reason=f"no FP8 here: {fp8_support(CPU).reason}")


class ConstantClock(Clock):
    """Every call takes 1 ms, so nothing depends on the machine."""

    def __init__(self) -> None:
        self.calls = 0

    def measure(self, fn: Callable[[], object]) -> float:
        fn()
        self.calls += 1
        return 1.0


class Bf16Gemms(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Counts the GEMMs in BF16."""

    count: int = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(kind not in PLAIN_TENSORS for kind in types):
            return NotImplemented  # torchao's own tensors take their operations apart first
        is_gemm = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.count += is_gemm and args[0].dtype is torch.bfloat16
        return func(*args, **(kwargs or {}))


@dataclass
class WithoutBf16(Clock):
    """A clock of a CPU by which a call takes `base_ms`, and a GEMM in BF16 `gemm_ms` more."""

    base_ms: float
    gemm_ms: float

    def measure(self, fn: Callable[[], object]) -> float:
        with Bf16Gemms() as seen:  # type: ignore[no-untyped-call]
            fn()
        return self.base_ms + float(seen.count) * self.gemm_ms
