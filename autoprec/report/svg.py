"""SVG charts without a library: marks, scales, axes. Colours are CSS classes of style.css.

Every text and attribute is escaped here, so a chart can be put into a page as it is. A mark's `tip`
is its SVG title, which browsers show when it is pointed at.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

from autoprec.report.formats import clean_text

NICE_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [start, end] in px."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the position of a value, kept within the chart."""
        wide = self.high - self.low
        share = (value - self.low) / wide if wide > 0.0 else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Return about `count` round values from low to high."""
        raw = max((self.high - self.low) / count, 1e-300)
        magnitude = 10.0 ** math.floor(math.log10(raw))
        step = magnitude * next(nice for nice in NICE_STEPS if nice * magnitude >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def mark(tag: str, *content: Markup, tip: str = "", kind: str = "", **attributes: object) -> Markup:
    """Return one SVG element; `kind` is its CSS class, `_` in attribute names becomes `-`."""
    named = {"class": kind, **attributes}
    pairs = "".join(
        f' {name.replace("_", "-")}="{escape(_attribute(value))}"'
        for name, value in named.items()
        if value not in ("", None)
    )
    title = f"<title>{escape(clean_text(tip))}</title>" if tip else ""
    return Markup(f"<{tag}{pairs}>{title}{''.join(content)}</{tag}>")


def text(x: float, y: float, words: str, *, kind: str = "", anchor: str = "start") -> Markup:
    """Return a text with its baseline at y."""
    shown = escape(clean_text(words))
    return mark("text", shown, x=x, y=y, kind=kind, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, *, kind: str, tip: str = "") -> Markup:
    """Return a straight line."""
    return mark("line", x1=x1, y1=y1, x2=x2, y2=y2, kind=kind, tip=tip)


def bar(scale: Scale, value: float, y: float, height: float, *, kind: str, tip: str = "") -> Markup:
    """Return a bar from the scale's start to a value."""
    size = {"x": scale.start, "y": y, "width": scale(value) - scale.start, "height": height}
    return mark("rect", kind=kind, tip=tip, **size)


def dot(x: float, y: float, radius: float, *, kind: str, tip: str = "") -> Markup:
    """Return a disc."""
    return mark("circle", cx=x, cy=y, r=radius, kind=kind, tip=tip)


def marker(
    x: float, y1: float, y2: float, words: str, *, kind: str, tip: str = "", anchor: str
) -> Markup:
    """Return a vertical line through a chart, with words above it."""
    shown = text(x, y1 - 7.0, words, kind="tick", anchor=anchor)
    return line(x, y1, x, y2, kind=kind, tip=tip) + shown


def whisker(low: float, high: float, y: float, *, kind: str = "whisker", tip: str = "") -> Markup:
    """Return a horizontal interval with end caps."""
    left, right = (line(x, y - 4, x, y + 4, kind=kind) for x in (low, high))
    return line(low, y, high, y, kind=kind, tip=tip) + left + right


def x_axis(
    scale: Scale, top: float, bottom: float, *, label: str, show: Callable[[float], str]
) -> Markup:
    """Return grid lines, tick labels and the axis label below the plot."""
    middle = (scale.start + scale.end) / 2
    axis = text(middle, bottom + 34, label, kind="axis-label", anchor="middle")
    for tick in scale.ticks():
        axis += line(scale(tick), top, scale(tick), bottom, kind="grid-line")
        axis += text(scale(tick), bottom + 16, show(tick), kind="tick", anchor="middle")
    return axis


def y_axis(
    scale: Scale, left: float, right: float, *, label: str, show: Callable[[float], str]
) -> Markup:
    """Return grid lines, tick labels and the axis label above the plot's left edge."""
    axis = text(8, min(scale.start, scale.end) - 10, label, kind="axis-label")
    for tick in scale.ticks(5):
        axis += line(left, scale(tick), right, scale(tick), kind="grid-line")
        axis += text(left - 8, scale(tick) + 4, show(tick), kind="tick", anchor="end")
    return axis


def picture(width: float, height: float, content: Iterable[Markup], *, title: str) -> Markup:
    """Return the whole SVG; `title` is what a screen reader says."""
    size = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria_label": title}
    return mark("svg", *content, kind="chart", **size)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Return an HTML legend of (CSS class of the mark, words)."""
    items = Markup("")
    for kind, words in entries:
        square = mark("rect", kind=kind, x=1, y=1, width=10, height=10, rx=2)
        swatch = mark("svg", square, width=12, height=12)
        items += Markup('<span class="key">{}{}</span>').format(swatch, words)
    return Markup('<div class="legend">{}</div>').format(items)


def padded(low: float, high: float) -> tuple[float, float]:
    """Return the range widened on both sides, and never empty."""
    if high <= low:
        low, high = low - abs(low) * 0.1 - 1e-12, high + abs(high) * 0.1 + 1e-12
    margin = (high - low) * 0.08
    return low - margin, high + margin


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
