"""The frame of layers: one row per layer, typed columns, one list of how each of them is shown.

layers.csv, the terminal, the page and notebooks all read it. Times are ms per step (all calls of
the layer, forward and backward), memory is bytes, gradient errors and shares are fractions (0.001 =
0.1 %). Names are written exactly, so that the file can be joined with a model's `named_modules()`.
A layer's `total_ms` is measured as a whole, its GEMMs and casts apart from it; `other_ms` is what
is left (bias, autograd, launches; negative where the parts cost more alone), so that a row adds up.
Savings are against BF16 O2, the baseline, and against FP32, the reference.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from autoprec.records import BF16_O2, FP32, Basis, LayerKind, LayerSensitivity, LayerTiming, Option
from autoprec.records.plan import KEPT
from autoprec.report import formats
from autoprec.report.formats import UNKNOWN
from autoprec.report.runs import RunRecords

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]  # Any: the values of one row by column, None where nothing is known

PARTS = ("output", "grad_input", "grad_weight", "cast")
TIMES = tuple(f"{part}_ms" for part in (*PARTS, "other", "total"))
BYTES = ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
BASELINES = {"bf16_o2": BF16_O2, "fp32": FP32}
LAYER_COLUMNS = (
    "name kind type shape calls is_frozen tied_to option precision recipe gemms_hp reason"
)
OPTION_COLUMNS = ["name", "option", *TIMES, "p20_ms", "p80_ms", "samples", "rejected", "time_basis"]
OPTION_COLUMNS += ["grad_error", "grad_error_stderr", "grad_error_basis"]
OPTION_COLUMNS += [*BYTES, "memory_bytes", "kernels", "infeasible"]
CODES = {
    "faster": "FP8 is faster; its gradient error is in the budget, or unknown",
    "forced": "FP8 is no faster: --keep or the memory limit asks for it",
    "kept": "by --keep",
    "slower": "FP8 is no faster than BF16 here",
    "costs": "FP8 seems faster, but its gain or gradient error is not good enough",
    "unsure": "FP32 seems faster here, but its gain is not sure",
    "no-fp8": "FP8 cannot take it: no linear layer, or not of a shape or class for FP8",
    "fp32": "BF16 is no faster than FP32 here",
    "fp32-costs": "BF16 is faster, but its gradient error too high, or all are FP32",
    "no-bf16": "BF16 cannot take it, or its time is not known",
    "uncalled": "no call with gradients in the captured step: it follows the others",
}
COUNTS = ("calls", "samples", "rejected")


class View(StrEnum):
    """Where layers are shown beside layers.csv, which has every column."""

    NARROW = "narrow"  # a terminal
    WIDE = "wide"  # and a notebook
    PAGE = "page"


@dataclass(frozen=True)
class Column:
    """One column of the frame: its title for people, how it writes a value, where it is shown."""

    name: str
    title: str = ""
    show: Callable[[Any], str] = formats.text  # Any: a value of the column
    views: tuple[View, ...] = ()
    basis: str = ""  # the column that says whether the value was measured
    is_sum: bool = False  # rows of a group add up

    @property
    def is_number(self) -> bool:
        """Whether its texts are aligned as numbers."""
        return self.show not in (formats.text, formats.option)


def _sums(names: Iterable[str]) -> Iterator[Column]:
    return (Column(name, is_sum=True) for name in names)


EVERYWHERE = tuple(View)
COLUMNS = (
    Column("name", "layer", views=EVERYWHERE),
    *map(Column, ("kind", "type")),
    Column("shape", "shape", views=(View.WIDE,)),
    *map(Column, ("calls", "is_frozen", "tied_to")),
    Column("option", "precision", formats.option, EVERYWHERE),
    *map(Column, ("precision", "recipe", "gemms_hp")),
    *_sums(TIMES[:-1]),
    Column("total_ms", "ms", formats.ms, (View.WIDE, View.PAGE), basis="time_basis", is_sum=True),
    *_sums(f"{label}_{name}" for label in BASELINES for name in TIMES),
    Column("best_fp8"),
    Column("best_fp8_total_ms", is_sum=True),
    Column("speedup_vs_bf16_o2", "vs BF16", formats.ratio, EVERYWHERE),
    Column("speedup_vs_fp32", "vs FP32", formats.ratio, (View.NARROW, View.WIDE)),
    Column("saved_vs_bf16_o2_ms", "saved, ms", formats.ms, (View.PAGE,), is_sum=True),
    Column("saved_vs_fp32_ms", is_sum=True),
    Column(
        "grad_error", "gradient error", formats.share, EVERYWHERE, "grad_error_basis", is_sum=True
    ),
    Column("grad_error_stderr"),
    Column("grad_error_share", is_sum=True),
    *_sums(BYTES),
    Column("memory_bytes", "memory", formats.size, (View.PAGE,), is_sum=True),
    *map(Column, ("samples", "rejected", "time_basis", "grad_error_basis")),
    Column("reason"),
    Column("code", "why", views=EVERYWHERE),
)


def columns_of(view: View, rows: Sequence[Row]) -> list[Column]:
    """Return the columns that a view shows, in order, without those that no row knows."""
    shown = (column for column in COLUMNS if view in column.views)
    nothing = (UNKNOWN, "")
    return [x for x in shown if any(x.show(row[x.name]) not in nothing for row in rows)]


def layers_frame(run: RunRecords) -> "pd.DataFrame":
    """Return one row per layer, in model order, with the columns of COLUMNS."""
    import pandas as pd

    options = options_frame(run)
    layers = pd.DataFrame(list(_layer_facts(run)), columns=LAYER_COLUMNS.split(), dtype=object)
    frame = _typed(layers).merge(options, on=["name", "option"], how="left")
    # beside the times of the chosen option stand those of the baselines and of the fastest FP8
    for label, option in BASELINES.items():
        own = options[options["option"] == option.key].set_index("name")[list(TIMES)]
        frame = frame.join(own.add_prefix(f"{label}_"), on="name")
        base, own_ms = frame[f"{label}_total_ms"], frame["total_ms"]
        frame[f"speedup_vs_{label}"] = base / own_ms.where(own_ms > 0.0)
        frame[f"saved_vs_{label}_ms"] = base - own_ms
    is_fp8 = options["option"].map(lambda key: Option.parse(key).is_fp8).astype(bool)
    fp8 = options[is_fp8 & options["total_ms"].notna()].sort_values("total_ms", kind="stable")
    best = fp8.drop_duplicates("name").set_index("name")[["option", "total_ms"]]
    frame = frame.join(best.add_prefix("best_"), on="name")
    frame = frame.rename(columns={"best_option": "best_fp8", "best_total_ms": "best_fp8_total_ms"})
    whole = frame["grad_error"].sum()
    frame["grad_error_share"] = frame["grad_error"] / (whole if whole > 0.0 else float("nan"))
    # codes are about the times of the options that were not taken, which a plan does not know
    frame["code"] = [reason_code(row) if run.profile else "" for row in frame_rows(frame)]
    return frame[[column.name for column in COLUMNS]]


def reason_code(row: Row) -> str:
    """Return why a layer has its option, as one of CODES; "" without a plan."""
    if not row["option"]:
        return ""
    if (row["reason"] or "").startswith(KEPT):
        return "kept"
    if row["calls"] == 0:
        return "uncalled"
    option, own_ms = Option.parse(row["option"]), row["total_ms"]
    bf16_ms, fp8_ms = row["bf16_o2_total_ms"], row["best_fp8_total_ms"]
    if option.is_fp8:
        return "forced" if bf16_ms and own_ms and own_ms >= bf16_ms else "faster"
    is_fp32, fp32_ms = option == FP32, row["fp32_total_ms"]
    if not is_fp32 and own_ms and fp32_ms is not None and fp32_ms < own_ms:
        return "unsure"
    ms = bf16_ms if is_fp32 else fp8_ms
    if ms is None or own_ms is None:
        return "no-bf16" if is_fp32 else "no-fp8"
    if ms >= own_ms:
        return "fp32" if is_fp32 else "slower"
    return "fp32-costs" if is_fp32 else "costs"


def used_codes(rows: Iterable[Row]) -> dict[str, str]:
    """Return what the codes of rows mean."""
    used = {row["code"] for row in rows}
    return {code: said for code, said in CODES.items() if code in used}


def options_frame(run: RunRecords) -> "pd.DataFrame":
    """Return one row per layer and option that the records know of, with OPTION_COLUMNS."""
    import pandas as pd

    facts: dict[tuple[str, Option], Row] = {}
    for spec in run.profile.model.layers if run.profile else ():
        facts.update({(spec.name, option): {} for option in spec.options})
    for timing in run.profile.layers if run.profile else ():
        for name in timing.names:
            facts.setdefault((name, timing.option), {}).update(_timing_facts(timing))
    for effect in _effects(run):
        facts.setdefault(effect.cell, {}).update(
            grad_error=effect.counted_error,
            grad_error_stderr=effect.grad_error.stderr,
            grad_error_basis=effect.basis.value,
        )
    _add_plan(facts, run)
    rows = [{"name": name, "option": option.key, **fact} for (name, option), fact in facts.items()]
    return _typed(pd.DataFrame(rows, columns=OPTION_COLUMNS, dtype=object))


def frame_rows(frame: "pd.DataFrame") -> list[Row]:
    """Return the rows as dicts of plain values, None where nothing is known."""
    # column by column: pandas takes three to four times as long for a whole frame
    known = frame.notna()
    columns = {
        str(name): [
            value if is_known else None
            for value, is_known in zip(frame[name].tolist(), known[name], strict=True)
        ]
        for name in frame.columns
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _layer_facts(run: RunRecords) -> Iterator[Row]:
    """Yield what each layer is and what the plan chose for it."""
    specs = {layer.name: layer for layer in run.profile.model.layers} if run.profile else {}
    plan = {layer.name: layer for layer in run.plan.layers} if run.plan else {}
    for name in dict.fromkeys((*specs, *plan, *(effect.name for effect in _effects(run)))):
        row: Row = {"name": name, "kind": LayerKind.OTHER.value}
        row |= {"type": "", "shape": "", "reason": ""}
        if chosen := plan.get(name):  # what the spec knows better overwrites it below
            row |= {
                "kind": chosen.kind.value,
                "shape": _shape(chosen.shapes),
                "option": chosen.option.key,
                "precision": chosen.precision.value,
                "recipe": chosen.recipe.value if chosen.recipe else None,
                "gemms_hp": " ".join(chosen.gemms_hp),
                "reason": chosen.reason,
            }
        if spec := specs.get(name):
            shapes = (parameter.shape for parameter in spec.parameters)
            row |= {
                "kind": spec.kind.value,
                "type": spec.type_name.rpartition(".")[2],
                "shape": str(spec.gemm) if spec.gemm else _shape(shapes),
                "calls": spec.calls_per_step,
                "is_frozen": spec.is_frozen,
                "tied_to": spec.tied_to,
            }
        yield row


def _shape(shapes: Iterable[tuple[int, ...]]) -> str:
    """Return the shapes of parameters; a called linear has its GEMM's MxKxN instead."""
    return " ".join("x".join(map(str, shape)) or "1" for shape in shapes)


