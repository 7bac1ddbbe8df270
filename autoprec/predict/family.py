"""Two models built by one code -> which layers of one stand for which of the other. No torch.

Layers match that do the same thing: their names are the same but for the numbers of blocks, else
the same in the last two parts, else in the last. A number in the last part is a block's only where
it is the first of its name: `fc1` and `fc2` of `layers.3.mlp` do different things, and so do the
`0` and the `3` of a block's `nn.Sequential`; those of a plain stack `0`, `2`, `4` do not.

Of a name with two numbers the first may be a stage's, of another width and resolution than the next
one's: where both models have the same stages, a layer matches those of its own stage alone. A
stage's ends are like what is between them.

Within such a role the first layer matches the first and the last the last: the errors of the first
block can be a hundred times those of the second, in models of any depth (docs/transfer.md). Those
between match by relative depth, and one that falls between two stands for each by how near it is:

    depth of layer j of n among the m of the other model:  1 + (j - 1) / (n - 3) * (m - 3)

One layer alone stands for all of the other model's equally; where there are two, both are ends.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoprec.common.grouping import grouped
from autoprec.common.recipes import Precision
from autoprec.common.text import first_and_more, percent
from autoprec.errors import RecordError
from autoprec.model.options import grad_weight_in_bf16, shape_refusal
from autoprec.records.model import LayerKind, LayerSpec, ModelSpec, Option

DIGITS = re.compile(r"\d+")
ENDS = 2  # the first and the last layer of a role
SHARED_PARTS = (0, 2, 1)  # trailing parts of a name that two layers share; 0: all
MOST_NAMED = 5


@dataclass(frozen=True)
class Place:
    """Where a layer of the large model stands.

    `peers` are the small model's layers of its role, in order; the layer is the `index`-th of
    `count` that have them as peers, all in one stage of several where `is_staged`.
    """

    peers: tuple[str, ...]
    index: int
    count: int
    is_staged: bool = False


def find_places(large: Iterable[str], small: Iterable[str]) -> dict[str, Place]:
    """Return the place of every layer of the large model that has a peer, by name.

    >>> find_places(["layers.0.up", "layers.1.up", "layers.2.up"], ["layers.0.up"])["layers.1.up"]
    Place(peers=('layers.0.up',), index=1, count=3, is_staged=False)
    """
    names, others = list(dict.fromkeys(large)), list(dict.fromkeys(small))
    staged = {role for role, _ in _stages(names).items() & _stages(others).items()}
    found: dict[str, Place] = {}
    for parts in SHARED_PARTS:
        roles, peers = (
            grouped((_staged_role(name, parts, staged), name) for name in each)
            for each in (names, others)
        )
        for same in roles.keys() & peers.keys():
            for index, name in enumerate(roles[same]):
                place = Place(tuple(peers[same]), index, len(roles[same]), bool(same[1]))
                found.setdefault(name, place)
    return found


def _staged_role(name: str, parts: int, staged: Collection[str]) -> tuple[str, str]:
    """Return a layer's role, and its stage where the role is matched by stages."""
    role = role_in_block(name, parts)
    return role, _stage(name) if not parts and role in staged else ""


