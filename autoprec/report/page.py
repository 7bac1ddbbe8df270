"""report.html: one file that opens anywhere, offline, and asks nothing of any network.

Everything a page needs is in it: style, charts (SVG made here) and a small script that sorts,
filters and shows tips. Its content security policy forbids every request and every script but that
one, by hash; so a name that smuggled markup past the escaping could still not run or send anything.
"""

import base64
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from autoprec import __version__
from autoprec.records import Estimate
from autoprec.report import figures, formats, sections
from autoprec.report.answers import fp8_ceiling, unmeasured
from autoprec.report.layer_frame import PARTS, Row, View, columns_of, frame_rows, options_frame
from autoprec.report.layer_table import total_row
from autoprec.report.runs import RunRecords
from autoprec.report.summary import apply_line, summarise_run
from autoprec.report.text_table import Table

if TYPE_CHECKING:
    import pandas as pd

TEMPLATES = Path(__file__).parent / "templates"
DETAILS = "option|output|grad_input|grad_weight|cast|total, ms|p20..p80|samples|gradient error"
DETAILS += "|memory|ran"
PREDICTED_SPREAD = "80 % interval, predicted"


def render_html(run: RunRecords) -> str:
    """Return the report of a run as one HTML page; sections say what was not run."""
    found, options, script = summarise_run(run), options_frame(run), _asset("script.js")
    rows = frame_rows(found.layers)
    return (
        _environment()
        .get_template("report.html")
        .render(
            # what was found, and the modules that draw it: templates call their functions
            run=run,
            found=found,
            options=options,
            ceiling=fp8_ceiling(run, found.layers, options),
            figures=figures,
            formats=formats,
            sections=sections,
            # the table of layers
            columns=columns_of(View.PAGE),
            rows=rows,
            total=total_row(found.layers),
            details=_details(rows, options),
            refusals={x.name: x.refusals for x in run.profile.model.layers} if run.profile else {},
            # the page itself
            notes=unmeasured(run),
            apply_line=apply_line("."),
            version=__version__,
            style=_asset("style.css"),
            script=script,
            policy=_policy(script),
        )
    )


def _details(layers: list[Row], options: "pd.DataFrame") -> dict[str, Table]:
    """Return what is known of every option, by layer."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    chosen = {(row["name"], row["option"]) for row in layers}
    for row in frame_rows(options):
        mark = " (chosen)" if (row["name"], row["option"]) in chosen else ""
        first, *others = _detail_texts(row)
        rows.setdefault(row["name"], []).append((first + mark, *others))
    is_sampled = bool((options["samples"] > 0).any())
    heads = [
        head if is_sampled or head != "p20..p80" else PREDICTED_SPREAD
        for head in DETAILS.split("|")
    ]
    return {name: Table(heads, texts, numbers=range(1, 10)) for name, texts in rows.items()}


def _detail_texts(row: Row) -> tuple[str, ...]:
    times = (formats.ms(row[f"{part}_ms"]) for part in (*PARTS, "total"))
    spread = formats.interval(row["p20_ms"], row["p80_ms"], formats.ms)
    samples = formats.text(row["samples"])
    samples += f" (-{row['rejected']})" if row["rejected"] else ""
    error = formats.UNKNOWN
    if row["grad_error"] is not None:
        estimate = Estimate(mean=row["grad_error"], stderr=row["grad_error_stderr"])
        error = formats.grad_error(estimate)
    memory, ran = formats.size(row["memory_bytes"]), row["infeasible"] or row["kernels"]
    option, spread = formats.option(row["option"]), spread.replace(" to ", "..")
    ran = ran if row["total_ms"] is not None else row["infeasible"] or "not timed"
    return (option, *times, spread or formats.UNKNOWN, samples, error, memory, ran or "")


@functools.cache
def _environment() -> Environment:
    """Return the templates' environment: everything is escaped, hidden characters made visible."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


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
