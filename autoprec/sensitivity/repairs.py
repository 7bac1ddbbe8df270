"""What causes a layer's error, measured: the error again with one suspect operand repaired.

Statistics say that something stands out in an operand, not that it hurts: a ReLU's output has a
mean of two spreads, and it is the gradients whose small values are lost. So a layer with a large
error runs again in emulated FP8 with each suspect repaired:

    underflow, outliers    its values lose digits as in FP8, but none is too small or too large
    a mean                 it is taken out of the input: the weight's rounding is multiplied by it

Neither makes the layer more precise than FP8 on well-behaved values. An input in BF16 would: it
takes away 81 % of an error that outliers have no part in, and 15 % of what an offset does.
"""

import logging
from collections.abc import Sequence
from functools import partial

from autoprec.device.memory import is_out_of_memory
from autoprec.device.ranks import world_size
from autoprec.errors import WorkloadError
from autoprec.model.layers import layer_named
from autoprec.model.memory import chunk_elements
from autoprec.records import LayerSensitivity, Operand, OperandStatistics
from autoprec.sensitivity.causes import suspects
from autoprec.sensitivity.emulation import Repair, emulated_layer
from autoprec.sensitivity.reference import Reference

log = logging.getLogger(__name__)

LARGE = 2.5e-3  # of error: a quarter of a usual budget, from which a layer's reason names causes
MOST_LAYERS = 4  # with the largest errors; a pass each and one for every suspect, one to four
BATCHES = 1  # two gave the shares of operands that were at fault to 0.02, in kinked networks too


def with_shares(
    reference: Reference, rows: Sequence[LayerSensitivity], statistics: Sequence[OperandStatistics]
) -> tuple[OperandStatistics, ...]:
    """Return the statistics, with what repairs take away of the largest errors.

    A layer's first FP8 option is looked at. Nothing is, on several ranks or where memory runs out:
    then all that stands out in an operand is named.
    """
    first: dict[str, LayerSensitivity] = {}
    for row in rows:
        if row.option.is_fp8:
            first.setdefault(row.name, row)
    large = [row for row in first.values() if row.grad_error.mean >= LARGE]
    large.sort(key=lambda row: -row.grad_error.mean)
    suspected = [(row, found) for row in large if (found := _repairs(row, statistics))]
    chunk = chunk_elements(reference.spec)
    settings = {
        (row.name, repair): partial(
            emulated_layer, layer_named(reference.model, row.name), row.option, repair, chunk=chunk
        )
        for row, found in suspected[:MOST_LAYERS]
        for repair in (Repair(), *found)
    }
    if world_size() > 1 or not settings:
        return tuple(statistics)
    try:
        errors = reference.measure_errors(settings, batches=BATCHES, stage="sensitivity: causes")
    except (RuntimeError, WorkloadError) as failure:  # emulated results are FP32, of a head's size
        if not is_out_of_memory(failure):
            raise
        log.warning("memory ran out: what causes the largest gradient errors is not measured")
        return tuple(statistics)
    # what each repair takes away, into the record of its operand
    shares: dict[tuple[str, Operand], dict[str, dict[str, float]]] = {}
    for (name, repair), error in errors.items():
        before = errors[name, Repair()].mean
        if repair != Repair() and before > 0.0:
            field = "mean_share" if repair.is_mean else "range_share"
            share = {str(first[name].option.recipe): 1.0 - error.mean / before}
            shares.setdefault((name, repair.operand or Operand.INPUT), {})[field] = share
    return tuple(s.model_copy(update=shares.get((s.name, s.operand), {})) for s in statistics)


def _repairs(row: LayerSensitivity, statistics: Sequence[OperandStatistics]) -> list[Repair]:
    """Return the repairs of all that stands out in a layer's operands under its recipe."""
    found = [
        Repair(is_mean=True) if suspect.is_mean else Repair(own.operand)
        for own in statistics
        if own.name == row.name
        for suspect in suspects(own, str(row.option.recipe))
    ]
    return list(dict.fromkeys(found))
