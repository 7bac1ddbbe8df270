"""Prices, keeps and ties -> what there is to choose, and the exact answer to it.

A unit is one layer, or the layers that share a parameter and hence one storage: each combination of
their options that is FP32 throughout or 16-bit throughout is one item. Options that cannot win in
time are locked: an FP8 option that takes no less time than BF16, or than another of less e, is left
out, whatever noise says about its e. BF16 that is slower than FP32 stays: one such layer may be
what lets all others have a BF16 flow. Layers that the step did not call follow the flow.

The all-FP32 plan has a flow of its own and stands beside the knapsack of the BF16 flow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from autoprec.errors import InfeasibleError
from autoprec.records import (
    BF16_O2,
    FP32,
    Constraint,
    FrontPoint,
    LayerSpec,
    Option,
    Precision,
)
from autoprec.search.costs import Costs, Price
from autoprec.search.keep import Keep, Keeps, match_keeps
from autoprec.search.solver import Item, Knapsack, Outside, Solution

GENTLENESS = {Precision.FP32: 0, Precision.BF16_O2: 1, Precision.FP8_O1: 2}

Options = tuple[Option, ...]


@dataclass(frozen=True)
class Unit:
    """Layers chosen together (by index), and the combinations of options they may take."""

    layers: tuple[int, ...]
    choices: tuple[Options, ...]


@dataclass(frozen=True)
class Problem:
    """What there is to choose. `allowed` are each layer's options by the keeps, locked or not."""

    costs: Costs
    keeps: Keeps
    allowed: tuple[Options, ...]
    units: tuple[Unit, ...]
    memory_bytes: int | None

    @property
    def can_be_fp32(self) -> bool:
        """Whether every layer may be FP32."""
        return all(FP32 in options for options in self.allowed)

    def point(self, options: Options, *, grad_error_measured: float | None = None) -> FrontPoint:
        """Return a plan with what the tables say of it."""
        return FrontPoint(
            options=options,
            step_ms=self.costs.step_ms(options),
            grad_error=self.costs.grad_error(options),
            grad_error_measured=grad_error_measured,
            memory_bytes=self.costs.memory_bytes(options),
        )

    def fits_memory(self, options: Options) -> bool:
        """Whether a plan needs no more bytes than are allowed."""
        return self.memory_bytes is None or self.costs.memory_bytes(options) <= self.memory_bytes

    def uniform(self, option: Option) -> Options:
        """Return the plan with this option wherever the keeps and ties let it, else the nearest."""
        chosen = list(map(self._first_allowed, range(len(self.allowed))))
        for group in tied_groups(self.costs.layers):
            wanted = option if all(option in self.allowed[i] for i in group) else None
            for index in group:
                if wanted is not None:
                    chosen[index] = wanted
                elif option.precision is not Precision.FP32:
                    chosen[index] = self._gentlest_16_bit(index, group) or chosen[index]
        return self.settle(tuple(chosen))

    def settle(self, options: Options) -> Options:
        """Return the plan with the layers that the step did not call in the plan's flow."""
        called = [o for layer, o in zip(self.costs.layers, options, strict=True) if layer.calls]
        flow = FP32 if all(option == FP32 for option in called) else BF16_O2
        return tuple(
            flow if index in self.followers and flow in self.allowed[index] else option
            for index, option in enumerate(options)
        )

    def rank(self, options: Options) -> tuple[float, float]:
        """Return the sort key of a plan by the table: its time to loss, then its error."""
        grad_error = self.costs.grad_error(options)
        return self.costs.step_ms(options) * (1.0 + grad_error), grad_error

    @cached_property
    def knapsack(self) -> Knapsack:
        """The choice among the plans that have a 16-bit layer."""
        outside, fsdp = self.costs.bf16_flow, self.costs.communication
        return Knapsack(
            [[_item(self.costs, unit, choice) for choice in unit.choices] for unit in self.units],
            Outside(
                ms=outside.ms - (fsdp.exposed_ms if fsdp else 0.0),
                grad_error=outside.grad_error,
                memory=outside.memory_bytes,
                hidable_ms=fsdp.moved_ms - fsdp.share * fsdp.between_ms if fsdp else 0.0,
            ),
            memory=math.inf if self.memory_bytes is None else self.memory_bytes,
        )

    @cached_property
    def followers(self) -> frozenset[int]:
        """The layers that just take the flow's precision: not called, not kept, not tied."""
        return frozenset(
            unit.layers[0]
            for unit in self.units
            if len(unit.layers) == 1
            and not self.costs.layers[unit.layers[0]].calls
            and self.costs.layers[unit.layers[0]].name not in self.keeps.of_layer
        )

    def _first_allowed(self, index: int) -> Option:
        return min(self.allowed[index], key=lambda option: GENTLENESS[option.precision])

    def _gentlest_16_bit(self, index: int, group: Sequence[int]) -> Option | None:
        """Return a layer's gentlest 16-bit option, if all layers of its group have one."""
        if any(all(option == FP32 for option in self.allowed[i]) for i in group):
            return None
        halves = [option for option in self.allowed[index] if option != FP32]
        return min(halves, key=lambda option: GENTLENESS[option.precision])


