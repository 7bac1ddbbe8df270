"""Fit the cost model's constants to the published rows and write profiles/*.json.

    .venv/bin/python bench/fit_costmodel.py [OUT]

Intervals are quantiles of the errors on rows of sources that were left out of the fit, so this fits
a dozen times: about three minutes.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from datasheets import SHEETS, Sheet
from holdout import (
    GEMM_KINDS,
    TIME_KINDS,
    Held,
    absolute_errors,
    covering,
    leave_sources_out,
    leave_training_sources_out,
)
from holdout import quantile as grouped_quantile
from modelfit import BEST_COVERED, Values, fit_everything, make_profile
from published import Kind, Observation, observations
from trainings import stated, trainings

LOW, HIGH = 0.1, 0.9
LARGE = 1024
SCORED = (BEST_COVERED, "h100-sxm", "h100-pcie", "h800")  # devices whose linears or GEMMs tell
WIDER = 1.5  # for devices of which no linear layer is published


def main(out: Path) -> None:
    rows, runs = observations(), stated(trainings())
    errors = interval_errors(rows)
    held = leave_training_sources_out(rows, runs)
    errors["step_error"] = covering(absolute_errors(held), HIGH - LOW)
    fitted = fit_everything(rows, runs)
    for sheet in SHEETS:
        profile = make_profile(sheet, fitted[sheet.name], rows, device_errors(sheet, errors))
        print(profile.save(out / f"{sheet.name}.json"))


def interval_errors(rows: Sequence[Observation]) -> Values:
    """Return the error quantiles of rows that the fit has not seen; single GEMMs: the large ones.

    Only one source has small GEMMs, so leaving it out says nothing of a fit that has seen it.
    """
    linear = _logs(leave_sources_out(rows, [Kind.LINEAR]))
    large = [row for row in rows if min(row.shapes[0]) >= LARGE or row.kind is Kind.LINEAR]
    gemm = _logs(leave_sources_out(large, GEMM_KINDS, devices=SCORED))
    time = _logs(leave_sources_out(large, TIME_KINDS, devices=SCORED))
    sizes = {source: [abs(value) for value in group] for source, group in time.items()}
    return {
        "gemm_error_low": min(grouped_quantile(gemm, LOW), -0.02),
        "gemm_error_high": max(grouped_quantile(gemm, HIGH), 0.02),
        "speedup_error_low": min(grouped_quantile(linear, LOW), -0.02),
        "speedup_error_high": max(grouped_quantile(linear, HIGH), 0.02),
        "time_error": grouped_quantile(sizes, HIGH - LOW),
    }


def device_errors(sheet: Sheet, errors: Values) -> Values:
    """Return a device's errors: wider where no linear layer of it is published."""
    wide = 1.0 if sheet.name.startswith("h100-sxm") else WIDER
    return {name: value * wide for name, value in errors.items()}


def _logs(held: Sequence[Held]) -> dict[str, list[float]]:
    groups = defaultdict(list)
    for row in held:
        groups[row.source].append(math.log(row.ratio))
    return dict(groups)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "profiles"
    folder.mkdir(exist_ok=True)
    main(folder)
