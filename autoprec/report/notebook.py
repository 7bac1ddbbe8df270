"""A plan or a run in a few lines: `str(plan)`, and what a notebook shows of it.

The HTML is a fragment of its own: no script, no class of a page's style sheet, every text escaped.
"""

from autoprec.records import Plan
from autoprec.report import formats
from autoprec.report.formats import and_more, clean_text
from autoprec.report.layer_frame import Row, View, columns_of, frame_rows, used_codes
from autoprec.report.layer_table import fold_layers
from autoprec.report.page import render
from autoprec.report.runs import RunRecords
from autoprec.report.summary import Summary, summarise_run

MOST_LINES = 8  # layers in `str(plan)`, alike ones folded
MOST_ROWS = 40  # in a notebook


def plan_text(plan: Plan) -> str:
    """Return a plan in at most 15 lines: what it gains, layers per option, the first layers."""
    found = summarise_run(RunRecords(plan=plan))
    rows = _by_option(found)
    options = [formats.option(row["option"]) for row in rows[:MOST_LINES]]
    width = max(map(len, options), default=0)
    layers = [f"  {o:{width}}  {row['name']}" for o, row in zip(options, rows, strict=False)]
    rest = sum(row["layers"] for row in rows[MOST_LINES:])
    more = [f"  {line}" for line in and_more(rest, "layer")]
    return "\n".join(map(clean_text, [*_sentences(found), *layers, *more]))


def run_html(records: RunRecords) -> str:
    """Return the findings of a run as a fragment of HTML, for a notebook."""
    found = summarise_run(records)
    rows = _by_option(found)
    rest = sum(row["layers"] for row in rows[MOST_ROWS:])
    lines = [*_sentences(found), *and_more(rest, "layer")]
    columns, rows = columns_of(View.WIDE, rows), rows[:MOST_ROWS]
    codes = used_codes(rows)
    return render("notebook.html", lines=lines, columns=columns, rows=rows, codes=codes)


def _sentences(found: Summary) -> list[str]:
    """Return the headline, the layers per option, whether FP8 pays, memory and the promise."""
    promise = (found.promise.sentence, found.promise.expectation)
    said = (found.counted, found.answer.fp8, found.memory_answer, *promise)
    return [found.answer.headline, *(line for line in said if line)]


def _by_option(found: Summary) -> list[Row]:
    """Return the folded rows, those of one option together, FP8 first."""
    rows = frame_rows(fold_layers(found.layers))
    return sorted(rows, key=lambda row: row["option"] or "", reverse=True)
