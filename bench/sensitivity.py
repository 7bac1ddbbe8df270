"""The depth-free table of gradient errors beside the exact one, layer by layer, in one run.

    python bench/sensitivity.py            the demo: examples/char_gpt.py, 17 linears
    python bench/sensitivity.py --deep     25 blocks of the same at a smaller width, 101 linears
    python bench/sensitivity.py --families [NAME ...]    ratios on the families of
                                           sensitivity_families.py and _attention.py, one line each

Both tables are measured on one warmed-up reference: same weights, batches and preconditioner. The
cost in step equivalents is wall time over the median FP32 training step of that reference; the
depth-free table's includes warming up and all else that `measure_sensitivity` does.
"""

import argparse
import importlib
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sensitivity_attention import FAMILIES as ATTENTION
from sensitivity_families import FAMILIES as OTHERS

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import (
    APPLICABLE_RECIPES,
    BF16_O2,
    LayerSensitivity,
    ModelSpec,
    Option,
    Recipe,
    Sensitivity,
    fp8_option,
)
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.local import list_cells
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.probes import probe_batches
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.sensitivity.rows import make_rows
from autoprec.sensitivity.tables import Method
from autoprec.workload.functions import Workload, workload_from
from autoprec.workload.loading import load_workload

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FAMILIES = {**OTHERS, **ATTENTION}
CPU = torch.device("cpu")
SUBSETS = 12


def deep_workload() -> Workload:
    """Return the demo with 25 narrow blocks."""
    sys.path.insert(0, str(EXAMPLES))
    char_gpt = importlib.import_module("char_gpt")
    vars(char_gpt).update(WIDTH=128, HEADS=4, DEPTH=25, BLOCK=64, BATCH=8)
    names = ("build_model", "train_batches", "loss_fn", "build_optimizer", "eval_batches")
    functions = {name: getattr(char_gpt, name) for name in names}
    return workload_from(SimpleNamespace(**functions), name="deep char_gpt")


def compare_rows(exact: Sensitivity, depth_free: Sensitivity, option: Option) -> None:
    """Print how far the two tables agree on one option."""
    pairs = [
        (
            row.name,
            row.grad_error.mean,
            found.grad_error.mean,
            row.grad_error.stderr or 0.0,
            found.grad_error.stderr or 0.0,
        )
        for row in exact.rows
        if row.option == option and (found := depth_free.row(row.name, option)) is not None
    ]
    left, right = (np.array([pair[place] for pair in pairs]) for place in (1, 2))
    count = max(round(len(pairs) / 4), 1)
    tops = [{pairs[i][0] for i in np.argsort(-values)[:count]} for values in (left, right)]
    logs = np.corrcoef(np.log(np.maximum(left, 1e-12)), np.log(np.maximum(right, 1e-12)))[0, 1]
    print(
        f"{option.key:28s} rows {len(pairs):4d}  Pearson {np.corrcoef(left, right)[0, 1]:.4f} "
        f"(of logs {logs:.4f})  sums {left.sum():.3e} {right.sum():.3e}  "
        f"top quarter {len(tops[0] & tops[1])}/{count}"
    )


def check_additivity(
    meter: JointMeter,
    spec: ModelSpec,
    table: Sensitivity,
    exact: Sensitivity,
    recipes: Sequence[Recipe],
) -> None:
    """Print predicted against measured joint e of random FP8 subsets of the linears."""
    generator = random.Random(0)
    linears = [layer for layer in spec.layers if any(o.is_fp8 for o in layer.options)]
    errors: dict[str, list[float]] = {"depth-free": [], "exact": []}
    for number in range(SUBSETS):
        share = generator.choice((0.2, 0.4, 0.6, 0.8))
        recipe = recipes[number % len(recipes)]
        chosen = {layer.name for layer in linears if generator.random() < share}
        chosen = chosen or {linears[0].name}
        options = tuple(
            fp8_option(recipe) if layer.name in chosen else BF16_O2 for layer in spec.layers
        )
        measured = meter.measure(options, 10**6).mean  # all that there are
        predicted = {
            name: record.activation_error.mean
            + sum(
                row.grad_error.mean
                for layer, option in zip(spec.layers, options, strict=True)
                if (row := record.row(layer.name, option)) is not None
            )
            for name, record in (("depth-free", table), ("exact", exact))
        }
        for name, value in predicted.items():
            errors[name].append(value / measured - 1.0)
        print(
            f"  {recipe.value:20s} {len(chosen):3d} layers  joint e {measured:.3e}  "
            f"depth-free {predicted['depth-free']:.3e} ({errors['depth-free'][-1]:+.0%})  "
            f"exact {predicted['exact']:.3e} ({errors['exact'][-1]:+.0%})"
        )
    for name, found in errors.items():
        print(f"additivity, {name} table: median error {statistics.median(map(abs, found)):.1%}")


