"""FP8 GEMMs on a CPU, at the speed of FP32 ones.

torch's CPU build has `_scaled_mm`, but on many CPUs oneDNN runs its reference loop for it: 30 s for
[2048, 256] @ [256, 768] on a Xeon with AMX, where FP32 takes 20 ms (torch 2.13.0). What it
computes is simple, and this computes the same with FP32 matmuls:

    out = bf16(sum_k a_mk b_kn * scale_a * scale_b + bias)      a, b in FP8, the sum in FP32

A product of two FP8 values is exact in FP32, so the two differ by the order of the sum only. It is
for numbers, never for times.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from autoprec.device.fp8 import emulates_gemms
from autoprec.sensitivity.casts import fp8_to_float


@contextmanager
def fast_fp8_gemms(device: torch.device) -> Iterator[None]:
    """Run `torch._scaled_mm` as above inside, for tensors on a CPU; nothing changes elsewhere.

    Every recipe runs then, also those that the CPU's own kernel refuses (`fp8_support`).
    """
    if device.type != "cpu":
        yield
        return
    token = emulates_gemms.set(True)
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch's own
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered")
            library.impl("_scaled_mm", scaled_mm, "CPU", allow_override=True)  # type: ignore[no-untyped-call]  # torch's own
        yield
    finally:
        emulates_gemms.reset(token)
        library._destroy()  # type: ignore[no-untyped-call]  # torch's own


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
