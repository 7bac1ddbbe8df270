"""What a run found, for people: terminal, HTML, CSV and notebooks. Needs no torch."""

import autoprec.common.rich_import  # before anything here imports rich
from autoprec.report.layer_frame import layers_frame
from autoprec.report.notebook import plan_text, run_html
from autoprec.report.page import render_html
from autoprec.report.runs import RunRecords, load_run
from autoprec.report.summary import summary_object
from autoprec.report.terminal import print_layers, print_record, print_summary
