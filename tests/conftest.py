"""What holds for every test: one thread, the same random numbers, and Python's own excepthook."""

import gc
import os
import sys
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # of this process and of those that tests start

import pytest
import torch
from hypothesis import HealthCheck, settings

from autoprec.device.random_state import seed_generators
from tests.examples import MORE
from tests.ranks import every_recipe

for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "LINES", "NO_COLOR", "PY_COLORS"):
    os.environ.pop(name, None)  # a terminal has none of them, a runner of CI has some

# What a newcomer and CI run is the same every time; `make test-random` looks for more, for long.
# Nothing depends on how busy the machine is: no deadline, no check for slow examples.
settings.register_profile(
    "same",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search", settings.get_profile("same"), derandomize=False, max_examples=100 * MORE
)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Run alone on a core: two busy OpenMP threads on two busy cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seed_generators(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Keep the garbage collector from looking at what imports made, in each of its full runs."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine() -> Iterator[None]:
    """Reject no sample for what else the machine does, so that what is timed is always the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoprec.device.local._involuntary_switches", lambda: 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _every_recipe() -> Iterator[None]:
    """Test every recipe, also where the CPU's own FP8 kernel has no row scales."""
    with every_recipe():
        yield


@pytest.fixture(autouse=True)
def _own_excepthook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what init_process_group leaves: it prefixes every later traceback with a rank."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
