"""One tune on many ranks: who prints and writes, without torch where there is one process.

`torchrun --nproc-per-node 8 -m autoprec tune model.py` starts the same command eight times. All of
them run the model; rank 0 alone reads and writes the folder, searches and prints.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from autoprec import __version__
from autoprec.common.text import short_digest
from autoprec.common.versions import software_versions
from autoprec.errors import SettingsError, WorkloadError
from autoprec.tuning.settings import Settings, all_settings

Q = TypeVar("Q")
R = TypeVar("R")
T = TypeVar("T")

LAUNCHED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several ranks."""
    return all(name in os.environ for name in LAUNCHED_BY) and os.environ["WORLD_SIZE"] != "1"


def check_launch(settings: Settings) -> None:
    """Refuse several ranks for what one process does (SettingsError)."""
    if settings.worker and is_launched():
        raise SettingsError(
            f"--worker is one process, but {os.environ['WORLD_SIZE']} were started; start each "
            "worker by itself, without torchrun"
        )
    if settings.script and is_launched():
        raise SettingsError(
            f"--script is recorded by one process, but {os.environ['WORLD_SIZE']} were started; "
            "give torchrun --nproc-per-node 1, or write a model.py with parallelize"
        )


def is_first() -> bool:
    """Whether this process prints and writes: rank 0, or the only one."""
    if _is_distributed():
        from autoprec.device.ranks import rank

        return rank() == 0
    return not is_launched() or os.environ["RANK"] == "0"


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Join the other ranks while the context is open; nothing where there are none."""
    if not is_launched() and not _is_distributed():
        yield
        return
    from autoprec.device.ranks import joined

    with joined():
        yield


def made_on_first(make: Callable[[], T]) -> T:
    """Return rank 0's result on every rank; its error is theirs."""
    return led_by_first(lambda _: make(), lambda _: None)


def made_on_all(make: Callable[[], T]) -> T:
    """Return rank 0's of what every rank makes, so that all go on from the same."""
    try:
        made = make()
    except (RuntimeError, WorkloadError) as error:
        if "torch" in sys.modules:  # what needs no torch needs no device
            from autoprec.device.memory import shortage

            if told := shortage(error):
                raise told from error
        raise
    if not _is_distributed():
        return made
    from autoprec.device.ranks import from_first_rank

    return from_first_rank(made)


def led_by_first(lead: Callable[[Callable[[Q], T]], R], answer: Callable[[Q], T]) -> R:
    """Return the result of `lead` on rank 0, where all ranks answer together what it asks."""
    if not _is_distributed():
        return lead(answer)
    from autoprec.device.ranks import led_by_first_rank

    return led_by_first_rank(lead, answer)


def check_ranks(settings: Settings, workload_digest: str) -> None:
    """Check that all ranks were started with the same settings, file and packages.

    Raises:
        DeviceError: one was not; on every rank.
        SettingsError: workers are asked for beside them.
    """
    from autoprec.device.ranks import check_same, world_size

    if settings.has_workers:
        raise SettingsError(
            "--workers and --launcher train branches apart, in processes of their own, but these "
            f"{world_size()} ranks train one model together; leave them out"
        )
    known = {name: str(getattr(settings, name)) for name in all_settings()}
    check_same("settings (--seed and the others)", short_digest(known))
    file = settings.workload or "the workload"
    check_same(f"text in {file} and what it imports beside it", workload_digest)
    check_same("versions of packages", short_digest(software_versions(), __version__))


def _is_distributed() -> bool:
    """Whether this process has a process group, which needs torch."""
    if "torch.distributed" not in sys.modules:
        return False
    from autoprec.device.ranks import world_size

    return world_size() > 1
