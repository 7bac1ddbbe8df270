"""Whole steps, GEMMs and linears of bench/gpu_day.py: what each section times, item by item."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from gpu_models import (
    TINY,
    Decoder,
    Options,
    Sizes,
    decoder_workload,
    fastest_options,
    in_context,
    options_of,
)
from gpu_running import Row
from torch import Tensor

from autoprec.common.text import first_line
from autoprec.device.fp8 import fp8_support
from autoprec.device.local import e4m3_dtype, find_monitor
from autoprec.device.timing import (
    Clock,
    Function,
    Monitor,
    Samples,
    Stopping,
    make_clock,
    sample_interleaved,
)
from autoprec.errors import AutoprecError
from autoprec.model.layers import model_layers
from autoprec.model.meta import capture_on_meta
from autoprec.predict import load_device_profile, predict_profile
from autoprec.predict.gemm import Kernel
from autoprec.predict.measure import (
    SHORT_CALLS,
    base_profile,
    gemm_candidates,
    repeated,
    replay_of,
    software_here,
)
from autoprec.profiler.compiling import made_graphs, open_compilation
from autoprec.records import BF16_O2, Option, Profile, Recipe, fp8_option
from autoprec.records.devices import DeviceProfile
from autoprec.runtime import attach_optimizer, install_options
from autoprec.workload.functions import take_batches

Item = Callable[[], Iterator[Row]]
Shape = tuple[int, int, int]
STAND_IN = "h100-sxm"  # for a CPU, whose predictions mean nothing
EAGER, COMPILED = "eager", "default"  # as records name the modes
# M tokens, K in, N out; growing, then a decoder's own
SQUARES: tuple[Shape, ...] = tuple((n, n, n) for n in (8192, 4096, 2048, 1024, 16384, 512))
LINEARS: tuple[Shape, ...] = (
    *((8192, 4096, 14336), (8192, 4096, 4096), (8192, 14336, 4096), (8192, 8192, 8192)),
    *((8192, 2048, 2048), (16384, 8192, 28672), (8192, 1024, 1024), (8192, 4096, 1024)),
)
TINY_SHAPES: tuple[Shape, ...] = ((32, 32, 64), (64, 64, 32))
SHORT_GEMM = 2048**3  # products up to which a GEMM takes an H100 less than a few launches
RECIPES = (Recipe.TENSORWISE, Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP)  # the telling ones first


@dataclass(frozen=True)
class Day:
    """Where one section runs, and where its rows go."""

    device: torch.device
    out: Path
    is_quick: bool

    @cached_property
    def clock(self) -> Clock:
        return make_clock(self.device)

    @cached_property
    def monitor(self) -> Monitor:
        return find_monitor(self.device)

    @cached_property
    def recipes(self) -> list[Recipe]:
        return [recipe for recipe in RECIPES if recipe in fp8_support(self.device).recipes]

    @cached_property
    def shipped(self) -> DeviceProfile:
        """The shipped profile of this device or the nearest one, with the software that is here."""
        if self.device.type != "cuda":
            return load_device_profile(STAND_IN)
        capability = torch.cuda.get_device_capability(self.device)
        found = base_profile(torch.cuda.get_device_name(self.device), capability)
        return found.model_copy(update={"software": software_here()})

    @property
    def backend(self) -> str:
        return "eager" if self.is_quick else "inductor"

    @property
    def sizes(self) -> Sizes:
        return TINY if self.is_quick else Sizes()

    def sample(
        self, functions: Mapping[str, Function], *, budget_ms: float, least_ms: float = 0.0
    ) -> dict[str, Samples]:
        """Sample functions in turns, with the device's own clock and monitor."""
        stopping = Stopping(
            3 if self.is_quick else 20,
            budget_ms=budget_ms,
            least_ms=0.0 if self.is_quick else least_ms,
            rejections=3,
        )
        return sample_interleaved(
            functions, clock=self.clock, stopping=stopping, monitor=self.monitor
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def timed(samples: Samples, *, as_trained: bool = True) -> Row:
    """Return times and conditions as a row; as trained, a slower host is what a step waits for."""
    timing, seen = samples.timing(as_trained=as_trained), samples.merged_conditions()
    found: Row = {"ms": timing.median_ms, "p20": timing.p20_ms, "p80": timing.p80_ms}
    found |= {"host_ms": timing.host_ms, "samples": timing.samples, "rejected": timing.rejected}
    if seen is not None:
        found |= {"sm_mhz": seen.sm_clock_mhz, "watts": seen.power_w, "celsius": seen.temperature_c}
        found["throttled"] = ", ".join(seen.throttle_reasons)
    return found


# --- whole steps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train the decoder."""

    name: str
    mode: str
    options: Options

    @property
    def label(self) -> str:
        return f"{self.name}, {self.mode}"


def predict_decoder(day: Day, device_profile: DeviceProfile) -> dict[str, Profile]:
    """Return the decoder's predicted profile by mode."""
    spec = capture_on_meta(decoder_workload(day.sizes))
    options = tuple(map(fp8_option, day.recipes))
    return {
        mode: predict_profile(spec, device_profile, compiled=mode == COMPILED, options=options)
        for mode in (COMPILED, EAGER)
    }


def make_arms(day: Day, predicted: Profile) -> list[Arm]:
    """Return the arms, the most telling first: the last says how far the device moved meanwhile."""
    model = predicted.model
    bf16 = options_of(model, BF16_O2)
    fp8 = [(f"fp8 {r}", options_of(model, fp8_option(r))) for r in day.recipes[:2]]
    compiled = [("bf16", bf16), *fp8, ("plan", fastest_options(predicted))]
    arms = [Arm(name, COMPILED, options) for name, options in compiled]
    arms += [Arm(name, EAGER, options) for name, options in (("bf16", bf16), *fp8[:1])]
    return [*arms, Arm("bf16 again", COMPILED, bf16)]


def steps(day: Day) -> dict[str, Item]:
    """A decoder in BF16, all FP8 and by the shipped profile's plan; compiled, then eager."""
    arms = make_arms(day, predict_decoder(day, day.shipped)[COMPILED])
    return {arm.label: partial(time_step, day, arm) for arm in arms}


def time_step(day: Day, arm: Arm) -> Iterator[Row]:
    """Time one arm's training step, alone in memory, and forward + backward of it."""
    workload = decoder_workload(day.sizes)
    (batch,) = take_batches(workload, seed=0, count=1, device=day.device)
    model, optimizer = build_arm(day, arm)

    def forward_backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(model(batch[:, :-1], batch[:, 1:]))

    def step() -> None:
        forward_backward()
        optimizer.step()

    row: Row = {"arm": arm.name, "mode": arm.mode, "tokens": day.sizes.batch * day.sizes.sequence}
    row["fp8_layers"] = sum(option.is_fp8 for option in arm.options.values())
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with open_compilation(day.device, arm.mode, backend=day.backend) as compilation:
        if compilation is not None:
            model.compile_parts(day.backend)
        known = made_graphs()
        row |= {"first_step_s": seconds_of(day, step), "graphs": made_graphs() - known}
        step()
        row["peak_gb"] = peak_of(day, step)
        both = {"step": step, "forward_backward": forward_backward}
        found = day.sample(both, budget_ms=3000.0, least_ms=1000.0)
    row["forward_backward_ms"] = timed(found["forward_backward"])["ms"]
    yield row | timed(found["step"])


def build_arm(day: Day, arm: Arm) -> tuple[Decoder, torch.optim.Optimizer]:
    """Return a decoder that runs the arm's options, and the optimizer of its masters."""
    with day.device:  # drawn there: a billion numbers take a CPU a while
        torch.manual_seed(0)
        model = Decoder(day.sizes).train()
    install_options(model, arm.options, uncovered=model_layers(model).uncovered)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=day.device.type == "cuda")
    attach_optimizer(model, optimizer)
    return model, optimizer


