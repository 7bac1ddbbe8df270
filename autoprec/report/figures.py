"""The four figures of the page: whole steps, the Pareto front, sensitivity, paired loss gaps."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from autoprec.records import Basis, Option, Search, Verification
from autoprec.records.verification import loss_gaps
from autoprec.report import formats, svg
from autoprec.report.layer_frame import frame_rows
from autoprec.report.summary import Summary
from autoprec.report.svg import Scale

if TYPE_CHECKING:
    import pandas as pd

PLAIN = "{:,.6g}".format
SIGNED = partial(formats.share, sign=True)
WIDTH = 1080.0
LABEL_PX = 190.0
CLIP = 2.2  # the longest bar is cut where it is more than this many times the second longest
MOST_DOTS = 40  # layers in the sensitivity chart; the table has them all
PARETO_KEYS = {
    "t-front": "exact front, sum of the table (predicted)",
    "t-exact": "trial from the front",
    "t-sampler": "trial of the sampler",
    "t-repair": "repair of the exact plan",
    "t-uniform": "uniform plan",
    "t-infeasible": "trial outside the constraint",
    "t-chosen": "chosen",
}

SOURCES = {"corrected": "exact", "front": "exact", "drawn": "sampler"}  # shown as


def step_figure(found: Summary) -> Markup:
    """Return bars of the whole-step times with their spread; predicted ones are hatched."""
    steps, ceiling = found.steps, found.ceiling
    # one bar that is far longer may not make the others unreadable
    second, longest = sorted([0.0, *(step.high_ms or step.ms for step in steps.values())])[-2:]
    limit = second if longest > CLIP * second > 0.0 else longest
    scale = Scale(0.0, limit, LABEL_PX, WIDTH - 290.0)
    bottom = 26.0 + 38.0 * len(steps)
    parts = [svg.x_axis(scale, 18.0, bottom, label="ms per training step", show=PLAIN)]
    for index, (label, step) in enumerate(steps.items()):
        y, title, speedup = 26.0 + 38.0 * index, found.title(label), found.speedups.get(label)
        kind = f"o-{label}" if step.basis is Basis.MEASURED else f"o-{label} predicted"
        tip = f"{title}: {formats.ms(step.ms)} ms, {step.basis}, {step.samples} samples"
        words = f"{formats.ms(step.ms)} ms {step.basis}{' (cut)' if step.ms > limit else ''}"
        words += f", plan {formats.ratio(speedup.value)}" if speedup else ""
        size = {"x": LABEL_PX, "y": y, "width": scale(step.ms) - LABEL_PX, "height": 26.0, "rx": 2}
        end = scale(max(step.ms, step.high_ms or 0.0)) + 10.0
        parts.append(svg.text(LABEL_PX - 12.0, y + 18.0, title, kind="label", anchor="end"))
        parts.append(svg.mark("rect", kind=kind, tip=tip, **size))
        parts.append(svg.text(end, y + 18.0, words, kind="value"))
        if step.low_ms is not None and step.high_ms is not None:
            parts.append(svg.whisker(scale(step.low_ms), scale(step.high_ms), y + 13.0, tip=tip))
    if ceiling is not None:
        ms = ceiling.baseline.ms / ceiling.limit
        words = f"FP8's ceiling: {formats.ms(ms)} ms"
        parts.append(svg.marker(scale(ms), 18.0, bottom, words, kind="limit", tip=ceiling.sentence))
    return svg.picture(WIDTH, bottom + 42.0, parts, title="Time of one training step")


def pareto_figure(search: Search) -> Markup:
    """Return step time against gradient error: front, trials, chosen plan, bound and budget."""
    dots = list(_pareto_dots(search))
    times, errors = [dot.step_ms for dot in dots], [dot.grad_error for dot in dots]
    x = Scale(*svg.padded(min(times), max(times)), 84.0, WIDTH - 30.0)
    budget, bound_ms = search.grad_error_budget, search.bound_ms
    highest = max(*errors, budget if budget < 3.0 * max(errors) else 0.0)
    y = Scale(0.0, max(highest * 1.12, 1e-12), 380.0, 34.0)
    parts = [
        svg.x_axis(x, 34.0, 380.0, label="predicted step time, ms", show=PLAIN),
        svg.y_axis(y, 84.0, WIDTH - 30.0, label="gradient error", show=formats.share),
    ]
    if budget <= y.high:
        at, words = y(budget), f"gradient error budget {formats.share(budget)}"
        parts.append(svg.line(x.start, at, x.end, at, kind="limit"))
        parts.append(svg.text(x.end, at - 6.0, words, kind="tick", anchor="end"))
    if x.low <= bound_ms <= x.high:
        tip = f"no plan within the budget is faster than {formats.ms(bound_ms)} ms (additive)"
        at, words = x(bound_ms), "proven bound"
        parts.append(svg.marker(at, 34.0, 380.0, words, kind="bound", tip=tip, anchor="start"))
    # the front is a staircase: between two points the left one is the best there is
    stairs = ""
    for point in sorted(search.front, key=lambda point: point.step_ms):
        left, top = f"{x(point.step_ms):.1f}", f"{y(point.grad_error):.1f}"
        stairs += f"H{left}V{top}" if stairs else f"M{left},{top}"
    parts += [svg.mark("path", d=stairs, kind="front"), *_measured_line(search, x, y)]
    for dot in dots:
        across, up = x(dot.step_ms), y(dot.grad_error)
        if dot.kind == "t-chosen":
            star = f"M{across:.1f},{up - 9:.1f}l9,9l-9,9l-9,-9z"
            parts.append(svg.mark("path", d=star, kind=dot.kind, tip=dot.tip))
        else:
            radius = 3.5 if dot.kind == "t-front" else 5.0
            parts.append(svg.dot(across, up, radius, kind=dot.kind, tip=dot.tip))
    figure = svg.picture(WIDTH, 424.0, parts, title="Pareto front of step time and gradient error")
    return svg.legend(PARETO_KEYS.items()) + figure


def _measured_line(search: Search, x: Scale, y: Scale) -> list[Markup]:
    """Return the line through the measured front, from the least error to the least time."""
    points = [(x(p.step_ms), y(p.grad_error_measured or 0.0)) for p in search.measured_front]
    line = "L".join(f"{across:.1f},{up:.1f}" for across, up in points)
    return [svg.mark("path", d=f"M{line}", kind="front measured")] if points else []


def sensitivity_figure(layers: "pd.DataFrame", options: "pd.DataFrame") -> Markup:
    """Return every option's gradient error by layer, with standard errors, largest first."""
    seen = options[options["grad_error"] > 0.0]
    largest = seen.groupby("name", sort=False)["grad_error"].max()
    top = largest.sort_values(ascending=False, kind="stable").index[:MOST_DOTS]
    seen = seen[seen["name"].isin(top)]
    if seen.empty:
        return Markup("")
    low, high = seen["grad_error"].min() / 1.5, seen["grad_error"].max() * 1.6
    # Errors of layers span orders of magnitude, hence the log scale; one line per layer.
    x = Scale(low, high, 270.0, WIDTH - 30.0, is_log=True)
    bottom = 16.0 + 20.0 * len(top)
    label = "gradient error (log scale), with its standard error"
    parts = [svg.x_axis(x, 8.0, bottom, label=label, show=formats.share)]
    chosen = dict(zip(layers["name"], layers["option"], strict=True))
    heights = {name: 20.0 + 20.0 * index for index, name in enumerate(top)}
    for name, y in heights.items():
        words = svg.fitted(name, 245.0)
        parts.append(svg.line(x.start, y, x.end, y, kind="rule"))
        parts.append(svg.text(x.start - 12.0, y + 4.0, words, kind="label", anchor="end"))
    for row in frame_rows(seen):
        y, mean, stderr = heights[row["name"]], row["grad_error"], row["grad_error_stderr"]
        kind, option = _kind(row["option"]), formats.option(row["option"])
        error = f"{formats.with_stderr(mean, stderr)} ({row['grad_error_basis']})"
        tip = f"{row['name']}, {option}: gradient error {error}"
        if stderr:
            left, right = x(max(mean - stderr, x.low)), x(mean + stderr)
            parts.append(svg.line(left, y, right, y, kind=f"error {kind}"))
        kind += " ring" if row["option"] == chosen.get(row["name"]) else ""
        parts.append(svg.dot(x(mean), y, 5.0, kind=kind, tip=tip))
    keys = svg.legend((_kind(key), formats.option(key)) for key in seen["option"].unique())
    return keys + svg.picture(WIDTH, bottom + 44.0, parts, title="Gradient error by layer")


