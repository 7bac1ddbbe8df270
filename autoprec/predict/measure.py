"""The GPU that is here -> a measured device profile: `autoprec devices measure`.

Times large GEMMs in every precision the device runs, the smallest GEMM, a copy, an empty kernel and
the FP8 casts of an operand, interleaved and with a cleared cache, and hands them to the cost
model's calibration. On CUDA each is replayed as a graph, so that Python's launches are in none of
them; one cast is timed with its launches, for what a kernel costs the host in eager mode. It starts
from the shipped profile of the same name, else of the same compute capability; what is not measured
(links, attention, block scales) stays that profile's and says so.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from autoprec.common.recipes import Recipe
from autoprec.common.text import first_line
from autoprec.common.versions import NOT_INSTALLED, software_versions
from autoprec.device.cuda_clock import graph_replay
from autoprec.device.fp8 import fp8_support
from autoprec.device.local import e4m3_dtype, find_monitor, resolve_device
from autoprec.device.timing import UNWATCHED, Clock, Monitor, make_clock, time_interleaved
from autoprec.device.torchao import float8_config, import_torchao
from autoprec.device.tracing import traced
from autoprec.errors import DeviceError
from autoprec.predict import list_device_profiles
from autoprec.predict.calibrate import CastTimes, Measured, Shape, calibrate_profile
from autoprec.predict.gemm import Kernel
from autoprec.predict.registry import find_profile
from autoprec.profiler.compiling import COMPILED, INDUCTOR, Backend, open_compilation
from autoprec.records.devices import DeviceProfile, Software
from autoprec.records.model import fp8_option

LARGE: tuple[Shape, ...] = ((8192, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 14336))
SMALL: Shape = (256, 256, 256)
COPIED_BYTES = 1 << 30
SAMPLES = 20
SHORT_CALLS = 20  # of a kernel of a few microseconds, in one replay
CAST, TINY = (16384, 8192), (256, 256)  # shapes of an operand: above and below any cache
CAST_RECIPES = (Recipe.TENSORWISE, Recipe.ROWWISE)  # those that the cost model has constants of
Function = Callable[[], object]
Operands = tuple[torch.Tensor, ...]  # a large one, a small one
log = logging.getLogger(__name__)


def measure_device_profile(target: str = "cuda") -> DeviceProfile:
    """Measure a GPU and return its profile.

    Raises:
        DeviceError: no such GPU is here, nothing like it is known, or a result is absurd.
    """
    device = resolve_device(target)
    if device.type != "cuda":
        raise DeviceError(
            f"a device profile is measured on a GPU, but {target!r} is {device.type}; "
            "for this CPU, `autoprec profile MODEL.py` measures the model itself"
        )
    name = torch.cuda.get_device_name(device)
    base = base_profile(name, torch.cuda.get_device_capability(device))
    clock, monitor = make_clock(device), find_monitor(device)
    measured = take_measurements(device, clock=clock, shapes=LARGE, monitor=monitor)
    source = f"autoprec devices measure on {name}, torch {torch.__version__}"
    return calibrate_profile(
        base, measured, title=safe_title(name), source=source, software=software_here()
    )


def software_here() -> Software:
    """Return the versions that run here; the default of one that is not (a CPU has no CUDA)."""
    found = {**software_versions(), "cuda": torch.version.cuda}
    known = {name: found.get(name) for name in Software.model_fields}
    return Software(**{n: v for n, v in known.items() if v and v != NOT_INSTALLED})


def base_profile(name: str, capability: tuple[int, int]) -> DeviceProfile:
    """Return the shipped profile of that name, else the first of that compute capability."""
    try:
        return find_profile(name)
    except DeviceError as error:
        wanted = f"{capability[0]}.{capability[1]}"
        for profile in list_device_profiles():
            if profile.capability == wanted:
                return profile
        raise DeviceError(
            f"a measured profile starts from a known one of its kind, but none is of compute "
            f"capability {wanted} ({name}); copy the nearest file of profiles/ and edit it"
        ) from error


def take_measurements(
    device: torch.device,
    *,
    clock: Clock,
    shapes: Sequence[Shape],
    copied_bytes: int = COPIED_BYTES,
    cast: tuple[int, int] = CAST,
    samples: int = SAMPLES,
    monitor: Monitor = UNWATCHED,
    backend: Backend = INDUCTOR,
) -> Measured:
    """Time GEMMs of `shapes` and a small one, a copy, an empty kernel and casts."""
    recipes = fp8_support(device).recipes
    meter = Meter(device, clock, samples, monitor)
    timed = {shape: meter.microseconds(gemm_candidates(device, shape, recipes)) for shape in shapes}
    smallest = meter.microseconds(gemm_candidates(device, SMALL, recipes), SHORT_CALLS)
    # What bounds all other kernels: streaming, and launching nothing.
    source = torch.empty(copied_bytes, dtype=torch.uint8, device=device)
    target, one = torch.empty_like(source), torch.ones((), device=device)
    copied_us = meter.time_one(lambda: target.copy_(source))
    # An operand like a weight: large, where its bytes count, and tiny, where its kernels do.
    operands = tuple(torch.randn(size, device=device).bfloat16() for size in (cast, TINY))
    known = [recipe for recipe in CAST_RECIPES if recipe in recipes]
    return Measured(
        large={Kernel(k): {shape: us[k] for shape, us in timed.items()} for k in smallest},
        small={Kernel(kernel): us for kernel, us in smallest.items()},
        copied_tbs=2 * copied_bytes / copied_us / 1e6,
        empty_us=meter.time_one(lambda: one.add_(0), SHORT_CALLS),
        facts=device_constants(device),
        casts=time_compiled_casts(meter, operands, known, backend=backend),
        eager=time_eager_casts(meter, operands, known[0]) if known else None,
    )


@dataclass(frozen=True)
class Meter:
    """Times functions on a device, in turns."""

    device: torch.device
    clock: Clock
    samples: int
    monitor: Monitor

    def microseconds(self, candidates: Mapping[str, Function], calls: int = 1) -> dict[str, float]:
        """Return the time of each on the device alone: on CUDA as a replay of `calls` calls."""
        if self.device.type != "cuda":
            return self.launched(candidates)  # a call costs the host next to nothing there
        replays = {name: replay_of(fn, calls) for name, fn in candidates.items()}
        return {name: us / calls for name, us in self.launched(replays).items()}

    def time_one(self, fn: Function, calls: int = 1) -> float:
        """Return the microseconds of one function on the device alone."""
        return self.microseconds({"it": fn}, calls)["it"]

    def launched(self, candidates: Mapping[str, Function]) -> dict[str, float]:
        """Return the time of each as Python launches it."""
        timings = time_interleaved(
            candidates, clock=self.clock, samples=self.samples, monitor=self.monitor
        )
        return {name: timing.median_ms * 1e3 for name, timing in timings.items()}


def time_compiled_casts(
    meter: Meter, operands: Operands, recipes: Sequence[Recipe], *, backend: Backend
) -> dict[Recipe, CastTimes]:
    """Time each recipe's compiled casts; none where torch.compile does not work, which is said."""
    large, small = operands
    found: dict[Recipe, CastTimes] = {}
    try:
        with open_compilation(meter.device, COMPILED, backend=backend):
            for recipe in recipes:
                cast = torch.compile(casts_of(recipe), backend=backend, dynamic=False)
                large_us = meter.time_one(partial(cast, large))
                small_us = meter.time_one(partial(cast, small), SHORT_CALLS)
                found[recipe] = CastTimes(large_us, small_us, large.numel(), small.numel())
    except torch.OutOfMemoryError:
        raise
    except (DeviceError, RuntimeError) as error:
        log.warning("compiled FP8 casts are not measured: %s", first_line(error))
    return found