def seconds_of(day: Day, fn: Function) -> float:
    day.synchronize()
    started = time.perf_counter()
    fn()
    day.synchronize()
    return time.perf_counter() - started


def peak_of(day: Day, fn: Function) -> float | None:
    """Return the peak memory of a call in GB; a CPU does not tell."""
    if day.device.type != "cuda":
        fn()
        return None
    torch.cuda.reset_peak_memory_stats(day.device)
    fn()
    return torch.cuda.max_memory_allocated(day.device) / 1e9


# --- GEMMs ------------------------------------------------------------------------------------


def gemms(day: Day) -> dict[str, Item]:
    shapes = TINY_SHAPES if day.is_quick else (*SQUARES, *LINEARS)
    return {"x".join(map(str, shape)): partial(time_gemm, day, shape) for shape in shapes}


def time_gemm(day: Day, shape: Shape) -> Iterator[Row]:
    """Time a GEMM alone in every kernel, and with both operands' casts before it."""
    M, K, N = shape
    functions = gemm_candidates(day.device, shape, day.recipes)
    functions.pop(Kernel.FP32)
    if Recipe.TENSORWISE in day.recipes:
        functions |= scaled_gemms(day, shape)
    # Replayed, so that Python's launches are in no sample; a short one often, for a replay is one.
    calls = SHORT_CALLS if M * K * N <= SHORT_GEMM else 1
    if day.device.type == "cuda":
        functions = {name: replay_of(fn, calls) for name, fn in functions.items()}
    else:
        functions = {name: repeated(fn, calls) for name, fn in functions.items()}
    for kernel, samples in day.sample(functions, budget_ms=150.0).items():
        row: Row = {"M": M, "K": K, "N": N, "kernel": str(kernel), "calls": calls}
        row |= timed(samples, as_trained=False)
        row |= {part: row[part] / calls for part in ("ms", "p20", "p80")}
        yield row | {"tflops": 2e-9 * M * K * N / row["ms"]}


