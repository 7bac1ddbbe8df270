"""Measured times -> a measured device profile, and back to the same times."""

from dataclasses import replace

import pytest
import torch

from autoprec.common.recipes import Gemm, Recipe
from autoprec.device.timing import UNWATCHED, Clock, Function
from autoprec.device.torchao import float8_config
from autoprec.errors import DeviceError
from autoprec.predict import load_device_profile
from autoprec.predict import measure as device_measure
from autoprec.predict.calibrate import (
    CastTimes,
    Measured,
    Shape,
    calibrate_profile,
    cast_constants,
    solve_fraction,
)
from autoprec.predict.casts import cast_us
from autoprec.predict.gemm import Kernel, gemm_us
from autoprec.predict.measure import (
    Meter,
    base_profile,
    casts_of,
    measure_device_profile,
    software_here,
    take_measurements,
    time_compiled_casts,
)
from autoprec.records.devices import ConstantKind
from autoprec.records.model import Basis, fp8_option

H100 = load_device_profile("h100-sxm")
SHAPES: tuple[Shape, ...] = ((8192, 4096, 4096), (8192, 8192, 8192))


class StepClock(Clock):
    """Says that every call took a hundredth of a millisecond more than the one before."""

    def __init__(self) -> None:
        self.ms = 0.0

    def measure(self, fn: Function) -> float:
        fn()
        self.ms += 0.01
        return self.ms


def measured(copied_tbs: float = 3.0) -> Measured:
    machine = H100.machine
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
    machine = H100.machine
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


def test_everything_that_a_device_runs_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        device_measure, "SMALL", (16, 16, 16)
    )  # a CPU's FP8 GEMM is a slow reference
    found = take_measurements(
        torch.device("cpu"),
        clock=StepClock(),
        shapes=[(32, 32, 32), (64, 32, 32)],
        copied_bytes=1 << 16,
        cast=(512, 256),
        samples=3,
        backend="aot_eager",
    )
    assert {Kernel.FP32, Kernel.BF16, Kernel.FP8_FAST, Kernel.FP8_ROWWISE} <= set(found.large)
    assert all(len(times) == 2 for times in found.large.values())
    assert found.copied_tbs > 0
    assert found.empty_us > 0
    assert set(found.casts) == {Recipe.TENSORWISE, Recipe.ROWWISE}
    assert all(times.large_elements == 2 * times.small_elements for times in found.casts.values())
    assert found.eager is not None
    assert 6 <= found.eager.kernels <= 20  # amax, scale, cast and a transposed copy, step by step


@pytest.mark.parametrize("recipe", [Recipe.TENSORWISE, Recipe.ROWWISE])
@pytest.mark.parametrize(("elements", "us"), [(2**25, 60.0), (2**27, 300.0)])
def test_the_model_takes_as_long_for_casts_as_was_measured(
    recipe: Recipe, elements: int, us: float
) -> None:
    times = CastTimes(us, 9.0, large_elements=elements, small_elements=2**16)
    found = cast_constants(H100.machine, replace(measured(), casts={recipe: times}))
    # a layer whose operands are all of this size, and cost what a weight's casts cost
    machine = replace(H100.machine, cast_share_input=1.0, cast_share_grad=1.0, **found)
    for size, wanted in ((elements, us), (2**16, 9.0)):
        side = round(size**0.5)
        cost = cast_us(machine, side, side, side, recipe=recipe, gemms=tuple(Gemm), compiled=True)
        assert cost == pytest.approx(3 * wanted, rel=0.01)


def test_eager_casts_give_what_a_kernel_costs_the_host() -> None:
    machine = H100.machine
    eager = CastTimes(500.0, 120.0, 2**25, 2**16, kernels=15)
    found = cast_constants(machine, replace(measured(), eager=eager))
    assert found["eager_host_us"] == 8.0
    assert found["eager_cast_kernels"] == 45.0
    moving_us = found["eager_cast_bytes"] * 2**25 / machine.bytes_per_us
    assert moving_us + 15 * machine.kernel_floor_us == pytest.approx(500.0)


def test_a_measured_profile_says_which_software_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    software = software_here()
    assert software.cuda == "12.8"
    assert torch.__version__.startswith(software.torch)
    made = calibrate_profile(H100, measured(), title="x", source="a test", software=software)
    assert made.software == software
    assert H100.machine.rowwise_is_cublas
    assert not made.machine.rowwise_is_cublas


def test_measured_casts_are_labelled_and_absurd_ones_refused() -> None:
    times = CastTimes(60.0, 9.0, large_elements=2**25, small_elements=2**16)
    eager = CastTimes(500.0, 120.0, 2**25, 2**16, kernels=15)
    given = replace(measured(), casts={Recipe.ROWWISE: times}, eager=eager)
    profile = calibrate_profile(H100, given, title="x", source="a test")
    made = ("rowwise_cast_bytes", "rowwise_cast_kernels", "eager_host_us", "eager_cast_bytes")
    assert all(profile.constants[name].kind is ConstantKind.MEASURED for name in made)
    assert profile.constants["tensorwise_cast_bytes"] == H100.constants["tensorwise_cast_bytes"]
    slow = replace(measured(), casts={Recipe.ROWWISE: replace(times, large_us=1e5)})
    with pytest.raises(DeviceError, match="rowwise_cast_bytes must be between"):
        calibrate_profile(H100, slow, title="x", source="a test")


@pytest.mark.parametrize("recipe", [Recipe.TENSORWISE, Recipe.ROWWISE])
def test_the_timed_casts_are_what_both_gemms_take(recipe: Recipe) -> None:
    x_NK = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    direct, turned = casts_of(recipe)(x_NK)
    dtype = float8_config(fp8_option(recipe)).cast_config_weight.target_dtype
    for made, original in ((direct, x_NK), (turned, x_NK.t())):
        assert made.dtype is dtype
        assert made.is_contiguous()
        axes = (0, 1) if recipe is Recipe.TENSORWISE else (1,)  # a scale for all, or by row
        values, exact = made.float(), original.float()
        scale = values.norm(dim=axes, keepdim=True) / exact.norm(dim=axes, keepdim=True)
        assert float((values / scale - exact).norm() / exact.norm()) < 0.05  # e4m3 gives 0.03
        assert float(values.abs().amax(axes).min()) >= 448 / 2 / (1 + 2**-4)  # the range is used


def test_on_a_gpu_many_calls_are_replayed_at_once_and_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Millisecond(StepClock):
        def measure(self, fn: Function) -> float:
            fn()
            return 1.0

    asked: list[int] = []

    def replay_of(fn: Function, calls: int) -> Function:
        asked.append(calls)
        return fn

    monkeypatch.setattr(device_measure, "replay_of", replay_of)
    meter = Meter(torch.device("cuda"), Millisecond(), 3, UNWATCHED)
    assert meter.microseconds({"kernel": lambda: None}, 20) == {"kernel": 50.0}
    assert meter.launched({"kernel": lambda: None}) == {"kernel": 1000.0}
    assert asked == [20]


def test_a_compiler_that_fails_leaves_casts_unmeasured(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler\nat all")

    meter = Meter(torch.device("cpu"), StepClock(), 3, UNWATCHED)
    operands = (torch.ones(64, 32), torch.ones(32, 32))
    assert time_compiled_casts(meter, operands, [Recipe.TENSORWISE], backend=broken) == {}
    assert "casts are not measured" in caplog.text
