"""FP8 and BF16 GEMMs on a CPU, at the speed of FP32 ones.

torch's CPU build has `_scaled_mm`, but on many CPUs oneDNN runs its reference loop for it: 30 s for
[2048, 256] @ [256, 768] on a Xeon with AMX, where FP32 takes 20 ms (torch 2.13.0). On a CPU without
BF16 instructions torch's own loops multiply BF16: g @ w of that size takes 20 times as long as in
FP32, a convolution 58 times (AVX2). What these compute is simple, and this computes the same with
FP32 kernels:

    out = bf16(sum_k a_mk b_kn * scale_a * scale_b + bias)      a, b in FP8, the sum in FP32
    out = bf16(sum_k a_mk b_kn + bias)                          a, b in BF16, the sum in FP32

A product of two FP8 or BF16 values is exact in FP32, so the two differ by the order of the sum
only. It is for numbers, never for times.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from autoprec.device.fp8 import emulates_gemms
from autoprec.sensitivity.casts import fp8_to_float

# Attention's own kernels are not among these: what they round to BF16 within must stay rounded.
BF16_OPERATIONS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "convolution",
    "convolution_backward",
)


def has_bf16_gemms() -> bool:
    """Whether this CPU multiplies BF16 with instructions of its own, by what torch itself asks."""
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's own
    return mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def fast_gemms() -> Iterator[None]:
    """Multiply FP8 on a CPU as above inside, and BF16 where the CPU cannot; on a GPU as ever.

    Every recipe runs then, also those that the CPU's own kernel refuses (`fp8_support`).
    """
    if emulates_gemms.get():
        yield
        return
    in_fp32 = {} if has_bf16_gemms() else {name: _in_fp32(name) for name in BF16_OPERATIONS}
    token = emulates_gemms.set(True)
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch's own
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered")
            library.impl("_scaled_mm", scaled_mm, "CPU", allow_override=True)  # type: ignore[no-untyped-call]  # torch's own
            for name, kernel in in_fp32.items():
                library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]  # torch's own
        yield
    finally:
        emulates_gemms.reset(token)
        library._destroy()  # type: ignore[no-untyped-call]  # torch's own


@functools.cache  # once, so that it is torch's own kernel and never this one
def _in_fp32(name: str) -> Callable[..., Any]:
    """Return an operation of aten that takes BF16 operands to its FP32 kernel, others to theirs."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed

    def run(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if args[0].dtype is not torch.bfloat16:
            return kernel(keys, *args, **kwargs)
        args, kwargs = tree_map(_widened, (args, kwargs))
        return tree_map_only(Tensor, Tensor.bfloat16, kernel(keys, *args, **kwargs))

    return run


def _widened(value: Any) -> Any:
    """Return a BF16 tensor in FP32, exactly, and FP32 for BF16 as the dtype of an output."""
    if value is torch.bfloat16:
        return torch.float32
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """Return the result of `torch._scaled_mm`; scales are one number, or [M, 1] and [1, N]."""
    b = fp8_to_float(b.t()).t()  # it comes column-major, and so it stays
    out = (fp8_to_float(a) @ b).mul_(scale_a).mul_(scale_b)  # [M, K] @ [K, N] -> [M, N]
    if bias is not None:
        out += bias
    if scale_result is not None:
        out *= scale_result
    return out.to(out_dtype or a.dtype)
