"""One command on a GPU: what it can do, its measured profile, and predicted against measured.

    python bench/gpu.py [--out runs/gpu] [--device cuda] [--quick]

Under ten minutes on one H100, with nothing but torch 2.11+ and this project's dependencies. It
writes results.json, results.md, device_profile.json and linears.csv (for `predict --csv`), after
every piece of work, so that what was measured is there whatever happens later. Every section has a
budget in seconds, and so has the whole; what does not fit, what does not run and what fails is
listed at the end.

    facts      device, driver, FP8 support, numeric self-test, NVML readings
    profile    `autoprec devices measure`: GEMMs, copy, casts -> device_profile.json
    gemms      BF16 and FP8 GEMMs over a grid, replayed as CUDA graphs
    linears    forward + backward, eager and compiled, each FP8 recipe against BF16
    compare    the linears as predicted by the shipped and by the measured profile
    steps      whole training steps: the demo model and one block of LLaMA2-7B's width
    kernels    what FP8 layers launch; last, since CUPTI slows all later launches

`--device cpu --quick` runs all of it with tiny shapes: a test of this script, no measurement (the
stand-in for a shipped profile is then that of an H100, and the predictions mean nothing).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # works without an installation too

from gpu_linears import name_all_kernels, sweep_linears  # noqa: E402
from gpu_models import Sizes, decoder_workload, make_arms  # noqa: E402
from gpu_report import compare_linears, speedup_csv  # noqa: E402
from gpu_run import (  # noqa: E402
    QUICK_SHAPES,
    Deadline,
    Run,
    Section,
    conditions_of,
    run_sections,
    shape_of,
)
from profiler import predict_step  # noqa: E402

from autoprec.device.fp8 import fp8_self_test, fp8_support  # noqa: E402
from autoprec.device.local import device_facts, find_sensor, resolve_device  # noqa: E402
from autoprec.device.timing import Stopping  # noqa: E402
from autoprec.errors import AutoprecError  # noqa: E402
from autoprec.model.capture import capture_model  # noqa: E402
from autoprec.model.context import Context  # noqa: E402
from autoprec.predict import load_device_profile, predict_profile  # noqa: E402
from autoprec.predict.calibrate import calibrate_profile  # noqa: E402
from autoprec.predict.gemm import Kernel, gemm_us  # noqa: E402
from autoprec.predict.measure import (  # noqa: E402
    CAST,
    LARGE,
    SMALL,
    base_profile,
    gemm_candidates,
    replay_of,
    safe_title,
    take_measurements,
)
from autoprec.profiler import open_compilation, profile_model, time_steps  # noqa: E402
from autoprec.workload.functions import Workload, load_workload  # noqa: E402

QUICK_SIZES = Sizes(width=32, hidden=64, heads=2, vocabulary=64, batch=2, sequence=16)
STAND_IN = "h100-sxm"


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
    run_sections(run, SECTIONS)
    print(f"wrote {given.out / 'results.md'}")
    return 0


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
        clock=run.clock,
        shapes=QUICK_SHAPES if run.is_quick else LARGE,
        small=QUICK_SHAPES[0] if run.is_quick else SMALL,
        copied_bytes=1 << (16 if run.is_quick else 30),
        cast=(32, 64) if run.is_quick else CAST,
        samples=run.samples,
        monitor=run.monitor,
        backend=run.backend,
    )
    found["large, us"] = [
        {"kernel": kernel.value, **{"x".join(map(str, s)): us for s, us in times.items()}}
        for kernel, times in measured.large.items()
    ]
    found["small, us"] = {kernel.value: us for kernel, us in measured.small.items()}
    found["copied TB/s"], found["empty us"] = measured.copied_tbs, measured.empty_us
    found["casts, us"] = {str(recipe): str(times) for recipe, times in measured.casts.items()}
    found["eager casts, us"] = str(measured.eager)
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
                f"{name} us": gemm_us(profile.machine, M, K, N, Kernel(kernel))
                for name, profile in run.profiles.items()
            }
            rows.append(
                {
                    **shape_of(shape),
                    "kernel": str(kernel),
                    "us": us,
                    "tflops": 2.0 * M * K * N / us / 1e6,
                    **predicted,
                    "rejected": samples.rejected,
                    **conditions_of(samples),
                }
            )


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
    context = Context(workload, run.device, clock=run.clock)
    spec = capture_model(context)
    is_compiled = mode != "eager"
    predictions = {
        f"{label} ms": predict_profile(spec, profile, compiled=is_compiled)
        for label, profile in run.profiles.items()
    }
    if not is_compiled:
        predictions["profiled ms"] = profile_model(context, spec, names_kernels=False)
    arms = make_arms(spec, predictions, recipes=1 if is_compiled else None)
    with open_compilation(run.device, mode, backend=run.backend) as compilation:
        steps = time_steps(
            context,
            arms,
            monitor=run.monitor,
            stopping=Stopping(3 if run.is_quick else 12),
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
            "compile s": compile_s,
        }
        for step in steps
    ]


SECTIONS: dict[str, tuple[float, Section]] = {
    "facts": (45.0, find_facts),
    "profile": (60.0, measure_profile),
    "gemms": (45.0, sweep_gemms),
    "linears": (160.0, sweep_linears),
    "compare": (5.0, compare),
    "steps": (200.0, time_whole_steps),
    "kernels": (20.0, name_all_kernels),
}

if __name__ == "__main__":
    sys.exit(main())
