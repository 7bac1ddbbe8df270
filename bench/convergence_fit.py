"""Fit the expected gap to bench/convergence.py's runs, and write the tables of docs/convergence.md.

    python bench/convergence_fit.py [--rows FILE]     FILE: what bench/convergence.py wrote; it is
                                                      condensed into bench/data/convergence.csv
    python bench/convergence_fit.py --gaps            print the gap of every plan

A plan is above the noise when its mean gap is more than two standard errors, its own or half of the
median one of its family and horizon, and sharp when also the ends of its 80 % interval are less
than a factor of 2 apart: of others nobody can say whether a prediction was within one. The rule is
that of `sensitivity.gap`, gap = c e N^a, e after 50 steps with grad_weight's by half; both are
fitted by least absolute deviations of log(gap) over the plans, and each family is predicted by the
fit to the others of the six that are not held back.
"""

import argparse
import csv
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from convergence import LAST_THIRD, POINTS
from convergence_families import FAMILIES, HELD_BACK
from scipy.stats import spearmanr

from autoprec.records import ExpectedGap, HorizonGap, LossGap
from autoprec.records.sensitivity import GRAD_WEIGHT_COUNTS
from autoprec.sensitivity.gap import (
    ABOVE,
    BELOW,
    BRANCH_SHARE,
    CONFIDENCE,
    GROWTH,
    LEVEL,
    QUANTILE,
    WHOLE_STEPS,
    loss_exponent,
    with_measured,
)

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
            own = loss_exponent(curve[:WARMUP_STEPS].tolist(), steps) or 0.0
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
        row["noise"] = max(row["exact_se"], statistics.median(beside) / 2)
        row["clear"] = row["exact"] > 2 * row["noise"]
        row["sharp"] = row["clear"] and row["exact"] > 3 * QUANTILE * row["exact_se"]
    for key, row in plans.items():
        row["parts"] = _gemm_parts(key, plans)
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


PRODUCT_RULE = "grad_weight x 0.5"
PUBLISHED = {"output": 0.72, "grad_input": 0.38, "grad_weight": 0.07}  # middles, Quartet II
Law = tuple[float, float]  # the gap of a whole run of 300 steps per error, and its growth
PRODUCT: Law = (LEVEL, GROWTH)
Rule = Callable[[Key], float]  # the gap that a plan is predicted to have


def predict(row: Row, law: Law, r: float = 1.0, weight: float = GRAD_WEIGHT_COUNTS) -> float:
    error = row["e50"] - (1.0 - weight) * row["parts"]["grad_weight"]
    return float(r * error * law[0] * math.pow(row["steps"] / WHOLE_STEPS, law[1]))


def fit(rows: Sequence[tuple[Row, float]], weight: float = GRAD_WEIGHT_COUNTS) -> Law:
    """Return the law that fits these plans, each with its r, best."""

    def loss(growth: float) -> tuple[float, float]:
        logs = [math.log(row["exact"] / predict(row, (1.0, growth), r, weight)) for row, r in rows]
        middle = statistics.median(logs)
        return _mean([abs(value - middle) for value in logs]), middle

    growth = min(np.arange(0.3, 1.2, 0.05).tolist(), key=lambda each: loss(each)[0])
    return math.exp(loss(growth)[1]), growth


def ceiling(plans: Sequence[Row], kind: str) -> str:
    """Return within how many measured gaps a predictor is that knows the true ones.

    True gaps are taken to be the measured ones, or those predicted, and are measured again.
    """
    generator = np.random.default_rng(0)
    shares = []
    for true in ("measured", "predicted"):
        truth = [row["exact"] if true == "measured" else predict(row, PRODUCT) for row in plans]
        inside = chosen = 0
        for gap, row in zip(truth, plans, strict=True):
            again = gap + row["exact_se"] * generator.standard_t(row["seeds"] - 1, 1000)
            kept = again > 2 * row["noise"]
            if kind == "sharp":
                kept &= again > 3 * QUANTILE * row["exact_se"]
            near = (again > gap / 2) & (again < 2 * gap)
            inside, chosen = inside + int((near & kept).sum()), chosen + int(kept.sum())
        shares.append(f"{inside / chosen:.0%} (true gaps as {true})")
    return " and ".join(shares)


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
    six = [row for k, row in whole.items() if k[0] not in HELD_BACK and row["exact"] > 0]
    rows: list[list[str]] = []
    for kind in ("sharp", "clear"):
        kept = {k: row for k, row in whole.items() if row[kind]}
        name = "sharp" if kind == "sharp" else "above the noise"
        for title, rule in _rules(kept, references).items():
            rows += _agreements(f"{name}, {title}", kept, rule, every=title == PRODUCT_RULE)
        yield (
            f"\nCeiling, {name}: a perfect predictor would be within a factor of 2 for "
            f"{ceiling(six, kind)}.\n"
        )
    yield table(["plans, rule", "steps", *AGREEMENT, "held back", *AGREEMENT[1:]], rows)
    yield "\n" + _coverage(whole)
    yield "\nGaps of shorter runs and the prediction together, sharp plans, families left out:\n"
    yield _combined(plans)
    yield "\nGradient error of each GEMM alone at one bit, and gap / (r e) with it, by steps\n"
    yield _kinds(whole, references)


