"""A point of the search -> the plan: every layer with its numbers and its reason."""

from collections.abc import Sequence

from autoprec.common.text import compared, percent
from autoprec.predict import Parallel, parse_parallel
from autoprec.predict.memory import memory_note
from autoprec.predict.parallel import gathers_fp8, unsplit_note
from autoprec.predict.transfer import sensitivity_basis
from autoprec.records import (
    BF16_O2,
    FP32,
    Assignment,
    Basis,
    Constraint,
    Fingerprint,
    FrontPoint,
    OperandStatistics,
    Plan,
    PredictedStep,
    Profile,
    Search,
    Sensitivity,
)
from autoprec.search.costs import Costs, is_all_fp32, make_costs
from autoprec.search.problem import Options, make_problem
from autoprec.search.reasons import Why, reasons

TOLD = 0.05  # a smaller share of what FP8 saves is not worth a note


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
    costs = make_costs(profile, sensitivity)
    problem = make_problem(costs, constraint)
    statistics: dict[str, list[OperandStatistics]] = {}
    for row in sensitivity.statistics:
        statistics.setdefault(row.name, []).append(row)
    why = reasons(Why(problem, search, point.options, statistics, profile.parallel))
    baseline = uniform_plan(costs)
    grad_error, grad_error_basis = _joint_e(point, sensitivity_basis(sensitivity))
    return Plan(
        layers=tuple(
            _assignment(costs, index, point.options, why[index])
            for index in range(len(point.options))
        ),
        uncovered=tuple(parameter.name for parameter in profile.model.uncovered),
        constraint=constraint,
        fingerprint=_fingerprint(profile, sensitivity),
        grad_error=grad_error,
        grad_error_basis=grad_error_basis,
        predicted=_predicted(costs, point.options, baseline),
        fp8_all_gather=_gathers_fp8(profile, point.options),
        notes=(
            *search.notes,
            *memory_notes(profile, costs, point.options),
            *plan_notes(costs, search, point.options),
            *parallel_notes(profile),
            *(() if sensitivity_basis(sensitivity) is Basis.MEASURED else sensitivity.notes),
        ),
    )


def memory_notes(profile: Profile, costs: Costs, options: Options) -> list[str]:
    """Return that the plan does not fit into the device's memory, where it does not."""
    chosen = dict(zip(profile.model.names, options, strict=True))
    note = memory_note(profile, chosen, costs.memory_bytes(options))
    return [note] if note else []


def parallel_notes(profile: Profile) -> list[str]:
    """Return which layers `--parallel` leaves whole although it asks for tensor parallelism."""
    parallel = parse_parallel(profile.parallel) if profile.parallel else Parallel()
    return [note] if (note := unsplit_note(profile.model.layers, parallel)) else []


def _gathers_fp8(profile: Profile, options: Options) -> bool:
    """Return whether FSDP gathers some layer's weights in FP8: asked for, and a layer can."""
    parallel = parse_parallel(profile.parallel) if profile.parallel else Parallel()
    return parallel.fsdp > 1 and any(gathers_fp8(option, parallel) for option in options)


def uniform_plan(costs: Costs) -> Options:
    """Return BF16 O2 wherever it has a price, whatever is kept."""
    return tuple(BF16_O2 if BF16_O2 in row else next(iter(row)) for row in costs.prices)


def plan_notes(costs: Costs, search: Search, options: Options) -> list[str]:
    """Return what to know of a plan as a whole: above all which precision is not worth it here."""
    if is_all_fp32(options):
        return [_why_no_bf16(costs, search, options)]
    if any(option.is_fp8 for option in options):
        return [note] if (note := _why_less_gain(costs, options)) else []
    return [note] if (note := _why_no_fp8(costs, search, options)) else []


def _why_no_bf16(costs: Costs, search: Search, options: Options) -> str:
    uniform = uniform_plan(costs)
    fp32_ms, bf16_ms = costs.step_ms(options), costs.step_ms(uniform)
    if is_all_fp32(uniform):
        return "BF16 is not worth it here: no layer can take it"
    if bf16_ms >= fp32_ms:
        return (
            f"BF16 is not worth it here: the step takes {bf16_ms:.4g} ms in BF16 O2, "
            f"{fp32_ms:.4g} ms in FP32"
        )
    return (
        f"BF16 O2 is {compared(bf16_ms, fp32_ms)}, but FP32 is the plan: e of BF16 O2 is "
        f"{percent(_measured_e(search, uniform) or costs.grad_error(uniform))}, the budget "
        f"{percent(search.grad_error_budget)}"
    )


def _why_no_fp8(costs: Costs, search: Search, options: Options) -> str:
    eligible = [i for i, row in enumerate(costs.prices) if any(o.is_fp8 for o in row)]
    if not eligible:
        return ""
    best = {i: min(p.ms for o, p in costs.prices[i].items() if o.is_fp8) for i in eligible}
    own = {i: costs.prices[i][options[i]].ms for i in eligible}
    faster = [i for i in eligible if best[i] < own[i]]
    if not faster:
        return (
            f"FP8 is not worth it here: on {_count(eligible)} that can take it the fastest recipe "
            f"needs {sum(best.values()):.4g} ms, the plan {sum(own.values()):.4g} ms"
        )
    gain = sum(own[i] - best[i] for i in faster)
    return (
        f"FP8 is not worth it here: it is faster on {_count(faster)} ({gain:.4g} ms a step in "
        f"all), but not by enough for the error it adds (e budget "
        f"{percent(search.grad_error_budget)})"
    )


def _why_less_gain(costs: Costs, options: Options) -> str:
    """Say how much of what FP8 saves goes to communication that hides behind compute in BF16."""
    lost = costs.unhidden_ms(options)
    saved = costs.step_ms(uniform_plan(costs)) - costs.step_ms(options) + lost
    if lost < TOLD * saved:
        return ""
    return (
        f"the FP8 layers save {saved:.4g} ms a step, but FSDP's communication hides less behind "
        f"them than behind BF16 and takes {lost:.4g} ms of it"
    )


def _count(layers: Sequence[int]) -> str:
    return "the 1 layer" if len(layers) == 1 else f"the {len(layers)} layers"


def _measured_e(search: Search, options: Options) -> float | None:
    return next((trial.grad_error for trial in search.trials if trial.options == options), None)


def _joint_e(point: FrontPoint, basis: Basis) -> tuple[float | None, Basis]:
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
    return Assignment(
        name=layer.name,
        kind=layer.kind,
        shapes=tuple(parameter.shape for parameter in layer.parameters),
        precision=option.precision,
        recipe=option.recipe,
        gemms_hp=option.gemms_hp,
        layer_ms=price.ms,
        baseline_ms=baseline.ms if baseline else None,
        basis=price.time_basis,
        grad_error=None if price.grad_error_basis is Basis.UNKNOWN else price.grad_error,
        grad_error_basis=price.grad_error_basis,
        reason=reason,
    )


def _predicted(costs: Costs, options: Options, baseline: Options) -> PredictedStep:
    fp32 = tuple(FP32 if FP32 in row else next(iter(row)) for row in costs.prices)
    low, high = costs.step_interval(options)
    return PredictedStep(
        plan_ms=costs.step_ms(options),
        fp32_ms=costs.step_ms(fp32),
        bf16_o2_ms=costs.step_ms(baseline),
        low_ms=low,
        high_ms=high,
        memory_bytes=costs.memory_bytes(options),
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
