"""One operand of an FP8 GEMM -> the shares of it that FP8 flushes to zero or cannot hold.

torchao casts x to FP8 as round(x * max / amax), with amax over the tensor (tensorwise) or over each
row (rowwise) and max the largest FP8 number (448 for e4m3, 57344 for e5m2). So

    underflow   non-zero elements with |x| * max / amax at most half the smallest FP8 number,
                2^-10 for e4m3 and 2^-17 for e5m2, which the cast rounds to zero
    saturated   elements that lie above max after scaling, or are not finite

The largest element always fits, by construction. A layer that runs out of range therefore shows it
as underflow of all the rest, and saturates only when its operand has an infinity or a NaN, which
makes the scale 0 or NaN.

A sample of the elements is enough for shares; amax must be exact, because outliers decide it.
"""

import torch
from torch import Tensor

MOST_ELEMENTS = 1 << 16  # of an operand; the standard error of a share is then below 0.2 %
SMALLEST_AMAX = 1e-12  # torchao 0.18's EPS
# Of the largest FP8 number. Up to 1 + 2^-5 the cast still rounds to it; inductor fuses a BF16 cast
# away for the elements but not for their amax, so that these may lie 2^-8 above it.
ABOVE = 1 + 2**-6


def range_shares(x: Tensor, dtype: torch.dtype, *, is_rowwise: bool) -> Tensor:
    """Return [underflow, saturated] of an operand that is cast to an FP8 dtype, on its device."""
    x = local(x)
    if is_rowwise:
        rows = x.reshape(-1, x.shape[-1])
        sample = rows[:: 1 + rows.numel() // MOST_ELEMENTS].float().abs()
        amax = sample.amax(dim=1, keepdim=True)
    else:
        flat = x.reshape(-1)
        sample = flat[:: 1 + flat.numel() // MOST_ELEMENTS].float().abs()
        amax = torch.stack(torch.aminmax(flat)).abs().amax().float()
    limits = torch.finfo(dtype)
    scaled = sample * (limits.max / amax.clamp(min=SMALLEST_AMAX))
    half_smallest = limits.smallest_normal * limits.eps / 2
    flushed = ((scaled <= half_smallest) & (sample > 0)).sum() / (sample > 0).sum().clamp(min=1)
    saturated = (~(scaled <= limits.max * ABOVE)).float().mean()  # written so that NaN counts
    return torch.stack([flushed, saturated])


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be a DTensor or sparse."""
    if tensor.is_sparse:
        return tensor.coalesce().values()
    to_local = getattr(tensor, "to_local", None)
    part: Tensor = to_local() if to_local is not None else tensor
    return part
