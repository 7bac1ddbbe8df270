"""Measured GEMMs, copies, casts and empty kernels -> the constants of a device profile.

A fraction is what the GEMM model needs so that its time at a shape is the measured one; over
several shapes the median. Casts of one operand (as it lies, and transposed) take

    us = elements * bytes / bandwidth + kernels * kernel floor        a layer has three operands

so two sizes give both constants. The model's own form (tiles, waves) is kept from the profile it
starts from, so that measured and predicted profiles differ in numbers only.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoprec.common.recipes import Recipe
from autoprec.errors import DeviceError
from autoprec.predict.gemm import KERNELS, Kernel, gemm_us
from autoprec.records.devices import (
    CONSTANTS,
    Constant,
    ConstantKind,
    DeviceProfile,
    Machine,
    Software,
)
from autoprec.records.model import Basis

Shape = tuple[int, int, int]
FLOORS = (Kernel.BF16, Kernel.FP8_FAST, Kernel.FP8_ROWWISE)  # whose smallest GEMM is the floor
HALVINGS = 60
OPERANDS = 3  # of a linear: input, weight, gradient of the output


@dataclass(frozen=True)
class CastTimes:
    """Microseconds of both casts of one operand, of a large tensor and of a small one.

    Eager ones count their `kernels`, and the small one is timed with its launches: it takes as long
    as the host needs for them.
    """

    large_us: float
    small_us: float
    large_elements: int
    small_elements: int
    kernels: int = 0


@dataclass(frozen=True)
class Measured:
    """What was timed, in microseconds: large GEMMs, the smallest GEMM, a copy, an empty kernel.

    `copied_tbs` is bytes read plus written over time; `facts` are constants read from the driver.
    Casts are those of an operand like a weight, which nothing else is fused with.
    """

    large: Mapping[Kernel, Mapping[Shape, float]]
    small: Mapping[Kernel, float]
    copied_tbs: float
    empty_us: float
    facts: Mapping[str, float]
    casts: Mapping[Recipe, CastTimes] = field(default_factory=dict)  # compiled
    eager: CastTimes | None = None


def calibrate_profile(
    base: DeviceProfile,
    measured: Measured,
    *,
    title: str,
    source: str,
    software: Software | None = None,
) -> DeviceProfile:
    """Return `base` with the constants that were measured, each labelled so.

    `software` is what ran, by default what `base` assumes: it says what a rowwise GEMM was.
    """
    base = base.model_copy(update={"software": software or base.software})
    bandwidth = max(base.value("memory_bandwidth_tbs"), measured.copied_tbs)
    found = dict(measured.facts, memory_bandwidth_tbs=bandwidth, kernel_floor_us=measured.empty_us)
    found["memory_fraction"] = measured.copied_tbs / bandwidth
    # Floors and bandwidth come first: the fractions are what they leave unexplained.
    found |= {KERNELS[k].floor: us for k, us in measured.small.items() if k in FLOORS}
    machine = replace(base.machine, **found)
    for kernel, times in measured.large.items():
        fractions = [solve_fraction(machine, kernel, shape, us) for shape, us in times.items()]
        found[KERNELS[kernel].fraction] = statistics.median(fractions)
    found |= cast_constants(machine, measured)
    return base.model_copy(
        update={
            "name": title.lower().replace(" ", "-"),
            "title": title,
            "aliases": (),
            "basis": Basis.MEASURED,
            "constants": base.constants | {n: _constant(n, v, source) for n, v in found.items()},
            "notes": (f"what was not measured is of {base.name}",),
        }
    )


def solve_fraction(machine: Machine, kernel: Kernel, shape: Shape, us: float) -> float:
    """Return the achieved fraction at which the model takes `us` for a GEMM."""
    bounds = CONSTANTS[KERNELS[kernel].fraction]
    low, high = bounds.low, bounds.high
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        time = gemm_us(replace(machine, **{KERNELS[kernel].fraction: middle}), *shape, kernel)
        low, high = (middle, high) if time > us else (low, middle)
    return math.sqrt(low * high)


def cast_constants(machine: Machine, measured: Measured) -> dict[str, float]:
    """Return the constants of casts at which the model takes the measured times."""
    found: dict[str, float] = {}
    for recipe, times in measured.casts.items():
        elements = times.large_elements - times.small_elements
        us_per_element = max(times.large_us - times.small_us, 0.0) / elements
        fixed_us = times.small_us - us_per_element * times.small_elements
        found[f"{recipe}_cast_bytes"] = us_per_element * machine.bytes_per_us
        kernels = max(fixed_us / machine.kernel_floor_us, 1.0)  # something was launched
        found[f"{recipe}_cast_kernels"] = OPERANDS * kernels
    if (eager := measured.eager) is not None:
        moving_us = max(eager.large_us - eager.kernels * machine.kernel_floor_us, 0.0)
        found["eager_cast_bytes"] = moving_us * machine.bytes_per_us / eager.large_elements
        found["eager_cast_kernels"] = float(OPERANDS * eager.kernels)
        found["eager_host_us"] = eager.small_us / eager.kernels
    return found


def _constant(name: str, value: float, source: str) -> Constant:
    bounds = CONSTANTS[name]
    if not bounds.low <= value <= bounds.high:
        raise DeviceError(
            f"{name} must be {bounds.span}, but {value:g} was measured; measure again with "
            "the device idle"
        )
    rounded = float(f"{value:.5g}")
    return Constant(value=rounded, unit=bounds.unit, kind=ConstantKind.MEASURED, source=source)
