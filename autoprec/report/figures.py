"""The figures of the page: what layers take and cost, whole steps, the proof, the search."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

from markupsafe import Markup

from autoprec.records import Basis, FrontPoint, Search, SearchTrial
from autoprec.records.cost import BASELINES
from autoprec.records.verification import loss_gaps
from autoprec.report import formats, svg
from autoprec.report.formats import clean_text
from autoprec.report.layer_frame import Row
from autoprec.report.layer_table import LayerGroup, fitted, saving_order
from autoprec.report.summary import Summary
from autoprec.report.svg import Scale

PLAIN = "{:,.6g}".format
SIGNED = partial(formats.share, sign=True)
WIDTH, SIDE_WIDTH = 860.0, 400.0  # of the main figures, and of those beside the first one
BARS_PX = (306.0, 610.0)  # where the bars of layers begin and end
SAVED_PX, ERROR_PX = 684.0, (704.0, 776.0)
MOST_CHARACTERS = 43  # of a name, in the 12 px system font, left of the bars
CLIP = 2.2  # times longer than the others, from which a bar is cut and a plan left out
MOST_BARS = 12  # groups of layers; the table has them all
PARETO_KEYS = {
    "bound": "front within 0.1 %, sums of the tables (predicted)",
    "tried": "plan tried",
    "outside": "outside the constraint",
    "o-plan": "chosen",
}


def layers_figure(groups: Sequence[LayerGroup]) -> Markup:
    """Return each group's time in BF16 O2 and in the plan, what is saved, and its gradient error.

    The groups whose time changes most are shown, the largest saving first, the others in one row.
    """
    timed = [group.row for group in groups if group.row["saved_vs_bf16_o2_ms"] is not None]
    if not timed:
        return Markup("")
    rows = _most_changed(timed)
    drawn = [row for row in rows if row["option"]]
    longest = max(1e-30, *(row[t] for row in drawn for t in ("bf16_o2_total_ms", "total_ms")))
    x, bottom = Scale(0.0, longest, *BARS_PX), 36.0 + 26.0 * len(rows)
    known = [row for row in drawn if row["grad_error"] is not None]
    errors = Scale(0.0, max([1e-30, *(row["grad_error"] for row in known)]), *ERROR_PX)
    label = f"ms per step, forward and backward ({_bases(timed, 'time_basis')})"
    parts = [
        svg.x_axis(x, 30.0, bottom, label=label, show=PLAIN),
        svg.text(SAVED_PX, 20.0, "saved, ms", kind="tick", anchor="end"),
    ]
    if known:  # two bases are too long for one line
        bases = _bases(known, "grad_error_basis")
        lines = (7.0, "gradient error"), (20.0, f"({bases})")
        parts += [svg.text(ERROR_PX[0], y, line, kind="tick") for y, line in lines]
    for place, row in enumerate(rows):
        parts += _layer_marks(row, 36.0 + 26.0 * place, x, errors)
    keys = {"o-bf16_o2 pale": "all in BF16 O2"}
    keys |= {f"o-{row['precision']}": f"this plan: {row['precision']}" for row in timed}
    title = "Time of layers in BF16 O2 and in the plan"
    return svg.legend(keys.items()) + svg.picture(WIDTH, bottom + 40.0, parts, title=title)


def _most_changed(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in order of what is saved, those that change least as one."""
    most = sorted(rows, key=lambda row: (-abs(row["saved_vs_bf16_o2_ms"]), *saving_order(row)))
    shown, rest = most[:MOST_BARS], most[MOST_BARS:]
    if len(rest) == 1:
        shown, rest = most, []
    shown.sort(key=saving_order)
    if rest:
        known = all(row["grad_error"] is not None for row in rest)
        sums = ["bf16_o2_total_ms", "total_ms", "saved_vs_bf16_o2_ms", *["grad_error"] * known]
        count = sum(row["layers"] for row in rest)
        whole = {name: math.fsum(row[name] for row in rest) for name in sums}
        about = {"name": formats.count_of(count, "other layer"), "option": "", "grad_error": None}
        shown.append(about | whole)
    return shown


