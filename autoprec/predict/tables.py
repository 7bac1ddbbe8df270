"""CSV in, table out: the predictions of many linears, each row with its own columns first.

A row that FP8 cannot run has its BF16 predictions and a `refusal`. A row that cannot be predicted
at all (unknown device, a shape that is none, more cells than the header) has the refusal alone.
A name that the input has already is `predicted_NAME` in the output.
"""

import csv
import io
from collections.abc import Iterable, Sequence

import pandas as pd

from autoprec.common.recipes import Recipe
from autoprec.common.text import error_line, shown_value
from autoprec.errors import AutoprecError, DeviceError
from autoprec.predict.linear import predict_linear
from autoprec.predict.registry import load_device_profile
from autoprec.predict.spelling import has_own_casts, parse_compiled, parse_recipe
from autoprec.records.devices import ArmPrediction

SIZES = ("M", "K", "N")
READ = ("device", *SIZES, "recipe", "compiled")
TIMES, SPEEDUPS = ("bf16", "fp8"), ("gemm_speedup", "speedup")  # of a `LinearPrediction`
ADDED = (
    "profile",
    *(f"{arm}_{time}" for arm in TIMES for time in ArmPrediction.model_fields),
    *(f"{name}{end}" for name in SPEEDUPS for end in ("", "_low", "_high")),
    "refusal",
)


def predict_table(
    text: str,
    *,
    source: str,
    device: str = "",
    recipe: Recipe = Recipe.TENSORWISE,
    compiled: bool = True,
) -> pd.DataFrame:
    """Return the rows of CSV text, all cells as text, with the columns `ADDED` behind their own.

    Its first line names the columns, in any case and order; messages call it `source`. Rows that
    name no device, recipe or mode have those given here.

    Raises:
        DeviceError: it is no CSV, or a column is missing or there twice.
    """
    header, *rows = _csv_lines(text, source=source) or [[]]
    names = [cell.strip().lower() for cell in header]
    _check_names(names, needed=SIZES if device else ("device", *SIZES), source=source)
    width = len(header)
    answers = []
    # Whatever is wrong with a row is that row's answer; the others keep theirs.
    for row in rows:
        cells = dict(zip(names, map(str.strip, row), strict=False))
        try:
            if any(cell.strip() for cell in row[width:]):
                raise DeviceError(
                    f"a row must have at most the header's {width} cells, but it has {len(row)}; "
                    "put quotes around a cell that holds commas"
                )
            answers.append(_row(cells, device, recipe, compiled=compiled))
        except AutoprecError as error:
            answers.append({"refusal": str(error)})
    # The file's own columns stay as they are: filled up where a row is short, names kept apart.
    own = pd.DataFrame([[*row, *[""] * width][:width] for row in rows], columns=header)
    added = pd.DataFrame(answers, columns=list(ADDED), dtype=object).fillna("")
    added.columns = pd.Index(added_names(header))
    return pd.concat([own, added], axis=1)


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


def _csv_lines(text: str, *, source: str) -> list[list[str]]:
    """Return the lines that are not empty.

    With the standard library's reader, and `strict`: a stray quote would swallow rows, and pandas
    does not say in which line.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        return [row for row in reader if row]
    except csv.Error as error:
        raise DeviceError(
            f"the CSV must be well formed, but {source} is not at line {reader.line_num} "
            f"({error_line(error)}); fix the quotes there"
        ) from error


def _check_names(names: Sequence[str], *, needed: Sequence[str], source: str) -> None:
    missing = [name for name in needed if name.lower() not in names]
    if missing:
        raise DeviceError(
            f"the CSV must have the columns {', '.join(needed)}, but {source} lacks "
            f"{', '.join(missing)}; its first line must name the columns"
        )
    for name in READ:
        if names.count(name.lower()) > 1:
            raise DeviceError(
                f"the CSV must name a column once, but {source} has two called {name}; "
                "rename the one that is not to be read"
            )


def _row(cells: dict[str, str], device: str, recipe: Recipe, *, compiled: bool) -> dict[str, str]:
    """Return the added cells of a row; what FP8 cannot run has no cells of FP8."""
    name, wording = cells.get("device") or device, cells.get("recipe", "")
    if not name:
        raise DeviceError(
            "a row must name its device, but its cell is empty; fill it in, or name the device of "
            "such rows before --csv"
        )
    is_compiled = parse_compiled(cells.get("compiled", ""), default=compiled)
    found = predict_linear(
        load_device_profile(name),
        *(_size(axis, cells.get(axis.lower(), "")) for axis in SIZES),
        recipe=parse_recipe(wording) if wording else recipe,
        compiled=has_own_casts(wording) or is_compiled,
    )
    added = {"profile": found.device, "refusal": found.refusal}
    for part in (*TIMES, *SPEEDUPS):
        digits = 6 if part in TIMES else 5
        for end, value in getattr(found, part) or ():
            added[f"{part}_{end}".removesuffix("_value")] = f"{value:.{digits}g}"
    return added


def _size(axis: str, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value.is_integer() or value < 1:
        raise DeviceError(
            f"{axis} must be a positive whole number, but it is {shown_value(text)}; fix it"
        )
    return int(value)
