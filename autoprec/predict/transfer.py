"""A small model's sensitivity -> a large model's, or what to do where there is none. No torch.

Transferred: a layer takes its gradient error from the layers of the small model that do the same
thing at the same relative depth (`family`), geometrically between two. The first and the last of a
role keep their own; the total of those between (of a stage, of all) is kept and spread over more
layers: the residual stream is longer, and each layer's share of it smaller. The loss
curve and the activations' error are the small model's. docs/transfer.md says what of this holds
over widths and depths, and how a small model has to be built for it.

Unknown: every gradient error is 0 and labelled `unknown`, and what DeepSeek-V3 keeps out of FP8
(embedding, output head, norms, MoE gates: arXiv 2412.19437, section 3.3.1) stays out of it; of
these only linears, so head and gates, could run in FP8 at all.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from autoprec.common.grouping import grouped
from autoprec.common.text import first_and_more, percent
from autoprec.errors import RecordError
from autoprec.model.roles import Role, role_of
from autoprec.predict.family import (
    ENDS,
    Place,
    depth_weights,
    find_places,
    lack_grad_weight,
    role_in_block,
)
from autoprec.records.model import FP32, Basis, LayerKind, LayerSpec, ModelSpec, Option
from autoprec.records.sensitivity import Estimate, Island, LayerSensitivity, Sensitivity

ROUTER_NAMES = frozenset(("router", "gating", "gate_network", "router_proj", "wg"))
ROUTER_NARROWING = 4  # a `gate` with fewer outputs than a quarter of its inputs picks experts
SOURCE = "DeepSeek-V3's list, arXiv 2412.19437, section 3.3.1"
ZERO = Estimate(mean=0.0)
MOST_NAMED = 5


def transfer_sensitivity(small: Sensitivity, spec: ModelSpec) -> Sensitivity:
    """Return the sensitivity of a model by that of a smaller one of its family.

    Raises:
        RecordError: no layer has a counterpart, or none of those that could run in FP8; or most of
            those have grad_weight in BF16 there.
    """
    table = {row.cell: row for row in small.rows}
    places = find_places(spec.names, (name for name, _ in table))
    _check_tokens(small, spec, places)
    # A layer without a counterpart is unknown, and so out of FP8.
    rows: list[LayerSensitivity] = []
    unmatched: list[str] = []
    for layer in spec.layers:
        place = places.get(layer.name)
        found = _transferred(layer, table, place) if place else []
        unmatched += [] if found else [layer.name]
        rows += found or [_unknown(layer.name, o) for o in layer.options if not o.is_fp8]
    own_fp8 = any(layer.takes_fp8 for layer in spec.layers)
    found_fp8 = any(row.option.is_fp8 for row in rows)
    if len(unmatched) == len(spec.layers) or (own_fp8 and not found_fp8):
        raise RecordError(_no_family(small, spec))
    return small.model_copy(
        update={
            "structure": spec.structure,
            "method": "transferred",
            "passes": 0,
            "step_equivalents": 0.0,
            "rows": tuple(row for row in rows if row.option != FP32),
            "activation_error": Estimate(mean=small.error_without_islands),
            "islands": tuple(_islands(small, spec)),
            "statistics": (),
            "joint": (),
            "schedule_steps": None,  # the small model's
            "notes": tuple(_transfer_notes(small, unmatched)),
        }
    )


def _check_tokens(small: Sensitivity, spec: ModelSpec, places: Mapping[str, Place]) -> None:
    """Refuse a table that was measured on batches whose tokens keep grad_weight out of FP8."""
    options = grouped((row.name, row.option) for row in small.rows)
    able = [x for x in spec.layers if x.name in places and x.takes_fp8]
    theirs = [[o for name in places[x.name].peers for o in options[name]] for x in able]
    lost = sum(x.numel for x, o in zip(able, theirs, strict=True) if lack_grad_weight(x, o))
    total = sum(layer.numel for layer in able)
    if lost > total / 2:
        raise RecordError(
            "a sensitivity of another model must be of FP8 as this one runs it, but of "
            f"{percent(lost / total)} of the weights that could it has grad_weight in BF16, as the "
            "tokens of its batches are no multiple of 16; measure it on batches that are"
        )


def _islands(small: Sensitivity, spec: ModelSpec) -> Iterator[Island]:
    """Yield the island outside of layers; which layers others are in the model, nobody knows."""
    outside = tuple(parameter.name for parameter in spec.uncovered)
    outputs = (*spec.names, *outside) if small.is_fp32_between else outside
    for island in small.islands if outputs else ():
        if island not in small.layer_islands:
            yield island.model_copy(update={"outputs": outputs})


def unknown_sensitivity(spec: ModelSpec) -> Sensitivity:
    """Return the sensitivity of a model of which nothing was measured."""
    # Every cost is 0: the plan is chosen by time, and `default_locks` keeps the delicate out.
    rows = [_unknown(layer.name, o) for layer in spec.layers for o in layer.options if o != FP32]
    return Sensitivity(
        structure=spec.structure,
        reference=FP32,
        method="unknown",
        preconditioner="unknown",
        batches=0,
        passes=0,
        step_equivalents=0.0,
        warmup_steps=0,
        checkpoint="",
        seed=0,
        rows=tuple(rows),
        activation_error=ZERO,
        floor=ZERO,
        statistics=(),
        joint=(),
        loss_curve=(),
        software={},
        notes=tuple(_unknown_notes(spec)),
    )


def sensitivity_basis(sensitivity: Sensitivity) -> Basis:
    """Return the basis of a sensitivity: the weakest that most of its rows have."""
    bases = {row.basis for row in sensitivity.rows}
    if bases == {Basis.UNKNOWN}:
        return Basis.UNKNOWN
    return Basis.TRANSFERRED if Basis.TRANSFERRED in bases else Basis.MEASURED


def default_locks(layers: Sequence[LayerSpec]) -> dict[str, str]:
    """Return the linears to keep out of FP8 while nothing is known of them, and why."""
    called = [layer for layer in layers if layer.kind is LayerKind.LINEAR and layer.calls]
    embeddings = {layer.name for layer in layers if layer.kind is LayerKind.EMBEDDING}
    rest = f"stays out of FP8 while its gradient error is unknown ({SOURCE})"
    locks: dict[str, str] = {}
    for layer in called:
        is_head = role_of(layer) is Role.HEAD or layer.tied_to in embeddings or layer is called[-1]
        if is_head or _is_router(layer):
            locks[layer.name] = f"{'the output head' if is_head else 'a router'} {rest}"
    return locks


def _is_router(layer: LayerSpec) -> bool:
    last, gemm = layer.name.lower().rpartition(".")[2], layer.gemm
    is_narrow = gemm is not None and gemm.N * ROUTER_NARROWING < gemm.K
    return last in ROUTER_NAMES or (last == "gate" and is_narrow)


def _unknown(name: str, option: Option) -> LayerSensitivity:
    return LayerSensitivity(name=name, option=option, grad_error=ZERO, basis=Basis.UNKNOWN)


def _transferred(
    layer: LayerSpec, table: dict[tuple[str, Option], LayerSensitivity], place: Place
) -> list[LayerSensitivity]:
    """Return the rows of a layer by its peers', one for each option that one of them has."""
    same = [[table[n, o] for n in place.peers if (n, o) in table] for o in layer.options]
    return [_share(layer.name, rows, place) for rows in same if rows]


