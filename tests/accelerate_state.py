"""Accelerate's state, of which a process has one: forgotten before and after a test."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


def forget_accelerators() -> None:
    """Let the next Accelerator or Trainer be the first of the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Give a test an Accelerate that nobody has used, and leave it so."""
    forget_accelerators()
    yield
    forget_accelerators()