def gap_figure(verification: Verification) -> Markup:
    """Return the paired gap of every seed, the intervals, zero and the tolerance."""
    gaps = {"bf16_o2": verification.control_gap, "plan": verification.gap}
    seeds = {label: loss_gaps(verification.branches, label) for label in gaps}
    tolerance = verification.loss_tolerance
    words = f"tolerance {formats.share(tolerance)}"
    ends = [0.0, tolerance, *(gap for by_seed in seeds.values() for gap in by_seed.values())]
    ends += [end for gap in gaps.values() if gap for end in (gap.low, gap.high)]
    x = Scale(*svg.padded(min(ends), max(ends)), 190.0, WIDTH - 40.0)
    parts = [
        svg.x_axis(x, 24.0, 130.0, label="relative loss gap to FP32", show=SIGNED),
        svg.marker(x(0.0), 24.0, 130.0, "FP32", kind="zero"),
        svg.marker(x(tolerance), 24.0, 130.0, words, kind="limit"),
    ]
    # Each branch has its interval on one line, and the seeds below it.
    titles = {"bf16_o2": "BF16 O2 (control)", "plan": "this plan"}
    for y, (label, gap) in zip((52.0, 100.0), gaps.items(), strict=True):
        kind = f"b-{label}"
        parts.append(svg.text(178.0, y + 4.0, titles[label], kind="label", anchor="end"))
        for seed, value in seeds[label].items():
            tip = f"seed {seed}: {SIGNED(value)}"
            parts.append(svg.dot(x(value), y + 12.0, 4.0, kind=f"{kind} pale", tip=tip))
        if gap is not None:
            tip = f"mean {formats.gap(gap)}"
            parts.append(svg.whisker(x(gap.low), x(gap.high), y, kind=f"interval {kind}", tip=tip))
            parts.append(svg.dot(x(gap.mean), y, 6.0, kind=kind, tip=tip))
    return svg.picture(WIDTH, 174.0, parts, title="Paired loss gaps by seed")


