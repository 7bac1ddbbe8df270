"""`autoprec.tune`: the whole tuning run from Python."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from autoprec.common.progress import Progress, report_nothing
from autoprec.errors import SettingsError
from autoprec.tuning.ranks import joined_ranks
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings

FUNCTIONS = (
    "build_model",
    "train_batches",
    "loss_fn",
    "build_optimizer",
    "eval_batches",
    "parallelize",
    "build_mesh",
)
Source = str | Path | Mapping[str, Callable[..., Any]] | object  # Any: the user's own functions


def tune(
    source: Source = None, /, *, progress: Progress = report_nothing, **given: Any
) -> Run:  # Any: functions of a workload, and values of settings
    """Find, prove and save the precision plan of a model, as `autoprec tune` does.

    In a process of several ranks (started by torchrun, or with a process group of its own) every
    rank calls it, and all run one tune.

    Args:
        source: the path of a `model.py` (or `model.py:name`), or the functions of one: a mapping
            of them by name, or any object that has them. They may be keyword arguments too.
        progress: told how far each stage is.
        given: settings by the names of the command line's options, as values or as its texts:
            `target`, `out`, `loss_tolerance`, `keep`, `recipes`, `trials`, `verify`, `resume`, ...

    Returns:
        The run, with `plan`, `profile`, `sensitivity`, `search`, `verification` and `report()`.

    Raises:
        SettingsError: there is no workload or more than one, or a setting is wrong.
        AutoprecError: a stage cannot do what was asked, see `autoprec.errors`.

    Example:
        >>> import tempfile, torch, autoprec
        >>> def batches(seed):
        ...     generator = torch.Generator().manual_seed(seed)
        ...     while True:
        ...         yield torch.randn(32, 16, generator=generator)
        >>> run = autoprec.tune(
        ...     build_model=lambda: torch.nn.Linear(16, 16),
        ...     train_batches=batches,
        ...     loss_fn=lambda model, batch: (model(batch) - batch.flip(-1)).square().mean(),
        ...     out=tempfile.mkdtemp(), recipes="tensorwise", trials=0, verify=False)
        >>> [layer.name for layer in run.plan.layers], run.report().name
        ([''], 'report.html')
    """
    functions = {name: given.pop(name) for name in FUNCTIONS if name in given}
    if (source is None) == (not functions and not given.get("script")):
        raise SettingsError(
            "tune needs one workload: a MODEL.py, or build_model, train_batches and loss_fn as "
            f"arguments, but it got {'two' if source is not None else 'none'}"
        )
    workload, found = None, functions or source
    if isinstance(found, str | Path):
        given["workload"] = str(found)
    elif found is not None:
        from autoprec.workload.functions import workload_from

        holder = SimpleNamespace(**found) if isinstance(found, Mapping) else found
        workload = workload_from(holder, name="the functions given")
    with joined_ranks():
        run = Run(Settings.of(**given), workload=workload, progress=progress)
        with run.locked():
            return run.make()
