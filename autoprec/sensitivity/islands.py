"""Where BF16 itself is too coarse: a few layers in FP32, and FP32 between them.

A value that sits far from zero beside its spread (an offset of 16 and a spread of 0.2) keeps few
bits of its spread in BF16. Layers in FP32 do not help as long as BF16 activations are between them,
so the layer whose row is worst in BF16 and those that make its input go together, and their outputs
stay FP32 up to the next layer. That is tried on uniform BF16 and kept if half of its error goes,
in FP32 only what must be: of the others the outputs are enough, or nothing, where their own rows
tell what is left then.

    extra = e(uniform BF16) - e(with the island in FP32) - the island's own rows

is what a plan pays for having the island in 16 bits, beyond the rows of its layers.

Parameters outside of layers (the transitions of a CRF, the poles of a state-space model) make code
of the user's compute in BF16. They are tried together where the layers' rows leave an error to
explain, and are FP32 in every plan if half of that goes: what they cost so is not known.

The user's code can be too coarse between many layers at once (splines, a residual far from zero).
Where there are no islands, or they leave much, FP32 between all layers is tried, which stay in BF16
themselves, and kept if half of that goes, or of what no row knows. Kinks make neither go, as any
small error crosses the same ones; so it is tried with the worse half of layers in FP32 too, and
kept by that rule. That comes first: where it does not help, nothing does.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from autoprec.model.layers import layer_named
from autoprec.records import BF16_O2, Island, LayerSensitivity
from autoprec.sensitivity.reach import recorded_reach
from autoprec.sensitivity.reference import Reference

TOO_COARSE = 1e-3  # of uniform BF16; networks without an offset have 1e-6 to 2e-4
FAR_TOO_COARSE = 4e-3  # left of it beside islands: FP32 between all layers costs time
MOST_TRIED = 4  # islands, one joint measurement each
MOST_IN_VAIN = 2  # of them: where kinks make BF16 coarse there are none
MOST_PRODUCERS = 4  # more of them is a residual stream, whose sums no island keeps in FP32

Measure = Callable[[Sequence[Island]], float]


def find_islands(
    reference: Reference,
    rows: Sequence[LayerSensitivity],
    joint: float,
    measure: Measure,
    measure_low: Callable[[Sequence[str], Sequence[Island]], float],
) -> tuple[tuple[Island, ...], float]:
    """Return the islands that uniform BF16 needs, and its joint gradient error with them in FP32.

    That is 0 where a plan's rows are all that it pays.

    Args:
        reference: what everything is measured against.
        rows: the table.
        joint: the gradient error of uniform BF16.
        measure: the same with these islands in FP32.
        measure_low: that of these layers in BF16 and all others in FP32, between such islands.
    """
    own = {row.name: max(row.grad_error.mean, 0.0) for row in rows if row.option == BF16_O2}
    outside = tuple(parameter.name for parameter in reference.spec.uncovered)
    found: list[Island] = []
    left, between = joint, joint - math.fsum(own.values())  # what no layer's row has
    if outside and between >= TOO_COARSE:
        error = measure([Island(outputs=outside)])
        if joint - error >= between / 2:
            found.append(Island(outputs=outside, grad_error=joint - error))
            left = error
    left = _add_layers(reference, own, found, left, measure)
    kept = {name for island in found for name in island.names}
    between = left - math.fsum(own[name] for name in own.keys() - kept)
    bar = FAR_TOO_COARSE if found else TOO_COARSE
    if left < bar:
        return tuple(found), left
    everything = Island(outputs=(*reference.spec.names, *outside))
    # a layer's own row has its output in BF16: rows may know it all, and it goes all the same
    most = math.fsum(own.values()) + between / 2 if between >= bar else left / 2
    low = sorted(own, key=lambda name: own[name])[: max(len(own) // 2, 1)]
    half = measure_low(low, [everything])
    if half <= most:  # all layers have no less
        error = measure([everything])
        if error <= most:
            return (everything.model_copy(update={"grad_error": max(joint - error, 0.0)}),), error
        without = measure_low(low, ())
        if without >= max(2 * half, TOO_COARSE):  # what is left above are kinks: their rows
            return (everything.model_copy(update={"grad_error": without - half}),), 0.0
    return tuple(found), left


def _add_layers(
    reference: Reference,
    own: Mapping[str, float],
    found: list[Island],
    joint: float,
    measure: Measure,
) -> float:
    """Add the islands of layers to those that were found; return the error that they leave."""
    worst = sorted(own, key=lambda name: -own[name])[:MOST_TRIED]
    producers = find_producers(reference, worst) if joint >= TOO_COARSE else {}
    in_vain = 0
    for name in worst:
        kept = [n for island in found for n in (*island.names, *island.outputs)]
        names = (*producers.get(name, ()), name)
        is_whole = set(reference.spec.names).issubset([*kept, *names])  # no plan but FP32's has it
        if joint < TOO_COARSE or in_vain == MOST_IN_VAIN:
            break
        if is_whole or not set(kept).isdisjoint(names):
            continue
        error = measure([*found, Island(names=names)])
        if error > joint / 2:
            in_vain += 1
            continue
        island, error = _smallest(names, own, joint, error, lambda x: measure([*found, x]))
        extra = joint - error - sum(own.get(n, 0.0) for n in island.names)
        found.append(island.model_copy(update={"grad_error": max(extra, 0.0)}))
        joint = error
    return joint


def _smallest(
    names: Sequence[str],
    own: Mapping[str, float],
    joint: float,
    error: float,
    measure: Callable[[Island], float],
) -> tuple[Island, float]:
    """Return what must be in FP32 of a layer and its producers, and the error that this leaves."""
    *makers, last = names
    smaller = [Island(outputs=(last,))]
    if makers:
        alone = Island(names=(last,))
        smaller += [alone, Island(outputs=names), Island(names=(last,), outputs=makers)]
    for island in smaller:
        freed = math.fsum(own.get(n, 0.0) for n in names if n not in island.names)
        left, most = measure(island), 2 * (error + freed)
        # the rows may explain it all: what every plan has must take half of it by itself
        if left <= (most if island.names else min(most, joint / 2)):
            return island, left
    return Island(names=names), error


def find_producers(reference: Reference, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the layers whose outputs make the input of each named one, through functions alone.

    None are found where autograd keeps no graph (the model's own input, checkpointing), and none
    are returned where there are more than MOST_PRODUCERS.
    """
    if not reference.reach.makers:  # else the probes recorded it
        layers = {name: layer_named(reference.model, name) for name in reference.spec.names}
        with recorded_reach(layers) as reference.reach:
            reference.run(0, keep=())
    found = {name: own or () for name, own in reference.reach.makers.items() if name in names}
    few = {name: own for name, own in found.items() if len(own) <= MOST_PRODUCERS}
    return {name: tuple(n for n in reference.spec.names if n in few[name]) for name in few}
