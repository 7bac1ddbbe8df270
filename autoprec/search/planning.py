"""A point of the search -> the plan: every layer with its numbers and its reason."""

from autoprec.predict import parse_parallel
from autoprec.predict.parallel import gathers_fp8
from autoprec.predict.transfer import sensitivity_basis
from autoprec.records.cost import Profile
from autoprec.records.model import BF16_O2, FP32, Basis
from autoprec.records.plan import (
    Assignment,
    Constraint,
    Fingerprint,
    FrontPoint,
    Plan,
    PredictedStep,
    Search,
)
from autoprec.records.sensitivity import Sensitivity, fp32_outputs
from autoprec.search.costs import Costs, is_all_fp32, make_costs, nearest_plan
from autoprec.search.notes import outside_note, plan_notes
from autoprec.search.problem import Options, make_problem
from autoprec.search.reasons import Why, reasons
from autoprec.sensitivity.gap import expected_gap


def build_plan(
    profile: Profile,
    sensitivity: Sensitivity,
    search: Search,
    point: FrontPoint,
    *,
    constraint: Constraint,
) -> Plan:
    """Return the plan of a point of the search, with the reason for every layer."""
    constraint = constraint.model_copy(update={"grad_error_budget": search.grad_error_budget})
    # the prices and the problem as the search had them: its record holds neither
    costs = make_costs(profile, sensitivity)
    plain = costs
    if sensitivity.fp32_always:  # which BF16 O2 has in BF16
        plain = make_costs(profile, sensitivity.model_copy(update={"islands": ()}))
    problem = make_problem(costs, constraint)
    options, basis = point.options, sensitivity_basis(sensitivity)
    islands = () if is_all_fp32(options) else sensitivity.islands
    why = reasons(Why(problem, search, options, sensitivity, profile.parallel))
    grad_error, grad_error_basis = _joint_error(point, basis)
    # a schedule's end says what run is planned; the budget is for its end only where that was asked
    run_steps = constraint.run_steps or sensitivity.schedule_steps
    parallel = parse_parallel(profile.parallel)
    return Plan(
        layers=tuple(_assignment(costs, i, options, reason) for i, reason in enumerate(why)),
        uncovered=tuple(parameter.name for parameter in profile.model.uncovered),
        constraint=constraint,
        fingerprint=_fingerprint(profile, sensitivity),
        grad_error=grad_error,
        grad_error_basis=grad_error_basis,
        predicted=_predicted(costs, plain, options, left_out=profile.left_out),
        fp8_all_gather=parallel.fsdp > 1 and any(gathers_fp8(o, parallel) for o in options),
        fp32_outputs=fp32_outputs(islands, dict(zip(profile.model.names, options, strict=True))),
        followers=() if is_all_fp32(options) else profile.model.followers,
        notes=(
            *plan_notes(profile, problem, search, options),
            *outside_note(sensitivity, options),
            *search.notes,
            *(() if basis is Basis.MEASURED else sensitivity.notes),
        ),
        expected_gap=run_steps and expected_gap(sensitivity, grad_error, run_steps),
    )


def _joint_error(point: FrontPoint, basis: Basis) -> tuple[float | None, Basis]:
    if is_all_fp32(point.options):
        return 0.0, Basis.MEASURED  # it is the reference
    if point.grad_error_measured is not None:
        return point.grad_error_measured, Basis.MEASURED
    if basis is Basis.UNKNOWN:
        return None, Basis.UNKNOWN
    return point.grad_error, Basis.PREDICTED if basis is Basis.MEASURED else basis


def _assignment(costs: Costs, index: int, options: Options, reason: str) -> Assignment:
    layer, option, prices = costs.layers[index], options[index], costs.prices[index]
    price, baseline = prices[option], prices.get(BF16_O2)
    return Assignment.of(
        layer,
        option,
        layer_ms=None if price.unknown else price.ms,
        baseline_ms=baseline.ms if baseline and not baseline.unknown else None,
        basis=price.time_basis,
        grad_error=None if price.grad_error_basis is Basis.UNKNOWN else price.grad_error,
        grad_error_basis=price.grad_error_basis,
        reason=reason,
    )


def _predicted(costs: Costs, plain: Costs, options: Options, *, left_out: float) -> PredictedStep:
    low, high = costs.step_interval(options)
    return PredictedStep(
        plan_ms=costs.step_ms(options),
        fp32_ms=costs.step_ms(nearest_plan(costs.prices, FP32)),
        bf16_o2_ms=plain.step_ms(nearest_plan(costs.prices, BF16_O2)),
        low_ms=low,
        high_ms=high,
        memory_bytes=costs.memory_bytes(options),
        left_out=left_out,
    )


def _fingerprint(profile: Profile, sensitivity: Sensitivity) -> Fingerprint:
    return Fingerprint(
        structure=profile.model.structure,
        device=profile.device.name,
        capability=profile.device.capability,
        software=profile.device.software,
        compile_mode=profile.device.compile_mode,
        tokens_per_step=profile.model.tokens_per_step,
        parallel=profile.parallel,
        time_basis=profile.basis,
        sensitivity_basis=sensitivity_basis(sensitivity),
        device_digest=profile.device.digest,
    )
