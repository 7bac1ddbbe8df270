"""The figures of a run of the demo, side by side: cost, speedups, prediction, verdict.

    autoprec tune examples/char_gpt.py --out runs/char_gpt
    python bench/demo.py runs/char_gpt

Run `tune` on a machine that does nothing else: with two threads on two busy cores, OpenMP waits
for its own threads and a step takes several times as long.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from autoprec.report import RunRecords, load_run
from autoprec.report.summary import summarise_run

MOST_EQUIVALENTS = 80.0
LEAST_SPEEDUP = 1.4
MOST_ERROR = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/char_gpt"))
    folder = parser.parse_args().folder
    for name, figure, target, is_met in figures(load_run(folder)):
        print(f"{name:52} {figure:>28}   {target:24} {'met' if is_met else 'MISSED'}")


def figures(run: RunRecords) -> Iterator[tuple[str, str, str, bool]]:
    """Yield (name, figure, target, whether it is met)."""
    found = summarise_run(run)
    if not (run.profile and run.sensitivity and run.search and run.plan and run.plan.predicted):
        raise SystemExit("the folder must hold a whole run of `autoprec tune`")
    costs = [r.step_equivalents for r in (run.profile, run.sensitivity, run.search)]
    parts = " + ".join(f"{cost:.1f}" for cost in costs)
    total = sum(costs)
    yield (
        "profile + sensitivity + search, FP32 steps",
        f"{parts} = {total:.1f}",
        f"<= {MOST_EQUIVALENTS:g}",
        total <= MOST_EQUIVALENTS,
    )
    vs_fp32 = found.speedups["fp32"]
    yield (
        "step speedup over FP32",
        f"{vs_fp32.value:.2f}x",
        f">= {LEAST_SPEEDUP}x",
        (vs_fp32.value >= LEAST_SPEEDUP),
    )
    for label in ("bf16_o2", "autocast_bf16"):
        speedup = found.speedups[label]
        interval = f"{speedup.value:.2f}x ({speedup.low:.2f} to {speedup.high:.2f})"
        is_met = speedup.high is not None and speedup.high >= 1.0
        yield f"step speedup over {label}", interval, ">= 1.0 in the interval", is_met
    predicted, measured = run.plan.predicted.plan_ms, found.steps["plan"].ms
    error = predicted / measured - 1.0
    yield (
        "predicted step time of the plan against measured",
        f"{predicted:.1f} / {measured:.1f} ms = {error:+.1%}",
        f"within {MOST_ERROR:.0%}",
        abs(error) <= MOST_ERROR,
    )
    promise = found.promise
    gap = promise.gap
    shown = f"{gap.mean:+.4%} ({gap.low:+.4%} to {gap.high:+.4%})" if gap else "none"
    is_met = promise.verdict == "verified"
    yield f"loss gap {promise.reach}", shown, f"verified at {promise.loss_tolerance:.2%}", is_met


if __name__ == "__main__":
    main()
