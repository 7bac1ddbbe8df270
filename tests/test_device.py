"""Names of targets, and the facts of the machine at hand."""

import platform
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autoprec.device import fp8
from autoprec.device import local as module
from autoprec.device.fp8 import Fp8Support
from autoprec.device.local import (
    LoadMonitor,
    ThermalMonitor,
    available_devices,
    device_facts,
    device_name,
    e4m3_dtype,
    find_monitor,
    find_sensor,
    fp8_format_gaps,
    resolve_device,
)
from autoprec.device.timing import UNWATCHED
from autoprec.errors import DeviceError
from autoprec.records import APPLICABLE_RECIPES, Recipe
from autoprec.sensitivity.gemm import fast_gemms

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GPU = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    uuid="1234",
    gcnArchName="gfx942:sramecc+:xnack-",
)
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
    assert facts.software["torch"] == metadata.version("torch")
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
    assert not monitor.observe(lambda: 1.0)[1].is_dirty
    assert monitor.observe(lambda: 1.0)[1].is_dirty


def test_the_cpu_has_a_monitor() -> None:
    assert isinstance(find_monitor(CPU), LoadMonitor)


def test_recipes_that_fail_alike_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torch 2.11, whose CPU kernel asserts that there is one scale."""
    tried = fp8.recipe_errors

    def without_row_scales(recipe: Recipe, device: torch.device) -> fp8.RecipeErrors:
        if recipe is not Recipe.TENSORWISE:
            raise RuntimeError(
                f"(scale_a.numel() == 1) INTERNAL ASSERT\nIt {fp8.ONE_SCALE} backend."
            )
        return tried(recipe, device)

    fp8.tried_recipes.cache_clear()
    monkeypatch.setattr(fp8, "recipe_errors", without_row_scales)
    found = fp8.tried_recipes(CPU)
    fp8.tried_recipes.cache_clear()
    assert found.recipes == (Recipe.TENSORWISE,)
    assert found.reason.startswith("FP8 on cpu does not run as rowwise, rowwise_with_gw_hp: torch ")
    assert "one scale per tensor only" in found.reason
    assert found.reason.isprintable()


def test_every_recipe_runs_on_emulated_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    none = Fp8Support((), "no kernel")
    monkeypatch.setattr(fp8, "tried_recipes", lambda _: none)
    with fast_gemms():
        assert fp8.fp8_support(CPU) == Fp8Support(APPLICABLE_RECIPES, "")
        assert fp8.fp8_support(CUDA) == none


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU that only torch's properties know; NVML does not show it."""
    found = SimpleNamespace(**vars(GPU))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(module, "fp8_support", lambda _: Fp8Support((), "none tried"))

    def no_sensor(_: str) -> object:
        raise DeviceError("NVML does not start (Driver Not Loaded)")

    monkeypatch.setattr(module, "open_sensor", no_sensor)
    return found


def test_facts_of_a_gpu_without_nvml_name_what_is_missing(gpu: SimpleNamespace) -> None:
    facts = device_facts(CUDA)
    assert (facts.name, facts.kind, facts.capability) == (gpu.name, "cuda", "9.0")
    assert (facts.memory_bytes, facts.driver, facts.fp8_reason) == (
        gpu.total_memory,
        "",
        "none tried",
    )
    missing = dict(facts.missing)
    assert "Driver Not Loaded" in missing["nvml"]
    assert "10.0 or more, and it has 9.0" in missing["mxfp8"]
    assert device_name(CUDA) == gpu.name
    assert find_sensor(CUDA) is None
    assert find_monitor(CUDA) is UNWATCHED


def test_a_gpu_with_nvml_has_a_thermal_monitor(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_sensor", lambda uuid: SimpleNamespace(uuid=uuid))
    assert isinstance(find_monitor(CUDA), ThermalMonitor)
    assert vars(find_sensor(CUDA))["uuid"] == gpu.uuid


@pytest.mark.parametrize(
    ("capability", "has_mxfp8"), [((8, 9), False), ((10, 0), True), ((12, 0), True)]
)
def test_mxfp8_is_for_blackwell(
    gpu: SimpleNamespace, capability: tuple[int, int], has_mxfp8: bool
) -> None:
    gpu.major, gpu.minor = capability
    assert (fp8_format_gaps(CUDA) == {}) is has_mxfp8
    assert e4m3_dtype(CUDA) is torch.float8_e4m3fn


def test_amd_names_its_own_formats_and_has_no_nvml(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    facts = device_facts(CUDA)
    assert (facts.kind, facts.driver) == ("hip", "")
    missing = dict(facts.missing)
    assert "AMD" in missing["nvml"]
    assert "float8_e4m3fnuz" in missing["e4m3fn, e5m2"]
    assert e4m3_dtype(CUDA) is torch.float8_e4m3fnuz
    assert find_sensor(CUDA) is None
    gpu.gcnArchName = "gfx950:sramecc+"
    assert e4m3_dtype(CUDA) is torch.float8_e4m3fn


@pytest.mark.parametrize(("count", "device"), [(0, "cpu"), (2, "cuda:0")])
def test_auto_takes_the_first_gpu(monkeypatch: pytest.MonkeyPatch, count: int, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device("auto") == torch.device(device)
    assert current == [torch.device(device)] * (count > 0)
    assert available_devices() == ("cpu", *(f"cuda:{index}" for index in range(count)))
