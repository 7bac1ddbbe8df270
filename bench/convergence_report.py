"""The JSON files of bench/convergence.py -> docs/convergence.md and docs/convergence.svg."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from autoprec.records import Sensitivity
from autoprec.sensitivity.gap import fit_loss_line, predicted_loss_gap

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEXT = Path(__file__).resolve().parent / "data" / "convergence_text.md"
FAMILIES = ("gpt", "vit", "encoder")
NOISE_FACTOR = 2.0  # a gap exceeds the noise when it is above this many standard errors
EARLY_STEPS, HORIZON = 10, 75
SIDE, MARGIN = 300, 56
RANGE = (1e-5, 1.0)  # of both axes
Run = dict[str, Any]  # Any: JSON
Row = dict[str, Any]


def write_report(folder: Path) -> None:
    """Write the page and its plot from the families that were measured."""
    runs = [
        json.loads(path.read_text())
        for name in FAMILIES
        if (path := folder / f"{name}.json").is_file()
    ]
    for run in runs:
        _repredict(run, Sensitivity.load(folder / run["family"] / "sensitivity.json"))
    parts = [TEXT.read_text(), _agreement(runs), *map(_plan_table, runs), _products(runs)]
    (DOCS / "convergence.md").write_text("\n".join([*parts, _slopes(runs)]))
    (DOCS / "convergence.svg").write_text(_plot(runs))


def _repredict(run: Run, sensitivity: Sensitivity) -> None:
    """Predict anew from the saved gradient errors: the page belongs to the present gap.py."""
    steps, start = run["branch_steps"], run["warmup_steps"]
    for row in run["plans"]:
        for kind in ("table", "joint"):
            row[f"{kind}_gap"] = predicted_loss_gap(
                sensitivity, row[f"{kind}_grad_error"], steps, start=start
            )


# --- figures -------------------------------------------------------------------------------------


def noise_of(run: Run) -> float:
    """Return the standard error of a mean gap, by the median spread of plans without fault."""
    spreads = [np.std(r["gaps"], ddof=1) for r in run["plans"] if not r["has_fault"]]
    return float(np.median(spreads)) / math.sqrt(run["seeds"])


def clear_rows(run: Run) -> list[Row]:
    """Return the plans whose mean gap exceeds the noise: the common one and their own."""
    return [r for r in run["plans"] if _mean(r) > NOISE_FACTOR * max(noise_of(run), _stderr(r))]


def _stderr(row: Row) -> float:
    return float(np.std(row["gaps"], ddof=1)) / math.sqrt(len(row["gaps"]))


def _mean(row: Row) -> float:
    return float(np.mean(row["gaps"])) if row["gaps"] else math.inf


def spearman(rows: Sequence[Row], score: Callable[[Row], float]) -> float:
    """Return the rank correlation of a score with the measured gaps; NaN for fewer than three."""
    if len(rows) < 3:
        return math.nan
    found = stats.spearmanr([score(row) for row in rows], [_mean(row) for row in rows])
    return float(found.statistic)


def calibration(rows: Sequence[Row], kind: str) -> tuple[float, float]:
    """Return the geometric mean of measured / predicted, and the slope of log on log."""
    pairs = np.log([[row[f"{kind}_gap"], _mean(row)] for row in rows])
    slope = np.polyfit(pairs[:, 0], pairs[:, 1], 1)[0] if len(rows) > 2 else math.nan
    return float(np.exp((pairs[:, 1] - pairs[:, 0]).mean())), float(slope)


SCORES: dict[str, Callable[[Row], float]] = {
    "autoprec, joint": lambda row: float(row["joint_gap"]),
    "autoprec, table": lambda row: float(row["table_gap"]),
    "ModelOpt": lambda row: float(row["scores"]["ModelOpt"]),
    "weight error": lambda row: float(row["scores"]["weight error"]),
    "layer order": lambda row: float(row["scores"]["layer order"]),
}

KINDS = ("joint", "table")


# --- page ----------------------------------------------------------------------------------------


def _agreement(runs: Sequence[Run]) -> str:
    heads = ["", *(f"{run['family']}" for run in runs)]
    rows: list[list[str]] = []
    for name, score in SCORES.items():
        rows.append([f"Spearman, {name}", *(f"{spearman(clear_rows(r), score):.2f}" for r in runs)])
    for name, score in SCORES.items():
        rows.append(
            [f"the same over all plans, {name}"]
            + [f"{spearman(run['plans'], score):.2f}" for run in runs]
        )
    for kind in KINDS:
        pairs = [calibration(clear_rows(run), kind) for run in runs]
        rows.append([f"measured / predicted, {kind}", *(f"{ratio:.2f}" for ratio, _ in pairs)])
        rows.append([f"slope of log on log, {kind}", *(f"{slope:.2f}" for _, slope in pairs)])
    rows += [
        ["plans above the noise", *(f"{len(clear_rows(r))} of {len(r['plans'])}" for r in runs)],
        ["noise of a mean gap", *(f"{noise_of(run):.3%}" for run in runs)],
        ["sensitivity, step equivalents", *(f"{run['sensitivity_steps']:.0f}" for run in runs)],
        ["joint measurement, step equivalents", *(f"{run['joint_steps']:.1f}" for run in runs)],
        ["ModelOpt, step equivalents", *(f"{run['modelopt_steps']:.0f}" for run in runs)],
        ["the loss probe alone, step equivalents", *(f"{r['loss_probe_steps']:.0f}" for r in runs)],
        ["FP32 step here, ms", *(f"{1e3 * run['step_s']:.0f}" for run in runs)],
        ["all of the family, minutes", *(f"{run['seconds'] / 60:.1f}" for run in runs)],
    ]
    return "\n## Agreement\n\n" + _table(heads, rows)


def _plan_table(run: Run) -> str:
    heads = ["plan", "gradient error, table", "gradient error, joint"]
    heads += ["predicted", "measured, per seed", "ModelOpt"]
    rows = [
        [
            row["label"],
            f"{row['table_grad_error']:.1e}",
            f"{row['joint_grad_error']:.1e}",
            f"{row['joint_gap']:.3%}",
            " ".join(f"{gap:+.3%}" for gap in row["gaps"])
            + (" diverged" if row["diverged"] else ""),
            f"{row['scores']['ModelOpt']:.1e}",
        ]
        for row in sorted(run["plans"], key=_mean)
    ]
    title = (
        f"\n## {run['family']}\n\n{run['parameters'] / 1e6:.1f} M parameters, {run['linears']} "
        f"linears that take FP8; outlier rows, a to d: {_faults(run)}. "
        f"Warm-up {run['warmup_steps']} steps, branches {run['branch_steps']}, {run['seeds']} "
        f"paired seeds. Loss of the reference at the end: {run['eval_loss']:.3f}.\n\n"
    )
    return title + _table(heads, rows)


def _faults(run: Run) -> str:
    return ", ".join(f"2^{power} in `{name}`" for name, power in run["faults"].items())


def _products(runs: Sequence[Run]) -> str:
    text = "\n## Planted faults through the product\n"
    for run in runs:
        product = run["product"]
        text += (
            f"\n**{run['family']}** (fault in `{run['fault']}`): gradient error budget "
            f"{product['grad_error_budget']:.2%}, the chosen plan's {product['chosen_e']:.2%}, "
            f"{product['fp8_layers']} layers in FP8; {product['step_equivalents']:.0f} step "
            "equivalents. Linears out of FP8, and why:\n"
        )
        text += "".join(f"\n- `{name}`: {product['reasons'][name]}" for name in product["out"])
        text += "\n\n" + _table(
            ["plan", "verdict", "gaps"],
            [
                [v["label"], v["verdict"], " ".join(f"{gap:+.3%}" for gap in v["gaps"])]
                for v in product["verdicts"]
            ],
        )
    return text


def _slopes(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        curve = tuple(enumerate(run["loss_curve"], start=1))
        early, late = fit_loss_line(curve[:EARLY_STEPS]), fit_loss_line(curve)
        if early is None or late is None:
            continue
        extrapolated = max(early.last_loss - early.slope * math.log(HORIZON / EARLY_STEPS), 0.25)
        rows.append(
            [
                run["family"],
                f"{late.slope / late.last_loss:.3f}",
                f"{early.slope / max(extrapolated, early.last_loss / 4):.3f}",
                f"{early.exponent_at(HORIZON):.3f}",
            ]
        )
    heads = [
        "family",
        "measured on the warm-up",
        "log line of ten steps (before)",
        "autoprec.sensitivity.gap from ten steps",
    ]
    return (
        f"\n## What a step is worth at step {HORIZON}\n\nRelative slope of the loss per e-fold of "
        "steps.\n\n" + _table(heads, rows)
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- plot ----------------------------------------------------------------------------------------


def _plot(runs: Sequence[Run]) -> str:
    width, height = (SIDE + MARGIN) * len(runs) + MARGIN, SIDE + 2 * MARGIN
    panels = "".join(
        f'<g transform="translate({MARGIN + i * (SIDE + MARGIN)},{MARGIN})">{_panel(run)}</g>'
        for i, run in enumerate(runs)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{panels}</svg>\n"
    )


def _panel(run: Run) -> str:
    noise = max(NOISE_FACTOR * noise_of(run), RANGE[0])
    parts = [
        f'<text x="{SIDE / 2}" y="-12" text-anchor="middle" font-size="15">{run["family"]}</text>',
        f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="#888"/>',
        f'<rect y="{_y(noise):.1f}" width="{SIDE}" height="{SIDE - _y(noise):.1f}" fill="#eee"/>',
        f'<line x1="0" y1="{SIDE}" x2="{SIDE}" y2="0" stroke="#888" stroke-dasharray="4"/>',
    ]
    for power in range(-5, 1):
        place = _x(10.0**power)
        words = f"{100 * 10.0**power:g}%"
        parts += [
            f'<text x="{place:.0f}" y="{SIDE + 16}" text-anchor="middle">{words}</text>',
            f'<text x="-4" y="{SIDE - place + 4:.0f}" text-anchor="end">{words}</text>',
        ]
    parts += [
        f'<text x="{SIDE / 2}" y="{SIDE + 36}" text-anchor="middle">predicted loss gap</text>',
        '<text x="6" y="16">measured loss gap</text>',
    ]
    for row in run["plans"]:
        colour = "#c33" if row["has_fault"] else "#36c"
        parts.append(
            f'<circle cx="{_x(row["joint_gap"]):.1f}" cy="{_y(_mean(row)):.1f}" r="5" '
            f'fill="{colour}" fill-opacity="0.7"><title>{row["label"]}</title></circle>'
        )
    return "".join(parts)


def _x(value: float) -> float:
    low, high = (math.log(bound) for bound in RANGE)
    clipped = min(max(value, RANGE[0]), RANGE[1])
    return SIDE * (math.log(clipped) - low) / (high - low)


def _y(value: float) -> float:
    return SIDE - _x(value)