def scaled_gemms(day: Day, shape: Shape) -> dict[str, Function]:
    """Return a tensorwise GEMM with the casts of both operands, which torch.compile fuses."""
    M, K, N = shape
    dtype, one = e4m3_dtype(day.device), torch.ones((), device=day.device)
    x_MK, w_NK = (torch.randn(*size, device=day.device).bfloat16() for size in ((M, K), (N, K)))
    # Of any shape: made anew for each, they would take longer than all GEMMs.
    current, delayed = (
        torch.compile(cast, backend=day.backend, dynamic=True)
        for cast in (cast_by_current_scale, cast_by_delayed_scale)
    )

    def multiply(a_MK: Tensor, b_NK: Tensor, inv_a: Tensor, inv_b: Tensor) -> Tensor:
        # output_MN = a_MK @ b_KN
        return torch._scaled_mm(
            a_MK, b_NK.t(), inv_a, inv_b, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def with_current() -> Tensor:
        (a_MK, inv_a), (b_NK, inv_b) = current(x_MK, dtype), current(w_NK, dtype)
        return multiply(a_MK, b_NK, inv_a, inv_b)

    def with_delayed() -> Tensor:
        (a_MK, _), (b_NK, _) = delayed(x_MK, one, dtype), delayed(w_NK, one, dtype)
        return multiply(a_MK, b_NK, one, one)

    return {"fp8 current": with_current, "fp8 delayed": with_delayed}


def cast_by_current_scale(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Read a tensor for its amax, then again for its cast; return it and the inverse scale."""
    scale = torch.finfo(dtype).max / x.abs().amax().float().clamp(min=1e-12)
    return saturated(x.float() * scale, dtype), scale.reciprocal()


def cast_by_delayed_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast by a scale of earlier steps, and note the amax for later ones on the way."""
    return saturated(x.float() * scale, dtype), x.abs().amax()


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


# --- linears ----------------------------------------------------------------------------------


def linears(day: Day) -> dict[str, Item]:
    """Each shape in BF16 and every recipe, compiled; the first ones eager too, at the end."""
    shapes = TINY_SHAPES if day.is_quick else LINEARS
    modes = [(shape, COMPILED) for shape in shapes] + [(shape, EAGER) for shape in shapes[:3]]
    return {
        f"{'x'.join(map(str, shape))}, {mode}": partial(time_linear, day, shape, mode)
        for shape, mode in modes
    }


def time_linear(day: Day, shape: Shape, mode: str) -> Iterator[Row]:
    """Time a linear between a norm and an activation: BF16 and each recipe, in turns of two."""
    M, K, N = shape
    with open_compilation(day.device, mode, backend=day.backend):
        bf16 = linear_step(day, shape, BF16_O2, mode)
        bf16()
        for recipe in day.recipes:
            row: Row = {"M": M, "K": K, "N": N, "mode": mode, "recipe": recipe.value}
            try:
                fp8 = linear_step(day, shape, fp8_option(recipe), mode)
                fp8()
            except (RuntimeError, AutoprecError) as error:
                yield row | {"refused": first_line(error)}
                continue
            found = day.sample({"bf16": bf16, "fp8": fp8}, budget_ms=250.0)
            row |= {"bf16_ms": timed(found["bf16"])["ms"], **timed(found["fp8"])}
            yield row | {"speedup": row["bf16_ms"] / row["ms"]}


def linear_step(day: Day, shape: Shape, option: Option, mode: str) -> Function:
    """Return forward + backward of a linear in context, as the runtime trains it."""
    M, K, N = shape
    layer = in_context(K, N, day.device)
    install_options(layer, {"0": BF16_O2, "1": option}, root=False)
    if mode == COMPILED:
        layer.compile(backend=day.backend, dynamic=False)
    x_MK = torch.randn(M, K, device=day.device).bfloat16().requires_grad_()
    gradient_MN = torch.randn(M, N, device=day.device).bfloat16()

    def step() -> None:
        x_MK.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x_MK).backward(gradient_MN)

    return step
