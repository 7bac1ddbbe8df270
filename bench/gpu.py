"""One command on a GPU: what it can do, its measured profile, and predicted against measured.

    python bench/gpu.py [--out runs/gpu] [--device cuda] [--quick]

Under ten minutes on one H100, with nothing but torch 2.11+ and this project's dependencies. It
writes results.json, results.md, device_profile.json and linears.csv (for `devices score`), after
every section, so that what was measured is there whatever happens later. Every section has a budget
in seconds; what does not fit, what does not run and what fails is listed at the end.

    facts      device, driver, FP8 support, numeric self-test, NVML readings
    profile    `autoprec devices measure`: GEMMs, copy, empty kernel -> device_profile.json
    gemms      BF16 and FP8 GEMMs over a grid, replayed as CUDA graphs
    linears    forward + backward, eager and compiled, each FP8 recipe against BF16
    compare    the linears as predicted by the shipped and by the measured profile
    steps      whole training steps: the demo model and one block of LLaMA2-7B's width

`--device cpu --quick` runs all of it with tiny shapes: a test of this script, no measurement (the
stand-in for a shipped profile is then that of an H100, and the predictions mean nothing).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # works without an installation too

from gpu_models import Sizes, decoder_workload, make_arms  # noqa: E402
from gpu_report import compare_linears, render, speedup_csv  # noqa: E402
from profiler import predict_step  # noqa: E402

from autoprec.capture import capture_model  # noqa: E402
from autoprec.costmodel import load_device_profile, predict_profile  # noqa: E402
from autoprec.costmodel.calibrate import calibrate_profile  # noqa: E402
from autoprec.costmodel.gemm import Kernel, gemm_us  # noqa: E402
from autoprec.costmodel.machine import machine_of  # noqa: E402
from autoprec.device import device_facts, find_monitor, find_sensor, resolve_device  # noqa: E402
from autoprec.device_measure import (  # noqa: E402
    LARGE,
    SMALL,
    base_profile,
    gemm_candidates,
    replay_of,
    safe_title,
    take_measurements,
)
from autoprec.errors import AutoprecError  # noqa: E402
from autoprec.precision import fp8_support  # noqa: E402
from autoprec.profiler import open_compilation, profile_model, time_steps  # noqa: E402
from autoprec.profiler.candidates import make_candidate  # noqa: E402
from autoprec.profiler.recording import Call  # noqa: E402
from autoprec.profiler.tracing import cuda_kernels, is_fp8_kernel  # noqa: E402
from autoprec.records import BF16_O2, fp8_option  # noqa: E402
from autoprec.records.devices import DeviceProfile  # noqa: E402
from autoprec.runtime import fp8_self_test  # noqa: E402
from autoprec.timing import (  # noqa: E402
    Function,
    Samples,
    Stopping,
    make_clock,
    merge_conditions,
    sample_interleaved,
)
from autoprec.workload import Workload, load_workload  # noqa: E402

Shape = tuple[int, int, int]

# M tokens, K in, N out: the most telling first, since the budget may end the list
SHAPES: tuple[Shape, ...] = (
    *((8192, 4096, 4096), (8192, 4096, 11008), (8192, 11008, 4096), (8192, 8192, 8192)),
    *((2048, 4096, 4096), (8192, 1024, 1024), (16384, 8192, 28672), (2048, 1024, 4096)),
    *((8192, 4096, 1024), (8192, 2048, 2048), (4096, 4096, 14336), (16384, 4096, 4096)),
    *((2048, 256, 768), (32768, 8192, 1024), (1024, 8192, 8192), (16384, 5120, 13824)),
)
QUICK_SHAPES: tuple[Shape, ...] = ((32, 32, 64), (64, 64, 32))
QUICK_SIZES = Sizes(width=32, hidden=64, heads=2, vocabulary=64, batch=2, sequence=16)
STAND_IN = "h100-sxm"


@dataclass
class Deadline:
    """The seconds that a section may take; it looks before each piece of work."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def is_over(self) -> bool:
        return self.elapsed > self.seconds


