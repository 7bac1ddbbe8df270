"""report.html: one file that opens anywhere, offline, and asks nothing of any network.

Everything a page needs is in it: style, charts (SVG made here) and a small script that sorts,
filters and shows tips. Its content security policy forbids every request and every script but that
one, by hash; so a name that smuggled markup past the escaping could still not run or send anything.
"""

import base64
import functools
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from autoprec import __version__
from autoprec.report import figures, formats
from autoprec.report.layer_frame import View, columns_of, frame_rows, options_frame
from autoprec.report.layer_table import total_row
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import predicted_and_measured, spread_title
from autoprec.report.summary import apply_line, summarise_run
from autoprec.report.tables import device_facts, recipe_table

TEMPLATES = Path(__file__).parent / "templates"


def _shown(value: object) -> object:
    """Return the text that a template prints for a value; None is unknown, text is cleaned."""
    if value is None:
        return formats.UNKNOWN
    if isinstance(value, str) and not isinstance(value, Markup):
        return formats.clean_text(value)
    return value


ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_html(run: RunRecords) -> str:
    """Return the report of a run as one HTML page; sections say what was not run."""
    found, options, script = summarise_run(run), options_frame(run), _asset("script.js")
    rows, total = frame_rows(found.layers), total_row(found.layers)
    return render(
        "report.html",
        # what was found, and the modules that draw it: templates call their functions
        run=run,
        found=found,
        options=options,
        spread=spread_title(found.steps.values()),
        predicted=predicted_and_measured(run),
        figures=figures,
        formats=formats,
        recipe_table=recipe_table,
        device_facts=device_facts,
        # the table of layers
        columns=columns_of(View.PAGE, [*rows, total]),
        rows=rows,
        total=total,
        details={name: frame_rows(own) for name, own in options.groupby("name")},
        refusals={x.name: x.refusals for x in run.profile.model.layers} if run.profile else {},
        # the page itself
        apply_line=apply_line("."),
        version=__version__,
        style=_asset("style.css"),
        script=script,
        policy=_policy(script),
    )


def page_parts() -> dict[str, Markup | str]:
    """Return the style of a page that has no script, and the policy that keeps it so."""
    return {"style": _asset("style.css"), "policy": _policy("")}


def render(template: str, **values: object) -> str:
    """Return a template with its values: all escaped, hidden characters made visible."""
    return ENVIRONMENT.get_template(template).render(values)


@functools.cache
def _asset(name: str) -> Markup:
    """Return a file of ours that goes into the page as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # ours, nothing of the run


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
