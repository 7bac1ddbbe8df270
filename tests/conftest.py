"""What holds for every test: one thread, the same random numbers, and Python's own excepthook."""

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Run alone on a core: two busy OpenMP threads on two busy cores wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_excepthook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what init_process_group leaves: it prefixes every later traceback with a rank."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
