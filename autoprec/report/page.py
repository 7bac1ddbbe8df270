"""report.html: one file that opens anywhere, offline, and asks nothing of any network.

Everything a page needs is in it: style and charts (SVG made here). It has no script, and its
content security policy forbids any, and every request; so a name that smuggled markup past the
escaping could still not run or send anything.
"""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from autoprec import __version__
from autoprec.report import figures, formats, tables
from autoprec.report.answer_page import answer_facts, next_lines
from autoprec.report.layer_frame import View, columns_of, options_frame, used_codes
from autoprec.report.layer_table import layer_groups, total_row
from autoprec.report.runs import RunRecords
from autoprec.report.summary import summarise_run
from autoprec.sensitivity.causes import offset_of

TEMPLATES = Path(__file__).parent / "templates"
_QUOTED = re.compile(r"`([^`]+)`")
MOST_GROUPS = 150  # of alike layers in the table; layers.csv has every layer


def _shown(value: object) -> object:
    """Return the text that a template prints for a value; None is unknown, text is cleaned."""
    if value is None:
        return formats.UNKNOWN
    if isinstance(value, str) and not isinstance(value, Markup):
        return formats.clean_text(value)
    return value


def _prose(text: str) -> Markup:
    """Return a sentence in which what stands between backticks is code."""
    return Markup(_QUOTED.sub(r"<code>\1</code>", str(escape(formats.clean_text(text)))))


ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["prose"] = _prose


def render_html(run: RunRecords) -> str:
    """Return the report of a run as one HTML page; sections say what was not run."""
    found = summarise_run(run)
    groups, total = layer_groups(found.layers, options_frame(run)), total_row(found.layers)
    return render(
        "report.html",
        run=run,
        found=found,
        facts=list(answer_facts(found)),
        next_lines=list(next_lines(found, ".")),
        # the modules that draw it: templates call their functions
        figures=figures,
        formats=formats,
        tables=tables,
        # the table of layers
        groups=groups,
        most_groups=MOST_GROUPS,
        columns=columns_of(View.PAGE, [*(group.row for group in groups), total]),
        total=total,
        codes=used_codes(group.row for group in groups),
        offsets=_offsets(run),
        refusals={x.name: x.refusals for x in run.profile.model.layers} if run.profile else {},
    )


def _offsets(run: RunRecords) -> dict[str, str]:
    """Return what is said of operands far from zero, by layer: time alone may be its reason."""
    found: dict[str, list[str]] = {}
    for row in run.sensitivity.statistics if run.sensitivity else ():
        if said := offset_of(row):
            shares = (row.mean_share or row.range_share).items()
            parts = [f"{formats.share(x)} of {recipe}'s error" for recipe, x in shares if x > 0.0]
            found.setdefault(row.name, []).append(f"{said} ({', '.join(parts)})" if parts else said)
    return {name: "; ".join(each) for name, each in found.items()}


def render(template: str, **values: object) -> str:
    """Return a template with its values: all escaped, hidden characters made visible."""
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))  # nothing of the run
    return ENVIRONMENT.get_template(template).render(values, style=style, version=__version__)
