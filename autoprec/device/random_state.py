"""The random numbers of a run are the user's: what autoprec does must not move their generators.

An FP8 and a BF16 run see the same batches and the same dropout only if a plan draws nothing, and a
run that was resumed goes on bit for bit only if checking its plan draws nothing either.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seed_generators(seed: int) -> None:
    """Seed every global generator that a model may draw from: torch's, numpy's and `random`'s.

    Without an accelerator `torch.manual_seed` keeps three printed stacks of calls, for CUDA, MTIA
    and XPU if they ever start: 1 to 4 ms (torch 2.13), as much as a step of a small model.
    """
    random.seed(seed)
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global generators of torch (CPU and CUDA), numpy and `random` back at the end.

    CUDA is not started for it, and numpy is not imported: what is not there has no state.
    """
    numpy_random = sys.modules.get("numpy.random")
    states_np = numpy_random.get_state() if numpy_random is not None else None
    state_py = random.getstate()
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]  # torch's own
    try:
        with torch.random.fork_rng(range(count)):
            yield
    finally:
        if numpy_random is not None:
            numpy_random.set_state(states_np)
        random.setstate(state_py)


def global_states() -> list[Any]:  # Any: each generator has its own
    """Return the states of the CPU's global generators, as plain values to compare."""
    numpy_random: Any = sys.modules.get("numpy.random")  # Any: its global one has no public name
    own = [] if numpy_random is None else [generator_state(numpy_random.mtrand._rand)]
    return [torch.default_generator.get_state().tolist(), random.getstate(), *own]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators inside, and put them back: a stream of batches may use them."""
    with random_state_kept():
        seed_generators(seed)
        yield


def generator_state(value: Any) -> Any:  # Any: whatever an attribute holds; plain values
    """Return the state of a random number generator that is no global one; None if it is none."""
    numpy_random = sys.modules.get("numpy.random")
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if numpy_random is not None and isinstance(value, numpy_random.Generator):
        return value.bit_generator.state
    if numpy_random is not None and isinstance(value, numpy_random.RandomState):
        state = value.get_state(legacy=False)
        inner = state["state"]
        return {**state, "state": {**inner, "key": inner["key"].tolist()}}
    return None


def set_generator_state(generator: Any, state: Any) -> None:  # Any: see generator_state
    """Give a generator a state that `generator_state` returned."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state.cpu() if isinstance(state, torch.Tensor) else state)
