"""FP8 and BF16 GEMMs on a CPU at the speed of FP32 ones, and torchao's casts part by part.

torch's CPU build has `_scaled_mm`, but on many CPUs oneDNN runs its reference loop for it: 30 s for
[2048, 256] @ [256, 768] on a Xeon with AMX, where FP32 takes 20 ms (torch 2.13.0). On a CPU without
BF16 instructions torch's own loops multiply BF16: g @ w of that size takes 20 times as long as in
FP32, a convolution 58 times (AVX2). What these compute is simple, and this computes the same with
FP32 kernels:

    out = bf16(sum_k a_mk b_kn * scale_a * scale_b + bias)      a, b in FP8, the sum in FP32
    out = bf16(sum_k a_mk b_kn + bias)                          a, b in BF16, the sum in FP32

A product of two FP8 or BF16 values is exact in FP32, so the two differ by the order of the sum
only. It is for numbers, never for times.

In eager mode torchao casts by way of two FP32 tensors of the operand's size, and takes its amax of
a copy. Each element's cast is its own, so parts give the same bits.
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
from autoprec.device.torchao import import_torchao
from autoprec.sensitivity.casts import fp8_to_float

PARTS = 64  # of an operand, cast or taken back one at a time
SMALLEST_PART = 1 << 15  # elements
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


@contextmanager
def casts_in_parts() -> Iterator[None]:
    """Cast to FP8 as torchao does inside, with little memory beside the result."""
    torchao = import_torchao()
    made_by, utils = torchao.float8_training_tensor, torchao.float8_utils
    function, amax = made_by._ToFloat8ConstrFunc, utils.tensor_to_amax
    whole = function.forward

    def forward(ctx: Any, x: Tensor, scale: Tensor, dtype: torch.dtype, *how: Any) -> Any:
        # Any: torchao is untyped
        if not _is_large(x):
            return whole(ctx, x, scale, dtype, *how)
        x_fp8, dim = torch.empty_like(x, dtype=dtype), max(range(x.dim()), key=x.size)
        scales = scale.expand(x.shape)  # one, or one for each row or column
        parts = [torch.split(each, _part(x, dim), dim) for each in (x, scales, x_fp8)]
        for own, at, into in zip(*parts, strict=True):
            into.copy_(whole(ctx, own, at, dtype)._data)
        names = ("linear_mm_config", "gemm_input_role", "axiswise_dim")
        given = dict(zip(names, how, strict=True))
        return made_by.Float8TrainingTensor(x_fp8, scale, x.dtype, **given)

    def tensor_to_amax(x: Tensor, *how: Any) -> Any:
        along = how[3] if len(how) > 3 else None  # reduced over ranks, their mesh, the kind, a dim
        if not _is_large(x) or any(how[:1]):
            return amax(x, *how)
        dims = [dim for dim in range(x.dim()) if along is None or dim != along % x.dim()]
        dim = max(dims, key=x.size)
        found = [amax(own, *how) for own in torch.split(x, _part(x, dim), dim)]
        return torch.stack(found).amax() if along is None else torch.cat(found, dim)

    function.forward, utils.tensor_to_amax = staticmethod(forward), tensor_to_amax
    try:
        yield
    finally:
        function.forward, utils.tensor_to_amax = staticmethod(whole), amax


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
    """Return the result of `torch._scaled_mm`; scales are one number, or [M, 1] and [1, N].

    Of the larger operand some rows of a, or columns of b, are in FP32 at a time.
    """
    out = torch.empty(len(a), b.shape[1], dtype=out_dtype or a.dtype)
    of_rows, of_columns = scale_a.reshape(-1, 1), scale_b.reshape(1, -1)
    of_rows, of_columns = of_rows.expand(len(out), 1), of_columns.expand(1, out.shape[1])
    every, is_left = slice(None), a.numel() >= b.numel()
    moving, held = (a, fp8_to_float(b.t()).t()) if is_left else (b.t(), fp8_to_float(a))
    step = _part(moving, 0)
    for start in range(0, len(moving), step):
        part = slice(start, start + step)
        some = fp8_to_float(moving[part])
        rows, columns = (part, every) if is_left else (every, part)
        own = some @ held if is_left else held @ some.t()  # [M, K] @ [K, N] -> [M, N]
        own.mul_(of_rows[rows]).mul_(of_columns[:, columns])
        if bias is not None:
            own += bias[columns]
        if scale_result is not None:
            own *= scale_result
        out[rows, columns] = own
    return out


def _is_large(x: Tensor) -> bool:
    """Whether to take an operand in parts; those of a DTensor are elsewhere."""
    return type(x) is Tensor and x.dim() > 1 and x.numel() > SMALLEST_PART


def _part(x: Tensor, dim: int) -> int:
    """Return how many rows, columns, ... of an operand to take at a time."""
    width = max(x.numel() // max(x.shape[dim], 1), 1)
    return max(-(-x.shape[dim] // PARTS), SMALLEST_PART // width, 1)