AGREEMENT = ["n", "Spearman", "within 2x", "ratio"]


def left_out(
    kept: Mapping[Key, Row], r: Mapping[tuple[str, int], float], weight: float = GRAD_WEIGHT_COUNTS
) -> dict[str, Law]:
    """Return the law of every family, fitted to the six but it."""
    return {
        family: fit(
            [(row, r[k[0], k[1]]) for k, row in kept.items() if k[0] not in (family, *HELD_BACK)],
            weight,
        )
        for family in FAMILIES
    }


def _rules(kept: Mapping[Key, Row], references: Mapping[tuple[str, int], Row]) -> dict[str, Rule]:
    """Return the ways to predict, the product's first."""
    none = dict.fromkeys(references, 1.0)
    of_runs = {of: {key: row[of] for key, row in references.items()} for of in ("r", "slope")}
    return {
        PRODUCT_RULE: _by_e(kept, none, GRAD_WEIGHT_COUNTS),
        "grad_weight x 0.25": _by_e(kept, none, 0.25),
        "grad_weight x 1": _by_e(kept, none, 1.0),
        "GEMMs apart, grad_weight x 0.5": _by_gemm(kept, 0.5),
        "GEMMs apart, grad_weight x 0.25": _by_gemm(kept, 0.25),
        "r of the warm-up": _by_e(kept, of_runs["r"], GRAD_WEIGHT_COUNTS),
        "r of runs": _by_e(kept, of_runs["slope"], GRAD_WEIGHT_COUNTS),
    }


def _by_e(kept: Mapping[Key, Row], r: Mapping[tuple[str, int], float], weight: float) -> Rule:
    laws = left_out(kept, r, weight)
    return lambda key: predict(kept[key], laws[key[0]], r[key[0], key[1]], weight)


def _by_gemm(kept: Mapping[Key, Row], weight: float) -> Rule:
    """Return a rule where e of each GEMM grows by its published exponent; a level is fitted.

    Quartet II's runs with one NVFP4 GEMM at a time; an error of grad_weight counts `weight`.
    """
    counts = {"output": 1.0, "grad_input": 1.0, "grad_weight": weight}

    def without_level(row: Row) -> float:
        steps, parts = row["steps"] / WHOLE_STEPS, row["parts"].items()
        return math.fsum(counts[g] * e * math.pow(steps, PUBLISHED[g]) for g, e in parts)

    levels = {
        family: statistics.median(
            row["exact"] / without_level(row)
            for k, row in kept.items()
            if k[0] not in (family, *HELD_BACK)
        )
        for family in FAMILIES
    }
    return lambda key: levels[key[0]] * without_level(kept[key])


def _agreements(
    title: str, kept: Mapping[Key, Row], rule: Rule, *, every: bool
) -> Iterator[list[str]]:
    """Yield how well plans are predicted: all, whole recipes, and each horizon if `every`."""
    sets = {"all": list(kept), "all, whole recipes": [k for k in kept if not _is_one_gemm(k)]}
    if every:
        sets |= {str(steps): [k for k in kept if k[1] == steps] for steps in HORIZONS}
    for name, keys in sets.items():
        found = []
        for held in (False, True):
            own = (k for k in keys if (k[0] in HELD_BACK) is held)
            found += agreement([(rule(k), kept[k]["exact"]) for k in own])
        yield [title, name, *found]


def _is_one_gemm(key: Key) -> bool:
    return key[3].removeprefix("one bit, ") in PUBLISHED


