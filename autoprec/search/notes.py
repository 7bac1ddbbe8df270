"""What to know of a plan as a whole: whether FP8 and BF16 pay here, what memory and --parallel do.

The one place that says whether FP8 is worth it; the report shows these notes.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized

from autoprec.common.text import compared, first_and_more, percent, significant
from autoprec.model.options import FP8_MULTIPLE
from autoprec.model.roles import Role, role_of
from autoprec.predict import Parallel, parse_parallel
from autoprec.predict.memory import memory_note
from autoprec.predict.parallel import unsplit_note
from autoprec.predict.transfer import sensitivity_basis
from autoprec.records import BF16_O2, FP32, Basis, LayerKind, Option, Precision, Profile, Search
from autoprec.records.sensitivity import Sensitivity
from autoprec.search.costs import UNMEASURED, Costs, Price, is_all_fp32, nearest_plan
from autoprec.search.problem import NEAR_TIE, Options, Problem, is_faster

SHORTEST_MS = 1e-4  # what rounding leaves is no time
SMALLEST_SHARE = 0.001  # of the weights
MOST_NAMED = 4
NO_FP8_KINDS = (LayerKind.OTHER, LayerKind.RECURRENT, LayerKind.CONV, LayerKind.ATTENTION)
KEEP_COSTS = "--keep costs"
MAY_NOT = "may not take it (--keep, or unknown gradient error)"
LARGER = 20  # a tolerance by as much more is none that its user thought of
BUDGET_IS = "the budget is "
NOTABLE = 0.05  # a smaller share of what FP8 saves is not worth a note


def plan_notes(
    profile: Profile, problem: Problem, search: Search, options: Options
) -> tuple[str, ...]:
    """Return the notes of a plan; the first says whether FP8 pays."""
    costs = problem.costs
    chosen = dict(zip(profile.model.names, options, strict=True))
    parallel = parse_parallel(profile.parallel) if profile.parallel else Parallel()
    notes = (
        fp8_note(profile, problem, search, options),
        _keep_note(search),
        _tie_note(costs, options),
        _unknown_note(profile),
        _no_option_note(profile, costs),
        _tokens_note(profile),
        _unsure_note(profile, costs, search, options),
        memory_note(profile, chosen, costs.memory_bytes(options)),
        (_why_no_bf16 if is_all_fp32(options) else _why_slower)(problem, search, options),
        _communication_note(costs, options),
        _head_note(profile, chosen),
        _kernel_note(profile, chosen),
        unsplit_note(profile.model.layers, parallel),
        _followers_note(profile, options),
        *problem.keeps.notes,
    )
    return tuple(note for note in notes if note)


def fp8_note(profile: Profile, problem: Problem, search: Search, options: Options) -> str:
    """Return the count of layers on which FP8 pays in a plan, or why it is not worth it here."""
    if not any(option.is_fp8 for option in options):
        return f"FP8 is not worth it here: {_why_no_fp8(profile, problem, search, options)}"
    costs = problem.costs
    in_fp8 = [i for i, option in enumerate(options) if option.is_fp8]
    pairs = {i: (_baseline(costs, i), costs.prices[i][options[i]]) for i in in_fp8}
    gains = {i: before.with_casts_ms - own.ms for i, (before, own) in pairs.items()}
    saved = [i for i, gain in gains.items() if gain > 0.0]
    forced = _forced_note(problem, {i: gain for i, gain in gains.items() if gain <= 0.0})
    if not saved:
        return f"FP8 is not worth it here: {forced}"
    linears = sum(layer.kind is LayerKind.LINEAR for layer in costs.layers)
    pays = (
        f"FP8 pays on {len(saved)} of {linears} linear layer{'' if linears == 1 else 's'}: "
        f"{_ms(sum(gains[i] for i in saved))} a step less in them than in BF16 "
        f"({_basis(price for i in saved for price in pairs[i])})"
    )
    return f"{pays}; {forced}" if forced else pays


def _forced_note(problem: Problem, gains: Mapping[int, float]) -> str:
    """Return the layers that are in FP8 although that is no faster, and what made them so."""
    if not gains:
        return ""
    # the search itself never takes an FP8 option that is no faster, but for its bytes
    names = [problem.costs.layers[index].name for index in gains]
    is_kept = all(name in problem.keeps.of_layer for name in names)
    return (
        f"{_count(names)} in FP8 because of {'--keep' if is_kept else 'the memory limit'} "
        f"{'is' if len(names) == 1 else 'are'} {_ms(-sum(gains.values()))} a step slower than in "
        f"BF16 ({first_and_more(names)})"
    )


def _tie_note(costs: Costs, options: Options) -> str:
    """Return how many layers have the more precise of options that take the same time."""
    tied = {
        i
        for i, own in enumerate(options)
        for price in (p for o, p in costs.prices[i].items() if o.is_fp8 and o != own)
        if own != FP32 and price.counted_ms < costs.prices[i][own].counted_ms
        if not is_faster(price, costs.prices[i][own])
    }
    if not tied:
        return ""
    return (
        f"{_count(tied)} where options take the same time within {percent(NEAR_TIE)} "
        f"ha{'s' if len(tied) == 1 else 've'} the one of less gradient error"
    )


def _keep_note(search: Search) -> str:
    """Return what --keep costs against the free choice, by the same tables; "" without one."""
    own, free = search.exact, search.free
    if free is None:
        return ""
    if free.options == own.options:
        return f"{KEEP_COSTS} nothing: the free choice is the same"
    # shares and no ms: whole steps are timed too, and their ms are others
    more = own.step_ms / max(free.step_ms, SHORTEST_MS) - 1.0
    time = f"{percent(more)} of a step"
    if own.step_ms - free.step_ms < SHORTEST_MS:  # the search waives gains that are not sure
        time = f"no time, and gains {percent(-more)} that are not sure" if more < 0.0 else "no time"
    return (
        f"{KEEP_COSTS} {time}, by its layers' times; its gradient error is "
        f"{percent(own.grad_error)}, the free choice's {percent(free.grad_error)}"
    )


def _baseline(costs: Costs, index: int) -> Price:
    """Return the price of the layer's BF16, else of its first option, FP32."""
    prices = costs.prices[index]
    return prices[BF16_O2 if BF16_O2 in prices else next(iter(prices))]