class _Dot(NamedTuple):
    """One plan of the search, as the Pareto figure shows it."""

    kind: str  # its CSS class
    name: str
    step_ms: float
    grad_error: float
    basis: Basis
    options: Sequence[Option]

    @property
    def tip(self) -> str:
        """The plan in words."""
        counts = Counter(map(formats.option, self.options))
        layers = ", ".join(f"{count} {option}" for option, count in counts.items())
        return (
            f"{self.name}: {formats.ms(self.step_ms)} ms predicted, gradient error "
            f"{formats.share(self.grad_error)} ({self.basis}), {layers}"
        )


def _pareto_dots(search: Search) -> Iterator[_Dot]:
    """Yield the plans of a search, those to be drawn above others last."""
    for trial in search.trials:
        source = SOURCES.get(trial.source, trial.source)
        kind = f"t-{source}" if trial.feasible else "t-infeasible"
        kind = kind if kind in PARETO_KEYS else "t-sampler"
        name = f"trial {trial.number} ({trial.source}{'' if trial.feasible else ', infeasible'})"
        basis = trial.grad_error_basis
        yield _Dot(kind, name, trial.step_ms, trial.grad_error, basis, trial.options)
    for p in search.front:
        yield _Dot("t-front", "front", p.step_ms, p.grad_error, Basis.PREDICTED, p.options)
    chosen = search.chosen
    error, basis = chosen.grad_error_measured, Basis.MEASURED
    if error is None:
        error, basis = chosen.grad_error, Basis.PREDICTED
    yield _Dot("t-chosen", "chosen", chosen.step_ms, error, basis, chosen.options)


def _kind(key: str) -> str:
    """Return the CSS class of an option's mark."""
    option = Option.parse(key)
    return f"e-{option.recipe or option.precision}"
