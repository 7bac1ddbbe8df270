"""What a run found, for people: terminal, HTML and CSV. Needs no torch."""

from autoprec.report.frame import layers_frame
from autoprec.report.notebook import plan_html, plan_text, run_html
from autoprec.report.page import render_html
from autoprec.report.runs import RunRecords, load_run
from autoprec.report.stages import (
    print_difference,
    print_plan,
    print_profile,
    print_record,
    print_sensitivity,
    print_verification,
)
from autoprec.report.summary import summary_object
from autoprec.report.table import layer_rows
from autoprec.report.terminal import print_summary

__all__ = [
    "RunRecords",
    "layer_rows",
    "layers_frame",
    "load_run",
    "plan_html",
    "plan_text",
    "print_difference",
    "print_plan",
    "print_profile",
    "print_record",
    "print_sensitivity",
    "print_summary",
    "print_verification",
    "render_html",
    "run_html",
    "summary_object",
]
