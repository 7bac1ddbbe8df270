"""A plan for a large model -> the plan for its proxy whose proof stands for it. No torch.

The inverse of `transfer`. There layer j of the model takes its gradient error from layer i of the
proxy with the weight w_ji of relative depth (`family.depth_weights`); here it votes with that
weight for its own option at i:

    votes_i(option) = sum of w_ji over the layers j of the role that have the option

and layer i takes the option with most votes, of equals the one with more error. So much is how the
plan looks. How much it hurts is the sum of gradient errors, and a proof is worth something only
where no less was tried than is claimed: while the proxy's own table gives the carried plan less
than the transferred one gives the plan, one more layer takes an option of more error, first where
votes are for it (most votes first), then one that the plan has elsewhere (least error first).

Layers that share a parameter share its storage: where one of them is 16-bit, all are.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from autoprec.predict.family import depth_weights, find_places
from autoprec.records.model import BF16_O2, FP32, Basis, LayerSpec, ModelSpec, Option
from autoprec.records.plan import Assignment, Plan
from autoprec.records.sensitivity import Sensitivity
from autoprec.records.verification import ROUNDING

Votes = Mapping[str, Mapping[Option, float]]  # of the proxy's layers, by name


def carry_plan(plan: Plan, proxy: ModelSpec, sensitivity: Sensitivity) -> Plan:
    """Return the plan for a proxy, by its own sensitivity, that stands for a larger model's."""
    between = plan.fp32_outputs or plan.is_fp32
    table = _Table(proxy, sensitivity if between else sensitivity.without_fp32_between())
    votes = _votes(plan, proxy)
    chosen = {layer.name: _most_voted(layer, votes, table, plan) for layer in proxy.layers}
    chosen = _share_storage(chosen, proxy)
    wanted = (plan.grad_error or 0.0) * (1.0 - ROUNDING)
    while table.grad_error(chosen) < wanted:
        changes = list(_changes(chosen, votes, table, plan))
        if not changes:
            break  # as much as the proxy can; the record holds both errors
        _, name, option = max(changes, key=lambda change: change[0])
        chosen = _share_storage({**chosen, name: option}, proxy)
    return _carried(plan, proxy, chosen, votes, table)


class _Table:
    """The proxy's gradient error, as plans count it, by layer and option and of assignments."""

    def __init__(self, proxy: ModelSpec, sensitivity: Sensitivity) -> None:
        self.options = {layer.name: layer.options for layer in proxy.layers}
        self.activations = sensitivity.error_without_islands
        self._rows = {r.cell: r.counted_error for r in sensitivity.rows}

    def error(self, name: str, option: Option) -> float:
        return self._rows.get((name, option), 0.0)

    def can_take(self, name: str, option: Option) -> bool:
        """Whether the option is measured there, or has no error to measure."""
        if option.is_fp8:
            return (name, option) in self._rows
        return option in self.options[name]

    def grad_error(self, chosen: Mapping[str, Option]) -> float:
        layers = math.fsum(self.error(name, option) for name, option in chosen.items())
        is_fp32 = all(option == FP32 for option in chosen.values())
        return layers if is_fp32 else layers + self.activations


def _votes(plan: Plan, proxy: ModelSpec) -> Votes:
    """Return the share of the plan's layers, by weight, for each option at each proxy layer."""
    found: dict[str, dict[Option, float]] = defaultdict(lambda: defaultdict(float))
    places = find_places((layer.name for layer in plan.layers), proxy.names)
    for layer in plan.layers:
        if place := places.get(layer.name):
            weights = depth_weights(place.index, place.count, len(place.peers))
            for at, weight in weights.items():
                found[place.peers[at]][layer.option] += weight
    wholes = {name: math.fsum(own.values()) for name, own in found.items()}
    return {name: {o: n / wholes[name] for o, n in own.items()} for name, own in found.items()}


def _most_voted(layer: LayerSpec, votes: Votes, table: _Table, plan: Plan) -> Option:
    """Return a layer's option by votes; without any it follows the activations' dtype."""
    options = {o: n for o, n in votes.get(layer.name, {}).items() if table.can_take(layer.name, o)}
    if options:
        return max(options, key=lambda o: (options[o], table.error(layer.name, o), o.key))
    return FP32 if plan.is_fp32 or BF16_O2 not in layer.options else BF16_O2


def _changes(
    chosen: Mapping[str, Option], votes: Votes, table: _Table, plan: Plan
) -> Iterator[tuple[tuple[float, float], str, Option]]:
    """Yield every change of one layer to an option of the plan that has more error there.

    Before it is how good it is: the share of votes for it, then how little error it adds.
    """
    for name, old in chosen.items():
        own = votes.get(name, {})
        for option in dict.fromkeys((*own, *plan.options)):
            added = table.error(name, option) - table.error(name, old)
            if added > 0.0 and table.can_take(name, option):
                yield (own.get(option, 0.0), -added), name, option


def _share_storage(chosen: Mapping[str, Option], proxy: ModelSpec) -> dict[str, Option]:
    """Return the options with tied layers all FP32 or all 16-bit."""
    owners = {layer.name: layer.tied_to or layer.name for layer in proxy.layers}
    is_16_bit = {owners[name] for name, option in chosen.items() if option != FP32}
    tied = {owner for name, owner in owners.items() if name != owner}
    return {
        name: BF16_O2 if option == FP32 and owners[name] in tied & is_16_bit else option
        for name, option in chosen.items()
    }


def _carried(
    plan: Plan, proxy: ModelSpec, chosen: Mapping[str, Option], votes: Votes, table: _Table
) -> Plan:
    made = plan.fingerprint.model_copy(
        update={
            "structure": proxy.structure,
            "tokens_per_step": proxy.tokens_per_step,
            "parallel": "",
            "time_basis": Basis.PREDICTED,  # no time of the proxy is a time of the model
            "sensitivity_basis": Basis.MEASURED,
        }
    )
    note = f"this plan stands for that of a larger model ({plan.fingerprint.structure}) in a proof"
    uncovered = tuple(parameter.name for parameter in proxy.uncovered)
    kept = () if set(plan.uncovered).isdisjoint(plan.fp32_outputs) else uncovered
    if {layer.name for layer in plan.layers}.issubset(plan.fp32_outputs):
        kept = (*proxy.names, *uncovered)
    return Plan(
        layers=tuple(
            _assignment(layer, chosen[layer.name], votes, table) for layer in proxy.layers
        ),
        uncovered=uncovered,
        fp32_outputs=kept,
        constraint=plan.constraint.model_copy(update={"keep": (), "memory_bytes": None}),
        fingerprint=made,
        grad_error=table.grad_error(chosen),
        grad_error_basis=Basis.PREDICTED,
        predicted=None,
        notes=(note,),
    )


def _assignment(layer: LayerSpec, option: Option, votes: Votes, table: _Table) -> Assignment:
    own = votes.get(layer.name, {})
    shares = ", ".join(f"{100 * n:.0f} % {o}" for o, n in own.items())
    return Assignment.of(
        layer,
        option,
        basis=Basis.PREDICTED,
        grad_error=table.error(layer.name, option),
        reason=f"the model's layers at its place: {shares}" if own else "no layer of the model",
    )
