"""NVML -> the clocks, power, heat, energy and throttle reasons of one GPU; what is absent says why.

NVML is read through nvidia-ml-py. No library, no driver, no permission, a MIG slice or a symbol the
driver lacks are facts, each with its reason in words, never a crash:

    open_sensor   raises one DeviceError when NVML or the GPU cannot be reached at all
    Sensor.read   leaves a reading that failed None, and its reason in `Sensor.missing`

A sample is dirty when the GPU was slowed by heat or by its power brake. The software power cap is
not such a reason: a GPU at full load runs there for as long as the training does.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import pynvml

from autoprec.errors import DeviceError
from autoprec.records import Conditions
from autoprec.timing import Observation

T = TypeVar("T")

REASONS = {  # bits of nvmlDeviceGetCurrentClocksEventReasons, by NVML's own names
    0x0002: "applications_clocks",
    0x0004: "sw_power_cap",
    0x0008: "hw_slowdown",
    0x0010: "sync_boost",
    0x0020: "sw_thermal",
    0x0040: "hw_thermal",
    0x0080: "hw_power_brake",
    0x0100: "display_clock",
}
SLOWDOWNS = frozenset({"hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake"})
PAUSE_S = 2.0  # a hot H100 falls below its slowdown threshold within a few seconds of idling
MOST_PAUSES = 15  # per round; after half a minute the GPU is measured as it is


class Sensor:
    """One GPU as NVML sees it; `missing` holds what could not be read, with the reason."""

    def __init__(self, handle: object) -> None:
        self._handle = handle
        self.missing: dict[str, str] = {}

    def driver(self) -> str:
        """Return the driver's version; empty when it cannot be read."""
        return self._read("driver", pynvml.nvmlSystemGetDriverVersion) or ""

    def memory_bytes(self) -> int:
        """Return the GPU's memory; 0 when it cannot be read."""
        read = self._read("memory", lambda: int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total))
        return read or 0

    def is_mig(self) -> bool:
        """Whether the GPU is split into slices, which have no clocks or power of their own."""
        mode = self._read("mig_mode", lambda: pynvml.nvmlDeviceGetMigMode(self._handle)[0])
        return bool(mode == pynvml.NVML_DEVICE_MIG_ENABLE)

    def energy_j(self) -> float | None:
        """Return the joules since the driver was loaded; the counter moves every 20 to 100 ms."""
        return self._read(
            "energy_j", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        )

    def throttle_reasons(self) -> tuple[str, ...]:
        """Return why the clocks are below what they could be."""
        bits = self._read("throttle_reasons", self._reason_bits) or 0
        return tuple(name for bit, name in REASONS.items() if bits & bit)

    def read(self) -> Conditions:
        """Return all readings of this moment; energy is a difference and stays None."""
        handle = self._handle
        return Conditions(
            sm_clock_mhz=self._clock("sm_clock_mhz", pynvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._clock("memory_clock_mhz", pynvml.NVML_CLOCK_MEM),
            power_w=self._read("power_w", lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3),
            power_limit_w=self._read(
                "power_limit_w", lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3
            ),
            temperature_c=self._read(
                "temperature_c",
                lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            ),
            throttle_reasons=self.throttle_reasons(),
        )

    def _clock(self, fact: str, domain: int) -> int | None:
        return self._read(fact, lambda: int(pynvml.nvmlDeviceGetClockInfo(self._handle, domain)))

    def _reason_bits(self) -> int:
        try:
            return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle))
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
            # its name before driver 535
            return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))

    def _read(self, fact: str, ask: Callable[[], T]) -> T | None:
        if fact in self.missing:
            return None
        try:
            return ask()
        except pynvml.NVMLError as error:
            self.missing[fact] = f"NVML: {error}"
            return None


class ThermalMonitor:
    """Pauses while the GPU is slowed by heat, and calls a sample that saw it slowed dirty."""

    def __init__(self, sensor: Sensor, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sensor = sensor
        self._sleep = sleep
        self._energy_j: float | None = None

    def settle(self) -> int:
        """Wait until nothing slows the GPU, at most MOST_PAUSES times; return how often."""
        for pauses in range(MOST_PAUSES):
            if not SLOWDOWNS & set(self._sensor.throttle_reasons()):
                return pauses
            self._sleep(PAUSE_S)
        return MOST_PAUSES

    def begin(self) -> None:
        """Note the energy counter."""
        self._energy_j = self._sensor.energy_j()

    def end(self) -> Observation:
        """Return what the GPU was like, and whether that spoiled the sample."""
        seen = self._sensor.read()
        after = self._sensor.energy_j()
        if self._energy_j is not None and after is not None:
            used = max(after - self._energy_j, 0.0)
            seen = seen.model_copy(update={"energy_j": used})
        return Observation(bool(SLOWDOWNS & set(seen.throttle_reasons)), seen)


def open_sensor(uuid: str) -> Sensor:
    """Return the sensor of the GPU with this UUID, as torch or nvidia-smi says it.

    Raises:
        DeviceError: NVML is not here, or does not show the GPU.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise DeviceError(
            f"clocks, power and heat need NVML, but it does not start ({error}); "
            "install the NVIDIA driver, or read the timings without them"
        ) from error
    try:
        return Sensor(_find_handle(uuid))
    except pynvml.NVMLError as error:
        raise DeviceError(
            f"NVML must show the GPU that torch uses, but it does not show {uuid} ({error}); "
            "read the timings without clocks, power and heat"
        ) from error


def _find_handle(uuid: str) -> object:
    """Return the handle of a GPU, or of the MIG slice of that UUID (torch omits the prefix)."""
    if uuid.startswith(("GPU-", "MIG-")):
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        if error.value not in (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT):
            raise
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
