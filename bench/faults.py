"""Planted faults of six kinds in small model families, through the product but for the timing.

    python bench/faults.py [--held-back] [--family NAME] [--kind KIND]

The faults are those of tests/planted.py. Rows are kept in runs/faults.jsonl: delete it to measure
again.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from sensitivity_families import FAMILIES, Family, images
from torch import Tensor, nn

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import Basis, Constraint, ModelSpec, Plan, Recipe, fp8_option
from autoprec.runtime import install_options
from autoprec.search import build_plan, search_plan
from autoprec.search.reasons import DOMINATES
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.parked import InTurn
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.workload.functions import workload_from
from tests.planted import Planted, plant, times_of
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
HELD_BACK = {"unet": "middle", "temporal_convolutions": "mixes.1", "gated_mixer": "blocks.1.up"}
# exponents of two, spreads of an offset, levels of a weight; of each kind a milder one
STRENGTHS = {
    "control": (0,),
    "rows": (20, 10),
    "gradient": (44, 16),
    "channel": (16, 8),
    "offset": (16, 8),
    "sink": (18, 10),
    "quantised": (7, 31),
}
HELD_BACK_STRENGTHS = {
    "control": (0,),
    "rows": (24, 7),
    "gradient": (40, 20),
    "channel": (18, 12),
    "offset": (12, 4),
    "sink": (20, 14),
    "quantised": (3, 15),
}
HARM = 2.0  # times the error of the layer without the fault, on the same weights
ROUNDINGS = 8  # of these: single ones differ by up to 6 times where the response has few dimensions
CAUSES = {
    "control": r"weight: |outlier channel 3\b",
    "rows": r"weight: (outlier channels 0, 1|\d+ % underflow)",
    "gradient": r"grad_output: [\d.]+ % underflow",
    "quantised": r"weight: ",
    "channel": r"input: outlier channel 3\b",
    "offset": r"input: mean",
    "sink": r"input: [^;]*outlier tokens",
}


class GatedMixer(nn.Module):
    """Patches of a picture, mixed by gates along the sequence (gMLP)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(48, 64), nn.Linear(64, 10)
        self.blocks = nn.ModuleList(map(GatedBlock, range(2)))

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).movedim(1, 3).flatten(3).flatten(1, 2)
        hidden = self.first(patches)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        found: Tensor = self.head(hidden.mean(1))
        return found


