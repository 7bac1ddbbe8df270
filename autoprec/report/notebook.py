"""A plan or a run in a few lines: `str(plan)`, and what a notebook shows of it.

The HTML is a fragment of its own: no script, no class of a page's style sheet, every text escaped.
"""

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from autoprec.records import Plan
from autoprec.report.folding import FoldedRow, fold_rows
from autoprec.report.formats import (
    clean_text,
    count_of,
    shown_grad_error,
    shown_ms,
    shown_option,
    shown_ratio,
)
from autoprec.report.runs import RunRecords
from autoprec.report.sections import headline
from autoprec.report.summary import Summary, summarise_run

MOST_LINES = 8  # layers in `str(plan)`, alike ones folded
MOST_ROWS = 40  # in a notebook
TITLES = ("precision", "layer", "shape", "ms", "vs FP32", "vs BF16", "gradient error")


def plan_text(plan: Plan) -> str:
    """Return a plan in at most 15 lines: what it gains, layers per option, the first layers."""
    found = summarise_run(RunRecords(plan=plan))
    rows = _by_option(found)
    width = max((len(shown_option(row.first.option)) for row in rows[:MOST_LINES]), default=0)
    layers = [f"  {shown_option(row.first.option):{width}}  {row.name}" for row in rows]
    rest = sum(len(row.rows) for row in rows[MOST_LINES:])
    more = [f"  ... and {count_of(rest, 'more layer')}"] if rest else []
    return "\n".join([*_sentences(RunRecords(plan=plan), found), *layers[:MOST_LINES], *more])


def plan_html(plan: Plan) -> str:
    """Return a plan as a fragment of HTML, for a notebook."""
    return run_html(RunRecords(plan=plan))


def run_html(records: RunRecords) -> str:
    """Return what a run found as a fragment of HTML, for a notebook."""
    found = summarise_run(records)
    first, *others = _sentences(records, found)
    rows = _by_option(found)
    rest = sum(len(row.rows) for row in rows[MOST_ROWS:])
    more = [f"... and {count_of(rest, 'more layer')}"] if rest else []
    said = Markup("").join(Markup("<div>{}</div>").format(line) for line in (*others, *more))
    table = _html_table([_texts(row) for row in rows[:MOST_ROWS]]) if rows else Markup("")
    return str(Markup("<div><b>{}</b>{}{}</div>").format(first, said, table))


def _sentences(run: RunRecords, found: Summary) -> list[str]:
    """Return the headline, the layers per option, and whether FP8 and memory are as they must."""
    options = Counter(shown_option(row.option) for row in found.rows if row.option)
    counts = ", ".join(f"{count} in {option}" for option, count in options.most_common())
    said = [headline(run, found)]
    if counts:
        said.append(f"{count_of(len(found.rows), 'layer')}: {counts}")
    said += [found.fp8_answer, found.memory_answer, found.verdict_sentence]
    return [clean_text(line) for line in said if line]


def _by_option(found: Summary) -> list[FoldedRow]:
    """Return the folded rows, those of one option together, the most precise option last."""
    rows = fold_rows(found.rows)
    return sorted(
        rows, key=lambda row: row.first.option.key if row.first.option else "", reverse=True
    )


def _texts(row: FoldedRow) -> tuple[str, ...]:
    error = row.grad_error
    return (
        shown_option(row.first.option),
        row.name,
        row.first.shape,
        shown_ms(row.chosen_ms),
        shown_ratio(row.speedup_vs_fp32),
        shown_ratio(row.speedup_vs_bf16_o2),
        shown_grad_error(error.mean if error else None, error.stderr if error else None),
    )


def _html_table(rows: Sequence[tuple[str, ...]]) -> Markup:
    head = Markup("").join(Markup("<th>{}</th>").format(title) for title in TITLES)
    cells = (
        Markup("").join(Markup("<td>{}</td>").format(clean_text(text)) for text in row)
        for row in rows
    )
    body = Markup("").join(Markup("<tr>{}</tr>").format(line) for line in cells)
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, body)
