"""`autoprec.tune`: the whole tuning run from Python."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.common.noise import warned_once
from autoprec.common.progress import Progress, report_nothing
from autoprec.errors import SettingsError
from autoprec.tuning.ranks import joined_ranks
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings

if TYPE_CHECKING:
    from autoprec.workload.functions import Workload

LIVE_PROXY = "the proxy given"
Source = str | Path | Mapping[str, Callable[..., Any]] | object  # Any: the user's own functions


def tune(
    source: Source = None,
    /,
    *,
    proxy: Source = None,
    progress: Progress = report_nothing,
    **given: Any,
) -> Run:  # Any: functions of a workload, and values of settings
    """Find, prove and save the precision plan of a model, as `autoprec tune` does.

    Of several ranks (torchrun's, or of a process group of the caller's) each calls it: one tune.

    Args:
        source: the path of a `model.py` (or `model.py:name`), or its functions: a mapping by name,
            or any object that has them. They may be keyword arguments too.
        proxy: the same of a small model of the family, to prove the plan on, see `--proxy`.
        progress: told how far each stage is.
        given: the command line's options by name, as values or texts: `out`, `keep`, `verify`, ...

    Returns:
        The run, with `plan`, `profile`, `sensitivity`, `search`, `verification` and `report()`.

    Raises:
        AutoprecError: a setting is wrong, or a stage cannot do what was asked (`autoprec.errors`).

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
    found = _one_workload(source, given)
    if isinstance(found, str | Path):
        given["workload"] = str(found)
    if proxy is not None:
        given["proxy"] = str(proxy) if isinstance(proxy, str | Path) else LIVE_PROXY
    workload = _live_workload(found, "the functions given")
    small = _live_workload(proxy, LIVE_PROXY)
    with warned_once(), joined_ranks():
        run = Run(Settings.of(**given), workload=workload, proxy=small, progress=progress)
        with run.locked():
            return run.make()


def _one_workload(source: Source, given: dict[str, Any]) -> Source:  # Any: see `tune`
    """Return the workload that was given; functions among the settings are taken out of these."""
    from autoprec.workload.functions import DEFINED

    functions = {name: given.pop(name) for name in DEFINED if name in given}
    if (source is None) == (not functions and not given.get("script")):
        raise SettingsError(
            "tune needs one workload: a MODEL.py, or build_model, train_batches and loss_fn as "
            f"arguments, but it got {'two' if source is not None else 'none'}"
        )
    return functions or source


def _live_workload(source: Source, name: str) -> "Workload | None":
    """Return the workload of live functions; None where there are none, or it is a file."""
    if source is None or isinstance(source, str | Path):
        return None
    from autoprec.workload.functions import workload_from

    return workload_from(source, name=name)
