"""Fit the expected gap to bench/convergence.py's runs, and write the tables of docs/convergence.md.

    python bench/convergence_fit.py [--rows FILE]     FILE: what bench/convergence.py wrote; it is
                                                      condensed into bench/data/convergence.csv

A plan is above the noise when its mean gap is more than two standard errors, its own or half of the
median one of its family and horizon. The rule is that of `sensitivity.gap`, gap = r e (N / n)^a; a
and n are fitted by least absolute deviations of log(gap) over these plans, and each family is
predicted by the fit to the others of the six that are not held back.
"""

import argparse
import csv
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from convergence import LAST_THIRD, POINTS
from convergence_families import FAMILIES, HELD_BACK
from scipy.stats import spearmanr

from autoprec.sensitivity.gap import GROWTH, WHOLE_STEPS, fit_loss_line

HERE = Path(__file__).parent
DATA, PAGE = HERE / "data" / "convergence.csv", HERE.parent / "docs" / "convergence.md"
BEGIN, END = "<!-- tables of bench/convergence_fit.py -->", "<!-- end of these tables -->"
HORIZONS = (75, 300, 2000)
WARMUP_STEPS = 50  # of the loss curve that a sensitivity sees
# of these the product's P is not yet what it will be: Lion's and Adafactor's, by second moments
OTHER_NORM = {"swiglu": "moments", "seq2seq": "moments"}
Row = dict[str, Any]  # Any: one line of a file
Key = tuple[str, int, int, str]  # family, steps, start, plan


# --- rows ----------------------------------------------------------------------------------------


def condense(path: Path) -> list[Row]:
    """Return a row per family, horizon and plan: means over seeds, with standard errors."""
    by_key: dict[Key, list[Row]] = defaultdict(list)
    references = {}
    for line in path.read_text().splitlines():
        run: Row = json.loads(line)
        start = run.get("start", 0)
        by_key[run["family"], run["steps"], start, run["plan"]].append(run)
        if run["plan"] == "reference":
            references[run["family"], run["steps"], start, run["seed"]] = run
    rows = []
    for (family, steps, start, plan), runs in sorted(by_key.items()):
        base = [references[family, steps, start, run["seed"]] for run in runs]
        row: Row = {"family": family, "steps": steps, "start": start, "plan": plan}
        row["seeds"] = len(runs)
        if plan == "reference":
            curve = np.mean([run["curve"] for run in runs], 0)
            fitted = fit_loss_line(tuple(enumerate(curve[:WARMUP_STEPS].tolist(), start=1)))
            own = 0.0 if fitted is None else fitted.exponent_at(steps)
            losses = [run["exact"] for run in runs]
            row |= {"loss": _mean(losses), "spread": statistics.stdev(losses), "r": own}
        else:
            for kind in ("exact", "own"):
                gaps = [run[kind] / b["exact"] - 1 for run, b in zip(runs, base, strict=True)]
                row |= {kind: _mean(gaps), f"{kind}_se": _stderr(gaps)}
            row |= _errors(runs, OTHER_NORM.get(family, "product"))
        rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    return rows


def _errors(runs: Sequence[Row], norm: str) -> Row:
    """Return e at every point, of single batches and (`a`) of the mean of four."""
    found: Row = {}
    for point in map(str, POINTS):
        sums = [run["errors"][point][norm] for run in runs if point in run["errors"]]
        if sums:
            d1, _, g1, d4, _, g4 = np.sum(sums, 0)
            found |= {f"e{point}": float(d1 / g1), f"a{point}": float(d4 / g4)}
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def read_rows() -> tuple[dict[Key, Row], dict[tuple[str, int], Row]]:
    """Return the plans' rows and the references', numbers as numbers; marks the clear plans."""
    plans: dict[Key, Row] = {}
    references: dict[tuple[str, int], Row] = {}
    for text in csv.DictReader(DATA.open()):
        row: Row = {k: v if k in ("family", "plan") else float(v) for k, v in text.items() if v}
        family, steps, start = text["family"], int(text["steps"]), int(text["start"])
        if row["plan"] == "reference":
            references[family, steps] = row
        else:
            plans[family, steps, start, row["plan"]] = row
    for (family, steps, start, _), row in plans.items():
        beside = [r["exact_se"] for k, r in plans.items() if k[:3] == (family, steps, start)]
        row["clear"] = row["exact"] > 2 * max(row["exact_se"], statistics.median(beside) / 2)
    for (family, steps), row in references.items():
        row["slope"] = _slope(references, family, steps)
    return plans, references


def _slope(references: Mapping[tuple[str, int], Row], family: str, steps: int) -> float:
    """Return r of the runs themselves: how much less loss the next longer ones end with."""
    losses = [references[family, n]["loss"] for n in HORIZONS]
    slopes = [
        math.log(a / b) / math.log(m / n)
        for (a, b), (n, m) in zip(
            itertools.pairwise(losses), itertools.pairwise(HORIZONS), strict=True
        )
    ]
    return {75: slopes[0], 300: _mean(slopes), 2000: slopes[1]}[steps]


# --- fit -----------------------------------------------------------------------------------------


def predict(row: Row, r: float, growth: float, whole: float) -> float:
    error: float = max(row["e10"], row["e50"])
    return r * error * math.pow(row["steps"] / whole, growth)


def fit(rows: Sequence[tuple[Row, float]]) -> tuple[float, float]:
    """Return the growth and the whole steps that fit these plans and their r best."""

    def loss(growth: float) -> tuple[float, float]:
        logs = [math.log(row["exact"] / predict(row, r, growth, 1.0)) for row, r in rows]
        middle = statistics.median(logs)
        return _mean([abs(value - middle) for value in logs]), middle

    growth = min(np.arange(0.3, 1.2, 0.05).tolist(), key=lambda each: loss(each)[0])
    return growth, math.exp(-loss(growth)[1] / growth)


