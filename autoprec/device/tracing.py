"""The operations that really run: the one dispatch mode that looks at them.

A dispatch mode sees ATen operations below autograd. Tensor subclasses (torchao's FP8 tensors) are
asked to take their operations apart first, so what is seen is what a kernel is launched for:
`_scaled_mm` on `float8_e4m3fn` is proof that FP8 operands were multiplied.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

PLAIN_TENSORS: tuple[type, ...] = (Tensor, nn.Parameter)
RunOperation = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]  # Any: torch's own protocol


class OperationTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Hands every operation inside to `run(func, args, kwargs)`, which runs it.

    Args:
        run: calls `func(*args, **kwargs)`, looks at what it likes, and returns the result.
        plain: the tensor classes that are no subclass to take apart.
    """

    def __init__(self, run: RunOperation, *, plain: tuple[type, ...] = PLAIN_TENSORS) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._run = run
        self._plain = plain

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Run the operation, or let the subclass among its operands take it apart."""
        if any(kind not in self._plain for kind in types):
            return NotImplemented
        return self._run(func, args, kwargs or {})
