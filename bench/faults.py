"""Planted faults of six kinds in small model families, through the product but for the timing.

    python bench/faults.py [--held-back] [--family NAME] [--kind KIND]

The faults are those of tests/planted.py. Rows are kept in runs/faults.jsonl: delete it to measure
again.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sensitivity_families import FAMILIES

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import Basis, Constraint, Recipe, fp8_option
from autoprec.search import build_plan, search_plan
from autoprec.search.reasons import DOMINATES
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from autoprec.workload.functions import workload_from
from tests.planted import plant, times_of
from tests.search_tables import profile_of

ROWS = Path("runs/faults.jsonl")
BUDGET = 0.01  # of gradient error; a loss tolerance's depends on the family's loss curve
# the layer with the fault
PLACES = {
    "gelu_decoder": "blocks.0.mlp.up",
    "swiglu_decoder": "blocks.1.mlp.down",
    "convolutions": "11",
    "recommender_adagrad": "layers.1",
}
HELD_BACK = {"unet": "middle", "temporal_convolutions": "mixes.1"}
# exponents of two, spreads of an offset, levels of a weight
STRENGTHS = {
    "control": (0,),
    "rows": (20,),
    "gradient": (44,),
    "channel": (16, 8),
    "offset": (16, 8),
    "sink": (18, 10),
    "quantised": (7,),
}
HELD_BACK_STRENGTHS = {"rows": 24, "sink": 14}
CAUSES = {
    "rows": r"weight: (outlier channels 0, 1|\d+ % underflow)",
    "gradient": r"grad_output: [\d.]+ % underflow",
    "channel": r"input: outlier channel 3\b",
    "offset": r"input: mean",
    "sink": r"input: [^;]*outlier tokens",
}


def measure(family: str, place: str, kind: str, strength: int) -> dict[str, Any]:
    """Run the product on one fault; return what it chose, said and measured."""
    functions = plant(FAMILIES[family], place, kind, strength)
    context = Context(workload_from(functions, name=family), torch.device("cpu"))
    spec = capture_model(context)
    reference = prepare_reference(context, spec)
    sensitivity = measure_sensitivity(reference)
    rows = {layer.name: times_of(layer) for layer in spec.layers}
    profile = profile_of(spec, rows, basis=Basis.PREDICTED)
    constraint = Constraint(loss_tolerance=0.001, grad_error_budget=BUDGET)
    meter = JointMeter(reference, fp32_outputs=sensitivity.island_names)
    search = search_plan(profile, sensitivity, constraint=constraint, evaluate=meter.measure)
    plan = build_plan(profile, sensitivity, search, search.chosen, constraint=constraint)
    takes_fp8 = {x.name for x in spec.layers if any(o.is_fp8 for o in x.options)}
    out = {x.name: x.reason for x in plan.layers if x.name in takes_fp8 and not x.option.is_fp8}
    # what makes its input goes with it where BF16 is too coarse
    out = {name: text for name, text in out.items() if f"{place}.layer input" not in text}
    own = next(layer for layer in plan.layers if layer.name == f"{place}.layer")
    errors = {
        recipe.value: row.grad_error.mean
        for recipe in (Recipe.TENSORWISE, Recipe.ROWWISE)
        if (row := sensitivity.row(own.name, fp8_option(recipe)))
    }
    return {
        "family": family,
        "kind": kind,
        "strength": strength,
        "errors": errors,
        "budget": search.grad_error_budget,
        "joint": plan.grad_error,
        "loss": sensitivity.loss_curve[-1][1],
        "option": own.option.key,
        "reason": own.reason,
        "others": {name: reason for name, reason in out.items() if name != own.name},
        "notes": list(sensitivity.notes),
    }


def verdict(row: dict[str, Any], control: dict[str, Any]) -> str:
    """Return "right", or what is wrong; `control` is the family without a fault."""
    if row["joint"] > BUDGET:
        return "over the budget"
    if others := sorted(row["others"].keys() - control["others"]):
        return f"also out: {', '.join(others)}"
    pattern = CAUSES.get(row["kind"])
    is_fastest = row["option"] == fp8_option(Recipe.TENSORWISE).key
    if is_fastest or row["errors"]["tensorwise"] < DOMINATES * BUDGET:
        is_blamed = re.search("underflow|outlier|mean", row["reason"])
        return "blamed without harm" if is_blamed else "right"
    if pattern is None:  # control and quantised: FP8 has what harm it has without a fault
        return "weight blamed" if "weight:" in row["reason"] else "right"
    return "right" if re.search(pattern, row["reason"]) else "another cause named"


def wanted(held_back: bool) -> Iterator[tuple[str, str, str, int]]:
    """Yield family, place, kind and strength."""
    if not held_back:
        for family, place in PLACES.items():
            for kind, strengths in STRENGTHS.items():
                yield from ((family, place, kind, strength) for strength in strengths)
        return
    for family, place in HELD_BACK.items():
        yield from ((family, place, kind, strengths[0]) for kind, strengths in STRENGTHS.items())
    for family, place in PLACES.items():
        yield from ((family, place, kind, each) for kind, each in HELD_BACK_STRENGTHS.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held-back", action="store_true")
    parser.add_argument("--family")
    parser.add_argument("--kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ROWS.parent.mkdir(exist_ok=True)
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    known = {(r["family"], r["kind"], r["strength"]): r for r in map(json.loads, lines)}
    print("| family | fault | tensorwise, rowwise | chosen | joint | verdict |")
    print("| --- | --- | --- | --- | --- | --- |")
    for family, place, kind, strength in wanted(arguments.held_back):
        if arguments.family not in (None, family) or arguments.kind not in (None, kind):
            continue
        row = known.get((family, kind, strength)) or measure(family, place, kind, strength)
        if row is not known.get((family, kind, strength)):
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
        errors = ", ".join(f"{e:.2%}" for e in row["errors"].values())
        joint = f"{row['joint']:.2%}"
        known[family, kind, strength] = row
        found = verdict(row, known[family, "control", 0])
        cells = (family, f"{kind} {strength}", errors, row["option"], joint, found)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
