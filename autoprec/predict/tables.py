"""CSV in, CSV out: the predictions of many linears, each row with its own columns first.

A row that FP8 cannot run has its BF16 predictions and a `refusal`. A row that cannot be predicted
at all (unknown device, a shape that is none, more cells than the header) has the refusal alone.
A name that the input has already is `predicted_NAME` in the output.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoprec.common.text import one_line, shown_value
from autoprec.errors import AutoprecError, DeviceError
from autoprec.predict.linear import predict_linear
from autoprec.predict.registry import load_device_profile
from autoprec.predict.spelling import has_own_casts, parse_compiled, parse_recipe
from autoprec.records.devices import ArmPrediction, LinearPrediction, Prediction
from autoprec.records.model import Recipe

SIZES = ("M", "K", "N")
NEEDED = ("device", *SIZES)
READ = (*NEEDED, "recipe", "compiled")
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

    def fitted(self, row: tuple[str, ...]) -> tuple[str, ...]:
        """Return a row with as many cells as the header."""
        width = len(self.header)
        return (*row[:width], *("",) * (width - len(row)))


@dataclass(frozen=True)
class Answer:
    """What became of one row: a prediction, or why there is none."""

    prediction: LinearPrediction | None
    refusal: str


def read_table(text: str, *, source: str, needed: tuple[str, ...] = NEEDED) -> Table:
    """Return the table in CSV text.

    Raises:
        DeviceError: it is no CSV, or a column is missing or there twice.
    """
    lines = _csv_lines(text, source=source)
    table = Table(header=lines[0] if lines else (), rows=tuple(lines[1:]))
    missing = [name for name in needed if table.column(name) is None]
    if missing:
        raise DeviceError(
            f"the CSV must have the columns {', '.join(needed)}, but {source} lacks "
            f"{', '.join(missing)}; its first line must name the columns"
        )
    names = [cell.strip().lower() for cell in table.header]
    twice = [name for name in {*READ, *needed} if names.count(name.lower()) > 1]
    if twice:
        raise DeviceError(
            f"the CSV must name a column once, but {source} has two called {twice[0]}; "
            "rename the one that is not to be read"
        )
    return table


def predict_table(
    table: Table,
    *,
    device: str = "",
    recipe: Recipe = Recipe.TENSORWISE,
    compiled: bool = True,
) -> tuple[Answer, ...]:
    """Return the answer for each row; device, recipe and mode are for rows that do not say."""
    return tuple(
        _answer(table, row, device=device, recipe=recipe, compiled=compiled) for row in table.rows
    )


def format_table(table: Table, answers: Sequence[Answer]) -> str:
    """Return the table as CSV with the predictions behind each row's own columns."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*table.header, *added_names(table.header)))
    for row, answer in zip(table.rows, answers, strict=True):
        writer.writerow((*table.fitted(row), *_cells(answer)))
    return out.getvalue()


def added_names(header: Iterable[str]) -> tuple[str, ...]:
    """Return the added columns' names: one that the header has already begins with `predicted_`."""
    taken = {cell.strip().lower() for cell in header}
    found = []
    for name in ADDED:
        while name in taken:
            name = f"predicted_{name}"
        taken.add(name)
        found.append(name)
    return tuple(found)


def _csv_lines(text: str, *, source: str) -> list[tuple[str, ...]]:
    """Return the lines that are not empty; `strict`, since a stray quote would swallow rows."""
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        return [tuple(row) for row in reader if row]
    except csv.Error as error:
        raise DeviceError(
            f"the CSV must be well formed, but {source} is not at line {reader.line_num} "
            f"({one_line(str(error))}); mend the quotes there"
        ) from error


def _answer(
    table: Table, row: tuple[str, ...], *, device: str, recipe: Recipe, compiled: bool
) -> Answer:
    wording = table.cell(row, "recipe")
    try:
        _check_width(table, row)
        prediction = predict_linear(
            load_device_profile(_device(table.cell(row, "device") or device)),
            *(_size(axis, table.cell(row, axis)) for axis in SIZES),
            recipe=parse_recipe(wording) if wording else recipe,
            compiled=has_own_casts(wording)
            or parse_compiled(table.cell(row, "compiled"), default=compiled),
        )
    except AutoprecError as error:
        return Answer(None, str(error))
    return Answer(prediction, prediction.refusal)


def _check_width(table: Table, row: tuple[str, ...]) -> None:
    width = len(table.header)
    if any(cell.strip() for cell in row[width:]):
        raise DeviceError(
            f"a row must have at most the header's {width} cells, but it has {len(row)}; "
            "put quotes around a cell that holds commas"
        )


def _device(name: str) -> str:
    if not name:
        raise DeviceError(
            "a row must name its device, but its cell is empty; fill it in, or name the device of "
            "such rows before --csv"
        )
    return name


def _size(axis: str, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value != value or value in (float("inf"), float("-inf")) or value != int(value) or value < 1:
        raise DeviceError(
            f"{axis} must be a positive whole number, but it is {shown_value(text)}; mend it"
        )
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
