"""How much sooner several processes find the same front: `python bench/search_workers.py [URL]`.

Each process has a device of its own, which a measurement keeps busy for SECONDS: it waits, since
processes here share two cores and would only show those. The tables are made up and wrong
(`tests/search_worker.py`), so that all plans' true errors are known. One, two and four processes
search the same tables one after the other, each time on a new study: of a SQLite file, or of the
database at URL. Times are from the first measurement's start; `front` is the time until the
measured plans cover what all three searches cover in the end (99 % of the least hypervolume of
step time and gradient error), `volume` the share of that of all plans.
"""

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.search_worker import BUDGET, COSTS, ROWS, plan_of, truth

PROCESSES = (1, 2, 4)
SECONDS = 3.0
WORST_MS = sum(max(ms for ms, _ in row.values()) for row in ROWS.values())


class Measured(NamedTuple):
    """When a measurement ended, and the plan's step time and gradient error."""

    end_s: float
    ms: float
    error: float


def main(url: str | None) -> None:
    every = [tuple(row) for row in ROWS.values()]
    points = [Measured(0.0, COSTS.counted_ms(p), truth(p)) for p in itertools.product(*every)]
    whole = volume(points)
    runs = {count: search(count, url) for count in PROCESSES}
    common = 0.99 * min(volume(run) for run in runs.values())
    print("processes measured   all s  front s  ratio  volume  best found")
    one_s = 0.0
    for count, run in runs.items():
        front_s = next(run[i].end_s for i in range(len(run)) if volume(run[: i + 1]) >= common)
        one_s = one_s or front_s
        print(
            f"{count:9d} {len(run):8d} {run[-1].end_s:7.1f} {front_s:8.1f} {one_s / front_s:6.2f} "
            f"{volume(run) / whole:7.3f} {best(run) / best(points):11.3f}",
            flush=True,
        )


def search(count: int, url: str | None) -> list[Measured]:
    """Let so many processes search; return what they measured, by its end."""
    with tempfile.TemporaryDirectory() as folder:
        storage = url or f"sqlite:///{folder}/study.db"
        command = [sys.executable, "-m", "tests.search_worker", storage, folder, str(SECONDS)]
        study = ["--study", f"processes{count}"]
        processes = [
            subprocess.Popen(
                [*command, *study, *(["--worker"] if number else [])],
                cwd=Path(__file__).parents[1],
                stdout=subprocess.DEVNULL,
            )
            for number in range(count)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit("a process failed")
        lines = [line.split() for f in Path(folder).glob("*.txt") for line in f.open()]
    starts = sorted((float(start), note) for start, note, _ in lines)
    plans = [(start - starts[0][0] + SECONDS, plan_of(note)) for start, note in starts]
    return [Measured(end_s, COSTS.counted_ms(plan), truth(plan)) for end_s, plan in plans]


def volume(points: Iterable[Measured]) -> float:
    """Return the hypervolume of step time and gradient error, within twice the budget."""
    area, error = 0.0, 2.0 * BUDGET
    for point in sorted(points, key=lambda p: p.ms):
        if point.error < error:
            area += (WORST_MS - point.ms) * (error - point.error)
            error = point.error
    return area


def best(points: Iterable[Measured]) -> float:
    """Return the least time to loss within the budget."""
    return min(p.ms * (1.0 + p.error) for p in points if p.error <= BUDGET)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
