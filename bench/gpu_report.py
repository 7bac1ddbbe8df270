"""Rows of bench/gpu_day.py -> predicted against measured, a page, tables as bench/data has them."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from gpu_running import Row, failures, read_rows, results

from autoprec.common.files import write_atomically
from autoprec.predict import predict_linear
from autoprec.predict.gemm import Kernel, gemm_us
from autoprec.records.devices import DeviceProfile, Prediction

PAGE, PREDICTIONS = "report.md", "predictions.csv"
KERNELS = {kernel.value: kernel for kernel in Kernel}
RECIPE_OF = {  # GEMM rows of bench/data, by kernel of ours
    Kernel.FP8_FAST: ("tensorwise", "fast_accum=True"),
    Kernel.FP8_SLOW: ("tensorwise", "fast_accum=False"),
    Kernel.FP8_ROWWISE: ("rowwise", "fast_accum=True"),
}
HIDDEN = ("section", "item", "at")
MOST_COLUMNS = 20  # a row with more is a list


def compare(
    rows: Sequence[Row], name: str, profile: DeviceProfile, step_ms: Mapping[str, float]
) -> Iterator[Row]:
    """Yield each measured figure beside a profile's prediction, then the scores of each kind.

    `step_ms` holds the whole steps' predictions by arm and mode.
    """
    made = [*_gemms(rows, profile), *_linears(rows, profile), *_steps(rows, step_ms)]
    for row in made:
        yield {"profile": name, **row, "error": row["predicted"] / row["measured"] - 1}
    for kind in dict.fromkeys(row["kind"] for row in made):
        own = [row for row in made if row["kind"] == kind]
        errors = [row["predicted"] / row["measured"] - 1 for row in own]
        score: Row = {"profile": name, "score of": kind, "count": len(own)}
        score |= {"median error": median(errors), "median |error|": median(map(abs, errors))}
        if kind.endswith("speedup"):
            sides = [(row["predicted"] >= 1) == (row["measured"] >= 1) for row in own]
            score["right side of 1"] = sum(sides) / len(sides)
        yield score


def _gemms(rows: Sequence[Row], profile: DeviceProfile) -> Iterator[Row]:
    for row, base in _with_bf16(results(rows, "gemms")):
        shape = row["M"], row["K"], row["N"]
        kernel = KERNELS.get(row["kernel"])
        if kernel is None:
            continue  # current and delayed scaling: measured only
        us = gemm_us(profile.machine, *shape, kernel)
        what = f"{_shape(row)} {kernel}"
        yield {"kind": "gemm ms", "what": what, "measured": row["ms"], "predicted": us / 1e3}
        if kernel is not Kernel.BF16 and base is not None:
            predicted = gemm_us(profile.machine, *shape, Kernel.BF16) / us
            measured = base["ms"] / row["ms"]
            yield {
                "kind": "gemm speedup",
                "what": what,
                "measured": measured,
                "predicted": predicted,
            }


def _with_bf16(rows: Sequence[Row]) -> Iterator[tuple[Row, Row | None]]:
    """Yield each GEMM with the BF16 one of its shape."""
    bf16 = {_shape(row): row for row in rows if row.get("kernel") == Kernel.BF16.value}
    for row in rows:
        if "ms" in row:
            yield row, bf16.get(_shape(row))


def _linears(rows: Sequence[Row], profile: DeviceProfile) -> Iterator[Row]:
    for row in results(rows, "linears"):
        if "speedup" not in row:
            continue
        is_compiled = row["mode"] != "eager"
        found = predict_linear(
            profile, row["M"], row["K"], row["N"], recipe=row["recipe"], compiled=is_compiled
        )
        if found.speedup is not None:
            what = f"{_shape(row)} {row['recipe']}, {row['mode']}"
            kind = "linear speedup" if is_compiled else "eager linear speedup"
            yield {
                "kind": kind,
                "what": what,
                "measured": row["speedup"],
                **_interval(found.speedup),
            }


def _interval(found: Prediction) -> Row:
    return {"predicted": found.value, "low": found.low, "high": found.high}


def _steps(rows: Sequence[Row], step_ms: Mapping[str, float]) -> Iterator[Row]:
    measured = {f"{row['arm']}, {row['mode']}": row["ms"] for row in results(rows, "steps")}
    for label, ms in measured.items():
        if label not in step_ms:
            continue
        yield {"kind": "step ms", "what": label, "measured": ms, "predicted": step_ms[label]}
        base = f"bf16, {label.rpartition(', ')[2]}"
        if label != base and base in measured and step_ms[label] != step_ms[base]:
            speedups = {
                "measured": measured[base] / ms,
                "predicted": step_ms[base] / step_ms[label],
            }
            yield {"kind": "step speedup", "what": label, **speedups}


def write_report(out: Path, *, is_quick: bool) -> None:
    """Write the page and the tables of what is measured so far."""
    rows = read_rows(out)
    device = next((row for row in results(rows, "facts") if "capability" in row), {})
    write_atomically(out / PAGE, "\n".join([*_page(rows, device, is_quick=is_quick), ""]))
    tables = {
        PREDICTIONS: [r for r in results(rows, "predictions") if "what" in r],
        "gemm.csv": list(_gemm_table(rows, device)),
        "linear_layers.csv": list(_linear_table(rows, device)),
        "training.csv": list(_training_table(rows, device)),
    }
    for name, table in tables.items():
        if table:
            write_atomically(out / name, _csv(table))


def _page(rows: Sequence[Row], device: Row, *, is_quick: bool) -> Iterator[str]:
    yield f"# autoprec on {device.get('name', 'a device that did not tell its name')}"
    yield ""
    if is_quick:
        yield "A test of the script with tiny shapes: no figure here means anything."
    else:
        yield "Measured by `bench/gpu_day.py`: medians, cold L2, candidates in turns."
    sections = dict.fromkeys(row["section"] for row in rows)
    for section in sections:
        own = results(rows, section)
        yield from ("", f"## {section}", "")
        # Rows of one kind have the same columns, and make a table.
        for columns in dict.fromkeys(tuple(row) for row in own):
            alike = [row for row in own if tuple(row) == columns]
            yield from _list(alike) if len(columns) > MOST_COLUMNS else _table(alike)
            yield ""
    yield from ("## failed or left out", "")
    failed = failures(rows)
    yield from (f"- {r['section']}, {r.get('item', 'process')}: {r['failed']}" for r in failed)
    if not failed:
        yield "nothing"


def _list(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield from ("", f"**{row.get('item')}**", "")
        yield from (f"- {name}: {_cell(row[name])}" for name in row if name not in HIDDEN)


def _table(rows: Sequence[Row]) -> Iterator[str]:
    columns = [name for name in rows[0] if name not in HIDDEN]
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(_cell(row[name]) for name in columns)} |"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "/").replace("\n", " ")


# --- tables with the columns of bench/data ----------------------------------------------------


def _gemm_table(rows: Sequence[Row], device: Row) -> Iterator[Row]:
    for row, base in _with_bf16(results(rows, "gemms")):
        recipe, note = RECIPE_OF.get(KERNELS.get(row["kernel"], Kernel.BF16), ("", ""))
        if recipe and base is not None:
            yield {
                **_origin(device),
                **{axis: row[axis] for axis in "MKN"},
                "recipe": recipe,
                "metric": "gemm kernel time (GPU time)",
                "bf16_value": f"{1e3 * base['ms']:.5g}",
                "fp8_value": f"{1e3 * row['ms']:.5g}",
                "unit": "us",
                "speedup": f"{base['ms'] / row['ms']:.5g}",
                "notes": f"{note}; {_conditions(row)}; no cast cost",
            }


def _linear_table(rows: Sequence[Row], device: Row) -> Iterator[Row]:
    for row in results(rows, "linears"):
        if "speedup" in row:
            yield {
                **_origin(device),
                **{axis: row[axis] for axis in "MKN"},
                "recipe": f"{row['recipe']} dynamic",
                "direction": "LayerNorm+Linear+Sigmoid fwd+bwd",
                "compiled": "no" if row["mode"] == "eager" else "yes",
                "fast_accum": "",
                "bf16_value": f"{row['bf16_ms']:.5g}",
                "fp8_value": f"{row['ms']:.5g}",
                "unit": "ms",
                "speedup": f"{row['speedup']:.5g}",
                "quant_cost_included": "yes",
                "notes": _conditions(row),
            }


def _training_table(rows: Sequence[Row], device: Row) -> Iterator[Row]:
    found = results(rows, "steps")
    for row in (row for row in found if row["fp8_layers"]):
        base = next((r for r in found if (r["arm"], r["mode"]) == ("bf16", row["mode"])), None)
        if base is not None:
            rates = [r["tokens"] / r["ms"] * 1e3 for r in (base, row)]
            origin = _origin(device)
            yield {
                "model": f"decoder of {row['parameters'] / 1e9:.2f} B parameters",
                "device": origin["device"],
                "n_gpu": 1,
                "parallelism": "none",
                "batch": "",
                "seq": row["tokens"],
                "baseline": "BF16 O2",
                "tokens_s_baseline": f"{rates[0]:.5g}",
                "tokens_s_fp8": f"{rates[1]:.5g}",
                "unit": "tok/s",
                "speedup": f"{rates[1] / rates[0]:.5g}",
                "recipe": row["arm"],
                "compile": "no" if row["mode"] == "eager" else "by block",
                "source": origin["source"],
                "notes": _conditions(row),
                "fair_pair": "yes",
            }


def _origin(device: Row) -> Row:
    software = device.get("software", {})
    versions = f"torch {software.get('torch')}, CUDA {software.get('cuda')}"
    return {"device": device.get("name"), "source": f"bench/gpu_day.py ({versions})"}


def _conditions(row: Row) -> str:
    return f"{row.get('sm_mhz')} MHz, {row.get('watts')} W, {row['samples']} samples"


def _shape(row: Row) -> str:
    return "x".join(str(row[axis]) for axis in "MKN")


def _csv(rows: Iterable[Row]) -> str:
    table = list(rows)
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in table for name in row if name not in HIDDEN))
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
