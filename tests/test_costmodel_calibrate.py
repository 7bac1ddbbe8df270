"""Measured times -> a measured device profile, and back to the same times."""

import pytest
import torch

from autoprec.costmodel import load_device_profile
from autoprec.costmodel.calibrate import Measured, Shape, calibrate_profile, solve_fraction
from autoprec.costmodel.gemm import Kernel, gemm_us
from autoprec.costmodel.machine import machine_of
from autoprec.device_measure import base_profile, measure_device_profile, take_measurements
from autoprec.errors import DeviceError
from autoprec.records.devices import ConstantKind
from autoprec.records.model import Basis
from autoprec.timing import Function

H100 = load_device_profile("h100-sxm")
SHAPES: tuple[Shape, ...] = ((8192, 4096, 4096), (8192, 8192, 8192))


class StepClock:
    """Says that every call took a hundredth of a millisecond more than the one before."""

    name = "steps"

    def __init__(self) -> None:
        self.ms = 0.0

    def measure(self, fn: Function) -> float:
        fn()
        self.ms += 0.01
        return self.ms

    def synchronize(self) -> None:
        return


def measured(copied_tbs: float = 3.0) -> Measured:
    machine = machine_of(H100)
    large = {
        k: {s: gemm_us(machine, *s, k) for s in SHAPES} for k in (Kernel.BF16, Kernel.FP8_FAST)
    }
    return Measured(
        large=large,
        small={Kernel.BF16: machine.bf16_gemm_floor_us},
        copied_tbs=copied_tbs,
        empty_us=machine.kernel_floor_us,
        facts={"sm_count": 132.0},
    )


def test_the_solved_fraction_gives_the_measured_time() -> None:
    machine = machine_of(H100)
    us = gemm_us(machine, 8192, 4096, 4096, Kernel.BF16)
    fraction = solve_fraction(machine, Kernel.BF16, (8192, 4096, 4096), us)
    assert fraction == pytest.approx(machine.bf16_fraction, rel=1e-6)


def test_a_measured_profile_says_what_was_measured() -> None:
    profile = calibrate_profile(H100, measured(), title="My GPU", source="a test")
    assert profile.basis is Basis.MEASURED
    assert profile.name == "my-gpu"
    assert profile.constants["bf16_fraction"].kind is ConstantKind.MEASURED
    assert profile.value("bf16_fraction") == pytest.approx(H100.value("bf16_fraction"), rel=0.05)
    assert profile.value("memory_fraction") == pytest.approx(3.0 / 3.35, rel=1e-3)
    assert profile.constants["interconnect_gbs"] == H100.constants["interconnect_gbs"]


def test_an_absurd_measurement_is_an_error() -> None:
    with pytest.raises(DeviceError, match="memory_fraction must be between"):
        calibrate_profile(H100, measured(copied_tbs=0.01), title="x", source="a test")


def test_a_gpu_starts_from_its_own_profile_or_its_generations() -> None:
    assert base_profile("NVIDIA H200", (9, 0)).name == "h200"
    assert base_profile("NVIDIA H100 NVL", (9, 0)).capability == "9.0"
    with pytest.raises(DeviceError, match=r"none is of compute capability 7\.0"):
        base_profile("Tesla V100", (7, 0))


def test_a_machine_without_a_gpu_says_so() -> None:
    with pytest.raises(DeviceError, match="measured on a GPU"):
        measure_device_profile("cpu")


def test_everything_that_a_device_runs_is_timed() -> None:
    found = take_measurements(
        torch.device("cpu"),
        clock=StepClock(),
        shapes=[(32, 32, 32), (64, 32, 32)],
        copied_bytes=1 << 16,
        samples=3,
    )
    assert {Kernel.FP32, Kernel.BF16, Kernel.FP8_FAST, Kernel.FP8_ROWWISE} <= set(found.large)
    assert all(len(times) == 2 for times in found.large.values())
    assert found.copied_tbs > 0
    assert found.empty_us > 0