def _layer_marks(row: Row, y: float, x: Scale, errors: Scale) -> Iterator[Markup]:
    """Yield one row of the figure: the plan's bar within the pale one of BF16 O2."""
    base_ms, own_ms, error = row["bf16_o2_total_ms"], row["total_ms"], row["grad_error"]
    times = f"{formats.ms(base_ms)} ms in BF16 O2, {formats.ms(own_ms)} ms in the plan"
    base, error_px = y + 14.0, 0.0
    name = fitted(clean_text(row["name"]), MOST_CHARACTERS)
    yield svg.text(BARS_PX[0] - 10.0, base, name, kind="label", anchor="end")
    if row["option"]:
        tip = f"{row['name']} {formats.option(row['option'])}: {times} ({row['time_basis']})"
        yield svg.bar(x, base_ms, y, 19.0, kind="o-bf16_o2 pale", tip=tip)
        yield svg.bar(x, own_ms, y + 4.0, 11.0, kind=f"o-{row['precision']}", tip=tip)
        yield svg.bar(errors, error or 0.0, y + 4.0, 11.0, kind="error")
        error_px = errors(error or 0.0) - errors.start
    else:  # a sum of many, on no scale with one of them
        yield svg.text(x.start + 6.0, base, times, kind="value")
    saved = formats.ms(row["saved_vs_bf16_o2_ms"])
    yield svg.text(SAVED_PX, base, saved, kind="value", anchor="end")
    if error is not None:
        yield svg.text(errors.start + error_px + 6.0, base, formats.share(error), kind="value")


def _bases(rows: Sequence[Row], column: str) -> str:
    """Return the bases of a column's values; those of most rows first."""
    found = Counter(row[column] or Basis.UNKNOWN.value for row in rows)
    return ", ".join(basis for basis, _ in found.most_common())


def steps_figure(found: Summary) -> Markup:
    """Return bars of the plan's step and of its baselines, with their spread."""
    steps = {label: found.steps[label] for label in ("plan", *BASELINES) if label in found.steps}
    if not steps:
        return Markup("")
    # one bar that is far longer may not make the others unreadable
    second, longest = sorted([0.0, *(step.timing.p80_ms for step in steps.values())])[-2:]
    limit = second if longest > CLIP * second > 0.0 else longest
    x = Scale(0.0, limit, 4.0, SIDE_WIDTH - 12.0)
    parts = []
    for place, (label, step) in enumerate(steps.items()):
        y, speedup = 14.0 + 42.0 * place, found.speedups.get(label)
        cut = " (cut)" if step.ms > limit else ""
        words = f"{formats.ms(step.ms)} ms {step.basis}{cut}"
        words += f", plan {formats.ratio(speedup.value)}" if speedup else ""
        parts.append(svg.text(x.start, y, formats.step_title(label), kind="label"))
        parts.append(svg.text(x.end, y, words, kind="value", anchor="end"))
        parts.append(svg.bar(x, step.ms, y + 7.0, 16.0, kind=f"o-{label} {step.basis}", tip=words))
        low, high = step.timing.p20_ms, step.timing.p80_ms
        if low < high:
            parts.append(svg.whisker(x(low), x(high), y + 15.0, tip=words))
    height = 42.0 * len(steps)
    return svg.picture(SIDE_WIDTH, height, parts, title="Time of one training step")


def proof_figure(found: Summary) -> Markup:
    """Return the plan's loss gap with its interval and seeds against the tolerance, and BF16's."""
    proof, promise = found.run.verification, found.promise
    if promise.gap is None or promise.loss_tolerance is None:
        return Markup("")
    others = {"bf16_o2": proof.control_gap, "as_written": proof.written_gap} if proof else {}
    gaps = {"plan": promise.gap} | {label: gap for label, gap in others.items() if gap}
    seeds = {label: loss_gaps(proof.branches, label) if proof else {} for label in gaps}
    tolerance = promise.loss_tolerance
    ends = [0.0, tolerance, *(gap for by_seed in seeds.values() for gap in by_seed.values())]
    ends += [end for gap in gaps.values() for end in (gap.low, gap.high)]
    x = Scale(*svg.padded(min(ends), max(ends)), 4.0, SIDE_WIDTH - 12.0)
    bottom, at = 20.0 + 44.0 * len(gaps), x(tolerance)
    words, anchor = f"tolerance {formats.share(tolerance)}", "end" if at > 200.0 else "start"
    parts = [
        svg.x_axis(x, 16.0, bottom, label="relative loss gap to FP32 (measured)", show=SIGNED),
        svg.line(x(0.0), 16.0, x(0.0), bottom, kind="zero"),
        svg.marker(at, 16.0, bottom, words, kind="limit", anchor=anchor),
    ]
    titles = {label: formats.step_title(label) for label in gaps}
    titles |= {"bf16_o2": "BF16 O2, for scale"}
    # each has its name, its interval and the seeds of it below each other
    for place, (label, gap) in enumerate(gaps.items()):
        kind, tip, y = f"b-{label}", f"{titles[label]}: {formats.gap(gap)}", 44.0 * place
        parts.append(svg.text(x.start, y + 30.0, titles[label], kind="label"))
        for seed, value in seeds[label].items():
            dot_tip = f"seed {seed}: {SIGNED(value)}"
            parts.append(svg.dot(x(value), y + 51.0, 4.0, kind=f"{kind} pale", tip=dot_tip))
        ends_px = (x(gap.low), x(gap.high))
        parts.append(svg.whisker(*ends_px, y + 40.0, kind=f"interval {kind}", tip=tip))
        parts.append(svg.dot(x(gap.mean), y + 40.0, 6.0, kind=kind, tip=tip))
    return svg.picture(SIDE_WIDTH, bottom + 40.0, parts, title="Loss gap to FP32")


