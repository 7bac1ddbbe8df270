"""The user's own measure of a model: `evaluate(model)`, one number or several by name, checked."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from autoprec.common.text import shown_value
from autoprec.errors import WorkloadError
from autoprec.workload.functions import UserCode, Workload

SINGLE = "metric"  # the name of the one number of an `evaluate` that returns no names


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
