"""layers.csv: the rows of the table as a pandas frame.

Times are ms per step, memory is bytes, gradient errors and shares are fractions (0.001 = 0.1 %).
Names are written exactly, so that the file can be joined with a model's `named_modules()`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from autoprec.records import Estimate
from autoprec.report.runs import RunRecords
from autoprec.report.table import PARTS, LayerRow, OptionRow, Times, layer_rows

if TYPE_CHECKING:
    import pandas as pd

Column = Callable[[LayerRow], object]


def layers_frame(run: RunRecords) -> "pd.DataFrame":
    """Return one row per layer, in model order."""
    import pandas as pd

    columns = frame_columns()
    rows = [[column(row) for column in columns.values()] for row in layer_rows(run)]
    return pd.DataFrame(rows, columns=list(columns))


def frame_columns() -> dict[str, Column]:
    """Return the columns by name, each with what it takes from a row."""
    return {
        "name": lambda row: row.name,
        "kind": lambda row: row.kind.value,
        "type": lambda row: row.type_name,
        "shape": lambda row: row.shape,
        "calls": lambda row: row.calls,
        "is_frozen": lambda row: row.spec.is_frozen if row.spec else None,
        "tied_to": lambda row: row.spec.tied_to if row.spec else None,
        "precision": lambda row: row.option.precision.value if row.option else None,
        "recipe": lambda row: row.option.recipe.value if row.option and row.option.recipe else None,
        "gemms_hp": lambda row: " ".join(row.option.gemms_hp) if row.option else None,
        **_time_columns("", lambda row: row.chosen),
        **_time_columns("bf16_o2_", lambda row: row.bf16_o2),
        **_time_columns("fp32_", lambda row: row.fp32),
        "best_fp8": lambda row: row.best_fp8.option.key if row.best_fp8 else None,
        "best_fp8_total_ms": _best_fp8_ms,
        "speedup_vs_bf16_o2": lambda row: row.speedup_vs_bf16_o2,
        "speedup_vs_fp32": lambda row: row.speedup_vs_fp32,
        "saved_vs_bf16_o2_ms": lambda row: row.saved_vs_bf16_o2_ms,
        "saved_vs_fp32_ms": lambda row: row.saved_vs_fp32_ms,
        **_effect_columns(),
        **_memory_columns(),
        "samples": lambda row: row.chosen.samples if row.chosen else None,
        "rejected": lambda row: row.chosen.rejected if row.chosen else None,
        "time_basis": lambda row: row.chosen.basis.value if row.chosen else None,
        "grad_error_basis": lambda row: row.grad_error_basis.value if row.grad_error else None,
        "reason": lambda row: row.reason,
    }


def _time_columns(prefix: str, times: Callable[[LayerRow], Times | None]) -> dict[str, Column]:
    def column(field: str) -> Column:
        return lambda row: getattr(times(row), field, None)

    return {f"{prefix}{part}_ms": column(f"{part}_ms") for part in (*PARTS, "other", "total")}


def _effect_columns() -> dict[str, Column]:
    return {
        "grad_error": lambda row: _mean(row.grad_error),
        "grad_error_stderr": lambda row: row.grad_error.stderr if row.grad_error else None,
        "grad_error_share": lambda row: row.grad_error_share,
    }


def _memory_columns() -> dict[str, Column]:
    def column(field: str) -> Column:
        return lambda row: getattr(getattr(_chosen(row), "timing", None), field, None)

    fields = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
    return {**{field: column(field) for field in fields}, "memory_bytes": lambda r: r.memory_bytes}


def _chosen(row: LayerRow) -> OptionRow | None:
    return next((option for option in row.options if option.option == row.option), None)


def _best_fp8_ms(row: LayerRow) -> float | None:
    times = row.best_fp8.times if row.best_fp8 else None
    return times.total_ms if times else None


def _mean(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.mean
