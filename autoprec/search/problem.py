"""Prices, keeps and ties -> what there is to choose, and the exact answer to it.

A group is one layer, or the layers that share a parameter and hence one storage, or those of an
island, between which BF16 is too coarse: each combination of their options that is FP32 throughout
or 16-bit throughout is one choice. Options that cannot win in time are locked: an FP8 option that
is not for sure faster than BF16 (its margin counts, see costs), or takes no less than another of
less error, is left out, whatever noise says about its error. BF16 that is slower than FP32 stays:
one such layer may be what lets all others pass BF16 activations. Layers that the step did not call
follow.

The all-FP32 plan has FP32 activations and stands beside the knapsack of all others.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from autoprec.common.grouping import grouped
from autoprec.common.text import shown_bytes
from autoprec.errors import InfeasibleError
from autoprec.records import BF16_O2, FP32, Constraint, LayerSpec, Option, Precision
from autoprec.search.costs import Costs, Price, is_all_fp32
from autoprec.search.keep import Keep, Keeps, match_keeps
from autoprec.search.solver import Item, Knapsack, Outside, Solution, unbeaten

# Of a time, the least by which an option must be faster than a more precise one of its layer: which
# of two within it is the faster changes from run to run.
NEAR_TIE = 0.005

Options = tuple[Option, ...]


def precision_rank(option: Option) -> int:
    """Return 0 for FP32, the most precise, 1 for BF16 and 2 for FP8."""
    return (Precision.FP32, Precision.BF16_O2, Precision.FP8_O1).index(option.precision)


@dataclass(frozen=True)
class Group:
    """Layers chosen together (by index), and the combinations of options they may take."""

    layers: tuple[int, ...]
    choices: tuple[Options, ...]


@dataclass(frozen=True)
class Problem:
    """What there is to choose. `allowed` are each layer's options by the keeps, locked or not."""

    costs: Costs
    keeps: Keeps
    allowed: tuple[Options, ...]
    memory_bytes: int | None
    groups: tuple[Group, ...] = ()
    ceiling: float = math.inf  # of a plan's whole gradient error, whatever counts of it

    def rank(self, options: Options) -> tuple[float, float]:
        """Return the sort key of a plan by the table: its time to loss, then its error."""
        grad_error = self.costs.grad_error(options)
        return self.costs.counted_ms(options) * (1.0 + grad_error), grad_error

    def most_error(self, options: Options, budget: float) -> float:
        """Return the most of a plan's gradient error that counts: the budget, and the ceiling's."""
        return min(budget, self.ceiling * self.costs.counted_share(options))

    def fits_memory(self, options: Options) -> bool:
        """Whether a plan needs no more bytes than are allowed."""
        return self.memory_bytes is None or self.costs.memory_bytes(options) <= self.memory_bytes

    def uniform(self, option: Option) -> Options:
        """Return the plan with this option wherever the keeps and ties let it, else the nearest."""
        chosen = [min(options, key=precision_rank) for options in self.allowed]
        for group in tied_groups(self.costs.layers):
            allowed = [self.allowed[index] for index in group]
            has_16_bit = all(any(o != FP32 for o in options) for options in allowed)
            for index in group:
                if all(option in options for options in allowed):
                    chosen[index] = option
                elif has_16_bit:  # a tie follows the layer that is kept in 16 bits
                    others = (o for o in self.allowed[index] if o != FP32)
                    chosen[index] = min(others, key=precision_rank)
        return self.follow_uncalled(tuple(chosen))

    def with_choices(self, options: Options, chosen: Iterable[tuple[Group, Options]]) -> Options:
        """Return a plan with these choices of groups in it."""
        plan = list(options)
        for group, choice in chosen:
            for index, option in zip(group.layers, choice, strict=True):
                plan[index] = option
        return tuple(plan)

    def with_fastest(self, options: Options, groups: Iterable[Group]) -> Options:
        """Return a plan with these groups in the fastest of their choices."""

        def fastest(group: Group) -> Options:
            return min(group.choices, key=lambda c: item_of(self.costs, group.layers, c).ms)

        return self.with_choices(options, ((group, fastest(group)) for group in groups))

    @cached_property
    def uniform_plans(self) -> tuple[Options, Options]:
        """The plans nearest to FP32 and to BF16 O2 throughout."""
        return self.uniform(FP32), self.uniform(BF16_O2)

    def follow_uncalled(self, options: Options) -> Options:
        """Return the plan with the layers that the step did not call as the others' activations."""
        called = [o for layer, o in zip(self.costs.layers, options, strict=True) if layer.calls]
        followed = FP32 if is_all_fp32(called) else BF16_O2
        return tuple(
            followed if index in self.followers and followed in self.allowed[index] else option
            for index, option in enumerate(options)
        )

    @cached_property
    def followers(self) -> frozenset[int]:
        """The layers that are not called, not kept and not tied."""
        layers = self.costs.layers
        alone = (group[0] for group in tied_groups(layers) if len(group) == 1)
        return frozenset(
            i for i in alone if not layers[i].calls and layers[i].name not in self.keeps.of_layer
        )

    @cached_property
    def knapsack(self) -> Knapsack:
        """The choice among the plans that have a 16-bit layer."""
        costs = self.costs
        outside, fsdp = costs.outside_bf16, costs.communication
        return Knapsack(
            [[item_of(costs, group.layers, c) for c in group.choices] for group in self.groups],
            Outside(
                ms=outside.ms - (fsdp.exposed_ms if fsdp else 0.0),
                grad_error=outside.grad_error + self.loose_error,
                memory=outside.memory_bytes,
                hidable_ms=fsdp.moved_ms - fsdp.share * fsdp.between_ms if fsdp else 0.0,
            ),
            memory=math.inf if self.memory_bytes is None else self.memory_bytes,
        )

    @cached_property
    def loose_error(self) -> float:
        """What islands cost that no group holds: they cannot be in FP32 as a whole."""
        held = [set(group.layers) for group in self.groups]
        islands = self.costs.islands
        return math.fsum(e for at, e in islands if not any(set(at) <= group for group in held))

    @property
    def fp32_plan(self) -> Options | None:
        """The all-FP32 plan, where the keeps and the memory limit leave it."""
        plan = (FP32,) * len(self.allowed)
        is_allowed = all(FP32 in options for options in self.allowed)
        return plan if is_allowed and self.fits_memory(plan) else None