def _gemm_parts(key: Key, plans: Mapping[Key, Row]) -> dict[str, float]:
    """Return e of each GEMM: one bit's is 16 times rowwise's, three bits; mixes are as rowwise."""
    rowwise: float = plans[*key[:3], "rowwise"]["e50"]
    least = 1e-6 * rowwise
    coarse = {g: plans[*key[:3], f"one bit, {g}"]["e50"] for g in PUBLISHED}
    parts = {g: max((e - rowwise) / 15, least) for g, e in coarse.items()}
    e = plans[key]["e50"]
    if _is_one_gemm(key):
        alone = key[3].removeprefix("one bit, ")
        return parts | {alone: max(e - sum(parts.values()) + parts[alone], 0.0)}
    return {g: e * part / sum(parts.values()) for g, part in parts.items()}


def _coverage(whole: Mapping[Key, Row]) -> str:
    """Return the share of plans above the noise in the interval around a left-out prediction."""
    kept = {k: row for k, row in whole.items() if row["clear"]}
    laws = left_out(kept, defaultdict(lambda: 1.0))
    ratios = {k: row["exact"] / predict(row, laws[k[0]]) for k, row in kept.items()}
    shares = {
        family: [1 / BELOW < ratio < ABOVE for k, ratio in ratios.items() if k[0] == family]
        for family in FAMILIES
    }
    six = [x for family, inside in shares.items() if family not in HELD_BACK for x in inside]
    product = [
        1 / BELOW < row["exact"] / predict(row, PRODUCT) < ABOVE
        for k, row in kept.items()
        if k[0] in HELD_BACK
    ]
    each = ", ".join(f"{f} {_mean(v):.0%} of {len(v)}" for f, v in shares.items())
    return (
        f"The interval, a factor of {BELOW:g} either way, held {_mean(six):.0%} of the {len(six)} "
        f"plans above the noise of families left out ({each}); the product's own constants "
        f"{_mean(product):.0%} of those held back.\n"
    )


def _combined(plans: Mapping[Key, Row]) -> str:
    """Compare what a shorter run says of a longer one with the prediction, and both together."""
    whole = {k: row for k, row in plans.items() if k[2] == 0 and k[3] != "bf16"}
    laws = left_out({k: row for k, row in whole.items() if row["sharp"]}, defaultdict(lambda: 1.0))
    rows = []
    for (short, start), steps in ((LAST_THIRD, 300), ((75, 0), 300), ((300, 0), 2000)):
        pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
        inside = []
        for key, row in whole.items():
            beside = plans.get((key[0], short, start, key[3]))
            if not row["sharp"] or key[1] != steps or key[0] in HELD_BACK or beside is None:
                continue
            alone, gap = predict(row, laws[key[0]]), beside["exact"]
            per_run = math.pow(short / steps, laws[key[0]][1]) * (1 - start / short) ** BRANCH_SHARE
            both = with_measured(*_records(alone, row, beside))
            mean, low, high = both.mean or 0.0, both.low or 0.0, both.high or 0.0
            pairs["prediction"].append((alone, row["exact"]))
            pairs["measured, carried on"].append((max(gap / per_run, 1e-9), row["exact"]))
            pairs["both"].append((mean, row["exact"]))
            inside.append(low < row["exact"] < high)
        title = f"{short}{f', from {start}' if start else ''} to {steps}"
        for name, found in pairs.items():
            held = f"{_mean(inside):.0%}" if name == "both" else ""
            rows.append([title, name, *agreement(found), held])
    return table(["steps", "by", *AGREEMENT, "in the interval"], rows)


def _records(alone: float, row: Row, beside: Row) -> tuple[ExpectedGap, HorizonGap]:
    expected = ExpectedGap(
        steps=int(row["steps"]), mean=alone, low=alone / BELOW, high=alone * ABOVE,
        confidence=CONFIDENCE,
    )  # fmt: skip
    gap, start = beside["exact"], int(beside["start"])
    measured = HorizonGap(
        warmup_steps=start,
        branch_steps=int(beside["steps"]) - start,
        gap=LossGap(mean=gap, low=gap, high=gap, confidence=CONFIDENCE, seeds=2),
        stderr=beside["exact_se"],
    )
    return expected, measured


def _gaps(plans: Mapping[Key, Row]) -> str:
    """Return the loss gap in percent, FP32 forward with standard error / its own forward."""
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
    parser.add_argument("--gaps", action="store_true")
    arguments = parser.parse_args()
    given: Path | None = arguments.rows
    if arguments.gaps:
        print(_gaps(read_rows()[0]))
        return
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