class GatedBlock(nn.Module):
    """One block of it; its number decides nothing."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(64), nn.LayerNorm(96)
        self.up, self.down = nn.Linear(64, 192), nn.Linear(96, 64)
        self.along = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        gate = self.along(self.inner(gate).transpose(1, 2)).transpose(1, 2) + 1.0
        found: Tensor = self.down(kept * gate)
        return found


OWN = {
    "gated_mixer": Family(
        *(GatedMixer, images, F.cross_entropy), optimizer=partial(torch.optim.NAdam, lr=2e-3)
    )
}


def measure(family: str, place: str, kind: str, strength: int) -> dict[str, Any]:
    """Run the product on one fault; return what it chose, said and measured.

    Beside it, what it does with the very same weights where the layer has FP32, in which no fault
    shows, and the layer's own error once the fault is taken out.
    """
    functions = plant((FAMILIES | OWN)[family], place, kind, strength)
    context = Context(workload_from(functions, name=family), torch.device("cpu"))
    spec = capture_model(context)
    reference, own = prepare_reference(context, spec), f"{place}.layer"
    sensitivity = measure_sensitivity(reference)
    rows = {layer.name: times_of(layer) for layer in spec.layers}
    profile = profile_of(spec, rows, basis=Basis.PREDICTED)
    meter = JointMeter(reference, islands=sensitivity.islands)

    def plan_of(*keep: str) -> Plan:
        limits = Constraint(loss_tolerance=0.001, grad_error_budget=BUDGET, keep=keep)
        search = search_plan(profile, sensitivity, constraint=limits, evaluate=meter.measure)
        return build_plan(profile, sensitivity, search, search.chosen, constraint=limits)

    plan, without = plan_of(), plan_of(f"{own}=fp32")
    assigned = next(layer for layer in plan.layers if layer.name == own)
    recipes = (fp8_option(recipe) for recipe in (Recipe.TENSORWISE, Recipe.ROWWISE))
    found = {o.recipe: row.grad_error.mean for o in recipes if (row := sensitivity.row(own, o))}
    # a moved weight has no levels
    faulty = (
        found[Recipe.TENSORWISE] if kind == "quantised" else error_over_roundings(reference, place)
    )
    cast(Planted, reference.model.get_submodule(place)).undo()
    return {
        "family": family,
        "kind": kind,
        "strength": strength,
        "errors": found,
        "faulty": faulty,
        "undone": error_over_roundings(reference, place),
        "joint": plan.grad_error,
        "loss": sensitivity.loss_curve[-1][1],
        "option": assigned.option.key,
        "reason": assigned.reason,
        "others": out_of_fp8(spec, plan, own),
        "others_without": out_of_fp8(spec, without, own),
        "passes": sensitivity.passes,
    }


def out_of_fp8(spec: ModelSpec, plan: Plan, own: str) -> dict[str, str]:
    """Return the other layers that could have FP8 and do not, with their reasons."""
    takes_fp8 = {x.name for x in spec.layers if any(o.is_fp8 for o in x.options)} - {own}
    out = {x.name: x.reason for x in plan.layers if x.name in takes_fp8 and not x.option.is_fp8}
    # what makes the layer's input goes with it where BF16 is too coarse
    return {name: text for name, text in out.items() if f"{own} input" not in text}


def error_over_roundings(reference: Reference, place: str) -> float:
    """Return the layer's mean error in tensorwise FP8, its weight moved by about a step each time.

    Of one rounding it is a draw where the response has few dimensions.
    """
    option = {f"{place}.layer": fp8_option(Recipe.TENSORWISE)}
    run = partial(install_options, reference.model, option, activation_dtype=torch.float32)
    weight = reference.model.get_parameter(f"{place}.layer.weight").detach()
    before, generator, found = weight.clone(), torch.Generator().manual_seed(0), []
    for _ in range(ROUNDINGS):
        step = torch.rand(weight.shape, generator=generator).sub_(0.5) / 8
        weight.copy_(before * (1.0 + step))
        moved = replace(reference, gradients=InTurn((), torch.device("cpu")))
        errors = moved.measure_errors({"moved": run}, batches=len(reference.batches))
        found.append(errors["moved"].mean)
    weight.copy_(before)
    return statistics.fmean(found)


def verdict(row: dict[str, Any]) -> str:
    """Return "right", or what is wrong."""
    if row["joint"] > BUDGET:
        return "over the budget"
    # all times are alike: one layer for another is no loss
    if len(row["others"]) > len(row["others_without"]):
        return f"also out: {', '.join(row['others'].keys() - row['others_without'])}"
    is_named = re.search(CAUSES[row["kind"]], row["reason"])
    is_harmed = row["faulty"] > HARM * row["undone"]
    if not is_harmed:
        # a network may have a mean of its own
        return "blamed without harm" if is_named and row["kind"] != "offset" else "right"
    is_fastest = row["option"] == fp8_option(Recipe.TENSORWISE).key
    is_small = row["errors"]["tensorwise"] < DOMINATES * BUDGET
    return "right, harmed" if is_fastest or is_small or is_named else "another cause named"


def wanted(held_back: bool) -> Iterator[tuple[str, str, str, int]]:
    """Yield family, place, kind and strength."""
    places, table = (HELD_BACK, HELD_BACK_STRENGTHS) if held_back else (PLACES, STRENGTHS)
    for family, place in places.items():
        for kind, strengths in table.items():
            yield from ((family, place, kind, strength) for strength in strengths)


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
    print(
        "| family | fault | tensorwise, rowwise | roundings | without | chosen | joint | verdict |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for family, place, kind, strength in wanted(arguments.held_back):
        if arguments.family not in (None, family) or arguments.kind not in (None, kind):
            continue
        row = known.get((family, kind, strength))
        if row is None:
            row = measure(family, place, kind, strength)
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
        errors = ", ".join(f"{e:.2%}" for e in row["errors"].values())
        means = f"{row['faulty']:.2%} | {row['undone']:.2%}"
        cells = (f"{family} | {kind} {strength}", errors, means, row["option"])
        print(f"| {' | '.join(cells)} | {row['joint']:.2%} | {verdict(row)} |", flush=True)


if __name__ == "__main__":
    main()
