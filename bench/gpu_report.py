"""Results of bench/gpu.py -> Markdown, and predicted speedups against measured ones."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from scoring import Pair, score_pairs

from autoprec.predict import predict_linear
from autoprec.records.devices import ArmPrediction, DeviceProfile, Prediction

Row = Mapping[str, Any]  # Any: whatever a section wrote, numbers, texts and None


def predicted_speedup(profile: DeviceProfile, row: Row) -> Prediction | None:
    """Return the predicted FP8 speedup of a measured linear, without kernels around the layer."""
    found = predict_linear(
        profile,
        row["M"],
        row["K"],
        row["N"],
        recipe=row["recipe"],
        compiled=row["mode"] != "eager",
    )
    if found.fp8 is None or found.speedup is None:
        return None
    value = _alone_ms(found.bf16) / _alone_ms(found.fp8)
    share = value / found.speedup.value
    return Prediction(value=value, low=found.speedup.low * share, high=found.speedup.high * share)


def predicted_ms(profile: DeviceProfile, row: Row) -> float:
    """Return the predicted ms of a measured linear in BF16."""
    compiled = row["mode"] != "eager"
    return _alone_ms(predict_linear(profile, row["M"], row["K"], row["N"], compiled=compiled).bf16)


def _alone_ms(arm: ArmPrediction) -> float:
    return arm.total_ms - arm.neighbours_ms


def compare_linears(
    rows: Sequence[Row], profiles: Mapping[str, DeviceProfile]
) -> dict[str, list[dict[str, Any]]]:
    """Return every measured speedup beside the predicted ones, and a score per profile and mode."""
    table, scores = [], []
    for row in (row for row in rows if row.get("speedup")):
        found = {name: predicted_speedup(profile, row) for name, profile in profiles.items()}
        shown = {name: one.value if one else None for name, one in found.items()}
        table.append({**_kept(row, ("M", "K", "N", "mode", "recipe", "speedup")), **shown})
    for name, profile in profiles.items():
        for mode in dict.fromkeys(row["mode"] for row in table):
            own = [row for row in rows if row.get("speedup") and row["mode"] == mode]
            made = [(predicted_speedup(profile, row), row["speedup"]) for row in own]
            pairs = [Pair(predicted, actual) for predicted, actual in made if predicted]
            bf16 = [abs(predicted_ms(profile, row) / row["bf16_ms"] - 1) for row in own]
            if pairs:
                score = score_pairs(pairs, left_out=len(own) - len(pairs))
                scores.append({"profile": name, "mode": mode, **score, "bf16_time": fmean(bf16)})
    return {"rows": table, "scores": scores}


def speedup_csv(rows: Sequence[Row], device: str) -> str:
    """Return the measured speedups as `autoprec devices predict --csv` reads them."""
    lines = ["device,M,K,N,recipe,compiled,speedup"]
    for row in (row for row in rows if row.get("speedup")):
        compiled = "no" if row["mode"] == "eager" else "yes"
        sizes = ",".join(str(row[axis]) for axis in "MKN")
        lines.append(f"{device},{sizes},{row['recipe']},{compiled},{row['speedup']:.6g}")
    return "\n".join([*lines, ""])


def render(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown: one table per list of rows, in the order of the sections."""
    lines = [f"# {results['title']}", "", results["claim"], ""]
    for section, content in results["sections"].items():
        lines += [f"## {section}", ""]
        for name, value in content.items():
            if isinstance(value, list) and value and isinstance(value[0], Mapping):
                lines += ["", f"**{name}**", "", *_table(value), ""]
            else:
                lines.append(f"- {name}: {_cell(value)}")
        lines.append("")
    return "\n".join([*lines, "## skipped or failed", "", *_skipped(results["skipped"]), ""])


def _skipped(notes: Sequence[str]) -> list[str]:
    return [f"- {note}" for note in notes] or ["nothing"]


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in rows),
    ]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")


def _kept(row: Row, names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names}
