"""How far the search is from the joint optimum where the table is wrong.

    python bench/search_optimum.py [FAMILY ...]

Of a small network with kinks (`search_families.py`) the joint gradient error of every plan is
measured, once; times are made up, since FP8 does not pay on a CPU. Then plans are searched with the
default trials, for several made-up times and budgets, and compared with the best of all plans by
the same rule (error and one standard error within the budget) and by the error alone. `table alone`
is the exact plan of the table: how often it is over the budget, else its ratio to the best. What
was measured on two batches is the truth here, also where the search asks for six. Half a minute of
one core per family.
"""

import itertools
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from search_families import FAMILIES, HELD_BACK

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import (
    BF16_O2,
    Basis,
    Constraint,
    ModelSpec,
    Option,
    Recipe,
    fp8_option,
)
from autoprec.search import search_plan
from autoprec.search.costs import make_costs
from autoprec.search.study import BATCHES
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from tests.search_tables import Row, profile_of

FP8 = (fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE))
SAVES = {FP8[0]: (0.55, 0.8), FP8[1]: (0.6, 0.9)}  # of BF16's time, where between
BUDGETS = (0.25, 0.4, 0.55, 0.75)  # of the largest joint error of all plans
TIMES = 3

Options = tuple[Option, ...]


def main(names: list[str]) -> None:
    print(f"{'family':12} {'plans':>6} {'table alone':>17} {'found/best, same rule':>26} "
          f"{'by error alone':>15} {'measured':>9}  source of the plan")  # fmt: skip
    for name in names or [*FAMILIES, *HELD_BACK]:
        compare(name)


def compare(name: str) -> None:
    """Measure all plans of a family, search, and print a line."""
    context = Context({**FAMILIES, **HELD_BACK}[name](), torch.device("cpu"))
    spec = capture_model(context)
    reference = prepare_reference(context, spec)
    sensitivity = measure_sensitivity(reference, options=FP8)
    meter = JointMeter(reference, islands=sensitivity.islands)
    choices = [
        (BF16_O2, *(o for o in FP8 if o in layer.options)) if layer.gemm else (BF16_O2,)
        for layer in spec.layers
    ]
    plans = {plan: meter.measure(plan, BATCHES) for plan in itertools.product(*choices)}

    table, same, alone, counts, sources = [], [], [], [], []
    for seed, share in itertools.product(range(TIMES), BUDGETS):
        profile = profile_of(spec, made_up(spec, choices, seed), fixed_bf16_ms=1.0)
        costs = make_costs(profile, sensitivity)
        truth = {plan: e.scaled(costs.counted_share(plan)) for plan, e in plans.items()}
        budget = share * max(error.mean for error in truth.values())
        search = search_plan(
            profile,
            sensitivity,
            constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=budget),
            evaluate=lambda plan, _: plans[plan],  # the truth, however many batches
        )

        def time_to_loss(plan: Options) -> float:
            return costs.counted_ms(plan) * (1.0 + truth[plan].mean)  # noqa: B023  # used at once

        found, exact = search.chosen.options, search.exact.options
        held = [p for p, e in truth.items() if e.mean + (e.stderr or 0.0) <= budget]
        within = [p for p, e in truth.items() if e.mean <= budget]
        best_ms = min(map(time_to_loss, held))
        table.append(time_to_loss(exact) / best_ms if exact in held else math.inf)
        same.append(time_to_loss(found) / best_ms)
        alone.append(time_to_loss(found) / min(map(time_to_loss, within)))
        counts.append(sum(t.grad_error_basis is Basis.MEASURED for t in search.trials))
        source = next(t.source for t in search.trials if t.options == found)
        sources.append(source if found != exact else "unchanged")
    kept = [ratio for ratio in table if ratio < math.inf]
    print(
        f"{name:12} {len(plans):6} {len(table) - len(kept):3} over, "
        f"{statistics.mean(kept or [math.nan]):.3f} "
        f"{statistics.mean(same):14.4f} (max {max(same):.3f}) {statistics.mean(alone):15.4f} "
        f"{statistics.mean(counts):9.1f}  "
        + ", ".join(f"{s} {sources.count(s)}" for s in sorted(set(sources))),
        flush=True,
    )


def made_up(spec: ModelSpec, choices: list[tuple[Option, ...]], seed: int) -> dict[str, Row]:
    """Return times of each layer in its options."""
    random = np.random.default_rng(seed)
    rows: dict[str, Row] = {}
    for layer, options in zip(spec.layers, choices, strict=True):
        ms = float(random.lognormal(0.0, 0.7))
        fp8 = {o: (ms * float(random.uniform(*SAVES[o])), 0.0) for o in options if o.is_fp8}
        rows[layer.name] = {BF16_O2: (ms, 0.0), **fp8}
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