def _share(name: str, rows: Sequence[LayerSensitivity], place: Place) -> LayerSensitivity:
    """Return a role's row at a place, by its peers' rows."""
    errors = [max(row.grad_error.mean, 0.0) for row in rows]
    index, count = place.index, place.count
    places, peers = _alike(place, len(rows))
    total = math.fsum(errors[at] for at in peers)
    reached = math.fsum(_between(errors, at, count) for at in places)
    scale = total / reached if reached > 0.0 else 1.0
    weights = depth_weights(index, count, len(rows))
    known = [error for at in weights if (error := rows[at].grad_error.stderr) is not None]
    stderr = scale * max(known) if len(known) == len(weights) else None
    return LayerSensitivity(
        name=name,
        option=rows[0].option,
        grad_error=Estimate(mean=scale * _between(errors, index, count), stderr=stderr),
        basis=Basis.TRANSFERRED,
        staying=scale * math.fsum(share * rows[at].staying for at, share in weights.items()),
    )


def _alike(place: Place, peers: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the places like this one, and the peers like it, whose total these places share.

    The first and the last are like nothing else, where there are others; a stage's are no ends.
    """
    index, count = place.index, place.count
    if place.is_staged or min(count, peers) < ENDS + 1:
        return range(count), range(peers)
    if index in (0, count - 1):
        return [index], [0 if index == 0 else peers - 1]
    return range(1, count - 1), range(1, peers - 1)


def _between(errors: Sequence[float], index: int, count: int) -> float:
    """Return the error at a depth by those of the nearest peers: it changes by factors there."""
    shares = [(w, errors[at]) for at, w in depth_weights(index, count, len(errors)).items()]
    if len(shares) == 1 or any(error == 0.0 for _, error in shares):
        return math.fsum(share * error for share, error in shares)
    return math.exp(math.fsum(share * math.log(error) for share, error in shares))


def _transfer_notes(small: Sensitivity, unmatched: Sequence[str]) -> Iterator[str]:
    yield (
        "the gradient error is transferred by role and relative depth from a smaller model "
        f"({small.structure}), not measured on this one; so is the loss curve behind the budget. "
        "Where both were measured, such totals were 0.3 to 2.2 of the large model's own over twice "
        "the depth, and down to 0.03 over four times (docs/transfer.md)"
    )
    if unmatched:
        names = first_and_more(unmatched, most=MOST_NAMED)
        yield (
            f"no counterpart in the smaller model, so out of FP8: {names}; their gradient error in "
            "BF16 is unknown and counts as 0"
        )
    yield from (f"of the smaller model: {note}" for note in small.notes)


def _unknown_notes(spec: ModelSpec) -> Iterator[str]:
    kept = ""
    if any(layer.takes_fp8 for layer in spec.layers):
        locks = first_and_more(default_locks(spec.layers), most=MOST_NAMED)
        held = f", here {locks}" if locks else ""
        kept = f"; embedding, output head, norms and routers stay out of FP8{held} ({SOURCE})"
    yield (
        "no sensitivity was measured: the gradient error is unknown and the plan is chosen by time "
        f"alone{kept}"
    )
    yield (
        "the loss tolerance is not verified: train a small model of the family with autoprec and "
        "give its sensitivity.json with --sensitivity, or verify the plan where the model fits"
    )


def _no_family(small: Sensitivity, spec: ModelSpec) -> str:
    theirs = [row.name for row in small.rows if row.option.is_fp8]
    own = [layer.name for layer in spec.layers if layer.takes_fp8]
    said = [
        first_and_more(dict.fromkeys(role_in_block(name) for name in names), most=MOST_NAMED)
        or "none"
        for names in (own, theirs)
    ]
    return (
        "a sensitivity of another model must be of the same family, but no layer that can run in "
        f"FP8 has a name of it: the model has {said[0]}, the sensitivity {said[1]}; measure a "
        "small model built by the same code"
    )
