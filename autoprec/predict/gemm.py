"""GEMM time by shape and kernel: tiles, waves, traffic and a floor.

    t = floor + max(compute, traffic) + overlap_share * min(compute, traffic)
    compute = waves * (tile flops / (peak per processor * achieved fraction) + tile_us) / clock
    waves   = wave_share * ceil(filled) + (1 - wave_share) * filled,  filled = tiles / processors
    clock   = (1 + boost) / (1 + boost * compute / (compute + 2 ms))

A tile fills its pipeline before its first product and stores its result behind its last: `tile_us`,
which a short K does not hide. Under the power limit clocks fall within milliseconds, more in BF16
than in FP8: the fraction is what a long GEMM sustains, a short one is faster by up to `boost`.

The kernel takes the cheapest of four tile shapes; a tile of half the area costs
`small_tile_factor` more per flop, since its operands are reused half as often. The achieved
fraction is per kernel: a power limit takes more from BF16 than from FP8 (so GEMM ratios above 2 are
real on a power-limited H100), and full accumulation costs FP8 a fifth.

Where there are fewer tiles than processors, cuBLAS splits K over several of them and adds partial
sums in FP32 (vLLM PR#23280's BF16 GEMMs of width 2112 are else priced up to twice too slow).

Row scales run in PyTorch's CUTLASS kernel (RowwiseScaledMM.cu), which walks the tiles in blocks
("swizzled") only from `rowwise_swizzle_from` rows and columns on. Below, it walks along the shorter
side of the output; once the operand of that side no longer fits the L2 cache, each wave reads it
again from memory. On Hopper from CUDA 12.9 on they run in cuBLASLt (ScaledBlas.cpp), as any other.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from autoprec.records.devices import Machine

TILES = ((128, 256, 0), (256, 128, 0), (128, 128, 1), (64, 128, 2))  # rows, columns, halvings
SPLITS = (1, 2, 4, 8)
SHORTEST_SPLIT = 1024  # of K: a shorter sum does not fill a tile's pipeline
BOOST_US = 2e3  # of work after which half of the boost is gone
PARTIAL_BYTES = 8  # an FP32 partial sum is written and read


class Kernel(StrEnum):
    """The kinds of GEMM kernel that differ in speed."""

    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP8_FAST = "fp8_fast"  # tensorwise scales, fast accumulation
    FP8_SLOW = "fp8_slow"  # tensorwise scales, full accumulation
    FP8_ROWWISE = "fp8_rowwise"
    FP8_BLOCK = "fp8_block"  # blocks of 128, and MX blocks of 32


@dataclass(frozen=True)
class Traits:
    """What tells kernels apart: constants by name, bytes per element."""

    peak: str
    fraction: str
    floor: str
    boost: str
    operand_bytes: int
    output_bytes: int = 2  # FP8 GEMMs write BF16


_fp8 = partial(Traits, "fp8_peak_tflops", boost="fp8_boost", operand_bytes=1)
KERNELS = {
    Kernel.FP32: Traits(
        "fp32_peak_tflops", "fp32_fraction", "bf16_gemm_floor_us", "bf16_boost", 4, 4
    ),
    # half of BF16's rate: 0.41 to 0.55 in 14 GEMMs on seven devices (gpu-flops-bench)
    Kernel.TF32: Traits(
        "tf32_peak_tflops", "bf16_fraction", "bf16_gemm_floor_us", "bf16_boost", 4, 4
    ),
    Kernel.BF16: Traits("bf16_peak_tflops", "bf16_fraction", "bf16_gemm_floor_us", "bf16_boost", 2),
    Kernel.FP8_FAST: _fp8("fp8_fraction", "tensorwise_gemm_floor_us"),
    Kernel.FP8_SLOW: _fp8("fp8_slow_fraction", "tensorwise_gemm_floor_us"),
    Kernel.FP8_ROWWISE: _fp8("fp8_rowwise_fraction", "rowwise_gemm_floor_us"),
    Kernel.FP8_BLOCK: _fp8("fp8_block_fraction", "rowwise_gemm_floor_us"),
}


def gemm_us(machine: Machine, M: int, K: int, N: int, kernel: Kernel) -> float:
    """Return the time of [M, K] @ [K, N] in microseconds."""
    traits = KERNELS[kernel]
    compulsory: float = traits.operand_bytes * (M * K + K * N) + traits.output_bytes * M * N
    flops_per_us = kernel_flops_per_us(machine, kernel) / machine.sm_count
    boost: float = getattr(machine, traits.boost)
    has_cutlass = kernel is Kernel.FP8_ROWWISE and not machine.rowwise_is_cublas
    splits_k = not (has_cutlass or kernel is Kernel.FP8_BLOCK)  # as cuBLAS alone does
    in_order = has_cutlass and min(M, N) < machine.rowwise_swizzle_from
    rereads = in_order and min(M, N) * K > machine.l2_cache_mb * 1e6
    sm_count, wave_share, bytes_per_us = machine.sm_count, machine.wave_share, machine.bytes_per_us
    best = math.inf
    for rows, columns, halvings in TILES:
        down, across = math.ceil(M / rows), math.ceil(N / columns)
        work = 2 * rows * columns * K * machine.small_tile_factor**halvings / flops_per_us
        for splits in SPLITS if splits_k and down * across < sm_count else (1,):
            if splits > 1 and splits * SHORTEST_SPLIT > K:
                break
            # A wave is one tile on each processor; the last, partly empty, is paid for in part.
            waves = max(down * across * splits / sm_count, 1.0)
            paid = wave_share * math.ceil(waves) + (1 - wave_share) * waves
            compute = paid * (work / splits + machine.tile_us)
            compute *= (1 + boost * compute / (compute + BOOST_US)) / (1 + boost)
            traffic = compulsory + (PARTIAL_BYTES * splits * M * N if splits > 1 else 0)
            if rereads:  # the operand of the shorter side, with each wave
                along, beside = (rows, columns) if M <= N else (columns, rows)
                side = min(down if M <= N else across, sm_count)
                traffic = max(traffic, waves * (side * along + sm_count / side * beside) * K)
            moved = traffic / bytes_per_us
            best = min(best, max(compute, moved) + machine.overlap_share * min(compute, moved))
    floor: float = getattr(machine, traits.floor)
    return floor + best


def kernel_flops_per_us(machine: Machine, kernel: Kernel) -> float:
    """Return the flops of the whole device in a microsecond with that kind of kernel."""
    peak: float = getattr(machine, KERNELS[kernel].peak)
    fraction: float = getattr(machine, KERNELS[kernel].fraction)
    return peak * fraction * 1e6
