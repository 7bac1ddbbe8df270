"""What only a CUDA device can show: real kernels, real clocks. Run by `make test-gpu`."""

import pytest
import torch

from autoprec.capture import capture_model
from autoprec.device import device_facts, resolve_device
from autoprec.precision import fp8_support
from autoprec.profiler import profile_model
from autoprec.runtime import fp8_self_test
from autoprec.timing import CudaClock, time_interleaved
from tests.models import mlp_workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def test_a_larger_gemm_takes_longer_on_the_cuda_clock() -> None:
    device = resolve_device("cuda")
    small, large = (torch.randn(n, n, device=device) for n in (256, 4096))
    found = time_interleaved(
        {"small": lambda: small @ small, "large": lambda: large @ large}, clock=CudaClock(device)
    )
    assert found["large"].median_ms > 2 * found["small"].median_ms


def test_fp8_is_right_or_missing_with_a_reason() -> None:
    device = resolve_device("cuda")
    support = fp8_support(device)
    if not support.recipes:
        assert support.reason
        return
    assert all(check.is_good for check in fp8_self_test(device))


def test_facts_name_the_device_and_its_driver() -> None:
    facts = device_facts(resolve_device("cuda"))
    assert facts.name == torch.cuda.get_device_name()
    assert facts.capability
    assert facts.driver or "driver" in dict(facts.missing)


def test_a_profile_proves_its_fp8_kernels() -> None:
    device = resolve_device("cuda")
    workload = mlp_workload()
    profile = profile_model(workload, capture_model(workload, device=device), device=device)
    assert all(step.peak_bytes for step in profile.steps if step.timing.samples)
    rows = [row for row in profile.layers if row.option.is_fp8 and not row.infeasible]
    assert bool(rows) == bool(fp8_support(device).recipes)
    assert all(any("_scaled_mm float8" in kernel for kernel in row.kernels) for row in rows)
