"""A target's name -> the torch device, what it is and can do, and a monitor of its heat."""

import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from autoprec.common.versions import NOT_INSTALLED, software_versions
from autoprec.device.fp8 import fp8_support
from autoprec.device.nvml import SLOWDOWNS, Sensor, open_sensor
from autoprec.device.ranks import world_size
from autoprec.device.tf32 import cudnn_allows_tf32, matmul_allows_tf32
from autoprec.device.timing import UNWATCHED, Monitor, Observation
from autoprec.errors import DeviceError
from autoprec.records import Conditions, DeviceFacts

PACKAGES = ("torch", "torchao", "numpy", "nvidia-ml-py")
INSTRUCTION_SETS = (  # those that decide how fast a CPU multiplies; Linux's names, x86 then Arm
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "amx_fp16", "amx_int8"),
    *("asimd", "sve", "sve2", "bf16", "svebf16", "i8mm", "sme"),
)
CPU_INFO = Path("/proc/cpuinfo")
PAUSE_S = 2.0  # a hot GPU cools below its slowdown threshold within a few seconds of idling
MOST_PAUSES = 15  # per round; after half a minute the GPU is measured as it is
MXFP8_CAPABILITY = (10, 0)  # Blackwell: MX blocks are scaled by the tensor cores
FNUZ_ARCHITECTURES = ("gfx940", "gfx941", "gfx942")  # MI300; MI350 and Navi 4 are OCP, as NVIDIA's
# Linux takes a CPU away every 3 to 6 ms while another process wants it, so that is 3 to 7 times in
# this span; a quiet machine's own services cause at most one switch in it.
MS_PER_SWITCH = 20.0


def resolve_device(target: str) -> torch.device:
    """Return the torch device that `target` (auto, cpu, cuda, cuda:1) names.

    A GPU becomes torch's current one: user code that says just "cuda" means it, and streams, graphs
    and synchronisation are its own. Of several ranks each takes the GPU of its LOCAL_RANK.

    Raises:
        DeviceError: the name is unknown or the device is not here.
    """
    # `auto` and `cuda` are the first GPU, or the rank's own
    here = available_devices()
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if world_size() > 1 else "cuda:0"
    if world_size() > 1 and target.startswith("cuda:"):
        raise DeviceError(
            f"of {world_size()} ranks each has a GPU of its own, but the target is {target!r}; "
            "give --target cuda, and CUDA_VISIBLE_DEVICES to choose which"
        )
    name = {"auto": own if len(here) > 1 else "cpu", "cuda": own}.get(target, target)
    if name not in here:
        raise DeviceError(
            f"a target must be a device that is here or auto, but {target!r} is not; "
            f"possible: auto, {', '.join(here)}"
        )
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def release_memory(device: torch.device) -> None:
    """Give back to a GPU what nothing holds any more: torch keeps it, in blocks of old sizes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available_devices() -> tuple[str, ...]:
    """Return the names of the devices that are here; the CPU comes first."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ("cpu", *(f"cuda:{index}" for index in range(count)))


def device_facts(device: torch.device) -> DeviceFacts:
    """Return the facts of device and software; takes seconds when FP8 is first tried."""
    hardware = _cuda_facts if device.type == "cuda" else _cpu_facts
    support = fp8_support(device)
    missing = fp8_format_gaps(device)
    facts = {
        **hardware(device, missing),
        "threads": torch.get_num_threads(),
        "allow_tf32": matmul_allows_tf32(),
        "allow_tf32_conv": cudnn_allows_tf32() if device.type == "cuda" else None,
        "compile_mode": "eager",
        "software": _software(missing),
        "fp8_recipes": tuple(recipe.value for recipe in support.recipes),
        "fp8_reason": support.reason,
    }
    return DeviceFacts.model_validate({**facts, "missing": tuple(missing.items())})


def fp8_format_gaps(device: torch.device) -> dict[str, str]:
    """Return the FP8 formats that a GPU's units do not multiply, each with the reason."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        if (properties.major, properties.minor) >= MXFP8_CAPABILITY:
            return {}
        had = f"{properties.major}.{properties.minor}"
        return {"mxfp8": f"MXFP8 GEMMs need compute capability 10.0 or more, and it has {had}"}
    architecture = str(properties.gcnArchName).partition(":")[0]
    gaps = {"mxfp8": f"torchao has no MXFP8 training on AMD's {architecture}"}
    if architecture in FNUZ_ARCHITECTURES:
        gaps["e4m3fn, e5m2"] = f"{architecture} multiplies float8_e4m3fnuz and float8_e5m2fnuz"
    return gaps


def e4m3_dtype(device: torch.device) -> torch.dtype:
    """Return the e4m3 format that the device multiplies."""
    is_fnuz = "e4m3fn, e5m2" in fp8_format_gaps(device)
    return torch.float8_e4m3fnuz if is_fnuz else torch.float8_e4m3fn


def device_name(device: torch.device) -> str:
    """Return the name that `device_facts` gives the device, at once."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    return str(_cpu_facts(device, {})["name"])


