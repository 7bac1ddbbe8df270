"""CSV in, CSV out: the predictions of many linears, each row keeping its own columns first.

A row that FP8 cannot run has its BF16 predictions and a `refusal`. A row that cannot be predicted
at all (unknown device, a shape that is none, more cells than columns) has the refusal alone.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from autoprec.costmodel.linear import predict_linear
from autoprec.costmodel.registry import load_device_profile
from autoprec.costmodel.spelling import has_own_casts, parse_compiled, parse_recipe
from autoprec.errors import AutoprecError, DeviceError
from autoprec.records.devices import ArmPrediction, LinearPrediction, Prediction, PricedRecipe

NEEDED = ("device", "M", "K", "N")
ARM_TIMES = (
    *("output", "grad_input", "grad_weight", "cast", "neighbours"),
    *("total", "total_low", "total_high"),
)
ADDED = (
    "profile",
    *(f"{arm}_{time}_ms" for arm in ("bf16", "fp8") for time in ARM_TIMES),
    *(f"{name}{end}" for name in ("gemm_speedup", "speedup") for end in ("", "_low", "_high")),
    "refusal",
)


@dataclass(frozen=True)
class Table:
    """A CSV file: its header and rows as they are."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, name: str) -> int | None:
        """Return where a column is, whatever its case, or None."""
        names = [cell.strip().lower() for cell in self.header]
        return names.index(name.lower()) if name.lower() in names else None

    def cell(self, row: tuple[str, ...], name: str) -> str:
        """Return a row's text in a column, or an empty one."""
        at = self.column(name)
        return row[at].strip() if at is not None and at < len(row) else ""


@dataclass(frozen=True)
class Answer:
    """What became of one row: a prediction, or why there is none."""

    prediction: LinearPrediction | None
    refusal: str


def read_table(text: str, *, source: str, needed: tuple[str, ...] = NEEDED) -> Table:
    """Return the table in CSV text.

    Raises:
        DeviceError: a needed column is missing.
    """
    lines = [tuple(row) for row in csv.reader(io.StringIO(text.removeprefix("\ufeff")))]
    lines = [line for line in lines if line]
    table = Table(header=lines[0] if lines else (), rows=tuple(lines[1:]))
    missing = [name for name in needed if table.column(name) is None]
    if missing:
        raise DeviceError(
            f"the CSV must have the columns {', '.join(needed)}, but {source} lacks "
            f"{', '.join(missing)}; its first line must name the columns"
        )
    return table


def predict_table(
    table: Table,
    *,
    device: str = "",
    recipe: PricedRecipe = PricedRecipe.TENSORWISE,
    compiled: bool = True,
) -> tuple[Answer, ...]:
    """Return the answer for each row; `device`, `recipe`, `compiled` are for rows without one."""
    return tuple(
        _answer(table, row, device=device, recipe=recipe, compiled=compiled) for row in table.rows
    )


def format_table(table: Table, answers: Sequence[Answer]) -> str:
    """Return the table as CSV with the predictions behind each row's own columns."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*table.header, *ADDED))
    for row, answer in zip(table.rows, answers, strict=True):
        padding = ("",) * (len(table.header) - len(row))
        writer.writerow((*row[: len(table.header)], *padding, *_cells(answer)))
    return out.getvalue()


def _answer(
    table: Table, row: tuple[str, ...], *, device: str, recipe: PricedRecipe, compiled: bool
) -> Answer:
    wording = table.cell(row, "recipe")
    if len(row) > len(table.header):
        return Answer(
            None,
            f"a row must have at most the header's {len(table.header)} cells, but it has "
            f"{len(row)}; quote a cell that holds a comma",
        )
    try:
        prediction = predict_linear(
            load_device_profile(table.cell(row, "device") or device),
            *(_size(axis, table.cell(row, axis)) for axis in "MKN"),
            recipe=parse_recipe(wording) if wording else recipe,
            compiled=has_own_casts(wording)
            or parse_compiled(table.cell(row, "compiled"), default=compiled),
        )
    except AutoprecError as error:
        return Answer(None, " ".join(str(error).split()))
    return Answer(prediction, prediction.refusal)


def _size(axis: str, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value != value or value in (float("inf"), float("-inf")) or value != int(value) or value < 1:
        raise DeviceError(f"{axis} must be a positive whole number, but it is {text!r}; mend it")
    return int(value)


def _cells(answer: Answer) -> tuple[str, ...]:
    found = answer.prediction
    if found is None:
        return (*("" for _ in ADDED[:-1]), answer.refusal)
    return (
        found.device,
        *_arm_cells(found.bf16),
        *_arm_cells(found.fp8),
        *_prediction_cells(found.gemm_speedup),
        *_prediction_cells(found.speedup),
        found.refusal,
    )


def _arm_cells(arm: ArmPrediction | None) -> tuple[str, ...]:
    if arm is None:
        return ("",) * len(ARM_TIMES)
    return tuple(f"{getattr(arm, f'{name}_ms'):.6g}" for name in ARM_TIMES)


def _prediction_cells(prediction: Prediction | None) -> tuple[str, ...]:
    if prediction is None:
        return ("", "", "")
    return tuple(f"{v:.5g}" for v in (prediction.value, prediction.low, prediction.high))
