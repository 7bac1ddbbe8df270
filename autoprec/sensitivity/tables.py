"""The two ways to the same table, and the choice between them.

layerwise     exact: one layer x option at a time, everything else FP32
sign_coded    all of them from a few probes; the few that these leave in doubt, exactly
"""

import logging
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial

import torch

from autoprec.device.local import release_memory
from autoprec.device.memory import is_out_of_memory
from autoprec.device.ranks import from_first_rank, largest_over_ranks, world_size
from autoprec.errors import WorkloadError
from autoprec.records.model import BF16_O2, Option
from autoprec.records.sensitivity import Estimate, LayerSensitivity, OperandStatistics
from autoprec.runtime import install_options
from autoprec.sensitivity.casts import Sides, staying_casts
from autoprec.sensitivity.doubts import (
    LARGE_ERROR,
    doubtful_cells,
    forward_casts,
    guessed_cells,
    large_cells,
    on_their_own,
    one_of_each,
)
from autoprec.sensitivity.hooks import change_backward
from autoprec.sensitivity.joint import tied_with
from autoprec.sensitivity.local import Cell, partly_fp8
from autoprec.sensitivity.probes import BatchProbe, operand_statistics, probe_batches
from autoprec.sensitivity.reference import Reference
from autoprec.sensitivity.room import agreed_groups
from autoprec.sensitivity.rows import CHOICE_DOUBT, added_shares, finite, make_rows

logger = logging.getLogger(__name__)

LAYERS_PER_PROBE = 16  # in deep models layers are alike: their order takes more probes
MOST_PROBES = 9  # per batch; 101 linears: 4 found 21 of the top 25 of a recipe, 9 found 23
REFINED_BATCHES = 2
# Passes that measure whole recipes then, or where there are kinks: all of them on all batches where
# that is enough, else the least certain on one batch.
FEW_PASSES, GUESSED_PASSES = 20, 13
FEWEST_FITTED = 4  # rows that tell of kinks in others
# Root mean square of the logarithms of what was measured one by one over what probes had, from
# which other rows are guesses: an eighth of a normal distribution is beyond a factor of two then.
# In eight families with all rows within it is 0.11 to 0.42, in nine with rows beyond 0.53 to 1.66.
SPREAD = 0.45
# Of a row on one of two batches over both: 0.04 to 0.6 in 20 families, 0.3 in the mean. It is what
# is taken for a spread, too, as if of so many rows, before any is measured.
ONE_BATCH, PRIOR_ROWS = 0.3, 2


class Method(StrEnum):
    """How the table is measured."""

    LAYERWISE = "layerwise"
    SIGN_CODED = "sign_coded"


@dataclass(frozen=True)
class Table:
    """The rows and what came out beside them."""

    method: Method
    rows: tuple[LayerSensitivity, ...]
    statistics: tuple[OperandStatistics, ...]
    refined: tuple[Cell, ...] = ()
    exact: frozenset[Cell] = frozenset()  # of those, what was measured on all batches
    is_untold: bool = False  # the loss changes otherwise than its gradients say
    together: tuple[str, ...] = ()  # layers whose rows share what their neighbours have with them
    # the shares of a row that kinks and choices add
    kinks: Mapping[Cell, float] = field(default_factory=dict)
    choices: Mapping[Cell, float] = field(default_factory=dict)
    # of refined rows, and of one of each that were together, what was measured and what was probed
    tested: Mapping[Cell, tuple[float, float]] = field(default_factory=dict)

    @property
    def errors(self) -> dict[Cell, float]:
        """The gradient error of each cell."""
        return {row.cell: row.grad_error.mean for row in self.rows}

    @property
    def spread(self) -> float:
        """How far rows that were measured one by one are from the probes: a logarithm's."""
        # layers too broken for probes to be linear in their errors say nothing of others
        broken = {name for (name, _), (_, probed) in self.tested.items() if probed > LARGE_ERROR}
        found = [
            math.log(max(exact / probed, 1e-3))
            for (name, _), (exact, probed) in self.tested.items()
            if name not in broken or exact <= LARGE_ERROR
        ]
        found += [ONE_BATCH] * PRIOR_ROWS
        return math.hypot(*found) / math.sqrt(len(found))


