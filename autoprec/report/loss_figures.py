"""Figures of loss: the Pareto front, sensitivity by layer, verification curves, paired gaps."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from autoprec.records import (
    BF16_O2,
    FP32,
    Branch,
    FrontPoint,
    LossGap,
    Option,
    Search,
    Verification,
)
from autoprec.report.charts import (
    Scale,
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
from autoprec.report.formats import (
    shown_grad_error,
    shown_ms,
    shown_option,
    shown_share,
    step_title,
)
from autoprec.report.runs import RunRecords
from autoprec.report.table import LayerRow, OptionRow

WIDTH = 1080.0
HALF = 530.0
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


def pareto_figure(search: Search) -> Markup:
    """Return step time against e: the front, every trial, the chosen plan, bound and budget."""
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
        y_axis(y, 84.0, WIDTH - 30.0, label="gradient perturbation e", show=shown_share),
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
        WIDTH, 424.0, parts, title="Pareto front of step time and e"
    )


def sensitivity_figure(rows: Sequence[LayerRow]) -> Markup:
    """Return e of every option by layer, with standard errors, the largest first."""
    ranked = sorted((row for row in rows if _largest_e(row) > 0.0), key=_largest_e, reverse=True)
    top = ranked[:MOST_DOTS]
    if not top:
        return Markup("")
    values = [grad_error for row in top for o in row.options if (grad_error := _e(o)) > 0.0]
    x = Scale(min(values) / 1.5, max(values) * 1.6, 270.0, WIDTH - 30.0, is_log=True)
    bottom = 16.0 + 20.0 * len(top)
    parts = [x_axis(x, 8.0, bottom, label="e (log scale), with standard error", show=shown_share)]
    for index, row in enumerate(top):
        parts += _sensitivity_marks(row, x, y=20.0 + 20.0 * index)
    options = dict.fromkeys(o.option for row in top for o in row.options if _e(o) > 0.0)
    keys = legend([(option_kind(option), shown_option(option)) for option in options])
    return keys + picture(WIDTH, bottom + 44.0, parts, title="Gradient perturbation by layer")


def curve_figure(verification: Verification) -> Markup:
    """Return the loss of every branch over its steps."""
    branches = [b for b in verification.branches if len(b.curve) > 1]
    if not branches:
        return Markup("")
    losses = [loss for branch in branches for loss in branch.curve]
    x = Scale(0.0, max(len(b.curve) for b in branches) - 1.0, 70.0, HALF - 12.0)
    y = Scale(*padded(min(losses), max(losses)), 250.0, 34.0)
    parts = [_branch_axes(x, y, label="training loss")]
    for branch in branches:
        tip = f"{step_title(branch.label)}, seed {branch.seed}"
        points = [(x(at), y(loss)) for at, loss in enumerate(branch.curve)]
        parts.append(path(points, kind=f"curve {_branch_kind(branch)}", tip=tip))
    return picture(HALF, 296.0, parts, title="Loss of the branches")


def drift_figure(verification: Verification) -> Markup:
    """Return each branch's loss relative to its seed's reference, over the branch's steps."""
    drifts = _drifts(verification)
    if not drifts:
        return Markup("")
    values = [value for _, drift in drifts for value in drift]
    x = Scale(0.0, max(len(drift) for _, drift in drifts) - 1.0, 84.0, HALF - 12.0)
    y = Scale(*padded(min(*values, 0.0), max(*values, 0.0)), 250.0, 34.0)
    parts = [_branch_axes(x, y, label="training loss against the reference")]
    parts.append(line(84.0, y(0.0), HALF - 12.0, y(0.0), kind="zero"))
    for branch, drift in drifts:
        tip = f"{step_title(branch.label)}, seed {branch.seed}"
        points = [(x(at), y(value)) for at, value in enumerate(drift)]
        parts.append(path(points, kind=f"curve {_branch_kind(branch)}", tip=tip))
    return picture(HALF, 296.0, parts, title="Loss relative to the reference")


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


