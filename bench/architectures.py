"""Architectures that this project did not write, each through its whole life under a random plan.

    python bench/architectures.py [NAME ...] [--seeds 1]

Tiny models from `transformers` configs, and from `diffusers` where that is installed, with random
weights: capture, a random valid plan with FP8 in half of the eligible layers, apply, three steps of
AdamW, proof of what ran, a bit-identical resume, undo (tests/architecture_checks.py). On a CPU
torch runs a reference loop for FP8 GEMMs, so equal FP32 ones stand in. Target: at least 25
architectures, all passed, or refused with a correct reason.
"""

import argparse
import importlib.util
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from autoprec.device.torchao import import_torchao
from autoprec.sensitivity.gemm import fast_gemms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.architecture_checks import Outcome, try_architecture
from tests.architecture_zoo import ARCHITECTURES, Architecture

WIDTHS = "{:16} {:44} {:>6} {:>6} {:>6}  {}"


def try_one(architecture: Architecture, *, seed: int, is_verbose: bool) -> Outcome:
    """Return the outcome; whatever is raised that is no refusal is a failure."""
    try:
        return try_architecture(architecture.workload(), seed=seed)
    except Exception as problem:  # noqa: BLE001  # a bench reports what broke and goes on
        if is_verbose:
            traceback.print_exc()
        text = " ".join(str(problem).split())
        return Outcome(0, 0, f"FAILED: {type(problem).__name__}: {text}")


def show(architecture: Architecture, *, seed: int, is_verbose: bool) -> Outcome:
    started = time.perf_counter()
    outcome = try_one(architecture, seed=seed, is_verbose=is_verbose)
    seconds = f"{time.perf_counter() - started:.1f}"
    numbers = (outcome.layers, outcome.fp8_layers, seconds)
    print(WIDTHS.format(architecture.family, architecture.name, *numbers, outcome.result))
    sys.stdout.flush()
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="random plans per architecture")
    parser.add_argument("--verbose", action="store_true", help="print tracebacks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import_torchao()
    chosen = [a for a in ARCHITECTURES if importlib.util.find_spec(a.library)]
    if arguments.names:
        chosen = [a for a in chosen if any(part in a.name for part in arguments.names)]
    print(WIDTHS.format("family", "architecture", "layers", "fp8", "s", "result"))
    outcomes = []
    with fast_gemms():
        for architecture in chosen:
            for seed in range(arguments.seeds):
                outcomes.append(show(architecture, seed=seed, is_verbose=arguments.verbose))
    counts = Counter(outcome.result.partition(":")[0] for outcome in outcomes)
    print(f"{len(chosen)} architectures: " + ", ".join(f"{n} {key}" for key, n in counts.items()))
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