def timed(
    reference: Reference, method: Method, recipes: Sequence[Recipe]
) -> tuple[Sensitivity, float]:
    """Measure by one method; return the record and its seconds (warm-up left out)."""
    started = time.perf_counter()
    options = [fp8_option(recipe) for recipe in recipes]
    found = measure_sensitivity(reference, options=options, method=method)
    return found, time.perf_counter() - started


def show_family(name: str, *, batches: int) -> None:
    """Print the table over the exact one for a family: as probed, and as the stage gives it."""
    context = Context(workload_from(FAMILIES[name], name=name), CPU)
    reference = prepare_reference(context, capture_model(context), batches=batches)
    exact = measure_sensitivity(reference, method=Method.LAYERWISE)
    cells = list_cells(reference.spec, None)
    probed = make_rows(probe_batches(reference, cells, probes=1), cells)
    found = measure_sensitivity(reference)
    columns = [
        ratios_to(exact, rows, is_fp8=is_fp8)
        for rows, is_fp8 in ((probed, True), (found.rows, True), (found.rows, False))
    ]
    of_rows = [note for note in found.notes if "one by one" in note]
    more = [int(count) for note in of_rows for count in re.findall(r"and (\d+) more", note)]
    named = sum(note.count(",") + 1 for note in of_rows)
    measured = "all" if found.method == Method.LAYERWISE else str(named + sum(more))
    sums = [(j.predicted_grad_error - j.overlap) / j.grad_error.mean for j in found.joint]
    print(
        f"| {name} | {len(cells)} | "
        + " | ".join(f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns)
        + f" | {measured} | {found.passes} | {', '.join(f'{ratio:.2f}' for ratio in sums)} |",
        flush=True,
    )
    if found.table_check:
        print(found.table_check, flush=True)


def ratios_to(exact: Sensitivity, rows: Sequence[LayerSensitivity], *, is_fp8: bool) -> list[float]:
    """Return the ratio of each whole FP8 recipe's row, or of each BF16 row, to the exact one."""
    wanted = [r for r in rows if r.option.is_whole_fp8 or not (is_fp8 or r.option.is_fp8)]
    pairs = [(r, exact.row(r.name, r.option)) for r in wanted if r.option.is_fp8 == is_fp8]
    return [
        row.grad_error.mean / other.grad_error.mean
        for row, other in pairs
        if other is not None and other.grad_error.mean > 0.0
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--recipes", nargs="+", type=Recipe, default=list(APPLICABLE_RECIPES))
    parser.add_argument("--families", nargs="*", choices=FAMILIES)
    parser.add_argument("--batches", type=int, default=2, help="of a family")
    arguments = parser.parse_args()
    if arguments.families is not None:
        heads = ("whole recipes, probed", "whole recipes", "BF16", "measured", "passes", "sums")
        print("| family | cells |", *(f"{head} |" for head in heads))
        for name in arguments.families or FAMILIES:
            show_family(name, batches=arguments.batches)
        return
    workload = deep_workload() if arguments.deep else load_workload(str(EXAMPLES / "char_gpt.py"))
    spec = capture_model(Context(workload, CPU))
    recipes = tuple(arguments.recipes)
    reference = prepare_reference(Context(workload, CPU), spec)
    depth_free, spent_s = timed(reference, Method.SIGN_CODED, recipes)
    print(
        f"depth-free: {depth_free.passes} passes, {depth_free.step_equivalents:.1f} step "
        f"equivalents with the warm-up of {depth_free.warmup_steps} (step {reference.step_s:.3f} s)"
    )
    exact, exact_s = timed(reference, Method.LAYERWISE, recipes)
    print(
        f"exact:      {exact.passes} passes, {exact_s:.1f} s against {spent_s:.1f} s "
        f"({exact_s / spent_s:.1f}x)"
    )
    print(*depth_free.notes, sep="\n")
    for option in (BF16_O2, *(fp8_option(recipe) for recipe in recipes)):
        compare_rows(exact, depth_free, option)
    meter = JointMeter(reference)
    check_additivity(meter, spec, depth_free, exact, recipes)


if __name__ == "__main__":
    main()
