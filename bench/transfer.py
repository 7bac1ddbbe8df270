"""Does a small model's table of gradient errors hold for a large one? Measured on both.

    python bench/transfer.py [llama gpt2 vit bert] [--verify]

Prints, in Markdown, for every pair of a proxy and a larger model (width x depth):

    order    Spearman's rank correlation of the transferred and the measured table over all linears
    total    transferred over measured, of the whole table, and of each role of linears
    plan     the plan of the transferred table within the budget of a loss tolerance: verdict and
             gap on the proxy, to which it is carried back, and on the large model (--verify)

`matched` and `plain` are the two ways to build a family, see bench/transfer_families.py. One core:
about three minutes and a half for a family, and two more with --verify.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from scipy.stats import spearmanr
from transformers.utils import logging as transformers_logging

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.predict.carry import carry_plan
from autoprec.predict.family import role_in_block
from autoprec.predict.transfer import transfer_sensitivity
from autoprec.records import Basis, ModelSpec, Option, Plan, Recipe, Sensitivity, fp8_option
from autoprec.runtime import uniform_plan
from autoprec.sensitivity.gap import HORIZON_STEPS, grad_error_budget_for
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from autoprec.verification import verify_plans
from autoprec.workload.functions import workload_from

sys.path.insert(0, str(Path(__file__).resolve().parent))

from transfer_families import BUILDERS, Member

OPTIONS = (fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE))
TOLERANCES = (0.0003, 0.003)  # a plan with a part of the linears in FP8, and with all or nearly all
# (proxy, large): deeper, wider, both
PAIRS = (
    ((64, 2), (64, 8)),
    ((64, 4), (64, 16)),
    ((64, 4), (128, 4)),
    ((64, 4), (256, 4)),
    ((128, 4), (256, 4)),
    ((64, 2), (128, 8)),
    ((64, 4), (256, 8)),
    ((64, 4), (512, 4)),
    ((128, 4), (512, 4)),
    ((64, 4), (512, 8)),
)
PLAIN_PAIRS = (((64, 4), (64, 16)), ((64, 4), (256, 4)), ((64, 4), (256, 8)))
VERIFIED_PAIR = ((64, 2), (128, 8))


@dataclass(frozen=True)
class Measured:
    """A member with its spec and its table."""

    context: Context
    spec: ModelSpec
    sensitivity: Sensitivity


@cache
def measured(member: Member) -> Measured:
    """Return a member's own table, as `autoprec tune` measures it."""
    name = f"{member.family} {member.width}x{member.depth}"
    context = Context(workload_from(member, name=name), torch.device("cpu"))
    spec = capture_model(context)
    sensitivity = measure_sensitivity(prepare_reference(context, spec), options=OPTIONS)
    return Measured(context, spec, sensitivity)


def errors_of(sensitivity: Sensitivity, option: Option) -> dict[str, float]:
    return {r.name: r.counted_error for r in sensitivity.rows if r.option == option}


def roles_of(errors: dict[str, float]) -> dict[str, float]:
    """Return the total of every role."""
    totals: dict[str, float] = {}
    for name, error in errors.items():
        role = role_in_block(name)
        totals[role] = totals.get(role, 0.0) + error
    return totals


def compare(proxy: Member, large: Member) -> Iterator[str]:
    """Yield a row of the table for each recipe."""
    own = measured(large)
    transferred = transfer_sensitivity(measured(proxy).sensitivity, own.spec)
    for option in OPTIONS:
        there, here = errors_of(transferred, option), errors_of(own.sensitivity, option)
        names = list(here)
        rank = spearmanr([there[n] for n in names], [here[n] for n in names]).statistic
        total = math.fsum(there.values()) / math.fsum(here.values())
        roles, own_roles = roles_of(there), roles_of(here)
        # roles that matter: at least 1 % of the total
        ratios = {
            role: roles[role] / error
            for role, error in own_roles.items()
            if error >= 0.01 * math.fsum(own_roles.values())
        }
        shown = ", ".join(f"{role} {ratio:.2f}" for role, ratio in ratios.items())
        sizes = f"{proxy.width}x{proxy.depth} -> {large.width}x{large.depth}"
        how = "matched" if proxy.is_matched else "plain"
        recipe = option.recipe
        yield f"| {large.family} {how} | {sizes} | {recipe} | {rank:.2f} | {total:.2f} | {shown} |"


