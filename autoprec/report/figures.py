"""The four figures of the page: whole steps, the Pareto front, sensitivity, paired loss gaps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from autoprec.records import (
    Basis,
    Estimate,
    FrontPoint,
    LossGap,
    Option,
    Search,
    Verification,
)
from autoprec.report.answers import Ceiling
from autoprec.report.formats import (
    shown_grad_error,
    shown_ms,
    shown_option,
    shown_ratio,
    shown_share,
    step_title,
)
from autoprec.report.layer_frame import Row, frame_rows
from autoprec.report.step_times import Speedup, Step, spread_title
from autoprec.report.svg import (
    Scale,
    bar,
    dot,
    fitted,
    legend,
    line,
    mark,
    padded,
    path,
    picture,
    plain_number,
    text,
    whisker,
    x_axis,
    y_axis,
)

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 1080.0
LABEL_PX = 190.0
CLIP = 2.2  # the longest bar is cut where it is more than this many times the second longest
MOST_DOTS = 40  # layers in the sensitivity chart; the table has them all
PARETO_KEYS = (
    ("t-front", "exact front, sum of the table (predicted)"),
    ("t-exact", "trial from the front"),
    ("t-sampler", "trial of the sampler"),
    ("t-repair", "repair of the exact plan"),
    ("t-uniform", "uniform plan"),
    ("t-infeasible", "trial outside the constraint"),
    ("t-chosen", "chosen"),
)
SOURCE_KINDS = {
    "exact": "t-exact",
    "uniform": "t-uniform",
    "sampler": "t-sampler",
    "repair": "t-repair",
}
BRANCH_KINDS = {"reference": "b-reference", "bf16_o2": "b-bf16_o2", "plan": "b-plan"}


def step_figure(
    steps: Mapping[str, Step], speedups: Mapping[str, Speedup], ceiling: Ceiling | None
) -> Markup:
    """Return bars of the whole-step times with their spread; predicted ones are hatched."""
    if not steps:
        return Markup("")
    limit = bar_limit([step.high_ms or step.ms for step in steps.values()])
    scale = Scale(0.0, limit, LABEL_PX, WIDTH - 290.0)
    parts: list[Markup] = []
    y = 26.0
    for label, step in steps.items():
        parts += _step_bar(label, step, speedups.get(label), scale=scale, y=y)
        y += 38.0
    parts += _ceiling_line(ceiling, scale=scale, bottom=y)
    axis = x_axis(scale, 18.0, y, label="ms per training step", show=plain_number)
    return picture(WIDTH, y + 42.0, [axis, *parts], title="Time of one training step")


def step_note(steps: Mapping[str, Step]) -> str:
    """Return what the bars and whiskers of the steps are."""
    title = spread_title(steps.values())
    if title == "80 % interval":
        return "Bars and whiskers are predicted: the median and its 80 % interval"
    more = ", with what the spread of the parts gives" if title == "spread" else ""
    return (
        "Bars are medians, whiskers the 20th to 80th percentile of the samples; hatched bars are "
        f"predicted{more}"
    )


def bar_limit(lengths: Sequence[float]) -> float:
    """Return the end of the axis: one that is far longer may not make the others unreadable."""
    longest, *others = sorted(lengths, reverse=True)
    second = others[0] if others else 0.0
    return second if second > 0.0 and longest > CLIP * second else longest


def pareto_figure(search: Search) -> Markup:
    """Return step time against gradient error: front, trials, chosen plan, bound and budget."""
    points = [
        (p.step_ms, p.grad_error_measured or p.grad_error) for p in (*search.front, search.chosen)
    ]
    points += [(trial.step_ms, trial.grad_error) for trial in search.trials]
    x = Scale(*padded(min(p[0] for p in points), max(p[0] for p in points)), 84.0, WIDTH - 30.0)
    budget = search.grad_error_budget
    reach = max(grad_error for _, grad_error in points)
    highest = max(reach, budget) if budget < 3.0 * reach else reach
    y = Scale(0.0, max(highest * 1.12, 1e-12), 380.0, 34.0)
    parts = [
        x_axis(x, 34.0, 380.0, label="predicted step time, ms", show=plain_number),
        y_axis(y, 84.0, WIDTH - 30.0, label="gradient error", show=shown_share),
        *_pareto_lines(search, x, y),
        *_trial_marks(search, x, y),
        *_front_marks(search.front, x, y),
        _star(
            x(search.chosen.step_ms),
            y(search.chosen.grad_error_measured or search.chosen.grad_error),
            search,
        ),
    ]
    return legend(PARETO_KEYS) + picture(
        WIDTH, 424.0, parts, title="Pareto front of step time and gradient error"
    )


def sensitivity_figure(layers: "pd.DataFrame", options: "pd.DataFrame") -> Markup:
    """Return every option's gradient error by layer, with standard errors, largest first."""
    seen = options[options["grad_error"] > 0.0]
    largest = seen.groupby("name", sort=False)["grad_error"].max()
    top = largest.sort_values(ascending=False, kind="stable").index[:MOST_DOTS]
    seen = seen[seen["name"].isin(top)]
    if seen.empty:
        return Markup("")
    low, high = seen["grad_error"].min() / 1.5, seen["grad_error"].max() * 1.6
    x = Scale(low, high, 270.0, WIDTH - 30.0, is_log=True)
    bottom = 16.0 + 20.0 * len(top)
    label = "gradient error (log scale), with its standard error"
    parts = [x_axis(x, 8.0, bottom, label=label, show=shown_share)]
    chosen = dict(zip(layers["name"], layers["option"], strict=True))
    heights = {name: 20.0 + 20.0 * index for index, name in enumerate(top)}
    for name, y in heights.items():
        parts.append(line(x.start, y, x.end, y, kind="rule"))
        words = fitted(name, 245.0)
        parts.append(text(x.start - 12.0, y + 4.0, words, kind="label", anchor="end"))
    for row in frame_rows(seen):
        is_chosen = row["option"] == chosen.get(row["name"])
        parts += _sensitivity_marks(row, x, y=heights[row["name"]], is_chosen=is_chosen)
    keys = legend([(option_kind(key), shown_option(key)) for key in seen["option"].unique()])
    return keys + picture(WIDTH, bottom + 44.0, parts, title="Gradient error by layer")


