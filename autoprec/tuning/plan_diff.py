"""Two record files -> what differs: plans by layer, sensitivities by drift."""

import math
from pathlib import Path

from autoprec.errors import RecordError
from autoprec.records import Difference, DifferenceRow, Estimate, Plan, Sensitivity, read_text
from autoprec.records.base import parse_object

DRIFT_FACTOR = 1.5  # what moved by less, or by less than two sigma, is no drift


def compare_files(before: Path, after: Path) -> Difference:
    """Compare two plans, or two sensitivities.

    Raises:
        RecordError: a file is unreadable, or the two are of different kinds.
    """
    texts = [(str(path), read_text(path, what="record")) for path in (before, after)]
    kinds = [parse_object(text, source=path).get("kind") for path, text in texts]
    if kinds == [Plan.KIND, Plan.KIND]:
        rows = diff_plans(Plan.load(before), Plan.load(after))
    elif kinds == [Sensitivity.KIND, Sensitivity.KIND]:
        rows = diff_sensitivities(Sensitivity.load(before), Sensitivity.load(after))
    else:
        raise RecordError(
            "two plans or two sensitivities can be compared, but the files are "
            f"{kinds[0]!r} and {kinds[1]!r}; give two of one kind"
        )
    return Difference(before=str(before), after=str(after), rows=rows)


def diff_plans(before: Plan, after: Plan) -> tuple[DifferenceRow, ...]:
    """Return a row for every layer whose option differs or that only one plan has."""
    old = {layer.name: layer.option.key for layer in before.layers}
    new = {layer.name: layer.option.key for layer in after.layers}
    return tuple(
        DifferenceRow(name=name, before=old.get(name, "absent"), after=new.get(name, "absent"))
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    )


def diff_sensitivities(before: Sensitivity, after: Sensitivity) -> tuple[DifferenceRow, ...]:
    """Return the layers and options whose gradient error drifted, or that were not measured again.

    A drift is a move beyond noise, and by DRIFT_FACTOR or more.
    """
    found = []
    for row in before.rows:
        other = after.row(row.name, row.option)
        if other is None or _has_drifted(row.grad_error, other.grad_error):
            now = "absent" if other is None else f"{other.grad_error.mean:.4%}"
            old, name = f"{row.grad_error.mean:.4%}", f"{row.name} {row.option}"
            found.append(DifferenceRow(name=name, before=old, after=now))
    return tuple(found)


def _has_drifted(before: Estimate, after: Estimate) -> bool:
    noise = 2.0 * math.hypot(before.stderr or 0.0, after.stderr or 0.0)
    low, high = sorted(max(estimate.mean, 0.0) for estimate in (before, after))
    return high - low > noise and high > DRIFT_FACTOR * low