def make_problem(costs: Costs, constraint: Constraint) -> Problem:
    """Return the choices that the keeps and the memory limit leave.

    Raises:
        RecordError: a keep matches no layer.
        InfeasibleError: keeps contradict each other or a tie, or no matched layer can take one.
    """
    keeps = match_keeps(constraint.keep, costs.layers, partial(_price_refusal, costs))
    allowed = []
    for layer, prices in zip(costs.layers, costs.prices, strict=True):
        keep, is_locked = keeps.of_layer.get(layer.name), layer.name in costs.locks
        allowed.append(
            tuple(o for o in prices if (keep.allows(o) if keep else not (o.is_fp8 and is_locked)))
        )
    problem = Problem(costs, keeps, tuple(allowed), constraint.memory_bytes)
    groups = (_group(problem, layers) for layers in _bound(problem))
    return replace(problem, groups=tuple(groups))


def _price_refusal(costs: Costs, keep: Keep, index: int) -> str:
    """Return the reason that a layer has no price in what it is kept in; "" where it has one."""
    if any(keep.allows(option) for option in costs.prices[index]):
        return ""
    missing = next((w for option, w in costs.missing[index].items() if keep.allows(option)), "")
    return (
        missing
        or costs.layers[index].refusal(keep.precision)
        or "it was neither timed nor measured in it"
    )


def tied_groups(layers: Sequence[LayerSpec]) -> list[tuple[int, ...]]:
    """Return the indices of layers that share a parameter; a layer alone is a group of one."""
    root: dict[str, str] = {}
    for layer in layers:
        owner = layer.tied_to or layer.name
        root[layer.name] = root.get(owner, owner)
    groups = grouped((root[layer.name], index) for index, layer in enumerate(layers))
    return [tuple(group) for group in groups.values()]


def _bound(problem: Problem) -> list[tuple[int, ...]]:
    """Return the indices of layers that are FP32 or 16-bit together: ties, joined by islands.

    An island is left out where keeps allow it neither way.
    """
    groups = tied_groups(problem.costs.layers)
    for island, _ in problem.costs.islands:
        met = [group for group in groups if set(group) & set(island)]
        joined = tuple(sorted(index for group in met for index in group))
        options = [problem.allowed[index] for index in joined]
        has_fp32 = all(FP32 in allowed for allowed in options)
        if has_fp32 or all(any(o != FP32 for o in allowed) for allowed in options):
            groups = [group for group in groups if group not in met] + [joined]
    return sorted(groups)


def exact(problem: Problem, budget: float) -> tuple[Options, float] | None:
    """Return the plan of least time to loss within a budget of gradient error by the table.

    With it comes the proven bound of the counted step time of any plan within the budget.
    """
    found = problem.knapsack.soonest(budget)
    plans = [] if found is None else [(_options(problem, found[0]), found[1])]
    if (fp32 := problem.fp32_plan) is not None:
        plans.append((fp32, problem.costs.counted_ms(fp32)))
    if not plans:
        return None
    options = min((plan for plan, _ in plans), key=problem.rank)
    return options, max(min(bound for _, bound in plans), 0.0)