def _timing_facts(timing: LayerTiming) -> Row:
    """Return the times and bytes of one option; no times where it cannot run."""
    known: Row = {name: getattr(timing, name) for name in BYTES}
    known["memory_bytes"] = sum(known.values())
    known |= {"kernels": " ".join(timing.kernels), "infeasible": timing.infeasible}
    if (total := timing.total) is None:
        return known | ({"time_basis": Basis.UNKNOWN.value} if timing.unknown else {})
    parts = {f"{p}_ms": part.median_ms for p in PARTS if (part := getattr(timing, p)) is not None}
    if "output_ms" in parts:
        known["other_ms"] = total.median_ms - sum(parts.values())
    same = {name: getattr(total, name) for name in ("p20_ms", "p80_ms", "samples", "rejected")}
    return known | parts | same | {"total_ms": total.median_ms, "time_basis": total.basis.value}


def _add_plan(facts: dict[tuple[str, Option], Row], run: RunRecords) -> None:
    """Add what the plan itself says, where the profile or the sensitivity say nothing."""
    reference = run.sensitivity.reference if run.sensitivity else None
    measured = {effect.name for effect in _effects(run)}
    for layer in run.plan.layers if run.plan else ():
        for option, ms in ((layer.option, layer.layer_ms), (BF16_O2, layer.baseline_ms)):
            known = facts.setdefault((layer.name, option), {})
            if ms is not None and not {"infeasible", "total_ms"} & set(known):
                known.update(total_ms=ms, time_basis=layer.basis.value)
        own = facts[layer.name, layer.option]
        if "grad_error" in own:
            continue
        if layer.name in measured and layer.option == reference:
            own.update(grad_error=0.0, grad_error_stderr=0.0)  # by definition
        elif layer.grad_error is not None:
            own.update(grad_error=layer.grad_error)
        own["grad_error_basis"] = layer.grad_error_basis.value if "grad_error" in own else None


def _effects(run: RunRecords) -> list[LayerSensitivity]:
    rows = run.sensitivity.rows if run.sensitivity else ()
    return [row for row in rows if row.basis is not Basis.UNKNOWN]


def _typed(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return the frame with each column in the type that its unit asks for; texts stay objects."""
    types = {}
    for name in frame.columns:
        if name.endswith("_ms") or name in ("grad_error", "grad_error_stderr"):
            types[name] = "float64"
        elif name.endswith("_bytes") or name in COUNTS:
            types[name] = "Int64"
        elif name.startswith("is_"):
            types[name] = "boolean"
    return frame.astype(types)
