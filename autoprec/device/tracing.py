"""The operations that really run, in order, each with its time if there is a clock.

A dispatch mode sees ATen operations below autograd. Tensor subclasses (torchao's FP8 tensors) are
asked to take their operations apart first, so what is seen is what a kernel is launched for:
`_scaled_mm` on `float8_e4m3fn` is proof that FP8 operands were multiplied.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoprec.device.timing import Clock, Function

PLAIN_TENSORS: tuple[type, ...] = (Tensor, nn.Parameter)
GEMMS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"})
NO_WORK = frozenset({"detach", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"})
RunOperation = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]  # Any: torch's own protocol


class OperationTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Hands every operation inside to `run(func, args, kwargs)`, which runs and returns it.

    Tensor classes that are not `plain` are taken apart first. Operators of functions (`torch.cond`,
    `flex_attention`) run unseen.
    """

    supports_higher_order_operators = True

    def __init__(self, run: RunOperation, *, plain: tuple[type, ...] = PLAIN_TENSORS) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._run = run
        self._plain = plain

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Run the operation, or let the subclass among its operands take it apart."""
        if any(kind not in self._plain for kind in types):
            # of fake tensors DTensor asks the shapes that its operations give: nothing runs
            return func(*args, **(kwargs or {})) if FakeTensor in types else NotImplemented
        if isinstance(func, HigherOrderOperator):
            return func(*args, **(kwargs or {}))
        return self._run(func, args, kwargs or {})


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
    measure = _untimed if clock is None else clock.measure

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: torch's own
        name = func.overloadpacket._qualified_op_name.rpartition("::")[2]
        if func.is_view or name in NO_WORK:
            return func(*args, **kwargs)
        results: list[Any] = []  # Any: the operation's own
        elapsed = measure(lambda: results.append(func(*args, **kwargs)))
        dtype = _operand_dtype((*args, *kwargs.values()))
        trace.operations.append(Operation(name, dtype, elapsed, trace.is_backward))
        return results[0]

    with OperationTracer(run):
        yield trace


def _untimed(fn: Function) -> float:
    fn()
    return 0.0


def _operand_dtype(values: Sequence[object]) -> str:
    """Return the first floating dtype among the operands, FP8 before any other."""
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else (value,))]
    names = [str(v.dtype).removeprefix("torch.") for v in flat if isinstance(v, Tensor)]
    floating = [name for name in names if "float" in name]
    return next((name for name in floating if "float8" in name), (floating or names or [""])[0])
