"""Names of targets, and the facts of the machine at hand."""

import platform
from pathlib import Path

import pytest
import torch

from autoprec import device as module
from autoprec.device import (
    LoadMonitor,
    available_devices,
    device_facts,
    find_monitor,
    resolve_device,
)
from autoprec.errors import DeviceError

CPU = torch.device("cpu")
XEON = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n"


def test_auto_is_the_best_that_is_here() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("target", ["tpu", "cuda:99", "CPU", "", "cpu:3", "mps"])
def test_a_device_that_is_not_here_is_one_line_that_lists_the_possible(target: str) -> None:
    with pytest.raises(DeviceError) as error:
        resolve_device(target)
    assert repr(target) in str(error.value)
    assert str(error.value).endswith(", ".join(("auto", *available_devices())))
    assert "\n" not in str(error.value)


def test_facts_of_the_cpu_are_complete() -> None:
    facts = device_facts(CPU)
    assert (facts.kind, facts.driver, facts.compile_mode) == ("cpu", "", "eager")
    assert facts.name
    assert facts.memory_bytes > 2**28
    assert facts.threads == torch.get_num_threads()
    assert facts.software["python"] == platform.python_version()
    assert facts.software["torch"] == torch.__version__
    assert bool(facts.fp8_recipes) or bool(facts.fp8_reason)
    assert any("NVML" in reason for _, reason in facts.missing)


def test_instruction_sets_are_those_that_multiply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(XEON)
    monkeypatch.setattr(module, "CPU_INFO", tmp_path / "cpuinfo")
    facts = device_facts(CPU)
    assert (facts.name, facts.capability) == ("Xeon", "avx2 avx512_bf16 amx_bf16")


def test_a_system_without_cpuinfo_is_a_fact_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_INFO", tmp_path / "absent")
    facts = device_facts(CPU)
    assert facts.capability == ""
    assert "No such file" in dict(facts.missing)["instruction sets"]


def test_tf32_is_read_where_the_process_allows_it() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert device_facts(CPU).allow_tf32
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert not device_facts(CPU).allow_tf32


def test_a_sample_is_dirty_when_the_cpu_was_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = iter([100, 101, 200, 240])
    monkeypatch.setattr(module, "_involuntary_switches", lambda: next(switches))
    monitor = LoadMonitor()
    monitor.begin()
    assert not monitor.end().is_dirty
    monitor.begin()
    assert monitor.end().is_dirty


def test_the_cpu_has_a_monitor() -> None:
    assert isinstance(find_monitor(CPU), LoadMonitor)
