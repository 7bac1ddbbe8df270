"""What this machine can do for a plan: versions, device, FP8 with reasons, numbers that are right.

The numeric self-test runs every FP8 recipe against a higher-precision reference: a wrong kernel or
compiler is found here rather than in a training run. One GEMM is timed in each precision, since "is
FP8 worth anything on this device" is the first question that people ask. Where FP8 has a reference
kernel only (oneDNN on most CPUs), a small GEMM tells so: the large one would take minutes.
"""

from collections.abc import Callable

import torch

from autoprec.device.fp8 import fp8_self_test, fp8_support
from autoprec.device.local import device_facts, resolve_device
from autoprec.device.timing import make_clock, time_interleaved
from autoprec.device.torchao import import_torchao
from autoprec.predict.gemm import Kernel
from autoprec.predict.measure import gemm_candidates
from autoprec.records import Check, Diagnosis, GemmShape, Recipe, Timing

GEMM = GemmShape(M=2048, K=1024, N=1024)
GPU_GEMM = GemmShape(M=8192, K=4096, N=4096)  # far longer than Python needs to launch it
SMALL_GEMM = GemmShape(M=128, K=128, N=128)
SAMPLES = 7
HOPELESS = 20.0  # times slower than BF16: an FP8 kernel that no plan can use is not timed further


def diagnose(target: str) -> Diagnosis:
    """Look at the machine; takes a few seconds."""
    device = resolve_device(target)
    shape = GPU_GEMM if device.type == "cuda" else GEMM
    timings, speed = time_gemms(shape, device)
    has_torchao = hasattr(import_torchao(), "convert_to_float8_training")
    torchao = Check(name="torchao float8 training", is_good=has_torchao, detail="importable")
    support = fp8_support(device)
    said = f"not available: {support.reason}"  # a fact, not a fault: plans have BF16 and FP32 only
    no_fp8 = Check(name="fp8 on this device", is_good=True, detail=said)
    fp8 = fp8_self_test(device) if support.recipes else [no_fp8]
    return Diagnosis(
        device=device_facts(device),
        checks=(torchao, *fp8, *speed),
        gemm=str(shape),
        gemm_ms=timings,
    )


def time_gemms(shape: GemmShape, device: torch.device) -> tuple[dict[str, Timing], list[Check]]:
    """Time one GEMM in FP32, BF16 and FP8 tensorwise, interleaved.

    FP8 is left out where it does not run, or where a small GEMM shows that it is hopeless; a check
    then says so.
    """
    clock = make_clock(device)
    large, small = gemm_functions(shape, device), gemm_functions(SMALL_GEMM, device)
    checks = []
    if "fp8" in small:
        quick = time_interleaved(small, clock=clock, samples=SAMPLES)
        ratio = quick["fp8"].median_ms / quick["bf16"].median_ms
        if ratio > HOPELESS:
            del large["fp8"]
            said = f"a reference kernel: {SMALL_GEMM} takes {ratio:,.0f} times as long as BF16"
            checks = [Check(name="fp8 speed", is_good=True, detail=said)]  # a fact, not a fault
    return time_interleaved(large, clock=clock, samples=SAMPLES), checks


def gemm_functions(shape: GemmShape, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return [M, K] @ [K, N] -> [M, N] in FP32, BF16 and (where it runs) FP8."""
    recipes = [Recipe.TENSORWISE] if fp8_support(device).recipes else []
    found = gemm_candidates(device, (shape.M, shape.K, shape.N), recipes)
    names = {"fp32": Kernel.FP32, "bf16": Kernel.BF16, "fp8": Kernel.FP8_FAST}
    return {name: found[kernel] for name, kernel in names.items() if kernel in found}