def _stages(names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the stages that each role is in."""
    roles = grouped((role_in_block(name, 0), _stage(name)) for name in names)
    return {role: frozenset(stages) for role, stages in roles.items()}


def _stage(name: str) -> str:
    """Return the first number of a name that has further ones before its last part, else ""."""
    numbers = [part for part in name.split(".")[:-1] if part.isdecimal()]
    return numbers[0] if len(numbers) > 1 else ""


def depth_weights(index: int, count: int, peers: int) -> dict[int, float]:
    """Return the peers nearest to the relative depth of the index-th of `count`, and their shares.

    >>> depth_weights(1, 4, 2)
    {0: 0.6666666666666667, 1: 0.3333333333333333}
    """
    first = 1 if 0 < index < count - 1 and peers > ENDS else 0  # of those that are no ends
    count, peers = count - 2 * first, peers - 2 * first
    if count == 1:
        return {first + at: 1.0 / peers for at in range(peers)}
    depth = first + (index - first) / (count - 1) * (peers - 1)
    below = int(depth)
    if depth == below:
        return {below: 1.0}
    return {below: below + 1 - depth, below + 1: depth - below}


def role_in_block(name: str, parts: int = 1) -> str:
    """Return the last parts of a name (0: all) without block numbers: what a layer does there.

    >>> role_in_block("vit.layers.3.mlp.fc1", 2), role_in_block("layers.7.attn.q_proj", 0)
    ('mlp.fc1', 'layers.*.attn.q_proj')
    """
    blocks, dot, last = name.rpartition(".")
    starred = DIGITS.sub("*", blocks)
    own = last if starred != blocks else DIGITS.sub("*", last)
    return ".".join(f"{starred}{dot}{own}".split(".")[-parts:])


def check_proxy(large: ModelSpec, small: ModelSpec) -> None:
    """Refuse a proxy that cannot stand for a model.

    Raises:
        RecordError: it is not smaller, a layer of one has no counterpart in the other, or most of
            the weights that could run in FP8 have none that can.
    """
    if small.numel >= large.numel:
        raise RecordError(
            f"a proxy must be smaller than its model, but it has {small.numel:,} parameters and "
            f"the model {large.numel:,}; give a smaller one, or tune without --proxy"
        )
    missing, other = _without_peer(large, small), _without_peer(small, large)
    if missing or other:
        raise RecordError(
            f"a proxy must be of the model's family, but {_mismatch(missing, other)}; build the "
            "proxy with the model's own code, narrower and with fewer blocks"
        )
    places = find_places(_linears(large), _linears(small))
    _check_takes_fp8(large, small, places)


def _check_takes_fp8(large: ModelSpec, small: ModelSpec, places: Mapping[str, Place]) -> None:
    """Refuse a proxy on which FP8 could not be measured for most of the weights that take it."""
    theirs = {layer.name: layer for layer in small.layers}
    total, lost, reasons = 0, 0, dict[str, dict[str, None]]()  # with the roles they are of
    for layer in large.layers:
        if layer.name in places and layer.takes_fp8:
            peers = [theirs[peer] for peer in places[layer.name].peers]
            total += layer.numel
            if why := _why_unmeasured(layer, peers):
                lost += layer.numel
                reasons.setdefault(why, {})[role_in_block(peers[0].name, 2)] = None
    if lost > total / 2:
        each = (f"{first_and_more(roles, most=2)}: {why}" for why, roles in reasons.items())
        whose = first_and_more(each, most=2)
        raise RecordError(
            "a proxy must be able to run in FP8 as its model is, but it cannot where "
            f"{percent(lost / total)} of the weights that could are ({whose}); build it with sizes "
            "that FP8 takes, and batches of such"
        )


def _why_unmeasured(layer: LayerSpec, peers: Sequence[LayerSpec]) -> str:
    """Return why FP8 cannot be measured on a layer's peers as the layer runs it; "" if it can."""
    theirs = {option for peer in peers for option in peer.options if option.is_fp8}
    if theirs and not lack_grad_weight(layer, theirs):
        return ""
    gemm, tokens = peers[0].gemm, peers[0].tokens
    why = peers[0].refusal(Precision.FP8_O1)
    if gemm is not None and not why:
        why = shape_refusal(gemm.K, gemm.N, tokens=(gemm.M, *tokens))
    return why or "it has no recipe in common"


def lack_grad_weight(layer: LayerSpec, theirs: Collection[Option]) -> bool:
    """Whether peers have a layer's FP8 options with grad_weight in BF16 alone, for their tokens."""
    return any(grad_weight_in_bf16(o) in theirs for o in layer.options if o not in theirs)


def _mismatch(missing: Sequence[str], other: Sequence[str]) -> str:
    if not missing:
        return f"it has layers of a role that the model has none of: {_roles(other)}"
    return (
        f"layers of the model have none of their role in it: {_roles(missing)} (the proxy has "
        f"{_roles(other) or 'no other role'})"
    )


def _without_peer(spec: ModelSpec, other: ModelSpec) -> list[str]:
    """Return the layers whose role no layer of the other model has: linears, then the rest."""
    called = [layer for layer in spec.layers if layer.calls and layer.kind is not LayerKind.LINEAR]
    rest = [layer.name for layer in other.layers if layer.kind is not LayerKind.LINEAR]
    pairs = ((_linears(spec), _linears(other)), ([layer.name for layer in called], rest))
    placed = [(own, find_places(own, peers)) for own, peers in pairs]
    return [name for own, places in placed for name in own if name not in places]


def _linears(spec: ModelSpec) -> list[str]:
    return [x.name for x in spec.layers if x.kind is LayerKind.LINEAR and x.calls]


def _roles(names: Sequence[str]) -> str:
    return first_and_more(dict.fromkeys(role_in_block(n, 2) for n in names), most=MOST_NAMED)