def make_table(reference: Reference, cells: Sequence[Cell], method: Method | None = None) -> Table:
    """Measure all cells, by the method that takes fewer passes unless one is given.

    Where hooks change what modules hand back, no probe is right: layer by layer then.
    """
    partly = partly_fp8(cells)
    one_by_one = (len(cells) - len(partly)) * len(reference.batches) + len(partly)
    if change_backward(reference.model, lambda: reference.run(0, keep=())):
        logger.warning(
            "hooks at modules' backward change gradients, which no probe sees: every layer is "
            "measured by itself, in %d passes",
            one_by_one,
        )
        method = Method.LAYERWISE
    if method is None:
        # where there are kinks only probes tell, and rows are then measured beside them
        is_cheaper = one_by_one <= _passes_of_probing(reference) + FEW_PASSES
        method = Method.LAYERWISE if is_cheaper else Method.SIGN_CODED
    if method is Method.LAYERWISE:
        whole = [cell for cell in cells if cell not in partly]
        exact = _exact_errors(reference, whole, len(reference.batches), "layer by layer")
        exact |= _exact_errors(reference, list(filter(partly.__contains__, cells)), 1, "GEMMs")
        statistics, staying = operand_statistics(reference, cells)
        own = {(n, o): staying.get((n, staying_casts(o)), 0.0) for n, o in cells}
        rows = [
            LayerSensitivity(name=n, option=o, grad_error=exact[n, o], staying=finite(own[n, o]))
            for n, o in cells
        ]
        return Table(method, tuple(rows), tuple(from_first_rank(statistics)))
    return _sign_coded_table(reference, cells)


def _sign_coded_table(reference: Reference, cells: Sequence[Cell]) -> Table:
    """Measure all cells with probes, then the few that these leave in doubt one by one."""
    probes = _probed(reference, cells, probes=_count_probes(reference))
    rows = make_rows(probes, cells)
    names = reference.spec.names
    # of any rank's batches: all measure the same
    marks = largest_over_ranks([float(any(n in p.unseen for p in probes)) for n in names])
    unseen = {name for name, mark in zip(names, marks, strict=True) if mark}
    statistics = from_first_rank(probes[0].statistics)
    kinks, choices = added_shares(probes, rows)
    table = Table(Method.SIGN_CODED, rows, tuple(statistics), kinks=kinks, choices=choices)
    table = measure_unseen(reference, table, unseen) if unseen else table
    seen = [row for row in table.rows if row.name not in unseen]
    if (steps := probes[0].steps) is not None:
        table = replace(table, is_untold=steps.is_untold)
    is_kinked = steps is not None and steps.are_guesses
    guessed = guessed_cells(seen, is_kinked=is_kinked, codes=probes[0].probes)
    doubted = dict.fromkeys((*large_cells(seen), *doubtful_cells(seen, statistics)))
    refined = one_of_each([*doubted])
    table = refine_table(reference, table, refined, batches=REFINED_BATCHES)
    along = {(name, forward_casts(option)) for name, option in refined}
    guessed = tuple(c for c in guessed if (c[0], forward_casts(c[1])) not in along)
    batches = len(reference.batches)
    if batches * len(guessed) <= FEW_PASSES:
        return refine_table(reference, table, guessed, batches=batches)
    # passes for what goes along are left for others
    left = max(GUESSED_PASSES, REFINED_BATCHES * len(doubted)) - REFINED_BATCHES * len(refined)
    first = {row.cell: row.grad_error.mean for row in make_rows(probes[:1], cells)}
    return refine_table(reference, table, guessed[:left], batches=1, probed=first)


