"""Figures of time: whole steps, what a step is made of, and the layers that take longest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from autoprec.records import Basis, Option
from autoprec.report.answers import Ceiling
from autoprec.report.charts import (
    Scale,
    bar,
    fitted,
    legend,
    line,
    picture,
    plain_number,
    text,
    whisker,
    x_axis,
)
from autoprec.report.folding import FoldedRow, fold_rows
from autoprec.report.formats import shown_ms, shown_option, shown_ratio, step_title
from autoprec.report.steps import Speedup, Step, spread_title
from autoprec.report.table import PARTS, LayerRow, Times, sum_times

WIDTH = 1080.0
LABEL_PX = 190.0
MOST_BARS = 16  # layers in the bar chart; the table has them all
CLIP = 2.2  # the longest bar is cut where it is more than this many times the second longest
PART_TITLES = {
    "output": "output (forward)",
    "grad_input": "grad_input",
    "grad_weight": "grad_weight",
    "cast": "FP8 casts and scales",
    "other": "rest (bias, autograd, launches)",
}
ANATOMY_KEYS = (
    ("s-eligible", "linears that can take FP8"),
    ("s-layers", "other layers"),
    ("s-rest", "outside the layers: attention, loss, optimizer, glue"),
)
OPTION_TITLES = {"fp32": "FP32", "bf16_o2": "BF16", "fp8": "FP8"}


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


def anatomy_figure(rows: Sequence[LayerRow], steps: Mapping[str, Step]) -> Markup:
    """Return what each step is made of: layers that can take FP8, other layers, the rest."""
    columns: dict[str, Callable[[LayerRow], Times | None]] = {
        "fp32": lambda row: row.fp32,
        "bf16_o2": lambda row: row.bf16_o2,
        "plan": lambda row: row.chosen,
    }
    shown = {label: column for label, column in columns.items() if label in steps}
    if not shown:
        return Markup("")
    parts: list[Markup] = []
    for index, (label, column) in enumerate(shown.items()):
        parts += _anatomy_bar(rows, column, steps[label], y=12.0 + 38.0 * index)
    scale = Scale(0.0, 1.0, LABEL_PX, WIDTH - 60.0)
    bottom = 12.0 + 38.0 * len(shown)
    axis = x_axis(scale, 4.0, bottom, label="share of the step", show=lambda v: f"{v:.0%}")
    return legend(ANATOMY_KEYS) + picture(
        WIDTH, bottom + 42.0, [axis, *parts], title="What a step is made of"
    )


def layer_figure(rows: Sequence[LayerRow]) -> Markup:
    """Return the layers that take longest: each option's time by GEMM, the chosen one marked.

    Layers that are alike and got the same option are one bar each with their times added up.
    """
    groups = [_group(row) for row in fold_rows(rows)]
    timed = [group for group in groups if group.longest_ms > 0.0]
    top = sorted(timed, key=lambda group: group.longest_ms, reverse=True)[:MOST_BARS]
    if not top:
        return Markup("")
    scale = Scale(0.0, bar_limit(_longest_bars(top)), 290.0, WIDTH - 150.0)
    parts: list[Markup] = []
    y = 10.0
    for group in top:
        parts.append(text(8.0, y + 15.0, fitted(group.name, 225.0), kind="label"))
        y = _layer_bars(group, scale=scale, y=y, parts=parts)
    axis = x_axis(scale, 4.0, y, label="ms per step, forward and backward", show=plain_number)
    keys = legend((f"p-{part}", title) for part, title in PART_TITLES.items())
    return keys + picture(WIDTH, y + 42.0, [axis, *parts], title="Time of the longest layers")


def mini_bars(row: LayerRow) -> Markup:
    """Return a row's options as small bars on the row's own scale, for the table."""
    options = row_options(row)
    lengths = [times.total_ms or 0.0 for times in options.values()]
    if not any(lengths):
        return Markup("")
    scale = Scale(0.0, bar_limit(lengths), 32.0, 170.0)
    parts: list[Markup] = []
    for index, (label, times) in enumerate(options.items()):
        y = 2.0 + 11.0 * index
        kind = "mini chosen" if _is_chosen(row, label) else "mini"
        parts.append(text(0.0, y + 8.0, OPTION_TITLES[label], kind=kind))
        parts += _stack(times, scale=scale, y=y, height=8.0, tip=f"{OPTION_TITLES[label]}: ")
    height = 4.0 + 11.0 * len(options)
    return picture(172.0, height, parts, title="times per option", kind="chart small")


def row_options(row: LayerRow) -> dict[str, Times]:
    """Return FP32, BF16 O2 and the chosen (or else fastest) FP8 option, as far as timed."""
    fp8 = row.best_fp8.times if row.best_fp8 else None
    if row.option is not None and row.option.is_fp8:
        fp8 = row.chosen
    options = {"fp32": row.fp32, "bf16_o2": row.bf16_o2, "fp8": fp8}
    if row.option is not None and not row.option.is_fp8:
        options[row.option.precision.value] = row.chosen
    return {label: times for label, times in options.items() if times is not None}


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


def _anatomy_bar(
    rows: Sequence[LayerRow], column: Callable[[LayerRow], Times | None], step: Step, *, y: float
) -> list[Markup]:
    eligible = layers = 0.0
    for row in rows:
        times = column(row)
        ms = (times.total_ms or 0.0) if times else 0.0
        layers += ms
        eligible += ms if any(option.option.is_fp8 for option in row.options) else 0.0
    whole = max(step.ms, layers)
    segments = {"eligible": eligible, "layers": layers - eligible, "rest": whole - layers}
    x, room = LABEL_PX, WIDTH - 60.0 - LABEL_PX
    title = f"{step_title(step.label)}, {shown_ms(step.ms)} ms"
    parts = [text(LABEL_PX - 12.0, y + 18.0, title, kind="label", anchor="end")]
    for kind, ms in segments.items():
        width = room * ms / whole if whole > 0.0 else 0.0
        tip = f"{shown_ms(ms)} ms of {shown_ms(step.ms)} ms ({step.basis})"
        parts.append(bar(x, y, width, 26.0, kind=f"s-{kind}", tip=tip, round_px=0))
        if width > 44.0:
            share = f"{ms / whole:.0%}"
            parts.append(text(x + width / 2, y + 18.0, share, kind="inside", anchor="middle"))
        x += width
    return parts


@dataclass(frozen=True)
class _Group:
    """Alike layers: their summed times per option."""

    name: str
    option: Option | None
    times: Mapping[str, Times]

    @property
    def chosen(self) -> str:
        """The label of the chosen option, "" without a plan."""
        if self.option is None:
            return ""
        return "fp8" if self.option.is_fp8 else self.option.precision.value

    @property
    def longest_ms(self) -> float:
        """The time of the chosen option, or of the longest there is."""
        chosen = self.times.get(self.chosen)
        times = [chosen] if chosen else self.times.values()
        return max((each.total_ms or 0.0 for each in times), default=0.0)


def _group(folded: FoldedRow) -> _Group:
    options = [row_options(row) for row in folded.rows]
    common = [label for label in OPTION_TITLES if all(label in times for times in options)]
    times = {label: sum_times([each[label] for each in options]) for label in common}
    return _Group(folded.name, folded.first.option, times)


def _layer_bars(group: _Group, *, scale: Scale, y: float, parts: list[Markup]) -> float:
    """Add a group's bars to `parts` and return where the next one starts."""
    for label, times in group.times.items():
        is_chosen, total = label == group.chosen, times.total_ms or 0.0
        kind = "tick chosen" if is_chosen else "tick"
        x, title = scale.start - 8.0, OPTION_TITLES[label]
        parts.append(text(x, y + 10.0, title, kind=kind, anchor="end"))
        parts += _stack(times, scale=scale, y=y, height=11.0, tip=f"{group.name} in {title}: ")
        words = f"{shown_ms(total)} ms{' (cut)' if total > scale.high else ''}"
        words += f"  chosen: {shown_option(group.option)}" if is_chosen else ""
        end = scale(total)
        parts.append(text(end + 8.0, y + 10.0, fitted(words, WIDTH - end - 8.0), kind=kind))
        y += 14.0
    parts.append(line(8.0, y + 3.0, WIDTH - 8.0, y + 3.0, kind="rule"))
    return y + 8.0


