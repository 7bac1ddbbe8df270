"""The user's metrics at the end of a branch: measured as the loss is, and tested beside it.

A metric's gap is the plan's value minus the reference's, in its unit, on the same seed. With a
tolerance it is tested as the loss is (`sequential`), turned so that more is worse.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.common.text import shown_value
from autoprec.device.random_state import seeded
from autoprec.device.ranks import sum_over_ranks, world_size
from autoprec.errors import WorkloadError
from autoprec.model.context import Context
from autoprec.records import LossGap, MetricTolerance
from autoprec.sensitivity.warm_up import restore
from autoprec.verification.sequential import Terms, gap_interval
from autoprec.workload.functions import UserCode, Workload

SINGLE = "metric"  # the name of the one number of an `evaluate` that returns no names


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


def metrics_of(workload: Workload, model: nn.Module) -> dict[str, float]:
    """Return the metrics of a model by name; none where the user defines no `evaluate`.

    >>> from autoprec.workload.functions import workload_from
    >>> workload = workload_from({
    ...     "build_model": lambda: nn.Linear(4, 1), "train_batches": iter, "loss_fn": max,
    ...     "evaluate": lambda model: {"weights": sum(p.numel() for p in model.parameters())},
    ... })
    >>> metrics_of(workload, workload.build_model())
    {'weights': 5.0}
    """
    if not workload.defines("evaluate"):
        return {}
    found = workload.evaluate(model)
    named = found if isinstance(found, Mapping) else {SINGLE: found}
    if not named or not all(isinstance(name, str) and name for name in named):
        raise WorkloadError(
            "evaluate(model) must return a number, or numbers by name, but it returned "
            f"{shown_value(found)}; return e.g. {{'accuracy': 91.2}}"
        )
    return {name: _number(name, value) for name, value in named.items()}


def _number(name: str, value: Any) -> float:  # Any: the user's
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    # numpy's scalars are registered as numbers; flags are not measures
    if isinstance(value, bool) or not isinstance(value, Real):
        raise WorkloadError(
            f"evaluate(model) must return numbers, but {name!r} is {shown_value(value)}; return "
            "one float for each"
        )
    with UserCode("evaluate(model)", "numbers that a float can hold"):
        return float(value)


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
