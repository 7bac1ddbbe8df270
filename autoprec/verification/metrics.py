"""The user's metrics at the end of a branch: measured as the loss is, and tested beside it.

A metric's gap is the plan's value minus the reference's, in its unit, on the same seed. With a
tolerance it is tested as the loss is (`sequential`), turned so that more is worse.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autoprec.device.random_state import seeded
from autoprec.device.ranks import sum_over_ranks, world_size
from autoprec.errors import WorkloadError
from autoprec.model.context import Context
from autoprec.records import LossGap, MetricTolerance
from autoprec.sensitivity.warm_up import restore
from autoprec.verification.sequential import Terms, gap_interval
from autoprec.workload.functions import Workload
from autoprec.workload.metrics import metrics_of


@dataclass(frozen=True)
class Tested:
    """Gaps of which more is worse, by seed, and how large they may be; without a name the loss."""

    gaps: tuple[float, ...]
    tolerance: float
    name: str = ""


def measure_metrics(context: Context, model: nn.Module) -> dict[str, float]:
    """Return the user's metrics of a model in eval mode; of several ranks, their means.

    Every generator that the user's code may draw from is seeded alike for every branch.
    """
    with seeded(context.seed):
        found = metrics_of(context.workload, model)
    means = [total / world_size() for total in sum_over_ranks(list(found.values()))]
    return dict(zip(found, means, strict=True))


def check_metrics(context: Context, tolerances: Sequence[MetricTolerance]) -> None:
    """Check `evaluate` on a fresh model, before any training: it runs, and has what is tested.

    Raises:
        WorkloadError: it fails, gives what is no finite number, or has not such a name.
    """
    if not tolerances and not context.workload.defines("evaluate"):
        return
    found: dict[str, float] = {}
    if context.workload.defines("evaluate"):
        with seeded(context.seed), torch.no_grad():
            model = restore(context, None).model.eval()
            found = measure_metrics(context, model)
    check_names(context.workload, found, tolerances)
    check_finite(found, where="before training")


def check_names(
    workload: Workload, found: Iterable[str], tolerances: Sequence[MetricTolerance]
) -> None:
    """Check that every tolerance is of a metric that is there."""
    names = ", ".join(found)
    for tolerance in tolerances:
        if not workload.defines("evaluate"):
            raise WorkloadError(
                f"--metric-tolerance {tolerance.name} needs evaluate(model) in the workload, but "
                f"{workload.name} has none; define it, or leave the option out"
            )
        if tolerance.name not in found:
            raise WorkloadError(
                f"--metric-tolerance must name what evaluate(model) returns ({names}), but "
                f"{tolerance.name!r} is not in it; correct the name"
            )


def check_finite(metrics: dict[str, float], *, where: str) -> None:
    """Check the metrics of a model in FP32."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise WorkloadError(
                f"evaluate(model) must give finite numbers in FP32, but {name!r} is {value} "
                f"{where}; leave it out, or fix what it measures"
            )


def tested_sides(gaps: Sequence[float], tolerance: MetricTolerance) -> list[Tested]:
    """Return the one or two tests of a metric: how far it falls, how far it rises."""
    sides = []
    if tolerance.at_least is not None:
        falls = tuple(-gap for gap in gaps)
        sides.append(Tested(falls, -tolerance.at_least, tolerance.name))
    if tolerance.at_most is not None:
        sides.append(Tested(tuple(gaps), tolerance.at_most, tolerance.name))
    return sides


def metric_interval(
    gaps: Sequence[float], tolerance: MetricTolerance | None, terms: Terms
) -> LossGap:
    """Return a metric's mean gap and interval, with room for unseen jumps where more is worse.

    That is on both sides where no tolerance says which way is worse.
    """
    known = tolerance or MetricTolerance(name="")
    rises = gap_interval(gaps, terms, tolerance=known.at_most or 0.0)
    falls = gap_interval([-gap for gap in gaps], terms, tolerance=-(known.at_least or 0.0))
    may_rise = known.at_most is None and known.at_least is not None
    may_fall = known.at_least is None and known.at_most is not None
    ends = {
        "low": rises.low if may_fall else 0.0 - falls.high,  # no negative zero
        "high": 0.0 - falls.low if may_rise else rises.high,
    }
    return rises.model_copy(update=ends)
