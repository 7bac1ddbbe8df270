"""One command for the day a GPU is there: what FP8 really gains on it, beside what was predicted.

On a machine with pip, once: what the GPU machine lacks, unpacked into a folder (51 MiB of 64)

    python bench/gpu_day.py --collect site

torchao, optuna, alembic, SQLAlchemy, Mako, MarkupSafe, colorlog, tqdm, PyYAML, packaging, pydantic,
pydantic-core, annotated-types, typing-extensions, typing-inspection, typer, annotated-doc,
shellingham, filelock, pytest-timeout: what pyproject.toml asks for, and what that needs in turn.

On the GPU machine (Linux x86-64, Python 3.12; torch 2.11 or later for CUDA, Triton, numpy, pandas,
scipy, rich, transformers, jinja2, pytest, hypothesis, nvidia-ml-py; no network):

    PYTHONPATH=site python3 bench/gpu_day.py --out runs/gpu           # 8 minutes
    PYTHONPATH=site make test-gpu PYTHON=python3                      # under 4

Sections, in this order; each has a process and a share of the time, and what it leaves is for
those behind it. `--sections steps,gemms` runs these alone, or again: the last run of each counts.

    facts        the device, NVML idle and at work, FP8 against FP64, the kernels by name
    steps        a decoder of 1.1 B parameters, 8192 tokens: BF16, all FP8, the plan; eager too
    gemms        BF16 and FP8 over growing sizes; current and delayed scaling, casts included
    linears      norm + linear + activation, forward and backward, compiled
    tune         `autoprec tune` on a small decoder, then its proof
    profile      `autoprec devices measure`
    predictions  the shipped and the measured profile against all of it

    rows.jsonl                                       every row, on disk as soon as it is there
    report.md, predictions.csv                       to read
    gemm.csv, linear_layers.csv, training.csv        to append to their namesakes in bench/data
    device_profile.json                              goes to profiles/measured/
    tune/                                            plan and report of the small decoder
    log.txt                                          what the sections printed

`--device cpu --quick` runs all of it with tiny shapes in about a minute: a test of this script.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # works without an installation too

from gpu_report import write_report  # noqa: E402
from gpu_running import ROWS, Child, share_out  # noqa: E402

BUDGET_S = 480.0
SHARES = {  # seconds of BUDGET_S; guesses until a GPU has told
    "facts": 40.0,
    "steps": 165.0,
    "gemms": 35.0,
    "linears": 75.0,
    "tune": 115.0,
    "profile": 40.0,
    "predictions": 10.0,
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.collect:
        return collect_wheels(given.collect)
    if not given.section and (problem := refusal(given)):
        print(f"bench/gpu_day.py: {problem}", file=sys.stderr)
        return 2
    if given.section:  # this process is a child
        from gpu_sections import run_section

        return run_section(given.out, given.section, device=given.device, is_quick=given.quick)
    return run_day(given)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a test of this script")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of all sections")
    parser.add_argument("--sections", default=",".join(SHARES), help="these alone, in this order")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="fill DIR with packages")
    parser.add_argument("--section", choices=SHARES, help=argparse.SUPPRESS)  # of a child
    return parser.parse_args(arguments)


def refusal(given: argparse.Namespace) -> str:
    """Return why nothing can be run, or an empty string."""
    unknown = [name for name in given.sections.split(",") if name not in SHARES]
    if unknown:
        return f"a section must be one of {', '.join(SHARES)}, but it is {unknown[0]!r}"
    if given.device == "cpu":
        return "" if given.quick else "--device cpu is for --quick only: a CPU is not the question"
    import torch

    if not torch.cuda.is_available():
        no_gpu = f"no CUDA device is here (torch {torch.__version__})"
        return f"{no_gpu}; --device cpu --quick tests the script itself"
    return ""


def collect_wheels(folder: Path) -> int:
    from gpu_wheels import CollectError, collect

    try:
        versions = collect(folder)
    except CollectError as error:
        print(f"bench/gpu_day.py: {error}", file=sys.stderr)
        return 2
    for name, version in versions.items():
        print(f"{name} {version}")
    print(f"put {folder} on PYTHONPATH")
    return 0


def run_day(given: argparse.Namespace) -> int:
    """Run the sections one after another, each in a process of its own."""
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / ROWS).touch()
    options = ["--out", str(given.out), "--device", given.device, *["--quick"] * given.quick]
    child = Child([sys.executable, str(Path(__file__).resolve()), *options], given.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a child ends with this process
    os.environ["PYTHONUNBUFFERED"] = "1"
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{known}".rstrip(os.pathsep)
    until = time.monotonic() + given.budget
    names = given.sections.split(",")
    for position, name in enumerate(names):
        started = time.monotonic()
        seconds = share_out(until - started, [SHARES[other] for other in names[position:]])
        outcome = child.run(name, seconds=seconds)
        print(
            f"{name:<12} {time.monotonic() - started:6.1f} of {seconds:5.1f} s  {outcome}",
            flush=True,
        )
        write_report(given.out, is_quick=given.quick)
    print(f"wrote {given.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