def gap_figure(verification: Verification) -> Markup:
    """Return the paired gap of every seed, the intervals, zero and the tolerance."""
    seeds = {label: seed_gaps(verification, label) for label in ("bf16_o2", "plan")}
    gaps: Mapping[str, LossGap | None]
    gaps = {"bf16_o2": verification.control_gap, "plan": verification.gap}
    ends = [
        0.0,
        verification.loss_tolerance,
        *(gap for by in seeds.values() for gap in by.values()),
    ]
    for known in gaps.values():
        ends += [known.low, known.high] if known else []
    x = Scale(*padded(min(ends), max(ends)), 190.0, WIDTH - 40.0)
    parts = [x_axis(x, 24.0, 130.0, label="relative loss gap to FP32", show=_signed)]
    for value, kind, words in (
        (0.0, "zero", "FP32"),
        (
            verification.loss_tolerance,
            "limit",
            f"tolerance {shown_share(verification.loss_tolerance)}",
        ),
    ):
        parts.append(line(x(value), 24.0, x(value), 130.0, kind=kind))
        parts.append(text(x(value), 16.0, words, kind="tick", anchor="middle"))
    for index, label in enumerate(("bf16_o2", "plan")):
        parts += _gap_marks(label, gaps[label], seeds[label], x=x, y=52.0 + 48.0 * index)
    return picture(WIDTH, 174.0, parts, title="Paired loss gaps by seed")


def seed_gaps(verification: Verification, label: str) -> dict[int, float]:
    """Return the relative gap of each seed whose branch and reference were evaluated."""
    references = {b.seed: b.eval_loss for b in verification.branches if b.label == "reference"}
    return {
        branch.seed: (branch.eval_loss - reference) / abs(reference)
        for branch in verification.branches
        if branch.label == label
        and branch.eval_loss is not None
        and (reference := references.get(branch.seed))
    }


def option_kind(key: str) -> str:
    """Return the CSS class of an option's mark."""
    option = Option.parse(key)
    return f"e-{option.recipe or option.precision}"


def _ceiling_line(ceiling: Ceiling | None, *, scale: Scale, bottom: float) -> list[Markup]:
    """Mark the shortest step that FP8 could reach."""
    if ceiling is None or ceiling.at_peak is None:
        return []
    ms = ceiling.baseline.ms / ceiling.at_peak
    words = f"FP8's ceiling: {shown_ms(ms)} ms"
    x = scale(ms)
    return [
        line(x, 16.0, x, bottom, kind="limit", tip=ceiling.sentence),
        text(x, 11.0, words, kind="tick", anchor="middle"),
    ]


def _step_bar(
    label: str, step: Step, speedup: Speedup | None, *, scale: Scale, y: float
) -> list[Markup]:
    basis = "" if step.basis is Basis.MEASURED else " predicted"
    tip = f"{step_title(label)}: {shown_ms(step.ms)} ms, {step.basis}, {step.samples} samples"
    parts = [
        text(LABEL_PX - 12.0, y + 18.0, step_title(label), kind="label", anchor="end"),
        bar(scale.start, y, scale(step.ms) - scale.start, 26.0, kind=f"o-{label}{basis}", tip=tip),
    ]
    if step.low_ms is not None and step.high_ms is not None:
        parts.append(whisker(scale(step.low_ms), scale(step.high_ms), y + 13.0, tip=tip))
    words = f"{shown_ms(step.ms)} ms {step.basis}{' (cut)' if step.ms > scale.high else ''}"
    if speedup is not None:
        words += f", plan {shown_ratio(speedup.value)}"
    x = scale(max(step.ms, step.high_ms or 0.0)) + 10.0
    return [*parts, text(x, y + 18.0, words, kind="value")]