def agreement(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """Return count, Spearman, share within a factor 2 and the geometric mean of the ratio."""
    if len(pairs) < 4:
        return [str(len(pairs)), "", "", ""]
    predicted, measured = np.array(pairs).T
    logs = np.log(measured / predicted)
    within = np.mean(np.abs(logs) < math.log(2))
    rank = spearmanr(predicted, measured)[0]
    return [str(len(pairs)), f"{rank:.2f}", f"{within:.0%}", f"{np.exp(logs.mean()):.2f}"]


# --- page ----------------------------------------------------------------------------------------


def tables() -> Iterator[str]:
    """Yield the page's tables."""
    plans, references = read_rows()
    whole = {k: row for k, row in plans.items() if k[2] == 0 and k[3] != "bf16"}
    clear = {k: row for k, row in whole.items() if row["clear"]}
    for name, of in (("the warm-up's loss curve", "r"), ("the runs themselves", "slope")):
        r = {key: row[of] for key, row in references.items()}
        fits = {
            family: fit(
                [
                    (row, r[k[0], k[1]])
                    for k, row in clear.items()
                    if k[0] not in (family, *HELD_BACK)
                ]
            )
            for family in FAMILIES
        }
        yield (
            f"\nr from {name}; growth and whole steps of the fit to all six: "
            + "{:.2f}, {:.0f}\n".format(*fits[HELD_BACK[0]])
        )
        rows = []
        for title, chosen in (("six families, left out in turn", False), ("two held back", True)):
            for steps in (*HORIZONS, 0):
                keys = [k for k in clear if (k[0] in HELD_BACK) is chosen and steps in (0, k[1])]
                fitted = [
                    (predict(clear[k], r[k[0], k[1]], *fits[k[0]]), clear[k]["exact"]) for k in keys
                ]
                used = [
                    (predict(clear[k], r[k[0], k[1]], GROWTH, WHOLE_STEPS), clear[k]["exact"])
                    for k in keys
                ]
                rows.append([title, str(steps or "all"), *agreement(fitted), *agreement(used)[1:]])
        heads = ["plans above the noise", "steps", "plans", "Spearman", "within 2x", "ratio"]
        yield table([*heads, "Spearman, product", "within 2x", "ratio"], rows)
    yield "\n" + _coverage(whole, references)
    yield "\nLoss gap in percent, mean ± standard error over seeds: FP32 forward / its own\n"
    yield _gaps(plans, references)
    yield "\nGradient error of each GEMM alone at one bit, and gap / (r e) with it, by steps\n"
    yield _kinds(whole, references)


def _coverage(whole: Mapping[Key, Row], references: Mapping[tuple[str, int], Row]) -> str:
    ratios = {
        key: row["exact"] / predict(row, references[key[0], key[1]]["r"], GROWTH, WHOLE_STEPS)
        for key, row in whole.items()
    }
    clear = [ratio for key, ratio in ratios.items() if whole[key]["clear"]]
    low, high = np.quantile(clear, [0.1, 0.9])
    top = np.quantile(list(ratios.values()), [0.8, 0.9, 0.95])
    return (
        "Measured over predicted as the product does: 10 to 90 % of the plans above the noise "
        f"{low:.2f} to {high:.2f}; of all plans 80, 90 and 95 % are below {top[0]:.2f}, "
        f"{top[1]:.2f} and {top[2]:.2f}.\n"
    )


def _gaps(plans: Mapping[Key, Row], references: Mapping[tuple[str, int], Row]) -> str:
    labels = list(dict.fromkeys(key[3] for key in plans))
    rows = []
    for family in FAMILIES:
        for steps, start in ((75, 0), LAST_THIRD, (300, 0), (2000, 0)):
            found = [plans.get((family, steps, start, label)) for label in labels]
            shown = [
                f"{100 * row['exact']:+.2f} ±{100 * row['exact_se']:.2f} / {100 * row['own']:+.2f}"
                if row
                else ""
                for row in found
            ]
            rows.append([family, f"{steps}{f', from {start}' if start else ''}", *shown])
    return table(["family", "steps", *labels], rows)


def _kinds(whole: Mapping[Key, Row], references: Mapping[tuple[str, int], Row]) -> str:
    rows = []
    for label in dict.fromkeys(key[3] for key in whole if key[3].startswith("one bit, ")):
        if label.endswith("half"):
            continue
        for steps in HORIZONS:
            found = {k[0]: row for k, row in whole.items() if k[1] == steps and k[3] == label}
            last = f"e{[p for p in POINTS if p < steps][-1]}"
            ratios = {
                kind: statistics.median(
                    row[kind] / references[f, steps]["slope"] / row["e50"]
                    for f, row in found.items()
                )
                for kind in ("exact", "own")
            }
            grown = statistics.median(row[last] / row["e50"] for row in found.values())
            batch = statistics.median(row["a50"] / row["e50"] for row in found.values())
            values = [ratios["exact"], ratios["own"], grown, batch]
            rows.append([label[9:], str(steps), *(f"{value:.2f}" for value in values)])
    heads = ["GEMM", "steps", "gap / (r e), FP32 forward", "own forward"]
    return table([*heads, "e at the last point / at 50", "e of four batches / of one"], rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path)
    given: Path | None = parser.parse_args().rows
    if given is not None:
        rows = condense(given)
        heads = dict.fromkeys(itertools.chain.from_iterable(rows))
        with DATA.open("w", newline="") as file:
            writer = csv.DictWriter(file, heads, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n" + "".join(tables()) + "\n" + END + after)


if __name__ == "__main__":
    main()