def plan_within(tolerance: float, proxy: Measured, large: Measured) -> Plan:
    """Return the plan with as many parameters in FP8 as the transferred table lets it have."""
    transferred = transfer_sensitivity(proxy.sensitivity, large.spec)
    budget = grad_error_budget_for(transferred, tolerance, HORIZON_STEPS)
    left = budget - transferred.activation_error.mean
    chosen: dict[str, Option] = {}
    model = large.context.workload.build_model()
    sizes = {layer.name: sum(p.numel for p in layer.parameters) for layer in large.spec.layers}
    best: dict[str, tuple[float, Option]] = {}
    for option in OPTIONS:
        for name, error in errors_of(transferred, option).items():
            best[name] = min(
                best.get(name, (math.inf, option)), (error, option), key=lambda x: x[0]
            )
    for name, (error, option) in sorted(best.items(), key=lambda item: item[1][0] / sizes[item[0]]):
        if error <= left:
            chosen[name], left = option, left - error
    plan = uniform_plan(model, "bf16_o2")
    layers = tuple(
        layer.model_copy(update=dict(chosen[layer.name])) if layer.name in chosen else layer
        for layer in plan.layers
    )
    rows = {(row.name, row.option): row.counted_error for row in transferred.rows}
    error = math.fsum(rows.get((layer.name, layer.option), 0.0) for layer in layers)
    made = plan.fingerprint.model_copy(update={"time_basis": Basis.PREDICTED})
    return plan.model_copy(
        update={
            "layers": layers,
            "grad_error": error + transferred.activation_error.mean,
            "grad_error_basis": Basis.TRANSFERRED,
            "fingerprint": made,
        }
    )


def prove(family: str) -> Iterator[str]:
    """Yield what proofs on the proxy and on the large model say of one plan, for each tolerance."""
    small, big = (measured(Member(family, *size)) for size in VERIFIED_PAIR)
    for tolerance in TOLERANCES:
        plan = plan_within(tolerance, small, big)
        carried = carry_plan(plan, small.spec, small.sensitivity)
        cells = []
        for side, own in ((small, carried), (big, plan)):
            found = verify_plans(side.context, [own], loss_tolerance=tolerance, spec=side.spec)
            gap = found.gap
            shown = f"{gap.mean:+.3%} ({gap.low:+.3%} to {gap.high:+.3%})" if gap else "none"
            count = sum(layer.option.is_fp8 for layer in own.layers)
            cells.append(
                f"{count} of {len(own.layers)}, {own.grad_error:.2%}, {found.verdict}, {shown}"
            )
        yield f"| {family} | {tolerance:.2%} | {cells[0]} | {cells[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", default=[*BUILDERS], help="default: all")
    parser.add_argument("--verify", action="store_true", help="prove plans on both sides too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    started = time.process_time()
    print("| family | proxy -> large | recipe | order | total | total by role |")
    print("| --- | --- | --- | --- | --- | --- |")
    for family in arguments.families:
        for pairs, is_matched in ((PAIRS, True), (PLAIN_PAIRS, False)):
            for proxy, large in pairs:
                members = (Member(family, *size, is_matched) for size in (proxy, large))
                print(*compare(*members), sep="\n", flush=True)
    if arguments.verify:
        print("\n| family | tolerance | on the proxy | on the large model |")
        print("| --- | --- | --- | --- |")
        for family in arguments.families:
            for row in prove(family):
                print(row, flush=True)
    print(f"\n{time.process_time() - started:.0f} s of CPU time, one thread", file=sys.stderr)


if __name__ == "__main__":
    main()