def make_problem(costs: Costs, constraint: Constraint) -> Problem:
    """Return what there is to choose under the keeps and the memory limit.

    Raises:
        RecordError: a keep matches no layer.
        InfeasibleError: keeps contradict each other or a tie, or no matched layer can take one.
    """
    found = match_keeps(constraint.keep, costs.layers, partial(_price_refusal, costs))
    keeps = found.of_layer
    allowed = tuple(
        tuple(o for o in prices if _is_allowed(o, layer, keeps.get(layer.name), costs))
        for layer, prices in zip(costs.layers, costs.prices, strict=True)
    )
    has_limit = constraint.memory_bytes is not None
    units = tuple(
        _make_unit(group, costs, allowed, keeps, has_limit=has_limit)
        for group in tied_groups(costs.layers)
    )
    return Problem(costs, found, allowed, units, constraint.memory_bytes)


def _price_refusal(costs: Costs, keep: Keep, index: int) -> str:
    """Return why a layer has no price in what it is kept in; "" where it has one."""
    if any(keep.allows(option) for option in costs.prices[index]):
        return ""
    missing = next((w for option, w in costs.missing[index].items() if keep.allows(option)), "")
    return (
        missing
        or costs.layers[index].refusal(keep.precision)
        or "it was neither timed nor measured in it"
    )


def _is_allowed(option: Option, layer: LayerSpec, keep: Keep | None, costs: Costs) -> bool:
    """Whether a layer may take an option: as it is kept, else as it is locked."""
    if keep is not None:
        return keep.allows(option)
    return not (option.is_fp8 and layer.name in costs.locks)


def tied_groups(layers: Sequence[LayerSpec]) -> list[tuple[int, ...]]:
    """Return the indices of layers that share a parameter; a layer alone is a group of one."""
    root: dict[str, str] = {}
    groups: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        owner = layer.tied_to or layer.name
        root[layer.name] = root.get(owner, owner)
        groups.setdefault(root[layer.name], []).append(index)
    return [tuple(group) for group in groups.values()]


def exact(problem: Problem, budget: float) -> tuple[Options, float] | None:
    """Return the plan of least time to loss within a budget of gradient error by the table.

    With it comes the proven bound of the step time of any plan within the budget.
    """
    costs = problem.costs
    found = problem.knapsack.soonest(budget)
    plans = [] if found is None else [(_options(problem, found[0]), found[1])]
    fp32 = _fp32_plan(problem)
    if fp32 is not None:
        plans.append((fp32, costs.step_ms(fp32)))
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
    fp32 = _fp32_plan(problem)
    if fp32 is not None:
        plans.append(fp32)
    if not plans:
        raise InfeasibleError(_nothing_fits(problem))
    costs = problem.costs
    kept: list[Options] = []
    for plan in sorted(plans, key=lambda plan: (costs.grad_error(plan), costs.step_ms(plan))):
        if not kept or costs.step_ms(plan) < costs.step_ms(kept[-1]):
            kept.append(plan)
    return tuple(kept)


def _fp32_plan(problem: Problem) -> Options | None:
    if not problem.can_be_fp32:
        return None
    plan = (FP32,) * len(problem.allowed)
    return plan if problem.fits_memory(plan) else None


