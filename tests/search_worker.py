"""A process that searches made-up tables: `python search_worker.py URL FOLDER SECONDS [OPTIONS]`.

A measurement waits SECONDS, as for a device of its own, and is noted in FOLDER; with SECONDS = inf
it never ends.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

from autoprec.records import BF16_O2, Constraint, Estimate, Option, Search
from autoprec.search import search_plan
from autoprec.search.costs import make_costs
from autoprec.search.workers import Team
from tests.search_tables import ROWWISE, TENSORWISE, Row, tables_of

ROWS: dict[str, Row] = {
    f"layer{i}": {
        BF16_O2: (2.0 + i, 1e-6),
        TENSORWISE: (1.3 + 0.6 * i, 1e-3),
        ROWWISE: (1.5 + 0.7 * i, 6e-4),
    }
    for i in range(5)
}
WRONG = (6.0, 0.2, 4.0, 0.5, 1.0)
LETTERS = {BF16_O2: "B", TENSORWISE: "T", ROWWISE: "R"}
BUDGET = 4e-3
TABLES = tables_of(ROWS)
COSTS = make_costs(*TABLES)


def truth(options: tuple[Option, ...]) -> float:
    parts = [row[o].grad_error for row, o in zip(COSTS.prices, options, strict=True)]
    return math.fsum(factor * part for factor, part in zip(WRONG, parts, strict=True))


def plan_of(note: str) -> tuple[Option, ...]:
    options = {letter: option for option, letter in LETTERS.items()}
    return tuple(options[letter] for letter in note)


def searched(
    url: str,
    folder: Path,
    seconds: float,
    *,
    is_worker: bool,
    budget: float = BUDGET,
    reference: str = "the same bits",
    software: str = "autoprec",
    study: str = "autoprec",
) -> Search:
    def measure(options: tuple[Option, ...], batches: int) -> Estimate:
        note = "".join(LETTERS[option] for option in options)
        with (folder / f"{os.getpid()}.txt").open("a") as file:
            file.write(f"{time.time()} {note} {truth(options)}\n")
        while math.isinf(seconds):
            time.sleep(1.0)
        time.sleep(seconds)
        return Estimate(mean=truth(options))

    return search_plan(
        *TABLES,
        constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=budget),
        evaluate=measure,
        storage=url,
        study_name=study,
        team=Team(software=software, reference=lambda: reference, is_worker=is_worker),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--study", default="autoprec")
    args = parser.parse_args()
    found = searched(args.url, args.folder, args.seconds, is_worker=args.worker, study=args.study)
    sys.stdout.write(found.chosen.model_dump_json())
