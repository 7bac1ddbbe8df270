"""report.html: one file that opens anywhere, offline, and asks nothing of any network.

Everything a page needs is in it: style, charts (SVG made here) and a small script that sorts,
filters and shows tips. Its content security policy forbids every request and every script but that
one, by hash; so a name that smuggled markup past the escaping could still not run or send anything.
"""

import base64
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from autoprec import __version__
from autoprec.report import figures, formats
from autoprec.report.answers import Ceiling, fp8_ceiling, unmeasured
from autoprec.report.recipes import recipe_rows
from autoprec.report.runs import RunRecords
from autoprec.report.sections import (
    condition_rows,
    environment_rows,
    headline,
    how_measured,
    joint_rows,
    predicted_rows,
    summary_cards,
    trial_rows,
)
from autoprec.report.summary import Summary, apply_line, summarise_run
from autoprec.report.table import table_totals
from autoprec.sensitivity.gap import HORIZON_STEPS

TEMPLATES = Path(__file__).parent / "templates"
FILTERS: dict[str, Callable[..., object]] = {
    "ms": formats.shown_ms,
    "share": formats.shown_share,
    "signed": functools.partial(formats.shown_share, sign=True),
    "ratio": formats.shown_ratio,
    "size": formats.shown_bytes,
    "option": formats.shown_option,
    "title_of_step": formats.step_title,
}


def render_html(run: RunRecords) -> str:
    """Return the report of a run as one HTML page; sections say what was not run."""
    found = summarise_run(run)
    ceiling = fp8_ceiling(run, found.rows)
    script = _asset("script.js")
    page = _environment().get_template("report.html")
    return page.render(
        run=run,
        found=found,
        totals=table_totals(found.rows),
        version=__version__,
        style=_asset("style.css"),
        script=script,
        policy=_policy(script),
        apply_line=apply_line("."),
        notes=unmeasured(run),
        ceiling=ceiling,
        count_of=formats.count_of,
        grad_error_text=formats.shown_grad_error,
        **_figures(run, found, ceiling),
        **_tables(run, found),
    )


def _figures(run: RunRecords, found: Summary, ceiling: Ceiling | None) -> dict[str, str]:
    """Draw every figure that the records allow; the others are empty."""
    empty, proof = Markup(""), run.verification
    return {
        "step_note": figures.step_note(found.steps),
        "step_figure": figures.step_figure(found.steps, found.speedups, ceiling),
        "pareto_figure": figures.pareto_figure(run.search) if run.search else empty,
        "sensitivity_figure": figures.sensitivity_figure(found.rows),
        "gap_figure": figures.gap_figure(proof) if proof else empty,
    }


def _tables(run: RunRecords, found: Summary) -> dict[str, Any]:  # Any: template values
    return {
        "headline": headline(run, found),
        "cards": summary_cards(run, found),
        "predicted_rows": predicted_rows(run),
        "recipe_rows": recipe_rows(run.sensitivity) if run.sensitivity else [],
        "horizon": HORIZON_STEPS,
        "joint_rows": joint_rows(run),
        "trial_rows": trial_rows(run),
        "environment_rows": environment_rows(run),
        "condition_rows": condition_rows(run),
        "how_measured": how_measured(run),
    }


@functools.cache
def _environment() -> Environment:
    """Return the templates' environment: everything is escaped, hidden characters made visible."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment


def _shown(value: object) -> object:
    """Return what a template prints for a value; None is unknown, text is cleaned."""
    if value is None:
        return formats.UNKNOWN
    if isinstance(value, str) and not isinstance(value, Markup):
        return formats.clean_text(value)
    return value


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