def _item(costs: Costs, unit: Unit, choice: Options) -> Item:
    prices = [costs.prices[index][o] for index, o in zip(unit.layers, choice, strict=True)]
    share = costs.communication.share if costs.communication else 0.0
    is_called = any(costs.layers[index].calls for index in unit.layers)
    return Item(
        ms=math.fsum(price.flow_ms for price in prices),
        grad_error=math.fsum(price.grad_error for price in prices),
        memory=float(sum(price.memory_bytes for price in prices)),
        is_16_bit=is_called and any(option != FP32 for option in choice),
        hiding_ms=share * math.fsum(price.compute_ms + price.boundary_ms for price in prices),
    )


def _options(problem: Problem, solution: Solution) -> Options:
    chosen: dict[int, Option] = {}
    for unit, pick in zip(problem.units, solution.picks, strict=True):
        chosen.update(zip(unit.layers, unit.choices[pick], strict=True))
    return tuple(chosen[index] for index in range(len(problem.allowed)))


def _make_unit(
    group: tuple[int, ...],
    costs: Costs,
    allowed: Sequence[Options],
    keeps: Mapping[str, Keep],
    *,
    has_limit: bool,
) -> Unit:
    if len(group) == 1:
        return _single_unit(group[0], costs, allowed[group[0]], keeps, has_limit=has_limit)
    choices: list[Options] = []
    for is_half in (False, True):
        combined: list[Options] = [()]
        for index in group:
            same = [option for option in allowed[index] if (option != FP32) == is_half]
            options = unlocked(same, costs.prices[index], has_limit=has_limit)
            combined = [(*before, option) for before in combined for option in options]
            combined = _best_combinations(combined, group, costs, has_limit=has_limit)
        choices += combined
    if not choices:
        names = ", ".join(repr(costs.layers[index].name) for index in group)
        raise InfeasibleError(
            f"layers that share a parameter are all FP32 or all 16-bit, but {names} have no such "
            "choice in common; change their --keep"
        )
    return Unit(group, tuple(choices))


def _single_unit(
    index: int,
    costs: Costs,
    allowed: Options,
    keeps: Mapping[str, Keep],
    *,
    has_limit: bool,
) -> Unit:
    layer = costs.layers[index]
    if not layer.calls and layer.name not in keeps and BF16_O2 in allowed:
        return Unit((index,), ((BF16_O2,),))
    options = unlocked(allowed, costs.prices[index], has_limit=has_limit)
    return Unit((index,), tuple((option,) for option in options))


def unlocked(
    options: Sequence[Option], prices: Mapping[Option, Price], *, has_limit: bool
) -> list[Option]:
    """Return the options; of the 16-bit ones those that beat every gentler one in time or bytes."""
    kept = [option for option in options if option == FP32]
    halves: list[Option] = []
    for option in sorted(options, key=lambda o: (GENTLENESS[o.precision], prices[o].grad_error)):
        beaten = any(_as_good(prices[k], prices[option], has_limit=has_limit) for k in halves)
        if option != FP32 and not beaten:
            halves.append(option)
    return kept + halves


def _as_good(gentler: Price, price: Price, *, has_limit: bool) -> bool:
    saves_bytes = has_limit and price.memory_bytes < gentler.memory_bytes
    return gentler.flow_ms <= price.flow_ms and not saves_bytes


def _best_combinations(
    combined: Sequence[Options], group: tuple[int, ...], costs: Costs, *, has_limit: bool
) -> list[Options]:
    """Drop combinations of tied layers that another beats in time, e and (under a limit) bytes."""
    items = [(_item(costs, Unit(group[: len(choice)], ()), choice), choice) for choice in combined]
    kept: list[tuple[Item, Options]] = []
    for item, choice in sorted(items, key=lambda pair: pair[0][:3]):
        if not any(
            other.grad_error <= item.grad_error and (not has_limit or other.memory <= item.memory)
            for other, _ in kept
        ):
            kept.append((item, choice))
    return [choice for _, choice in kept]


def _nothing_fits(problem: Problem) -> str:
    least = sum(min(p.memory_bytes for p in prices.values()) for prices in problem.costs.prices)
    need = least + problem.costs.bf16_flow.memory_bytes
    return (
        f"a plan must fit in {problem.memory_bytes} bytes, but the smallest needs about {need}; "
        "allow more memory or keep fewer layers in FP32"
    )