def _unsure_note(profile: Profile, costs: Costs, search: Search, options: Options) -> str:
    """Return the layers that stay in BF16 as their gain is not sure, and what that gives up."""
    if search.expected is None:
        return ""
    stay = sum(
        own == BF16_O2 and hoped != own and costs.prices[i][hoped].margin_ms > 0.0
        for i, (own, hoped) in enumerate(zip(options, search.expected.options, strict=True))
    )
    step_ms = costs.step_ms(options)
    given_up = step_ms - search.expected.step_ms
    if not stay or given_up <= 0.0:
        return ""
    sure = (
        "whose 95 % interval is above zero"
        if profile.basis is Basis.MEASURED
        else f"of more than {percent(math.expm1(profile.speedup_error))} in what FP8 changes, by "
        "which 1 prediction in 10 is too high"
    )
    return (
        f"{_count(range(stay))} that might be faster out of BF16 stay{'s' if stay == 1 else ''} in "
        f"it: a layer leaves it only for a gain {sure}; that gives up {_ms(given_up)} "
        f"({percent(given_up / step_ms)}) of the step, on paper"
    )


def _ms(value: float) -> str:
    return f"{significant(value, 3)} ms"


def _why_no_fp8(profile: Profile, problem: Problem, search: Search, options: Options) -> str:
    if not profile.device.fp8_recipes:
        return profile.device.fp8_reason or f"{profile.device.name} has no FP8 GEMM"
    costs = problem.costs
    eligible = [i for i, row in enumerate(costs.prices) if any(o.is_fp8 for o in row)]
    if not eligible:
        return _why_ineligible(costs)
    fp8 = {i: [p for o, p in costs.prices[i].items() if o.is_fp8] for i in eligible}
    best = {i: min(prices, key=lambda price: price.ms) for i, prices in fp8.items()}
    own = {i: costs.prices[i][options[i]] for i in eligible}
    gains = {i: own[i].with_casts_ms - best[i].ms for i in eligible}
    faster = [i for i in eligible if gains[i] > 0.0]
    basis = _basis(price for i in faster for price in (best[i], own[i]))
    gain = f"{_ms(sum(gains[i] for i in faster))} a step in all, {basis}"
    # slower everywhere, faster within the noise, kept out, or too harmful: the first that holds
    if not faster:
        steps = _steps(profile, options)
        best_ms, own_ms = (sum(p.with_casts_ms for p in x.values()) for x in (best, own))
        whole = profile.step("fp8_o1")
        is_known = bool(steps) and whole is not None and whole.timing.basis is Basis.MEASURED
        if is_known and _basis(best.values()) is Basis.PREDICTED:  # the step is the better witness
            return f"no FP8 recipe seems faster on {_count(eligible)} that can take it{steps}"
        return (
            f"on {_count(eligible)} that can take it the fastest recipe needs {_ms(best_ms)} "
            f"({_basis(best.values())}), the plan {_ms(own_ms)} ({_basis(own.values())}){steps}"
        )
    if all(min(p.counted_ms for p in fp8[i]) >= own[i].with_casts_ms for i in faster):
        return (
            f"on {_count(faster)} where it seems faster ({gain}) the gain is "
            f"within its uncertainty{_steps(profile, options)}"
        )
    text = f"it is faster on {_count(faster)} ({gain})"
    return f"{text}, but {_but(problem, search, options, faster)}"