def _pareto_lines(search: Search, x: Scale, y: Scale) -> list[Markup]:
    parts = []
    if search.grad_error_budget <= y.high:
        at = y(search.grad_error_budget)
        parts.append(line(x.start, at, x.end, at, kind="limit"))
        words = f"gradient error budget {shown_share(search.grad_error_budget)}"
        parts.append(text(x.end, at - 6.0, words, kind="tick", anchor="end"))
    if x.low <= search.bound_ms <= x.high:
        at = x(search.bound_ms)
        tip = f"no plan within the budget is faster than {shown_ms(search.bound_ms)} ms (additive)"
        parts.append(line(at, y.end, at, y.start, kind="bound", tip=tip))
        parts.append(text(at + 6.0, y.end + 8.0, "proven bound", kind="tick"))
    return parts


def _trial_marks(search: Search, x: Scale, y: Scale) -> list[Markup]:
    parts = []
    for trial in search.trials:
        kind = SOURCE_KINDS.get(trial.source, "t-sampler") if trial.feasible else "t-infeasible"
        tip = (
            f"trial {trial.number} ({trial.source}{'' if trial.feasible else ', infeasible'}): "
            f"{shown_ms(trial.step_ms)} ms predicted, gradient error "
            f"{shown_share(trial.grad_error)} ({trial.grad_error_basis}), "
            f"{_option_counts(trial.options)}"
        )
        parts.append(dot(x(trial.step_ms), y(trial.grad_error), 5.0, kind=kind, tip=tip))
    return parts


def _front_marks(front: Sequence[FrontPoint], x: Scale, y: Scale) -> list[Markup]:
    ranked = sorted(front, key=lambda point: point.step_ms)
    stairs: list[tuple[float, float]] = []
    for point in ranked:
        at = (x(point.step_ms), y(point.grad_error))
        stairs += [(at[0], stairs[-1][1]), at] if stairs else [at]
    parts = [path(stairs, kind="front")]
    for point in ranked:
        tip = (
            f"front: {shown_ms(point.step_ms)} ms, gradient error {shown_share(point.grad_error)} "
            f"(both predicted by the tables), {_option_counts(point.options)}"
        )
        parts.append(dot(x(point.step_ms), y(point.grad_error), 3.5, kind="t-front", tip=tip))
    return parts


def _star(x: float, y: float, search: Search) -> Markup:
    chosen = search.chosen
    grad_error = (
        chosen.grad_error if chosen.grad_error_measured is None else chosen.grad_error_measured
    )
    basis = "predicted" if chosen.grad_error_measured is None else "measured"
    tip = (
        f"chosen: {shown_ms(chosen.step_ms)} ms predicted, gradient error "
        f"{shown_share(grad_error)} {basis}, "
        f"{_option_counts(chosen.options)}"
    )
    way = f"M{x:.1f},{y - 9:.1f}l9,9l-9,9l-9,-9z"
    return mark("path", d=way, kind="t-chosen", tip=tip)


def _option_counts(options: Sequence[Option]) -> str:
    counts = {option: options.count(option) for option in dict.fromkeys(options)}
    return ", ".join(f"{count} {shown_option(option)}" for option, count in counts.items())


def _sensitivity_marks(row: Row, x: Scale, *, y: float, is_chosen: bool) -> list[Markup]:
    mean, stderr, kind = row["grad_error"], row["grad_error_stderr"], option_kind(row["option"])
    error = shown_grad_error(Estimate(mean=mean, stderr=stderr))
    option = shown_option(row["option"])
    tip = f"{row['name']}, {option}: gradient error {error} ({row['grad_error_basis']})"
    whisker = []
    if stderr:
        low, high = x(max(mean - stderr, x.low)), x(mean + stderr)
        whisker.append(line(low, y, high, y, kind=f"error {kind}"))
    return [*whisker, dot(x(mean), y, 5.0, kind=kind + " ring" * is_chosen, tip=tip)]


def _gap_marks(
    label: str, gap: LossGap | None, seeds: Mapping[int, float], *, x: Scale, y: float
) -> list[Markup]:
    kind = BRANCH_KINDS[label]
    title = "BF16 O2 (control)" if label == "bf16_o2" else "this plan"
    parts = [text(178.0, y + 4.0, title, kind="label", anchor="end")]
    for seed, value in seeds.items():
        tip = f"seed {seed}: {_signed(value)}"
        parts.append(dot(x(value), y + 12.0, 4.0, kind=f"{kind} pale", tip=tip))
    if gap is not None:
        words = (
            f"mean {_signed(gap.mean)}, {gap.confidence:.0%} interval {_signed(gap.low)} to "
            f"{_signed(gap.high)}, {gap.seeds} seeds"
        )
        parts.append(whisker(x(gap.low), x(gap.high), y, kind=f"interval {kind}", tip=words))
        parts.append(dot(x(gap.mean), y, 6.0, kind=kind, tip=words))
    return parts


def _signed(value: float) -> str:
    return shown_share(value, sign=True)