def time_eager_casts(meter: Meter, operands: Operands, recipe: Recipe) -> CastTimes:
    """Time a recipe's eager casts, and count their kernels."""
    large, small = operands
    cast = casts_of(recipe)
    with traced() as trace:
        cast(small)
    large_us = meter.time_one(partial(cast, large))
    launches = repeated(partial(cast, small), SHORT_CALLS)
    small_us = meter.launched({"cast": launches})["cast"] / SHORT_CALLS
    return CastTimes(large_us, small_us, large.numel(), small.numel(), len(trace.operations))


def casts_of(recipe: Recipe) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return torchao's casts of a weight for its two GEMMs: as it lies, and transposed."""
    utils, config = import_torchao().float8_utils, float8_config(fp8_option(recipe))
    given = config.cast_config_weight

    def cast(x: torch.Tensor, dim: int) -> torch.Tensor:
        scale = utils.tensor_to_scale(
            x,
            given.target_dtype,
            scaling_granularity=given.scaling_granularity,
            axiswise_dim=dim,
            round_scales_to_power_of_2=config.round_scales_to_power_of_2,
        )
        made: torch.Tensor = utils.to_fp8_saturated(x.float() * scale, given.target_dtype)
        return made

    def both(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        direct = cast(x_NK, -1)
        turned = direct if recipe is Recipe.TENSORWISE else cast(x_NK, 0)
        return direct, turned.t().contiguous()

    return both


def replay_of(fn: Function, calls: int) -> Function:
    """Return the replay of a CUDA graph that holds `calls` calls of `fn`."""
    return graph_replay(repeated(fn, calls))


def repeated(fn: Function, calls: int) -> Function:
    """Return a function that calls `fn` so often."""

    def run() -> None:
        for _ in range(calls):
            fn()

    return run


def gemm_candidates(
    device: torch.device, shape: Shape, recipes: Sequence[Recipe]
) -> dict[str, Function]:
    """Return one GEMM per kernel that the device runs, on random operands."""
    M, K, N = shape
    a_MK, b_NK = torch.randn(M, K, device=device), torch.randn(N, K, device=device)
    a_bf16, b_bf16 = a_MK.bfloat16(), b_NK.bfloat16()
    found: dict[str, Function] = {
        Kernel.FP32: lambda: a_MK @ b_NK.T,
        Kernel.BF16: lambda: a_bf16 @ b_bf16.T,
    }

    def scaled(scale_a: torch.Tensor, scale_b: torch.Tensor, *, is_fast: bool) -> Function:
        # output_MN = a_MK @ b_KN of operands that are cast once, before the timing
        a_fp8, b_fp8 = (x.to(e4m3_dtype(device)) for x in (a_bf16, b_bf16))
        scales = {"scale_a": scale_a, "scale_b": scale_b}
        return lambda: torch._scaled_mm(
            a_fp8, b_fp8.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=is_fast
        )

    one = torch.ones((), device=device)
    rows, columns = torch.ones(M, 1, device=device), torch.ones(1, N, device=device)
    if Recipe.TENSORWISE in recipes:
        found[Kernel.FP8_FAST] = scaled(one, one, is_fast=True)
        found[Kernel.FP8_SLOW] = scaled(one, one, is_fast=False)
    if Recipe.ROWWISE in recipes:
        found[Kernel.FP8_ROWWISE] = scaled(rows, columns, is_fast=True)
    return found


def device_constants(device: torch.device) -> dict[str, float]:
    """Return the constants that the driver knows."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "sm_count": float(properties.multi_processor_count),
        "l2_cache_mb": properties.L2_cache_size / 1e6,
        "memory_capacity_gb": math.floor(properties.total_memory / 1e8) / 10,
    }


def safe_title(name: str) -> str:
    """Return a device's name without what a file's name could not hold."""
    return re.sub(r"[^A-Za-z0-9 .-]+", " ", name).strip() or "gpu"
