"""What the search itself costs, by the number of layers: `python bench/search.py [LAYERS ...]`.

The tables are made up: layers of a transformer in five kinds, errors spread over three orders of
magnitude as measured ones are, sixteen FP8 options each. A whole plan's error takes no time to
measure and is not what the table says: each layer's is wrong by a factor (its logarithm with a
standard deviation of 0.7), as where derivatives jump; `table` is the exact plan of the table over
the true optimum, by time to loss. The default trials, a SQLite study. Each size runs in
a process of its own, so that imports count. CPU seconds, since other work may share the processor.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from autoprec.search.costs import Costs

SIZES = (5, 30, 225, 1000)


def main(sizes: tuple[int, ...]) -> None:
    print(f"{'layers':>7} {'plans':>9} {'measured':>9} {'changed':>8} {'solves':>7} "
          f"{'table':>6} {'found/best':>11} {'search CPU s':>13} {'with imports':>13}")  # fmt: skip
    for layers in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_tables(Path(folder), layers)
            done = subprocess.run(
                [sys.executable, __file__, "--folder", folder],
                capture_output=True,
                text=True,
                check=True,
            )
        found = json.loads(done.stdout)
        print(
            f"{layers:7d} {found['plans']:>9} {found['measured']:9d} {found['changed']!s:>8} "
            f"{found['solves']:7d} {found['table']:>6} {found['found']:11.4f} "
            f"{found['search_s']:13.2f} {found['process_s']:13.2f}",
            flush=True,
        )


def search_folder(folder: Path) -> None:
    """Search the records of a folder and print what it took, as JSON."""
    from autoprec.records import Constraint, Estimate, Option, Profile, Sensitivity
    from autoprec.search import build_plan, search_plan
    from autoprec.search.costs import make_costs
    from autoprec.search.problem import exact, make_problem
    from autoprec.search.solver import Knapsack

    profile = Profile.load(folder / "profile.json")
    sensitivity = Sensitivity.load(folder / "sensitivity.json")
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=4e-3)
    costs = make_costs(profile, sensitivity)
    true = wronged(costs)
    counts = {"measured": 0, "solves": 0}
    minimise = Knapsack.minimise

    def counted(self: Knapsack, price: float, budget: float) -> object:
        counts["solves"] += 1
        return minimise(self, price, budget)

    def measure(options: tuple[Option, ...], batches: int) -> Estimate:
        counts["measured"] += 1
        return Estimate(mean=true.grad_error(options), stderr=0.0)

    Knapsack.minimise = counted  # type: ignore[assignment, method-assign]  # only counts
    started = time.process_time()
    search = search_plan(
        profile,
        sensitivity,
        constraint=constraint,
        evaluate=measure,
        storage=f"sqlite:///{folder / 'study.db'}",
    )
    build_plan(profile, sensitivity, search, search.chosen, constraint=constraint)
    search_s = time.process_time() - started
    groups = make_problem(costs, constraint).groups
    best = exact(make_problem(true, constraint), search.grad_error_budget)
    plans = (search.chosen.options, search.exact.options, best[0] if best else ())
    chosen, table, least = (true.counted_ms(p) * (1.0 + true.grad_error(p)) for p in plans)
    is_over = true.grad_error(search.exact.options) > search.grad_error_budget
    found = {
        "found": chosen / least,
        "table": "over" if is_over else f"{table / least:.3f}",
        "search_s": search_s,
        "process_s": time.process_time(),
        "changed": search.chosen.options != search.exact.options,
        "plans": f"10^{sum(np.log10(len(group.choices)) for group in groups):.0f}",
        **counts,
    }
    print(json.dumps(found))


def wronged(costs: "Costs") -> "Costs":
    """Return the costs with each layer's errors multiplied by a factor of its own."""
    wrong = np.random.default_rng(1).lognormal(0.0, 0.7, len(costs.prices)).tolist()
    prices = [
        {o: replace(price, grad_error=price.grad_error * factor) for o, price in row.items()}
        for factor, row in zip(wrong, costs.prices, strict=True)
    ]
    return replace(costs, prices=tuple(prices))


def write_tables(folder: Path, layers: int) -> None:
    """Write a profile and a sensitivity of that many layers."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from autoprec.records import BF16_O2, FP32, Recipe, fp8_option, with_gemms_hp
    from tests.search_tables import Row, profile_of, sensitivity_of, spec_of

    recipes = (Recipe.TENSORWISE, Recipe.ROWWISE)  # these with any GEMMs in BF16, as tune has them
    fp8 = [
        *with_gemms_hp(list(map(fp8_option, recipes))),
        fp8_option(Recipe.ROWWISE_WITH_GW_HP),
        fp8_option(Recipe.BLOCKWISE),
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
    if sys.argv[1:2] == ["--folder"]:
        search_folder(Path(sys.argv[2]))
    else:
        main(tuple(map(int, sys.argv[1:])) or SIZES)