def _stack(times: Times, *, scale: Scale, y: float, height: float, tip: str) -> list[Markup]:
    """Return the parts of one time side by side; they end where the total does."""
    values = {part: getattr(times, f"{part}_ms") or 0.0 for part in (*PARTS, "other")}
    if times.output_ms is None:
        values = {"other": times.total_ms or 0.0}
    shown = {part: max(ms, 0.0) for part, ms in values.items()}
    total, whole = times.total_ms or 0.0, sum(shown.values())
    squeeze = total / whole if whole > 0.0 else 0.0  # parts that cost more alone than together
    at, bars = 0.0, []
    for part, ms in shown.items():
        start, end = scale(at), scale(at + ms * squeeze)
        words = f"{tip}{PART_TITLES[part]} {shown_ms(values[part])} of {shown_ms(total)} ms"
        bars.append(
            bar(
                start,
                y,
                end - start,
                height,
                kind=f"p-{part}",
                tip=f"{words} ({times.basis})",
                round_px=0,
            )
        )
        at += ms * squeeze
    return bars


def _is_chosen(row: LayerRow, label: str) -> bool:
    if row.option is None:
        return False
    return label == ("fp8" if row.option.is_fp8 else row.option.precision.value)


def _longest_bars(groups: Sequence[_Group]) -> list[float]:
    """Return the longest bar of every option."""
    longest: dict[str, float] = {}
    for group in groups:
        for label, times in group.times.items():
            longest[label] = max(longest.get(label, 0.0), times.total_ms or 0.0)
    return list(longest.values())


def bar_limit(lengths: Sequence[float]) -> float:
    """Return the end of the axis: one that is far longer may not make the others unreadable."""
    longest, *others = sorted(lengths, reverse=True)
    second = others[0] if others else 0.0
    return second if second > 0.0 and longest > CLIP * second else longest