def front(problem: Problem, budget: float = math.inf) -> tuple[Options, ...]:
    """Return plans of the Pareto front of step time and gradient error, by increasing error.

    In a large model they are more dense around the budget.

    Raises:
        InfeasibleError: no plan at all satisfies the keeps and the memory limit.
    """
    plans = [_options(problem, point) for point in problem.knapsack.front(near=budget)]
    if (fp32 := problem.fp32_plan) is not None:
        plans.append(fp32)
    if not plans:
        raise InfeasibleError(_nothing_fits(problem))
    costs = problem.costs
    return tuple(unbeaten(plans, lambda plan: (costs.grad_error(plan), costs.counted_ms(plan))))


def _options(problem: Problem, solution: Solution) -> Options:
    picks = zip(problem.groups, solution.picks, strict=True)
    chosen = ((group, group.choices[pick]) for group, pick in picks)
    return problem.with_choices((FP32,) * len(problem.allowed), chosen)


def item_of(costs: Costs, layers: Sequence[int], choice: Options) -> Item:
    """Return the cost of a choice for these layers, beside BF16 activations."""
    prices = [costs.prices[index][o] for index, o in zip(layers, choice, strict=True)]
    chosen = dict(zip(layers, choice, strict=True))
    share = costs.communication.share if costs.communication else 0.0
    return Item(
        ms=math.fsum(price.counted_ms for price in prices),
        grad_error=math.fsum((costs.island_error(chosen), *(p.grad_error for p in prices))),
        memory=float(sum(price.memory_bytes for price in prices)),
        is_16_bit=not is_all_fp32(choice) and any(costs.layers[index].calls for index in layers),
        hiding_ms=share * math.fsum(price.compute_ms + price.boundary_ms for price in prices),
    )


def wide_groups(problem: Problem) -> tuple[Group, ...]:
    """Return the groups with all that could win if the table of errors were wrong.

    Of a single layer all options that save time against each more precise precision.
    """
    costs, has_limit = problem.costs, problem.memory_bytes is not None

    def could_win(index: int, option: Option) -> bool:
        own, prices = precision_rank(option), costs.prices[index]
        higher = [o for o in problem.allowed[index] if precision_rank(o) < own and o != FP32]
        return has_limit or all(is_faster(prices[option], prices[o]) for o in higher)

    groups = []
    for group in problem.groups:
        index, is_open = group.layers[0], len(group.layers) == 1 and len(group.choices) > 1
        own = problem.allowed[index] if is_open else ()
        more = ((option,) for option in own if could_win(index, option))
        groups.append(Group(group.layers, tuple(dict.fromkeys((*group.choices, *more)))))
    return tuple(groups)


def _group(problem: Problem, layers: tuple[int, ...]) -> Group:
    """Return the group of these layers, its choices without those that cannot win."""
    costs, allowed = problem.costs, problem.allowed
    if layers[0] in problem.followers and BF16_O2 in allowed[layers[0]]:
        return Group(layers, ((BF16_O2,),))

    def cost(choice: Options) -> tuple[float, ...]:
        item = item_of(costs, layers[: len(choice)], choice)
        return item[:2] if problem.memory_bytes is None else item[:3]

    choices: list[Options] = []
    for is_16_bit in (False, True):
        combined: list[Options] = [()]
        for index in layers:
            same = [option for option in allowed[index] if (option != FP32) == is_16_bit]
            options = _worthwhile(same, costs.prices[index], problem.memory_bytes is not None)
            combined = [(*before, option) for before in combined for option in options]
            if len(layers) > 1:  # alone, the worthwhile options are the choices
                combined = unbeaten(combined, cost)
        choices += combined
    if not choices:
        names = ", ".join(repr(costs.layers[index].name) for index in layers)
        raise InfeasibleError(
            f"layers that share a parameter are all FP32 or all 16-bit, but {names} have no "
            "such choice in common; change their --keep"
        )
    return Group(layers, tuple(choices))


def _worthwhile(
    options: Sequence[Option], prices: Mapping[Option, Price], has_limit: bool
) -> list[Option]:
    """Return the options that beat every more precise one in time, or in bytes if limited."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (precision_rank(o), prices[o].grad_error)):
        own = prices[option]
        as_fast = [k for k in kept if not is_faster(own, prices[k])]
        if not any(prices[k].memory_bytes <= own.memory_bytes or not has_limit for k in as_fast):
            kept.append(option)
    return kept


def is_faster(own: Price, other: Price) -> bool:
    """Whether an option is faster than a more precise one by more than two runs may differ."""
    return own.counted_ms * (1.0 + NEAR_TIE) < other.counted_ms


def _nothing_fits(problem: Problem) -> str:
    least = sum(min(p.memory_bytes for p in prices.values()) for prices in problem.costs.prices)
    need = least + problem.costs.outside_bf16.memory_bytes
    return (
        f"a plan must fit in {shown_bytes(problem.memory_bytes or 0)}, but the smallest needs "
        f"{shown_bytes(need)}; raise --memory or keep fewer layers in FP32"
    )
