"""NVML's readings through the real nvidia-ml-py client, from a small library compiled here."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest
import torch

from autoprec.device.local import MOST_PAUSES, ThermalMonitor, nvml_facts
from autoprec.device.nvml import open_sensor
from autoprec.device.timing import Clock, Stopping, sample_interleaved
from autoprec.errors import DeviceError
from tests.ranks import exit_code_of

SOURCE = Path(__file__).with_name("nvml_stub.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="a stub of NVML needs a C compiler")
LoadStub = Callable[..., None]


@pytest.fixture
def load_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadStub:
    def load(*flags: str, **environment: int) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(compiled(tmp_path, *flags))))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    return load


def compiled(folder: Path, *flags: str) -> Path:
    library = folder / "libnvidia-ml.so.1"
    command = [str(COMPILER), "-shared", "-fPIC", "-o", str(library), str(SOURCE), *flags]
    subprocess.run(command, check=True)
    return library


class EveryCallTakes(Clock):
    def __init__(self, ms: float) -> None:
        self.ms = ms

    def measure(self, fn: Callable[[], object]) -> float:
        fn()
        return self.ms


def test_a_healthy_gpu_tells_everything(load_stub: LoadStub) -> None:
    load_stub()
    sensor = open_sensor("a")
    seen = sensor.read()
    assert (seen.sm_clock_mhz, seen.memory_clock_mhz, seen.temperature_c) == (1755, 2619, 61)
    assert (seen.power_w, seen.power_limit_w) == (412.5, 700.0)
    assert seen.throttle_reasons == ("sw_power_cap",)
    assert sensor.driver() == "570.86.15"
    assert not sensor.is_mig()
    assert sensor.missing == {}


def test_a_power_cap_is_recorded_and_no_reason_to_reject(load_stub: LoadStub) -> None:
    load_stub()
    monitor = ThermalMonitor(open_sensor("a"))
    elapsed, seen = monitor.observe(lambda: 3.0)
    assert elapsed == 3.0
    assert not seen.is_dirty
    assert seen.conditions is not None
    assert seen.conditions.throttle_reasons == ("sw_power_cap",)


def test_hot_samples_are_rejected_and_counted(load_stub: LoadStub) -> None:
    load_stub(STUB_HOT=MOST_PAUSES + 1)
    naps: list[float] = []
    monitor = ThermalMonitor(open_sensor("a"), sleep=naps.append)
    found = sample_interleaved(
        {"gemm": lambda: None},
        clock=EveryCallTakes(1.0),
        stopping=Stopping(samples=3),
        warmup=1,
        monitor=monitor,
    )["gemm"]
    assert len(naps) == found.pauses == MOST_PAUSES
    assert (found.rejected, found.clean) == (1, [1.0, 1.0, 1.0])
    assert found.conditions[0].throttle_reasons == ("hw_thermal",)


def test_a_gpu_that_stays_hot_is_measured_as_it_is(load_stub: LoadStub) -> None:
    load_stub(STUB_HOT=10**6)
    found = sample_interleaved(
        {"gemm": lambda: None},
        clock=EveryCallTakes(1.0),
        stopping=Stopping(samples=4, rejections=2),
        monitor=ThermalMonitor(open_sensor("a"), sleep=lambda _: None),
    )["gemm"]
    assert (found.rejected, len(found.clean)) == (2, 4)


def test_a_gpu_that_stays_hot_is_waited_for_once(load_stub: LoadStub) -> None:
    load_stub(STUB_HOT=MOST_PAUSES + 4)
    naps: list[float] = []
    monitor = ThermalMonitor(open_sensor("a"), sleep=naps.append)
    assert monitor.settle() == MOST_PAUSES
    for _ in range(4):  # the fourth sample is the last hot one
        assert monitor.settle() == 0
        assert monitor.observe(lambda: 1.0)[1].is_dirty
    assert len(naps) == MOST_PAUSES
    assert not monitor.observe(lambda: 1.0)[
        1
    ].is_dirty  # it has cooled: from now on heat is waited for again
    assert not monitor.gave_up


def test_what_may_not_be_read_is_a_named_fact(load_stub: LoadStub) -> None:
    load_stub(STUB_ERROR=4)
    missing: dict[str, str] = {}
    assert nvml_facts("a", missing) == "570.86.15"
    assert set(missing) == {"power_w"}
    assert "Insufficient Permissions" in missing["power_w"]


def test_an_older_driver_tells_as_much_by_older_names(load_stub: LoadStub) -> None:
    load_stub("-DNO_SYMBOLS")
    sensor = open_sensor("a")
    assert sensor.read().throttle_reasons == ("sw_power_cap",)
    assert sensor.missing == {}


def test_a_mig_slice_is_found_and_named(load_stub: LoadStub) -> None:
    load_stub(STUB_MIG=1)
    missing: dict[str, str] = {}
    nvml_facts("b", missing)
    assert list(missing) == ["mig"]


def test_no_driver_is_a_fact_with_its_reason(load_stub: LoadStub) -> None:
    load_stub(STUB_INIT=9)
    missing: dict[str, str] = {}
    assert nvml_facts("a", missing) == ""
    assert "Driver Not Loaded" in missing["nvml"]


def test_a_gpu_that_nvml_does_not_show_is_an_error(load_stub: LoadStub) -> None:
    load_stub()
    with pytest.raises(DeviceError, match="must show the GPU"):
        open_sensor("GPU-unknown")


def read_by_name(library: Path) -> None:
    """Read a clock through the library that the client finds itself: one of its name is loaded."""
    ctypes.CDLL(str(library))
    sys.exit(open_sensor("a").read().sm_clock_mhz == 1755)


def test_the_client_loads_the_library_by_its_own_name(tmp_path: Path) -> None:
    library = compiled(tmp_path, "-Wl,-soname,libnvidia-ml.so.1")
    assert exit_code_of(read_by_name, library) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has NVML")
def test_no_library_is_an_error_in_one_line() -> None:
    with pytest.raises(DeviceError, match="need NVML"):
        open_sensor("a")
