"""A comparison for people: in a terminal, as Markdown for a pull request, as a page.

All three show the same lines and tables: what differs beyond noise first, then what does not and
how small a difference would have been seen, then what was not alike.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from autoprec.common.grouping import grouped
from autoprec.common.text import first_and_more
from autoprec.records import Change, Comparison, DifferenceRow
from autoprec.report import formats
from autoprec.report.compare import ABSENT, STAYS
from autoprec.report.formats import and_more, clean_text, count_of
from autoprec.report.layer_table import fold_names
from autoprec.report.page import render
from autoprec.report.text_table import BAD, GOOD, Line, Part, Table, notes, section

MOST_ROWS = 20  # of one table; --json has them all


def comparison_parts(found: Comparison) -> list[Part]:
    """Return a comparison as lines and tables, the answer first."""
    parts: list[Part] = [Line(headline(found), "bold")]
    for check in found.checks:
        words = "passes" if check.is_good else "FAILS"
        style = GOOD if check.is_good else BAD
        parts.append(Line(f"{check.name}: {words} ({check.detail})", style))
    parts += [Line(f"A: {found.before}; B: {found.after}"), Line(_alike(found.facts))]
    parts += [Line(""), _whole_table(found)]
    if rows := _decision_rows(found.decisions):
        parts += [
            *section("Decided otherwise"),
            *_table(("layer", "A", "B"), rows, "group of layers"),
        ]
    if rows := _layer_rows(found.layer_times, formats.ms):
        heads = ("layer", "in", "A, ms", "B, ms", "B / A")
        parts += [*section("Layer times"), *_table(heads, rows, "layer time")]
    if rows := _layer_rows(found.layer_errors, formats.share):
        heads = ("layer", "in", "A", "B", "B / A")
        parts += [*section("Gradient errors of layers"), *_table(heads, rows, "gradient error")]
    parts += [Line(""), Line(compared_text(found))]
    return [*parts, *notes(map(clean_text, found.notes))]


def comparison_markdown(found: Comparison) -> str:
    """Return a comparison as Markdown that GitHub shows, e.g. in a pull request."""
    lines: list[str] = []
    for part in comparison_parts(found):
        if isinstance(part, Table):
            lines += ["", *_markdown_table(part), ""]
        elif part.text:
            bold = "bold" in part.style
            lines += [f"**{_escaped(part.text)}**" if bold else _escaped(part.text), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines) + "\n")


def comparison_html(found: Comparison) -> str:
    """Return a comparison as one page that loads nothing."""
    return render("compare.html", parts=comparison_parts(found))


def headline(found: Comparison) -> str:
    """Return what differs, in one sentence."""
    said = [*_plan_sentences(found), *_layer_sentences(found)]
    others = [step for step in found.steps if step.name != "plan" and step.is_beyond_noise]
    if others:
        titles = [formats.step_title(step.name) for step in others]
        said.append(f"other steps differ: {first_and_more(titles, most=2)}")
    if said:
        return f"B against A: {'; '.join(said)}"
    plan = (found.step, found.speedup, found.grad_error)
    unknown = [c for c in plan if c and c.low is None and c.before != c.after]
    return f"No difference beyond noise{', where the noise is known' if unknown else ''}"


def _plan_sentences(found: Comparison) -> Iterator[str]:
    step, speedup, error = found.step, found.speedup, found.grad_error
    if step and step.is_beyond_noise:
        yield f"the plan's step takes {change_text(step)} as long"
    if speedup and speedup.is_beyond_noise:
        over = formats.step_title(speedup.name)
        yield f"its speedup over {over} is {change_text(speedup)} of A's"
    if error and error.is_beyond_noise:
        said = f"{formats.share(error.after)}, A's {formats.share(error.before)}"
        said = f"{change_text(error)} of A's" if error.ratio else said
        yield f"its gradient error is {said}"
    if found.verdicts and found.verdicts[0] is not found.verdicts[1]:
        old, new = _verdict_texts(found)
        yield f"the verdict is {new}, not {old}"


def _verdict_texts(found: Comparison) -> list[str]:
    """Return both verdicts, each with the steps that it is over."""
    pairs = zip(found.verdicts or (), found.reaches, strict=False)
    return [f"{verdict.replace('_', ' ')} {reach}".rstrip() for verdict, reach in pairs]


def _layer_sentences(found: Comparison) -> Iterator[str]:
    if found.decisions:
        yield f"{count_of(len(found.decisions), 'layer')} decided otherwise"
    if times := len(found.layer_times):
        yield count_of(times, "layer time differs", "layer times differ")
    if errors := len(found.layer_errors):
        yield count_of(errors, "layer's gradient error differs", "layers' gradient errors differ")


def compared_text(found: Comparison) -> str:
    """Return how much was compared, and what noise it was compared against."""
    counts = (
        (found.layers_compared, "decision"),
        (len(found.steps), "step time"),
        (found.times_compared, "layer time"),
        (found.errors_compared, "gradient error"),
    )
    said = ", ".join(count_of(count, noun) for count, noun in counts if count)
    text = f"compared: {said}" if said else "compared: the verdicts"
    if found.times_compared or found.errors_compared:
        text += (
            "; intervals of one table hold together: between equal runs chance shows a difference "
            "in at most 5 % of comparisons"
        )
    if found.noise_between:
        scatter = formats.share(found.noise_between)
        text += f"; the runs' layer times scatter by {scatter} beyond their samples"
    return text


def change_text(change: Change) -> str:
    """Return a ratio with its interval, e.g. `1.13x (1.10x to 1.16x)`."""
    if change.before == change.after:
        return "the same"
    if change.ratio is None:
        return formats.UNKNOWN
    if change.low is None or change.high is None:
        return f"{_factor(change.ratio)} (noise not known)"
    if change.low == change.high:
        return _factor(change.ratio)
    return f"{_factor(change.ratio)} ({_factor(change.low)} to {_factor(change.high)})"


def _factor(value: float) -> str:
    """Return a ratio with three decimals, as differences are small; large ones with fewer."""
    return f"{value:.3f}x" if 0.1 <= value < 2.0 else formats.ratio(value)


def _whole_table(found: Comparison) -> Table:
    """Return the plan as a whole: its step and other steps that differ, gradient error, verdict."""
    rows: list[tuple[str, ...]] = []
    for step in found.steps:
        if step.name == "plan" or step.is_beyond_noise:
            title = f"{formats.step_title(step.name)}, ms per step ({step.basis})"
            rows.append((title, formats.ms(step.before), formats.ms(step.after), change_text(step)))
    if speedup := found.speedup:
        title = f"its speedup over {formats.step_title(speedup.name)} ({speedup.basis})"
        values = (formats.ratio(speedup.before), formats.ratio(speedup.after))
        rows.append((title, *values, change_text(speedup)))
    if error := found.grad_error:
        title = f"its gradient error ({error.basis})"
        values = (formats.share(error.before), formats.share(error.after))
        rows.append((title, *values, change_text(error)))
    if found.verdicts:
        rows.append(("verdict", *_verdict_texts(found), ""))
    if all(found.gaps):
        gaps = (formats.gap_ends(gap) for gap in found.gaps if gap)
        rows.append(("its loss gap to FP32", *gaps, ""))
    if not rows:
        rows.append(("the plan as a whole", formats.UNKNOWN, formats.UNKNOWN, "not in both"))
    return Table(("", "A", "B", "B / A"), rows, numbers=(3,))


def _alike(facts: Sequence[DifferenceRow]) -> str:
    """Return in one line what the runs were not alike in."""
    if not facts:
        return "made alike: device, model, settings and versions"
    rows = (f"{clean_text(f.name)} {f.before or 'none'} -> {f.after or 'none'}" for f in facts)
    return f"not alike: {'; '.join(rows)}"


def _decision_rows(decisions: Sequence[DifferenceRow]) -> list[tuple[str, ...]]:
    """Return the decisions, layers of one pattern and one change together."""
    groups = grouped(((row.before, row.after), row.name) for row in decisions)
    return [
        (name, *(_option(key) for key in change))
        for change, names in groups.items()
        for name in fold_names(names)
    ]


def _layer_rows(changes: Iterable[Change], show: Callable[[float], str]) -> list[tuple[str, ...]]:
    """Return the numbers of layers that differ, those of one text together."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for change in changes:
        texts = (_option(change.option), show(change.before), show(change.after))
        alike.setdefault((*texts, change_text(change)), []).extend(change.names)
    return [(", ".join(fold_names(names)), *texts) for texts, names in alike.items()]


def _option(key: str) -> str:
    own = key.removesuffix(STAYS)
    return key if key == ABSENT else formats.option(own) + key[len(own) :]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], noun: str) -> Iterator[Part]:
    numbers = range(2, len(heads)) if len(heads) > 3 else ()
    yield Table(heads, rows[:MOST_ROWS], numbers=numbers)
    yield from map(Line, and_more(len(rows) - MOST_ROWS, noun, " in --json"))


def _markdown_table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(table.heads)} |"
    yield f"|{'|'.join('---:' if i in table.numbers else '---' for i in range(len(table.heads)))}|"
    for row in table.rows:
        yield f"| {' | '.join(_escaped(str(cell)) for cell in row)} |"


def _escaped(text: str) -> str:
    """Return a text that Markdown shows as it is: names hold underscores, stars and pipes."""
    shown = clean_text(text)
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~" else c for c in shown)