def _count_probes(reference: Reference) -> int:
    """Return how many probes a batch takes."""
    return min(max(len(reference.spec.layers) // LAYERS_PER_PROBE, 1), MOST_PROBES)


def _passes_of_probing(reference: Reference) -> int:
    """Return what probing takes, in passes: those of probe_batches where there are kinks."""
    probes = _count_probes(reference)
    (groups,) = largest_over_ranks([float(reference.groups)])  # all choose the same method
    return len(reference.batches) * (int(groups) * (1 + probes) + 2 * probes) + 2 * int(groups)


def refine_table(
    reference: Reference,
    table: Table,
    cells: Sequence[Cell],
    *,
    batches: int,
    probed: Mapping[Cell, float] | None = None,
) -> Table:
    """Return a table whose cells are measured one by one; a pass per cell and batch.

    Options of the layer that cast alike in the forward pass go along, unless they are measured
    themselves: what probes do not know (kinks, choices) comes of that, and what stays in the
    layer's own parameters is known. Others that are in FP8 go half the way on a scale of factors.
    A cell measured on a part of the batches goes half the way at least, and as far as inverse
    variances say: the spread has both. With what the probes said of that part, `probed`, kinks
    count as they do in the cells.
    """
    if not cells:
        return table
    exact = _exact_errors(reference, cells, batches, "largest rows")
    if probed is not None:
        table = _with_kinks_as_measured(table, exact, probed)
    before = table.errors
    tested = {cell: (e.mean, before[cell]) for cell, e in exact.items() if before[cell] > 0.0}
    table = replace(table, tested={**table.tested, **tested})
    if batches >= len(reference.batches):
        table = replace(table, exact=table.exact | exact.keys())
        return _with_exact(table, exact, share=1.0)
    chosen = math.fsum(table.choices.get(cell, 0.0) for cell in exact) / len(exact)
    share = max(1.0 - (_one_batch(chosen) / table.spread) ** 2, 0.5)
    return _with_exact(table, exact, share=share)


def _with_kinks_as_measured(
    table: Table, exact: Mapping[Cell, Estimate], probed: Mapping[Cell, float]
) -> Table:
    """Return a table in which kinks add what they do in rows that were measured.

    What probes make of kinks is too high where a layer's error reaches few of those behind it, as
    in branches of small weight: by one factor in all layers that are alike (kinks.py). So the
    logarithms of measured over `probed`, on one batch, are fitted by a multiple of the part of a
    row that its kinks are; of that, what its standard error leaves is taken (James and Stein). Rows
    with choices scatter more on one batch, and count for less.
    """
    found = [  # of each row its kinks' part, the logarithm, and how much that counts
        (
            table.kinks.get(cell, 0.0),
            math.log(error.mean / probed[cell]),
            (ONE_BATCH / _one_batch(table.choices.get(cell, 0.0))) ** 2,
        )
        for cell, error in exact.items()
        if min(error.mean, probed[cell]) > 0.0
    ]
    weight = math.fsum(counts * part * part for part, _, counts in found)
    common = math.fsum(counts * part * log for part, log, counts in found)
    slope = common / weight if weight > 0.0 else 0.0
    if len(found) < FEWEST_FITTED or slope == 0.0:
        return table
    left = math.fsum(counts * (log - slope * part) ** 2 for part, log, counts in found)
    left *= len(found) / (len(found) - 1) / math.fsum(counts for *_, counts in found)
    # rows have no factor in common (0.7 there, 0.1 to 0.2 where they have), or too few kinks to
    # tell of the rows that have many
    if max(left, (ONE_BATCH * max(table.kinks.values())) ** 2 / weight) > SPREAD**2:
        return table
    slope *= max(1.0 - left / weight / slope**2, 0.0)
    factors = {cell: math.exp(slope * part) for cell, part in table.kinks.items()}
    rows = tuple(multiplied(row, factors.get(row.cell, 1.0)) for row in table.rows)
    kinks = {c: max(1.0 - (1.0 - part) / factors[c], 0.0) for c, part in table.kinks.items()}
    return replace(table, rows=rows, kinks=kinks)


def _one_batch(choices: float) -> float:
    """Return how far a row on one batch is from both, with so much of it from choices."""
    return math.hypot(ONE_BATCH, CHOICE_DOUBT * choices)


def measure_unseen(reference: Reference, table: Table, names: Collection[str]) -> Table:
    """Return a table whose rows of layers that probes do not see, or not whole, are measured.

    BF16 and one whole recipe of each casts forward: one by one where GUESSED_PASSES are enough for
    that, else neighbours together, whose rows are scaled to what they have jointly. How far that is
    from the probes tells how far rows within it may be.
    """
    kinds: dict[Sides, dict[str, Option]] = {}
    alone = {row.cell for row in on_their_own(table.rows)}
    for row in table.rows:
        if row.name in names and (row.cell in alone or not row.option.is_fp8):
            kinds.setdefault(forward_casts(row.option), {}).setdefault(row.name, row.option)
    count, batches = sum(map(len, kinds.values())), len(reference.batches)
    batches = batches if count * batches <= GUESSED_PASSES else 1
    most = count if count <= GUESSED_PASSES else GUESSED_PASSES // len(kinds)
    groups = [
        tuple(cells[n * len(cells) // most : (n + 1) * len(cells) // most])
        for cells in ([*kind.items()] for kind in kinds.values())
        for n in range(most)
    ]
    settings = {group: partial(_installed, reference, *group) for group in groups if group}
    found = reference.measure_errors(settings, batches=batches, stage="sensitivity: unseen layers")
    before = table.errors
    exact: dict[Cell, Estimate] = {}
    for group, error in found.items():
        total = math.fsum(before[cell] for cell in group)
        for cell in group:
            exact[cell] = error.scaled(before[cell] / total if total > 0.0 else 1.0 / len(group))
    table = _with_exact(table, exact, share=1.0)
    if most == count:
        return table
    tested = {
        cell: (exact[cell].mean, before[cell])
        for cell, *_ in found
        if cell[1].is_fp8 and before[cell] > 0.0
    }
    return replace(table, refined=(), together=tuple(sorted(names)), tested=tested)


def _with_exact(table: Table, exact: Mapping[Cell, Estimate], *, share: float) -> Table:
    """Return a table with exact rows, of which the probes keep a share."""
    ratios: dict[str, dict[Sides, float]] = {}  # of every layer, by its casts forward
    alone = {row.cell for row in on_their_own(table.rows)}
    for row in table.rows:
        found, before = exact.get(row.cell), row.grad_error.mean
        if found is not None and row.cell in alone and min(found.mean, before) > 0.0:
            ratio = (found.mean / before) ** share
            ratios.setdefault(row.name, {})[forward_casts(row.option)] = ratio
    known, rows = {*table.refined, *exact}, []
    for row in table.rows:
        of_layer = ratios.get(row.name, {})
        if row.cell in exact:
            rows.append(_refined(row, exact[row.cell], share=share))
        elif row.cell not in known and row.option.is_fp8 and of_layer:
            near = math.sqrt(statistics.geometric_mean(of_layer.values()))
            mean = row.grad_error.mean
            stays = min(row.staying / mean, 1.0) if mean > 0.0 else 0.0
            ratio = of_layer.get(forward_casts(row.option), near)
            rows.append(multiplied(row, stays + (1.0 - stays) * ratio))
        else:
            rows.append(row)
    refined = tuple(dict.fromkeys((*table.refined, *exact)))
    return replace(table, rows=tuple(rows), refined=refined)


def _probed(reference: Reference, cells: Sequence[Cell], *, probes: int) -> list[BatchProbe]:
    """Probe all batches; where memory runs out, with the layers in twice as many groups.

    Of several ranks none could tell the others then, so all ask for the memory first.
    """
    if world_size() > 1:
        reference.groups = agreed_groups(
            reference.context, reference.spec, reference.groups, is_parked=reference.is_parked
        )
    before = reference.groups
    while True:
        try:
            return probe_batches(reference, cells, probes=probes)
        except (RuntimeError, WorkloadError) as error:
            can_shrink = world_size() == 1 and reference.groups < len(reference.spec.layers)
            if not can_shrink or not is_out_of_memory(error):
                raise
        # here the error and its frames are gone, and what they held can be given back
        release_memory(reference.context.device)
        if reference.groups == before:
            logger.warning("memory ran out: the layers are probed again, fewer at a time")
        reference.groups = min(2 * reference.groups, len(reference.spec.layers))


def _exact_errors(
    reference: Reference, cells: Sequence[Cell], batches: int, stage: str
) -> dict[Cell, Estimate]:
    """Return the gradient error of every cell on the first `batches`."""
    settings = {cell: partial(_installed, reference, cell) for cell in cells}
    return reference.measure_errors(settings, batches=batches, stage=f"sensitivity: {stage}")


def _installed(reference: Reference, *cells: Cell) -> AbstractContextManager[object]:
    """Run layers in their options inside, the others and all activations in FP32.

    Layers that share a weight with one of them have it in BF16 with it.
    """
    own = dict(cells)
    options = {**dict.fromkeys(tied_with(reference.spec, own), BF16_O2), **own}
    return install_options(reference.model, options, activation_dtype=torch.float32)


def _refined(probed: LayerSensitivity, exact: Estimate, *, share: float) -> LayerSensitivity:
    """Return a row with its exact gradient error, of which the probes keep a share."""
    before = probed.grad_error.mean
    if before <= 0.0 or (share == 1.0 and exact.stderr is not None):
        return probed.model_copy(update={"grad_error": exact})
    # how batches scatter is what the probes saw, where it was measured on one
    return multiplied(probed, (max(exact.mean, 0.0) / before) ** share)


def multiplied(row: LayerSensitivity, ratio: float) -> LayerSensitivity:
    """Return a row times a ratio; what stays in its parameters is known, and stays as it is."""
    return row.model_copy(update={"grad_error": row.grad_error.scaled(ratio)})