def loss_figure(run: RunRecords) -> Markup:
    """Return the reference's loss during the warm-up of the sensitivity stage."""
    curve = run.sensitivity.loss_curve if run.sensitivity else ()
    if len(curve) < 2:
        return Markup("")
    losses = [loss for _, loss in curve]
    x = Scale(curve[0][0], curve[-1][0], 70.0, HALF - 12.0)
    y = Scale(*padded(min(losses), max(losses)), 210.0, 34.0)
    points = [(x(step), y(loss)) for step, loss in curve]
    parts = [
        x_axis(x, 34.0, 210.0, label="warm-up step", show=lambda at: f"{at:.0f}"),
        y_axis(y, 70.0, HALF - 12.0, label="reference loss", show=plain_number),
        path(points, kind="curve b-reference"),
    ]
    return picture(HALF, 256.0, parts, title="Loss of the reference")


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


def option_kind(option: Option) -> str:
    """Return the CSS class of an option's mark."""
    if option == FP32:
        return "e-fp32"
    return "e-bf16_o2" if option == BF16_O2 else f"e-{option.recipe}"


def _pareto_lines(search: Search, x: Scale, y: Scale) -> list[Markup]:
    parts = []
    if search.grad_error_budget <= y.high:
        at = y(search.grad_error_budget)
        parts.append(line(x.start, at, x.end, at, kind="limit"))
        words = f"e budget {shown_share(search.grad_error_budget)}"
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
            f"{shown_ms(trial.step_ms)} ms predicted, e "
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
            f"front: {shown_ms(point.step_ms)} ms, e {shown_share(point.grad_error)} (both "
            f"predicted by the "
            f"tables), {_option_counts(point.options)}"
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
        f"chosen: {shown_ms(chosen.step_ms)} ms predicted, e {shown_share(grad_error)} {basis}, "
        f"{_option_counts(chosen.options)}"
    )
    way = f"M{x:.1f},{y - 9:.1f}l9,9l-9,9l-9,-9z"
    return mark("path", d=way, kind="t-chosen", tip=tip)


def _option_counts(options: Sequence[Option]) -> str:
    counts = {option: options.count(option) for option in dict.fromkeys(options)}
    return ", ".join(f"{count} {shown_option(option)}" for option, count in counts.items())


def _sensitivity_marks(row: LayerRow, x: Scale, *, y: float) -> list[Markup]:
    parts = [
        line(x.start, y, x.end, y, kind="rule"),
        text(x.start - 12.0, y + 4.0, fitted(row.name, 245.0), kind="label", anchor="end"),
    ]
    for option in row.options:
        effect = option.sensitivity
        if effect is None or effect.grad_error.mean <= 0.0:
            continue
        mean, stderr, kind = (
            effect.grad_error.mean,
            effect.grad_error.stderr,
            option_kind(option.option),
        )
        bias = shown_grad_error(effect.bias.mean, effect.bias.stderr)
        tip = (
            f"{row.name}, {shown_option(option.option)}: e {shown_grad_error(mean, stderr)} "
            f"({effect.basis}), bias {bias}"
        )
        if stderr:
            low, high = x(max(mean - stderr, x.low)), x(mean + stderr)
            parts.append(line(low, y, high, y, kind=f"error {kind}"))
        ring = " ring" if option.option == row.option else ""
        parts.append(dot(x(mean), y, 5.0, kind=f"{kind}{ring}", tip=tip))
    return parts


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


def _drifts(verification: Verification) -> list[tuple[Branch, list[float]]]:
    references = {b.seed: b.curve for b in verification.branches if b.label == "reference"}
    found = []
    for branch in verification.branches:
        reference = references.get(branch.seed)
        if branch.label == "reference" or not reference:
            continue
        pairs = zip(branch.curve, reference, strict=False)  # a diverged branch is shorter
        drift = [(loss - base) / abs(base) for loss, base in pairs if base]
        if len(drift) > 1:
            found.append((branch, drift))
    return found


def _branch_axes(x: Scale, y: Scale, *, label: str) -> Markup:
    show = shown_share if "against" in label else plain_number
    return x_axis(x, 34.0, 250.0, label="step of the branch", show=lambda at: f"{at:.0f}") + y_axis(
        y, x.start, x.end, label=label, show=show
    )


def _branch_kind(branch: Branch) -> str:
    return BRANCH_KINDS.get(branch.label, "b-reference")


def _signed(value: float) -> str:
    return shown_share(value, sign=True)


def _largest_e(row: LayerRow) -> float:
    return max((_e(option) for option in row.options), default=0.0)


def _e(option: OptionRow) -> float:
    return option.sensitivity.grad_error.mean if option.sensitivity else 0.0
