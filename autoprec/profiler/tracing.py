"""A function -> the operations that ran, in order, each with its time if there is a clock."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from autoprec.device.timing import Clock
from autoprec.device.tracing import OperationTracer

GEMMS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"})
NO_WORK = frozenset({"detach", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"})


@dataclass(frozen=True)
class Operation:
    """One ATen operation: its name, the dtype of its operands, and the ms it took (0 untimed)."""

    name: str
    dtype: str
    ms: float
    is_backward: bool

    @property
    def is_gemm(self) -> bool:
        """Whether it multiplies matrices."""
        return self.name in GEMMS


@dataclass
class Trace:
    """The operations so far; set `is_backward` where backward begins."""

    operations: list[Operation] = field(default_factory=list)
    is_backward: bool = False


@contextmanager
def traced(clock: Clock | None = None) -> Iterator[Trace]:
    """Note every operation inside that computes something."""
    trace = Trace()

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: torch's own
        name = func.overloadpacket._qualified_op_name.rpartition("::")[2]
        if func.is_view or name in NO_WORK:
            return func(*args, **kwargs)
        result, elapsed = _run(lambda: func(*args, **kwargs), clock)
        dtype = _operand_dtype((*args, *kwargs.values()))
        trace.operations.append(Operation(name, dtype, elapsed, trace.is_backward))
        return result

    with OperationTracer(run):
        yield trace


def _run(fn: Callable[[], Any], clock: Clock | None) -> tuple[Any, float]:
    if clock is None:
        return fn(), 0.0
    results: list[Any] = []
    elapsed = clock.measure(lambda: results.append(fn()))
    return results[0], elapsed


def _operand_dtype(values: Sequence[object]) -> str:
    """Return the first floating dtype among the operands, FP8 before any other."""
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else (value,))]
    names = [str(v.dtype).removeprefix("torch.") for v in flat if isinstance(v, Tensor)]
    floating = [name for name in names if "float" in name]
    return next((name for name in floating if "float8" in name), (floating or names or [""])[0])
