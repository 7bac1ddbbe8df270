"""What this machine can do for a plan: versions, device, FP8 with reasons, numbers that are right.

The numeric self-test runs every FP8 recipe against a higher-precision reference: a wrong kernel or
compiler is found here rather than in a training run. One GEMM is timed in each precision, since "is
FP8 worth anything on this device" is the first question that people ask.
"""

from collections.abc import Callable

import torch

from autoprec.device import device_facts, resolve_device
from autoprec.precision import fp8_support, import_torchao
from autoprec.records import Check, Diagnosis, GemmShape, Timing
from autoprec.runtime import fp8_self_test
from autoprec.timing import make_clock, time_interleaved

GEMM = GemmShape(M=2048, K=1024, N=1024)
SAMPLES = 7


def diagnose(target: str) -> Diagnosis:
    """Look at the machine; takes a few seconds.

    Raises:
        DeviceError: the target is not here.
    """
    device = resolve_device(target)
    return Diagnosis(
        device=device_facts(device),
        checks=(*_software_checks(), *_fp8_checks(device)),
        gemm=str(GEMM),
        gemm_ms=time_gemm(device),
    )


def time_gemm(device: torch.device) -> dict[str, Timing]:
    """Time one GEMM in FP32, BF16 and (where it runs) FP8 tensorwise, interleaved."""
    a_MK = torch.randn(GEMM.M, GEMM.K, device=device)
    b_NK = torch.randn(GEMM.N, GEMM.K, device=device)
    a_bf16, b_bf16 = a_MK.bfloat16(), b_NK.bfloat16()
    # each: [M, K] @ [K, N] -> [M, N]
    candidates: dict[str, Callable[[], object]] = {
        "fp32": lambda: a_MK @ b_NK.T,
        "bf16": lambda: a_bf16 @ b_bf16.T,
    }
    if fp8_support(device).recipes:
        one = torch.ones((), device=device)
        a_fp8, b_fp8 = a_bf16.to(torch.float8_e4m3fn), b_bf16.to(torch.float8_e4m3fn)
        candidates["fp8"] = lambda: torch._scaled_mm(
            a_fp8, b_fp8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
    return time_interleaved(candidates, clock=make_clock(device), samples=SAMPLES)


def _software_checks() -> list[Check]:
    torchao = import_torchao()
    return [
        Check(
            name="torchao float8 training",
            is_good=hasattr(torchao, "convert_to_float8_training"),
            detail="importable",
        )
    ]


def _fp8_checks(device: torch.device) -> list[Check]:
    support = fp8_support(device)
    if not support.recipes:
        return [
            Check(
                name="fp8 on this device",
                is_good=True,  # a fact, not a fault: plans for it have BF16 and FP32 only
                detail=f"not available: {support.reason}",
            )
        ]
    return fp8_self_test(device)