def _but(problem: Problem, search: Search, options: Options, faster: Sequence[int]) -> str:
    """Return what keeps layers out of FP8 that are faster in it."""
    costs = problem.costs
    closed = [i for i in faster if not any(option.is_fp8 for option in problem.allowed[i])]
    if len(closed) == len(faster):
        return f"{first_and_more(costs.layers[i].name for i in closed)} {MAY_NOT}"
    fp8 = {i: [o for o in costs.prices[i] if o.is_fp8] for i in faster}
    best = {i: min(own, key=lambda o: costs.prices[i][o].ms) for i, own in fp8.items()}
    lost = costs.taken_ms(options, best)
    budget = f"for the gradient error it adds (budget {percent(search.grad_error_budget)})"
    if lost <= 0.0:
        return f"not by enough {budget}"
    return (
        f"FSDP's communication, which hides behind it, takes {_ms(lost)} of that, and the rest "
        f"is not enough {budget}"
    )


def _why_ineligible(costs: Costs) -> str:
    """Return the reason that no linear has an FP8 option: mostly a refusal that they share."""
    linears = [layer for layer in costs.layers if layer.kind is LayerKind.LINEAR]
    refusals = Counter(text for layer in linears if (text := layer.refusal(Precision.FP8_O1)))
    if refusals:
        reason, count = refusals.most_common(1)[0]
        return f"none of the linear layers can take it ({count} of them: {reason})"
    return (
        "no FP8 option was profiled" if linears else "no layer is a linear with one weight matrix"
    )


def _basis(prices: Iterable[Price]) -> Basis:
    """Return MEASURED where all times were, else PREDICTED."""
    is_measured = all(price.time_basis is Basis.MEASURED for price in prices)
    return Basis.MEASURED if is_measured else Basis.PREDICTED


def _steps(profile: Profile, options: Options) -> str:
    """Return the whole step's time in FP8 over what it has in its place, where both were timed.

    A ratio, as the plan may be timed later beside another such step, when the machine is less busy.
    """
    label, title = ("fp32", "FP32") if is_all_fp32(options) else ("bf16_o2", "BF16 O2")
    fp8, other = profile.step("fp8_o1"), profile.step(label)
    if fp8 is None or other is None or other.timing.median_ms <= 0.0:
        return ""
    ratio = fp8.timing.median_ms / other.timing.median_ms
    took = f"{significant(ratio, 3)}x as long as in {title} ({fp8.timing.basis})"
    if ratio < 1.0:  # a reader would take the two for a contradiction, and be right
        return f"; whole steps do not show that: with FP8 they take {took}"
    return f"; the whole step with FP8 takes {took}"


def _why_no_bf16(problem: Problem, search: Search, options: Options) -> str:
    costs = problem.costs
    uniform = nearest_plan(costs.prices, BF16_O2)
    fp32_ms, bf16_ms = costs.step_ms(options), costs.step_ms(uniform)
    if is_all_fp32(uniform):
        return "BF16 is not worth it here: no layer can take it"
    if bf16_ms >= fp32_ms:
        return (
            "BF16 is not worth it here: by its layers the step takes "
            f"{significant(bf16_ms / max(fp32_ms, SHORTEST_MS), 3)}x as long in BF16 O2 as in FP32"
        )
    if over := _over_budget(problem, search, uniform):
        why = f"BF16's {over}"
    elif options != search.chosen.options:
        why = "training refuted plans with BF16, within the budget by their gradient error"
    else:
        allowed = zip(costs.layers, uniform, problem.allowed, strict=True)
        closed = first_and_more(layer.name for layer, own, may in allowed if own not in may)
        why = f"{closed} {MAY_NOT}" if closed else "its gain is not worth its gradient error"
    faster = compared(bf16_ms, fp32_ms) + _with_fp32(costs)
    return f"BF16 O2 is {faster}, but FP32 is the plan: {why}"