@dataclass
class Run:
    """What is measured where, and what was found so far."""

    device: torch.device
    out: Path
    is_quick: bool = False
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    profiles: dict[str, DeviceProfile] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return 3 if self.is_quick else 20

    @property
    def backend(self) -> str:
        return "aot_eager" if self.is_quick else "inductor"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return QUICK_SHAPES if self.is_quick else SHAPES

    def sample(self, functions: Mapping[str, Function], *, budget_ms: float) -> dict[str, Samples]:
        """Sample functions in turns, with the device's own clock and monitor."""
        return sample_interleaved(
            functions,
            clock=make_clock(self.device),
            stopping=Stopping(self.samples, budget_ms=budget_ms, rejections=3),
            monitor=find_monitor(self.device),
        )

    def within(
        self, items: Sequence[Any], deadline: Deadline, what: str
    ) -> Iterator[Any]:  # Any: a section's own pieces of work
        """Yield items until the deadline; say which were left out."""
        for position, item in enumerate(items):
            if deadline.is_over:
                left = ", ".join(map(str, items[position:]))
                self.skipped.append(f"{what}: {deadline.seconds:g} s were over before {left}")
                return
            yield item


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a test of this script")
    given = parser.parse_args(arguments)
    if given.device != "cpu" and not torch.cuda.is_available():
        print(
            f"bench/gpu.py: no CUDA device is here (torch {torch.__version__}); "
            "--device cpu --quick tests the script itself",
            file=sys.stderr,
        )
        return 2
    if given.device == "cpu" and not given.quick:
        print("bench/gpu.py: --device cpu is for --quick only", file=sys.stderr)
        return 2
    try:
        device = resolve_device(given.device)
    except AutoprecError as error:
        print(f"bench/gpu.py: {error}", file=sys.stderr)
        return 2
    run = Run(device, given.out, given.quick)
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    run_sections(run, SECTIONS)
    print(f"wrote {given.out / 'results.md'}")
    return 0


def run_sections(run: Run, sections: Mapping[str, tuple[float, "Section"]]) -> None:
    """Run every section and write the results after each, whatever becomes of it."""
    for name, (seconds, section) in sections.items():
        deadline = Deadline(seconds)
        found = run.sections.setdefault(name, {})
        try:
            section(run, found, deadline)
        except Exception as error:  # noqa: BLE001  # the sections before and after must not be lost
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            run.skipped.append(f"{name} failed: {type(error).__name__}: {reason}")
        finally:
            found["seconds"] = round(deadline.elapsed, 1)
            write_results(run)
        print(f"{name:<8} {deadline.elapsed:6.1f} s", file=sys.stderr)


def write_results(run: Run) -> None:
    run.out.mkdir(parents=True, exist_ok=True)
    where = run.sections.get("facts", {}).get("name", str(run.device))
    claim = (
        "A test of the script: no figure here means anything."
        if run.is_quick
        else "Measured by bench/gpu.py; medians, L2 cleared, candidates interleaved."
    )
    results = {
        "title": f"autoprec on {where}",
        "claim": claim,
        "sections": run.sections,
        "skipped": run.skipped,
    }
    (run.out / "results.json").write_text(json.dumps(results, indent=1, default=str))
    (run.out / "results.md").write_text(render(results))


def find_facts(run: Run, found: dict[str, Any], _deadline: Deadline) -> None:
    found.update(device_facts(run.device).model_dump())
    sensor = find_sensor(run.device)
    found["conditions"] = sensor.read().model_dump() if sensor else "no NVML"
    recipes = fp8_support(run.device).recipes
    checks = fp8_self_test(run.device, recipes=recipes)
    if run.device.type == "cuda":
        checks += fp8_self_test(run.device, recipes=recipes, compiler=torch.compile)
    found["checks"] = [check.model_dump() for check in checks]