def find_sensor(device: torch.device) -> Sensor | None:
    """Return the NVML sensor of a device; None where there is none (`device_facts` says why)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    try:
        return open_sensor(str(torch.cuda.get_device_properties(device).uuid))
    except DeviceError:
        return None


def find_monitor(device: torch.device) -> Monitor:
    """Return the monitor that rejects samples of a hot GPU or a busy CPU, where these are told."""
    if device.type == "cpu":
        return UNWATCHED if sys.platform == "win32" else LoadMonitor()
    sensor = find_sensor(device)
    return UNWATCHED if sensor is None else ThermalMonitor(sensor)


def _cpu_facts(_device: torch.device, missing: dict[str, str]) -> dict[str, object]:
    missing["clocks, power, heat"] = "NVML reads them of NVIDIA GPUs only"
    try:
        text = CPU_INFO.read_text()
    except OSError as error:
        text = ""
        missing["instruction sets"] = f"{CPU_INFO}: {error.strerror}"
    lines = [line.partition(":") for line in text.splitlines()]
    first = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # of many CPUs
    flags = set(first.get("flags", first.get("Features", "")).split())
    if text and not flags:
        missing["instruction sets"] = f"{CPU_INFO} lists none"
    name = first.get("model name", first.get("Model")) or platform.processor()
    if not name:
        missing["name"] = f"neither {CPU_INFO} nor the platform says"
    return {
        "name": name or platform.machine() or "cpu",
        "kind": "cpu",
        "capability": " ".join(known for known in INSTRUCTION_SETS if known in flags),
        "memory_bytes": _physical_memory(missing),
        "driver": "",
    }


def _cuda_facts(device: torch.device, missing: dict[str, str]) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    is_hip = torch.version.hip is not None
    if is_hip:
        missing["nvml"] = "the GPU is AMD's: NVML reads clocks, power and heat of NVIDIA GPUs only"
    return {
        "name": properties.name,
        "kind": "hip" if is_hip else "cuda",
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": int(properties.total_memory),
        "driver": "" if is_hip else nvml_facts(str(properties.uuid), missing),
    }


def nvml_facts(uuid: str, missing: dict[str, str]) -> str:
    """Return the driver's version; add what NVML does not tell of a GPU, and why, to `missing`."""
    try:
        sensor = open_sensor(uuid)
    except DeviceError as error:
        missing["nvml"] = str(error)
        return ""
    driver = sensor.driver()
    sensor.read()
    if sensor.is_mig():
        missing["mig"] = "the GPU is split into MIG slices: clocks and power are the GPU's"
    missing.update(sensor.missing)
    return driver


def _physical_memory(missing: dict[str, str]) -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError) as error:
        missing["memory"] = f"the system does not say ({error})"
        return 0


def _software(missing: dict[str, str]) -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{sys.platform} {platform.release()}"}
    found |= software_versions(PACKAGES)
    absent = [name for name, version in found.items() if version == NOT_INSTALLED]
    missing.update(dict.fromkeys(absent, "not installed"))
    found |= {"cuda": torch.version.cuda or "", "hip": torch.version.hip or ""}
    return {name: version for name, version in found.items() if version and name not in absent}


@dataclass
class ThermalMonitor:
    """Pauses while the GPU is slowed by heat, and calls a sample that saw it slowed dirty."""

    sensor: Sensor
    sleep: Callable[[float], None] = time.sleep
    gave_up: bool = False
    seen: Conditions | None = None  # by the last look

    def settle(self) -> int:
        """Wait until nothing slows the GPU, at most MOST_PAUSES times; return how often.

        A GPU that stayed slow is not waited for again until a sample has seen it fast.
        """
        patience = 0 if self.gave_up else MOST_PAUSES
        for pauses in range(patience):
            if not SLOWDOWNS & set(self.sensor.throttle_reasons()):
                return pauses
            self.sleep(PAUSE_S)
        self.gave_up = True
        return patience

    def observe(self, sample: Callable[[], float]) -> tuple[float, Observation]:
        """Take a sample; return what the GPU was like meanwhile, and whether that spoiled it."""
        self.seen = None
        elapsed = sample()
        seen = self.seen or self.sensor.read()
        is_slow = bool(SLOWDOWNS & set(seen.throttle_reasons))
        self.gave_up = self.gave_up and is_slow
        return elapsed, Observation(is_slow, seen)

    def look(self) -> None:
        """Read the sensor: an idle GPU's clocks and power say nothing of the sample."""
        self.seen = self.sensor.read()


class LoadMonitor(Monitor):
    """Calls a sample dirty when other processes took the CPU away from this one during it.

    It waits for nothing: how long others want the CPU is not known.
    """

    def observe(self, sample: Callable[[], float]) -> tuple[float, Observation]:
        """Take a sample; dirty if it was interrupted more often than a quiet machine does."""
        switches, started = _involuntary_switches(), time.perf_counter()
        elapsed = sample()
        around_ms = (time.perf_counter() - started) * 1e3
        switches = _involuntary_switches() - switches
        return elapsed, Observation(is_dirty=switches > max(1.0, around_ms / MS_PER_SWITCH))


def _involuntary_switches() -> int:
    import resource  # not on Windows, where no LoadMonitor is made

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