def _why_slower(problem: Problem, search: Search, options: Options) -> str:
    """Return why the plan is slower than BF16 O2, if its error is why, or an empty string."""
    uniform = nearest_plan(problem.costs.prices, BF16_O2)
    own_ms, bf16_ms = (problem.costs.step_ms(each) for each in (options, uniform))
    over = _over_budget(problem, search, uniform)
    if not over or bf16_ms > (1.0 - NOTABLE) * own_ms:
        return ""
    faster = compared(bf16_ms, own_ms) + _with_fp32(problem.costs)
    return f"BF16 O2 is {faster}, but its {over}"  # two lines of the answer, which has few


def _with_fp32(costs: Costs) -> str:
    """Return what BF16 O2 has in FP32 beside its layers, as every plan."""
    if not costs.fp32_always:
        return ""
    is_all = costs.fp32_always.issuperset(layer.name for layer in costs.layers)
    return " with FP32 between layers" if is_all else " with some FP32 beside layers"


def _over_budget(problem: Problem, search: Search, uniform: Options) -> str:
    trials = (trial.grad_error for trial in search.trials if trial.options == uniform)
    error, budget = next(trials, problem.costs.grad_error(uniform)), search.grad_error_budget
    if error <= budget:
        return ""
    cuts = (note for note in search.notes if note.startswith(BUDGET_IS))
    cut = next(cuts, "").removeprefix(BUDGET_IS).partition(":")[0]
    said = f"gradient error is {percent(error)}, the budget {percent(budget)}"
    said += f" ({cut})" if cut else ""
    if not budget or error > min(problem.ceiling, LARGER * budget):
        return said
    times = math.ceil(10.0 * error / budget) / 10
    return f"{said}; {times:g}x the --loss-tolerance lets it in"


def _communication_note(costs: Costs, options: Options) -> str:
    """Return the part of what FP8 saves that goes to communication BF16 compute would hide."""
    lost = costs.unhidden_ms(options)
    saved = costs.step_ms(nearest_plan(costs.prices, BF16_O2)) - costs.step_ms(options) + lost
    has_fp8 = any(option.is_fp8 for option in options)
    if not has_fp8 or min(lost, saved) <= 0.0 or lost < NOTABLE * saved:
        return ""
    return (
        f"the FP8 layers save {_ms(saved)} a step, but FSDP's communication hides less behind "
        f"them than behind BF16 and takes {_ms(lost)} of it"
    )


def _head_note(profile: Profile, chosen: Mapping[str, Option]) -> str:
    """Return the fused loss that output heads in FP8 rule out, or an empty string."""
    heads = [
        layer.name
        for layer in profile.model.layers
        if layer.gemm is not None and layer.gemm.N > layer.gemm.K  # of a vocabulary
        if role_of(layer) is Role.HEAD and chosen[layer.name].is_fp8
    ]
    if not heads:
        return ""
    return (
        f"{first_and_more(heads)} in FP8 rules out a fused linear cross-entropy, which runs the "
        "head's GEMMs itself, in BF16, and never writes the logits; the model has none now, and "
        "what one would save is not priced"
    )


def _kernel_note(profile: Profile, chosen: Mapping[str, Option]) -> str:
    """Return what FP8 layers pay behind kernels that no cast is fused into, if that is predicted.

    A predicted time's interval is its spread and, below, what may not be paid (`unfused_us`):
    unsure = median - p20 * p80 / median.
    """
    layers = [x for x in profile.model.layers if x.made_by and chosen[x.name].is_fp8]
    rows = (profile.timing(layer.name, chosen[layer.name]) for layer in layers)
    casts = [row.cast for row in rows if row and row.cast and not row.cast.samples]
    unsure_ms = sum(t.median_ms - t.p20_ms * t.p80_ms / t.median_ms for t in casts if t.median_ms)
    if unsure_ms < SHORTEST_MS:
        return ""
    kernels = first_and_more(dict.fromkeys(layer.made_by for layer in layers))
    return (
        f"{_count(layers)} in FP8 whose input comes from {kernels}, into which torch.compile fuses "
        f"no cast, pay up to {_ms(unsure_ms)} a step for that: predicted from memory traffic, as "
        "no published pair shows it"
    )