def measure_profile(run: Run, found: dict[str, Any], _deadline: Deadline) -> None:
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name(run.device)
        base = base_profile(name, torch.cuda.get_device_capability(run.device))
    else:
        name, base = "CPU", load_device_profile(STAND_IN)
    run.profiles["shipped"] = base
    found["starts from"] = base.name
    measured = take_measurements(
        run.device,
        clock=make_clock(run.device),
        shapes=QUICK_SHAPES if run.is_quick else LARGE,
        small=QUICK_SHAPES[0] if run.is_quick else SMALL,
        copied_bytes=1 << (16 if run.is_quick else 30),
        samples=run.samples,
        monitor=find_monitor(run.device),
    )
    found["large, us"] = [
        {"kernel": kernel.value, **{"x".join(map(str, s)): us for s, us in times.items()}}
        for kernel, times in measured.large.items()
    ]
    found["small, us"] = {kernel.value: us for kernel, us in measured.small.items()}
    found["copied TB/s"], found["empty us"] = measured.copied_tbs, measured.empty_us
    try:
        source = f"bench/gpu.py on {name}, torch {torch.__version__}"
        profile = calibrate_profile(base, measured, title=safe_title(name), source=source)
    except AutoprecError as error:
        run.skipped.append(f"profile: no device_profile.json, since {error}")
        return
    run.profiles["measured"] = profile
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "device_profile.json").write_text(profile.to_json())
    changed = [n for n, c in profile.constants.items() if c != base.constants[n]]
    found["constants"] = [
        {"constant": n, "shipped": base.value(n), "measured": profile.value(n)} for n in changed
    ]


def sweep_gemms(run: Run, found: dict[str, Any], deadline: Deadline) -> None:
    rows: list[dict[str, Any]] = found.setdefault("rows", [])
    recipes = fp8_support(run.device).recipes
    for M, K, N in run.within(run.shapes, deadline, "gemms"):
        shape = (M, K, N)
        functions = gemm_candidates(run.device, shape, recipes)
        functions.pop(Kernel.FP32)
        if run.device.type == "cuda":
            functions = {name: replay_of(fn, 1) for name, fn in functions.items()}
        for kernel, samples in run.sample(functions, budget_ms=200.0).items():
            us = samples.timing().median_ms * 1e3
            predicted = {
                f"{name} us": gemm_us(machine_of(profile), M, K, N, Kernel(kernel))
                for name, profile in run.profiles.items()
            }
            rows.append(
                {
                    **_shape(shape),
                    "kernel": str(kernel),
                    "us": us,
                    "tflops": 2.0 * M * K * N / us / 1e6,
                    **predicted,
                    "rejected": samples.rejected,
                    **_conditions(samples),
                }
            )


def sweep_linears(run: Run, found: dict[str, Any], deadline: Deadline) -> None:
    rows: list[dict[str, Any]] = found.setdefault("rows", [])
    for shape in run.within(run.shapes, Deadline(deadline.seconds / 4), "linears, eager"):
        rows += time_linears(run, shape, mode="eager")
    for shape in run.within(run.shapes, deadline, "linears, compiled"):
        rows += time_linears(run, shape, mode="default")


def time_linears(run: Run, shape: Shape, *, mode: str) -> list[dict[str, Any]]:
    """Time a linear in BF16 and each FP8 recipe, in turns."""
    M, K, N = shape
    options = [BF16_O2, *map(fp8_option, fp8_support(run.device).recipes)]
    x_MK = torch.randn(M, K, device=run.device, requires_grad=True)
    call = Call(args=(x_MK,), kwargs={}, gradients=[torch.randn(M, N, device=run.device)])
    steps: dict[str, Function] = {}
    failed: dict[str, str] = {}
    with open_compilation(run.device, mode, backend=run.backend) as compilation:
        for option in options:
            candidate = make_candidate(
                lambda: nn.Linear(K, N, bias=False, device=run.device), [call], option
            )
            try:
                if compilation is not None:
                    candidate.compiled = compilation.compile_layer(candidate.layer)
                    compilation.run_first(candidate.step)
                candidate.step()
                steps[option.key] = candidate.step
            except RuntimeError as error:
                failed[option.key] = str(error).strip().splitlines()[0]
        found = run.sample(steps, budget_ms=400.0)
        base = found[BF16_O2.key].timing().median_ms
        kernels = {key: proof(run, step) for key, step in steps.items()}
    return [
        {
            **_shape(shape),
            "mode": mode,
            "recipe": option.recipe.value,
            "bf16_ms": base,
            "fp8_ms": found[option.key].timing().median_ms if option.key in found else None,
            "speedup": (
                base / found[option.key].timing().median_ms if option.key in found else None
            ),
            "fp8 kernels": kernels.get(option.key, failed.get(option.key, "")),
            **(_conditions(found[option.key]) if option.key in found else {}),
        }
        for option in options
        if option.recipe is not None
    ]


