"""A run of bench/gpu.py: its device, its sections under deadlines, and its results on disk."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gpu_report import render

from autoprec.common.text import first_line
from autoprec.device.local import find_monitor, release_memory
from autoprec.device.timing import (
    Clock,
    Function,
    Monitor,
    Samples,
    Stopping,
    make_clock,
    sample_interleaved,
)
from autoprec.records.devices import DeviceProfile

Shape = tuple[int, int, int]

# M tokens, K in, N out: the most telling first, since the budget may end the list
SHAPES: tuple[Shape, ...] = (
    *((8192, 4096, 4096), (8192, 4096, 11008), (8192, 11008, 4096), (8192, 8192, 8192)),
    *((2048, 4096, 4096), (8192, 1024, 1024), (16384, 8192, 28672), (2048, 1024, 4096)),
    *((8192, 4096, 1024), (8192, 2048, 2048), (4096, 4096, 14336), (16384, 4096, 4096)),
    *((2048, 256, 768), (32768, 8192, 1024), (1024, 8192, 8192), (16384, 5120, 13824)),
)
QUICK_SHAPES: tuple[Shape, ...] = ((32, 32, 64), (64, 64, 32))
LIMIT_S = 480.0  # no piece of work begins later; the longest takes under two minutes


@dataclass
class Deadline:
    """The seconds that a section may take; it looks before each piece of work."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def is_over(self) -> bool:
        return self.elapsed > self.seconds


@dataclass
class Run:
    """What is measured where, and what was found so far."""

    device: torch.device
    out: Path
    is_quick: bool = False
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    profiles: dict[str, DeviceProfile] = field(default_factory=dict)
    whole: Deadline = field(default_factory=lambda: Deadline(LIMIT_S))

    @cached_property
    def clock(self) -> Clock:
        return make_clock(self.device)

    @cached_property
    def monitor(self) -> Monitor:
        return find_monitor(self.device)  # one for all: it remembers a GPU that stays slow

    @property
    def samples(self) -> int:
        return 3 if self.is_quick else 20

    @property
    def backend(self) -> str:
        return "eager" if self.is_quick else "inductor"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return QUICK_SHAPES if self.is_quick else SHAPES

    def sample(self, functions: Mapping[str, Function], *, budget_ms: float) -> dict[str, Samples]:
        """Sample functions in turns, with the device's own clock and monitor."""
        return sample_interleaved(
            functions,
            clock=self.clock,
            stopping=Stopping(self.samples, budget_ms=budget_ms, rejections=3),
            monitor=self.monitor,
        )

    def within(
        self, items: Sequence[Any], deadline: Deadline, what: str
    ) -> Iterator[Any]:  # Any: a section's own pieces of work
        """Yield items until the deadline, and write what was found; say which were left out."""
        for position, item in enumerate(items):
            over = next((one for one in (deadline, self.whole) if one.is_over), None)
            if over is not None:
                left = ", ".join(map(str, items[position:]))
                self.skipped.append(f"{what}: {over.seconds:g} s were over before {left}")
                return
            yield item
            write_results(self)


Section = Callable[[Run, dict[str, Any], Deadline], None]


def run_sections(run: Run, sections: Mapping[str, tuple[float, Section]]) -> None:
    """Run every section and write the results after each, whatever becomes of it."""
    for name, (seconds, section) in sections.items():
        deadline = Deadline(seconds)
        found = run.sections.setdefault(name, {})
        try:
            section(run, found, deadline)
        except Exception as error:  # noqa: BLE001  # the sections before and after must not be lost
            run.skipped.append(f"{name} failed: {type(error).__name__}: {first_line(error)}")
        finally:
            found["seconds"] = round(deadline.elapsed, 1)
            write_results(run)
        release_memory(run.device)
        print(f"{name:<8} {deadline.elapsed:6.1f} s", file=sys.stderr)


def write_results(run: Run) -> None:
    run.out.mkdir(parents=True, exist_ok=True)
    where = run.sections.get("facts", {}).get("name", str(run.device))
    claim = (
        "A test of the script: no figure here means anything."
        if run.is_quick
        else "Measured by bench/gpu.py; medians, L2 cleared, candidates interleaved."
    )
    results = {
        "title": f"autoprec on {where}",
        "claim": claim,
        "sections": run.sections,
        "skipped": run.skipped,
    }
    (run.out / "results.json").write_text(json.dumps(results, indent=1, default=str))
    (run.out / "results.md").write_text(render(results))


def shape_of(shape: Shape) -> dict[str, int]:
    return dict(zip("MKN", shape, strict=True))


def conditions_of(samples: Samples) -> dict[str, Any]:
    seen = samples.merged_conditions()
    if seen is None:
        return {}
    return {
        "sm MHz": seen.sm_clock_mhz,
        "W": seen.power_w,
        "C": seen.temperature_c,
        "throttled": ", ".join(seen.throttle_reasons),
    }
