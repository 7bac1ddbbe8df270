"""NVML -> the clocks, power, heat, energy and throttle reasons of one GPU; what is absent says why.

NVML is read through nvidia-ml-py. No library, no driver, no permission, a MIG slice or a symbol the
driver lacks are facts, each with its reason in words, never a crash:

    open_sensor   raises one DeviceError when NVML or the GPU cannot be reached at all
    Sensor.read   leaves a reading that failed None, and its reason in `Sensor.missing`

`SLOWDOWNS` are the reasons that spoil a measurement: heat and the power brake. The software power
cap is none of them: a GPU at full load runs there for as long as the training does.
"""

from collections.abc import Callable
from typing import TypeVar

import pynvml

from autoprec.errors import DeviceError
from autoprec.records import Conditions

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


class Sensor:
    """One GPU as NVML sees it; `missing` holds what could not be read, with the reason."""

    def __init__(self, handle: object) -> None:
        self._handle = handle
        self.missing: dict[str, str] = {}

    def driver(self) -> str:
        """Return the driver's version; empty when it cannot be read."""
        return self._read("driver", pynvml.nvmlSystemGetDriverVersion) or ""

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
