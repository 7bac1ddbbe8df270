"""How long the search takes on saved records, by the number of layers: `python bench/search.py`.

The tables are made up: layers of a transformer in five kinds, errors spread over three orders of
magnitude as measured ones are, five FP8 options each. No workload, 12 trials, a SQLite study. Each
size runs in a process of its own, so that imports count; `exact` is the knapsack at one budget.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = (20, 200, 1000)


def main() -> None:
    print(f"{'layers':>7} {'plans':>9} {'exact ms':>9} {'search s':>9} {'whole process s':>16}")
    for layers in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_tables(Path(folder), layers)
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, folder], capture_output=True, text=True, check=True
            )
            whole_s = time.perf_counter() - started
        found = json.loads(done.stdout)
        print(
            f"{layers:7d} {found['plans']:>9} {found['exact_ms']:9.1f} {found['search_s']:9.2f} "
            f"{whole_s:16.2f}"
        )


def search_folder(folder: Path) -> None:
    """Search the records of a folder and print what it took, as JSON."""
    from autoprec.records import Constraint, Profile, Sensitivity
    from autoprec.search import build_plan, search_plan
    from autoprec.search.costs import make_costs
    from autoprec.search.problem import exact, make_problem

    profile = Profile.load(folder / "profile.json")
    sensitivity = Sensitivity.load(folder / "sensitivity.json")
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=4e-3)
    started = time.perf_counter()
    search = search_plan(
        profile,
        sensitivity,
        constraint=constraint,
        evaluate=None,
        trials=12,
        storage=f"sqlite:///{folder / 'study.db'}",
    )
    build_plan(profile, sensitivity, search, search.chosen, constraint=constraint)
    search_s = time.perf_counter() - started
    problem = make_problem(make_costs(profile, sensitivity), constraint)
    started = time.perf_counter()
    exact(problem, search.grad_error_budget)
    print(
        json.dumps(
            {
                "plans": f"10^{sum(np.log10(len(u.choices)) for u in problem.groups):.0f}",
                "exact_ms": 1e3 * (time.perf_counter() - started),
                "search_s": search_s,
                "torch": "torch" in sys.modules,
            }
        )
    )


def write_tables(folder: Path, layers: int) -> None:
    """Write a profile and a sensitivity of that many layers."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from autoprec.records import BF16_O2, FP32, Gemm, Recipe, fp8_option
    from tests.search_tables import Row, profile_of, sensitivity_of, spec_of

    fp8 = [
        fp8_option(Recipe.TENSORWISE),
        fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT),
        fp8_option(Recipe.ROWWISE),
        fp8_option(Recipe.ROWWISE, Gemm.GRAD_INPUT),
        fp8_option(Recipe.ROWWISE_WITH_GW_HP),
    ]
    rng = np.random.default_rng(0)
    rows: dict[str, Row] = {}
    for index in range(layers):
        ms, grad_error = float(rng.lognormal()), float(rng.lognormal(-8.0, 2.0)) / layers**0.5
        row = {FP32: (3.0 * ms, 0.0), BF16_O2: (ms, 0.02 * grad_error)}
        for option in fp8:
            row[option] = (
                ms * float(rng.uniform(0.6, 1.1)),
                grad_error * float(rng.uniform(0.3, 1.0)),
            )
        rows[f"blocks.{index // 5}.{('norm', 'qkv', 'proj', 'fc1', 'fc2')[index % 5]}"] = row
    spec = spec_of(rows)
    profile_of(spec, rows).save(folder / "profile.json")
    sensitivity_of(spec, rows, activation_error=1e-6).save(folder / "sensitivity.json")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        search_folder(Path(sys.argv[1]))
    else:
        main()