def _unknown_note(profile: Profile) -> str:
    """Return what the times leave out because no time of it is known, or an empty string."""
    unknown = profile.unknown_times
    if profile.left_out < SMALLEST_SHARE:
        return ""
    reasons = "; ".join(dict.fromkeys(unknown.values()))
    return (
        f"no time is known for {percent(profile.left_out)} of the weights "
        f"({first_and_more(unknown, most=MOST_NAMED)}: {reasons}): all step times and speedups "
        "leave it out"
    )


def _no_option_note(profile: Profile, costs: Costs) -> str:
    """Return the share of the weights that are in experts, recurrent and other such layers.

    And in those of which a proxy could not measure FP8.
    """
    model = profile.model
    kinds: Counter[str] = Counter()
    is_able = any(layer.takes_fp8 for layer in model.layers)
    for layer, prices, missing in zip(model.layers, costs.prices, costs.missing, strict=True):
        numel = layer.numel  # with its biases, as times leave it out
        if fp8 := [option for option in layer.options if option.is_fp8]:
            if prices.keys().isdisjoint(fp8) and UNMEASURED in map(missing.get, fp8):
                kinds[UNMEASURED] += numel
        elif layer.kind in NO_FP8_KINDS and any(len(p.matrix_shape) > 1 for p in layer.parameters):
            kinds[layer.type_name.rpartition(".")[2]] += numel
        elif layer.kind is LayerKind.LINEAR and is_able and layer.refusals:
            kinds[layer.refusals[0].reason] += numel  # where none is able the first note says why
    for p in (p for p in model.uncovered if len(p.matrix_shape) > 1):
        is_stack = p.name in model.loose_stacks
        kinds[f"{'stacked matrices' if is_stack else 'parameters'} of no layer"] += p.numel
    shares = ((kind, n / model.numel) for kind, n in kinds.most_common())
    large = [(kind, share) for kind, share in shares if share >= NOTABLE]
    if not large:
        return ""
    first, *others = (f"{percent(share)} of the weights ({kind})" for kind, share in large)
    return f"no FP8 option yet for {first}{''.join(f' and {other}' for other in others)}"


def _tokens_note(profile: Profile) -> str:
    """Return that the largest M keeps grad_weight of notable weights out of FP8; "" if it does not.

    Of batches that differ the profile says it.
    """
    model, M = profile.model, profile.model.tokens_per_step
    layers = [layer for layer in model.layers if layer.gemm and layer.gemm.M == M]
    found = [x.numel for x in layers if x.takes_fp8]
    is_uneven = M % FP8_MULTIPLE and len(model.mix) < 2
    if not is_uneven or sum(found) < NOTABLE * model.numel:
        return ""
    return (
        f"grad_weight stays in BF16 in {_count(found)} that FP8 could take with M={M}, no multiple "
        f"of {FP8_MULTIPLE}: {M + -M % FP8_MULTIPLE} tokens there would change that"
    )


def outside_note(sensitivity: Sensitivity, options: Options) -> list[str]:
    """Return what stays FP32 beside a plan's layers, and the error that says so; else nothing."""
    if is_all_fp32(options) or not sensitivity.fp32_always:
        return []
    error = sum(island.grad_error for island in sensitivity.islands if not island.names)
    where, untimed = "what is computed between layers", ""
    if not sensitivity.is_fp32_between:
        layers = {row.name for row in sensitivity.rows}
        behind = [name for name in sensitivity.fp32_always if name in layers]
        outside = [name for name in sensitivity.fp32_always if name not in layers]
        said = [f"{first_and_more(outside)}, outside of layers"] if outside else []
        said += [f"what is computed behind {first_and_more(behind)}"] if behind else []
        where = ", and ".join(said)
        untimed = "; what the code around it then takes is in no predicted time"
    return [
        f"BF16 O2 is too coarse for {where}: alone it has gradient error {percent(error)} "
        f"({sensitivity_basis(sensitivity)}), so that is FP32 here{untimed}"
    ]


def _followers_note(profile: Profile, options: Options) -> str:
    followers = () if is_all_fp32(options) else profile.model.followers
    if not followers:
        return ""
    return (
        f"{first_and_more(followers)} stay FP32 and are cast in each forward: nobody trains them, "
        "but the training writes into them (an average), and BF16 would lose small changes"
    )


def _count(layers: Sized) -> str:
    return "the 1 layer" if len(layers) == 1 else f"the {len(layers)} layers"
