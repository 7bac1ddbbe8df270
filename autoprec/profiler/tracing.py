"""A function -> the operations that really ran, in order, each with its time if there is a clock.

A dispatch mode sees the ATen operations below autograd, torchao's tensor subclasses taken apart, so
`_scaled_mm float8_e4m3fn` in the list is proof that FP8 operands were multiplied. On CUDA the names
of the kernels are added, as CUPTI reports them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprec.device.timing import Clock

GEMMS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"})
NO_WORK = frozenset({"detach", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"})
PLAIN_TENSORS = (Tensor, nn.Parameter)
LOST_KERNELS = 1000  # a process's k-th profile can lack its first k kernels (PyTorch issue 192021)
SLEEP_KERNEL = "spin_kernel"  # of torch.cuda._sleep: launched first, to be lost
FP8_KERNEL = re.compile(  # cuBLASLt's older and newer names, CUTLASS, Triton, hipBLASLt
    r"(?<!u)e4m3|e5m2|float8|fp8|nvjet_(sm\d+_)?(q[a-z]|[a-z]q)[a-z]{3}_|_scaled_mm"
    r"|_(F8|B8){1,2}[A-Z]",
    re.IGNORECASE,
)


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


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Notes every operation that computes something; set `is_backward` where backward begins."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.operations: list[Operation] = []
        self.is_backward = False
        self._clock = clock

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Run the operation and note it; subclasses are asked to take theirs apart first."""
        if any(kind not in PLAIN_TENSORS for kind in types):
            return NotImplemented
        name = func.overloadpacket._qualified_op_name.rpartition("::")[2]
        if func.is_view or name in NO_WORK:
            return func(*args, **(kwargs or {}))
        result, elapsed = _run(lambda: func(*args, **(kwargs or {})), self._clock)
        dtype = _operand_dtype((*args, *(kwargs or {}).values()))
        self.operations.append(Operation(name, dtype, elapsed, self.is_backward))
        return result


def cuda_kernels(fn: Callable[[], object]) -> tuple[str, ...]:
    """Return the names of the CUDA kernels that `fn` launches, each once; none without CUPTI."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as seen:
        for _ in range(LOST_KERNELS):
            torch.cuda._sleep(1)  # type: ignore[no-untyped-call]  # torch's own
        fn()
        torch.cuda.synchronize()
    return kernel_names(seen.events() or ())


def kernel_names(events: Iterable[Any]) -> tuple[str, ...]:  # Any: torch's events
    """Return the names of what ran on a GPU, each once, without the kernels that only wait."""
    names = (event.name for event in events if event.device_type.name == "CUDA")
    return tuple(dict.fromkeys(name for name in names if SLEEP_KERNEL not in name))


def is_fp8_kernel(name: str) -> bool:
    """Whether a CUDA kernel's name says that it multiplies FP8 operands.

    Seen: `sm89_xmma_gemm_e4m3bf16_e4m3f32_...` (sm90 too), `nvjet_qqtst_128x256_...` and since
    CUDA 13 `nvjet_sm90_qqtst_...` of cuBLASLt, and CUTLASS templates over `cutlass::float_e4m3_t`.
    nvjet names five types where operands and result differ (q is e4m3, o is FP4, t is BF16) and
    three where they do not; `ue4m3` is the scale of FP4. Casts to FP8 are not meant, so elementwise
    and reduction kernels do not count.
    """
    is_cast = re.search(r"elementwise_kernel|reduce_kernel|triton_(poi|red|per|spl|for|unk)_", name)
    return not is_cast and FP8_KERNEL.search(name) is not None


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