def pareto_figure(search: Search) -> Markup:
    """Return step time against gradient error: the front, plans tried, the chosen one, bounds."""
    chosen, known = search.chosen, search.chosen.grad_error_measured
    front = [plan for plan in search.front if plan.step_ms <= CLIP * chosen.step_ms]
    trials = [plan for plan in search.trials if plan.step_ms <= CLIP * chosen.step_ms]
    plans: list[FrontPoint | SearchTrial] = [*front, *trials]
    error = chosen.grad_error if known is None else known
    times = [chosen.step_ms, *(plan.step_ms for plan in plans)]
    errors = [error, *(plan.grad_error for plan in plans)]
    x = Scale(*svg.padded(min(times), max(times)), 84.0, WIDTH - 30.0)
    budget = search.grad_error_budget
    highest = max(*errors, budget if budget < 3.0 * max(errors) else 0.0)
    y = Scale(0.0, max(highest * 1.12, 1e-12), 300.0, 34.0)
    parts = [
        svg.x_axis(x, 34.0, 300.0, label="predicted step time, ms", show=PLAIN),
        svg.y_axis(y, 84.0, WIDTH - 30.0, label="gradient error", show=formats.share),
    ]
    parts += _limits(search, x, y)
    # the front is a staircase: between two points the left one is the best there is
    stairs = ""
    for point in sorted(front, key=lambda point: point.step_ms):
        left, top = f"{x(point.step_ms):.1f}", f"{y(point.grad_error):.1f}"
        stairs += f"H{left}V{top}" if stairs else f"M{left},{top}"
    parts.append(svg.mark("path", d=stairs, kind="front"))
    for trial in trials:
        kind, basis = ("tried", "outside")[not trial.feasible], trial.grad_error_basis
        tip = _plan_tip(f"trial {trial.number}", trial, trial.grad_error, basis)
        parts.append(svg.dot(x(trial.step_ms), y(trial.grad_error), 5.0, kind=kind, tip=tip))
    tip = _plan_tip("chosen", chosen, error, Basis.PREDICTED if known is None else Basis.MEASURED)
    star = f"M{x(chosen.step_ms):.1f},{y(error) - 9:.1f}l9,9l-9,9l-9,-9z"
    parts.append(svg.mark("path", d=star, kind="o-plan", tip=tip))
    title = "Step time and gradient error of plans"
    return svg.legend(PARETO_KEYS.items()) + svg.picture(WIDTH, 344.0, parts, title=title)


def _limits(search: Search, x: Scale, y: Scale) -> Iterator[Markup]:
    """Yield the budget and the proven bound, as far as they are within the figure."""
    budget, bound_ms = search.grad_error_budget, search.bound_ms
    if budget <= y.high:
        at, words = y(budget), f"gradient error budget {formats.share(budget)}"
        yield svg.line(x.start, at, x.end, at, kind="limit")
        yield svg.text(x.end, at - 6.0, words, kind="tick", anchor="end")
    if x.low <= bound_ms <= x.high:
        tip = f"no plan within the budget is faster than {formats.ms(bound_ms)} ms (additive)"
        words = "proven bound"
        yield svg.marker(x(bound_ms), 34.0, 300.0, words, kind="bound", tip=tip, anchor="start")


def _plan_tip(name: str, plan: FrontPoint | SearchTrial, grad_error: float, basis: Basis) -> str:
    """Return a plan of the search in words."""
    counts = Counter(map(formats.option, plan.options))
    layers = ", ".join(f"{count} {option}" for option, count in counts.items())
    error = f"gradient error {formats.share(grad_error)} ({basis})"
    return f"{name}: {formats.ms(plan.step_ms)} ms predicted, {error}, {layers}"
