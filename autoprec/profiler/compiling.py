"""`torch.compile` around what is timed: compile time apart, and no graph made within a sample.

A layer is compiled alone, with static shapes; a whole step as users compile it: the model, with the
inductor's default mode, loss and optimizer outside. The first run compiles (the backward pass too);
its time beyond that of a second run is compile time, and in no sample.

Dynamo keeps what it made by code object. All layers and models share `nn.Module`'s, so it would
give up after eight of them and time eager code in silence: here the limit is high, reaching it is
an error, and caches are emptied before each group, lest one layer's sizes make another's dynamic.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from autoprec.common.text import first_line
from autoprec.device.ranks import largest_over_ranks, world_size
from autoprec.device.timing import Function, Monitor, Observation
from autoprec.errors import DeviceError

EAGER, COMPILED = "eager", "default"  # modes, as records name them
INDUCTOR = "inductor"
Backend = str | Callable[..., Any]  # Any: as torch.compile takes it
MOST_GRAPHS = 256  # per code object; a group of layers has at most some dozens of options
MOST_SPOILED = 2  # samples in which a graph was made; one more, and the step never settles


@dataclass
class Compilation:
    """What compiling took so far, and how it is done."""

    device: torch.device
    backend: Backend = INDUCTOR
    seconds: float = 0.0
    recompiles: int = 0  # graphs made after the first run

    def compile_layer(self, layer: nn.Module) -> Callable[..., Any]:  # Any: a layer's own
        """Return the layer compiled for the shapes that it is called with."""
        return torch.compile(layer, backend=self.backend, dynamic=False)

    def run_first(self, step: Function) -> None:
        """Run a step twice: the first compiles, the second tells how much of it that was."""
        # Lazy compilation makes the backward graph only when backward runs, so a whole step is run.
        # What the second run still compiles would have been in a sample: it is counted.
        first = self._run(step)
        known = made_graphs()
        self.seconds += max(first - self._run(step), 0.0)
        self.recompiles += made_graphs() - known

    def _run(self, step: Function) -> float:
        started = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


@dataclass
class GraphMonitor:
    """Another monitor, that also spoils every sample in which a graph was made."""

    compilation: Compilation
    inner: Monitor
    spoiled: int = 0

    def settle(self) -> int:
        """Wait as the other monitor does."""
        return self.inner.settle()

    def look(self) -> None:
        """Look as the other monitor does."""
        self.inner.look()

    def observe(self, sample: Callable[[], float]) -> tuple[float, Observation]:
        """Return the other monitor's answer; spoiled if there are more graphs after the sample.

        Raises:
            DeviceError: it happens again and again.
        """
        # A sample with a graph in it holds seconds of compiling, so it is left out even where no
        # more rejections are allowed; a step that goes on compiling has no time of its own.
        known = made_graphs()
        elapsed, seen = self.inner.observe(sample)
        made = round(largest_over_ranks([float(made_graphs() - known)])[0])  # all, or none
        if not made:
            return elapsed, seen
        self.compilation.recompiles += made
        self.spoiled += 1
        if self.spoiled > MOST_SPOILED:
            raise DeviceError(
                "a compiled step must not compile again while it is timed, but "
                f"{self.spoiled} samples did; give batches of one shape, or time it with --eager"
            )
        return elapsed, replace(seen, is_spoiled=True)


@contextmanager
def open_compilation(
    device: torch.device, mode: str, *, backend: Backend = INDUCTOR
) -> Iterator[Compilation | None]:
    """Let what is timed be compiled while the context is open; give None in eager mode.

    Raises:
        DeviceError: torch.compile does not work here.
    """
    if mode in ("", EAGER):
        yield None
        return
    torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(
            recompile_limit=MOST_GRAPHS,
            accumulated_recompile_limit=MOST_GRAPHS,
            fail_on_recompile_limit_hit=True,
            # what torch.nn calls is a frame that dynamo skips: `Sequential.compile()` would be
            # eager up to torch 2.13, and a lone BF16 layer with 2.11
            wrap_top_frame=True,
        ):
            if problem := compiler_problem(device, backend):
                raise DeviceError(f"{problem}, or time with --eager")
            yield Compilation(device, backend)
    finally:
        torch.compiler.reset()


def forget_failed_trace() -> None:
    """Empty what a compilation that failed leaves behind and eager steps would trip over.

    A vocabulary that is divided over ranks masks its tokens; torch keeps the mask in a placement
    that every use shares, and a failed trace leaves a fake tensor there (torch 2.13).
    """
    if world_size() == 1:
        return
    masks: Any = sys.modules.get("torch.distributed.tensor._ops._mask_buffer")  # Any: torch's own
    for each in gc.get_objects() if masks is not None else ():
        if type(each) is masks.MaskBuffer:
            each.data, each.refcount = None, 0


def made_graphs() -> int:
    """Return the number of graphs that dynamo has made in this process."""
    return int(counters["stats"]["unique_graphs"])


def compiler_problem(device: torch.device, backend: Backend = INDUCTOR) -> str:
    """Compile one small function; return the line that says what is missing, or nothing."""
    needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
    try:
        torch.compile(lambda x: x.sin() * 2, backend=backend)(torch.ones(8, device=device))
    except RuntimeError as error:
        return (
            f"timing under torch.compile needs {needed}, but on {device} torch says: "
            f"{first_line(error)}; install what is missing"
        )
    return ""