def proof(run: Run, step: Function) -> str:
    """Return the names of the FP8 kernels that a step launched; on a CPU nothing names them."""
    if run.device.type != "cuda":
        return "not on a CPU"
    return ", ".join(filter(is_fp8_kernel, cuda_kernels(step))) or "none"


def compare(run: Run, found: dict[str, Any], _deadline: Deadline) -> None:
    rows = run.sections.get("linears", {}).get("rows", [])
    found.update(compare_linears(rows, run.profiles))
    name = run.profiles["shipped"].name if "shipped" in run.profiles else run.device.type
    (run.out / "linears.csv").write_text(speedup_csv(rows, name))


def time_whole_steps(run: Run, found: dict[str, Any], deadline: Deadline) -> None:
    rows: list[dict[str, Any]] = found.setdefault("rows", [])
    demo = str(ROOT / "examples" / "char_gpt.py")
    sizes = QUICK_SIZES if run.is_quick else Sizes()
    block = decoder_workload(sizes)
    pieces: list[tuple[str, Workload, str]] = [("decoder block", block, "eager")]
    if not run.is_quick:
        pieces.append(("demo", load_workload(demo), "eager"))
    pieces.append(("decoder block", block, "default"))
    names = {f"{name}, {mode}": (name, workload, mode) for name, workload, mode in pieces}
    for key in run.within(list(names), deadline, "steps"):
        rows += compare_steps(run, *names[key])


def compare_steps(run: Run, name: str, workload: Workload, mode: str) -> list[dict[str, Any]]:
    """Time whole steps and predict each: by the device profiles, and by the profiler if eager."""
    spec = capture_model(workload, device=run.device)
    is_compiled = mode != "eager"
    predictions = {
        f"{label} ms": predict_profile(spec, profile, compiled=is_compiled)
        for label, profile in run.profiles.items()
    }
    if not is_compiled:
        predictions["profiled ms"] = profile_model(workload, spec, device=run.device)
    arms = make_arms(spec, predictions, recipes=1 if is_compiled else None)
    with open_compilation(run.device, mode, backend=run.backend) as compilation:
        steps = time_steps(
            workload,
            arms,
            device=run.device,
            clock=make_clock(run.device),
            samples=3 if run.is_quick else 12,
            seed=0,
            compilation=compilation,
        )
        compile_s = compilation.seconds if compilation else 0.0
    base = next(step.timing.median_ms for step in steps if step.label == "bf16_o2")
    return [
        {
            "model": name,
            "mode": mode,
            "arm": step.label,
            "ms": step.timing.median_ms,
            "p20": step.timing.p20_ms,
            "p80": step.timing.p80_ms,
            "over bf16": base / step.timing.median_ms,
            **{label: predict_step(p, arms[step.label]) for label, p in predictions.items()},
            "peak GB": step.peak_bytes and step.peak_bytes / 1e9,
            "joules": step.energy_j,
            "compile s": compile_s,
        }
        for step in steps
    ]


def _shape(shape: Shape) -> dict[str, int]:
    return dict(zip("MKN", shape, strict=True))


def _conditions(samples: Samples) -> dict[str, Any]:
    seen = merge_conditions(samples.conditions, pauses=samples.pauses)
    if seen is None:
        return {}
    return {
        "sm MHz": seen.sm_clock_mhz,
        "W": seen.power_w,
        "C": seen.temperature_c,
        "throttled": ", ".join(seen.throttle_reasons),
    }


Section = Callable[[Run, dict[str, Any], Deadline], None]
SECTIONS: dict[str, tuple[float, Section]] = {
    "facts": (45.0, find_facts),
    "profile": (60.0, measure_profile),
    "gemms": (45.0, sweep_gemms),
    "linears": (160.0, sweep_linears),
    "compare": (5.0, compare),
    "steps": (200.0, time_whole_steps),
}

if __name__ == "__main__":
    sys.exit(main())
