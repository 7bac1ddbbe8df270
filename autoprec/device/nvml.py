"""NVML -> the clocks, power, heat and throttle reasons of one GPU; what is absent says why.

NVML is read through nvidia-ml-py. No library, no driver, no permission, a MIG slice or a symbol the
driver lacks are facts, each with its reason in words, never a crash:

    open_sensor   raises one DeviceError when NVML or the GPU cannot be reached at all
    Sensor.read   leaves a reading that failed None, and its reason in `Sensor.missing`

`SLOWDOWNS` are the reasons that spoil a measurement: heat and the power brake. The software power
cap is none of them: a GPU at full load runs there for as long as the training does.
"""

from collections.abc import Callable
from typing import Any

import pynvml

from autoprec.errors import DeviceError
from autoprec.records import Conditions

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
        return self._read("driver", lambda _: pynvml.nvmlSystemGetDriverVersion()) or ""

    def is_mig(self) -> bool:
        """Whether the GPU is split into slices, which have no clocks or power of their own."""
        mode = self._read("mig_mode", pynvml.nvmlDeviceGetMigMode)
        return mode is not None and bool(mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE)

    def throttle_reasons(self) -> tuple[str, ...]:
        """Return the reasons that the clocks are below what they could be."""
        bits = self._read("throttle_reasons", _reason_bits) or 0
        return tuple(name for bit, name in REASONS.items() if bits & bit)

    def read(self) -> Conditions:
        """Return all readings of this moment."""
        ask, clock, heat = pynvml, pynvml.nvmlDeviceGetClockInfo, pynvml.nvmlDeviceGetTemperature
        return Conditions(
            sm_clock_mhz=self._read("sm_clock_mhz", clock, ask.NVML_CLOCK_SM),
            memory_clock_mhz=self._read("memory_clock_mhz", clock, ask.NVML_CLOCK_MEM),
            power_w=self._thousandth("power_w", ask.nvmlDeviceGetPowerUsage),
            power_limit_w=self._thousandth("power_limit_w", ask.nvmlDeviceGetEnforcedPowerLimit),
            temperature_c=self._read("temperature_c", heat, ask.NVML_TEMPERATURE_GPU),
            throttle_reasons=self.throttle_reasons(),
        )

    def _thousandth(self, fact: str, ask: Callable[[object], Any]) -> float | None:
        value = self._read(fact, ask)
        return None if value is None else float(value) / 1e3

    def _read(self, fact: str, ask: Callable[..., Any], *args: object) -> Any:  # Any: NVML's own
        """Return the answer of NVML; None, and the reason kept, where it does not."""
        if fact in self.missing:
            return None
        try:
            return ask(self._handle, *args)
        except pynvml.NVMLError as error:
            self.missing[fact] = f"NVML: {error}"
            return None


def _reason_bits(handle: object) -> int:
    try:
        return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        # its name before driver 535
        return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def open_sensor(uuid: str) -> Sensor:
    """Return the sensor of the GPU with this UUID, as torch or nvidia-smi says it."""
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
