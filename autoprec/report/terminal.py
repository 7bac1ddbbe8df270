"""What the commands print: `tune` its answer, with `--verbose` all that it found, others a record.

Each record has a function that returns its headline, its table and its remarks.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from autoprec.common.recipes import Precision
from autoprec.records.base import Record
from autoprec.records.checks import Check, Comparison, Diagnosis, PlanCheck
from autoprec.records.cost import Profile, Timing
from autoprec.records.model import Option
from autoprec.records.plan import Plan, Search
from autoprec.records.sensitivity import Sensitivity
from autoprec.records.verification import Verification
from autoprec.report import formats
from autoprec.report.answer_page import print_answer
from autoprec.report.compare_views import comparison_parts
from autoprec.report.formats import and_more, count_of
from autoprec.report.layer_frame import frame_rows, layers_frame
from autoprec.report.layer_table import fold_layers, layers_parts
from autoprec.report.remarks import profile_notes
from autoprec.report.runs import RunRecords
from autoprec.report.summary import Summary, summarise_run
from autoprec.report.tables import (
    branch_table,
    device_facts,
    loss_sentences,
    sensitivity_sentences,
    steps_table,
)
from autoprec.report.text_table import (
    BAD,
    GOOD,
    STYLES,
    Line,
    Part,
    Table,
    notes,
    print_parts,
    section,
)

MOST_OPTIONS = 5  # columns of the table of sensitivities
MOST_SHOWN = 30  # rows of a stage's own table; the record has them all
SLOW = 1.1  # times slower than FP32, from which BF16 is worth a word


def print_summary(
    run: RunRecords,
    console: Console,
    *,
    out: Path | str | None = None,
    verbose: bool = False,
) -> None:
    """Print the answer of a run, and if `verbose` layers, steps, loss and notes below it.

    `out` is its folder, as the user will write it.
    """
    found = summarise_run(run)
    print_answer(found, console, out=out)
    if not verbose:
        return
    ceiling = [Line(found.ceiling)] if found.ceiling else []
    parts = [Line(""), *layers_parts(found.layers, console.width)] if len(found.layers) else []
    parts += [*_steps_parts(found), *section("Loss"), *_loss_lines(found)]
    print_parts([*parts, *ceiling, *notes(found.notes)], console)


def print_layers(run: RunRecords, console: Console) -> None:
    """Print the layers of a run, alike ones in one line."""
    print_parts(layers_parts(layers_frame(run), console.width), console)


def print_record(record: Record, console: Console) -> None:
    """Print a record as its type is shown; one of another type as indented JSON."""
    views: dict[type, Callable[[Any], Sequence[Part]]] = {  # Any: each takes its own record
        Profile: _profile_parts,
        Sensitivity: _sensitivity_parts,
        Search: _search_parts,
        Plan: lambda plan: _plan_parts(plan, console.width),
        Verification: _verification_parts,
        Comparison: comparison_parts,
        Diagnosis: _diagnosis_parts,
        PlanCheck: _plan_check_parts,
    }
    # a subclass, as the plan with verbs, is shown as what it is
    if view := next((views[kind] for kind in type(record).__mro__ if kind in views), None):
        print_parts(view(record), console)
    else:
        console.print_json(record.model_dump_json())


def _steps_parts(found: Summary) -> list[Part]:
    """Return the whole-step times and the plan's speedup over each baseline."""
    if not found.steps:
        return []
    return [Line(""), steps_table(found), *([Line(found.without)] if found.without else [])]


def _loss_lines(found: Summary) -> list[Line]:
    style = STYLES[found.promise.verdict]
    return [Line(x, style if x == found.promise.sentence else "") for x in loss_sentences(found)]


def _profile_parts(profile: Profile) -> list[Part]:
    """Return the costs of the options: slowest layers first, alike ones together; whole steps."""
    found = summarise_run(RunRecords(profile=profile))
    folded = fold_layers(found.layers)
    folded = folded.sort_values("bf16_o2_total_ms", ascending=False, kind="stable")
    folded["ratio"] = folded["bf16_o2_total_ms"] / folded["best_fp8_total_ms"]
    rows = []
    for row in frame_rows(folded.head(MOST_SHOWN)):
        recipe = formats.option(row["best_fp8"]).removeprefix("fp8_o1 ")
        times = (row["fp32_total_ms"], row["bf16_o2_total_ms"], row["best_fp8_total_ms"])
        rows.append((row["name"], recipe, *map(formats.ms, times), formats.ratio(row["ratio"])))
    heads = ("layer", "best FP8 recipe", "FP32 ms", "BF16 ms", "FP8 ms", "FP8 vs BF16")
    return [
        Line(f"{profile.device.name}: {count_of(len(profile.model.layers), 'layer')}", "bold"),
        Table(heads, rows, numbers=range(2, 6)),
        *map(Line, and_more(len(folded) - MOST_SHOWN, "row", " in profile.json")),
        *_steps_parts(found),
        *notes(profile_notes(profile)),
        _cost(profile.step_equivalents),
    ]


def _sensitivity_parts(sensitivity: Sensitivity) -> list[Part]:
    """Return the gradient error per layer and option, the layers with the largest first."""
    found: dict[str, dict[Option, float]] = {}
    for row in sensitivity.rows:
        found.setdefault(row.name, {})[row.option] = row.counted_error
    ranked = sorted(found.items(), key=lambda item: max(item[1].values()), reverse=True)
    options = list(dict.fromkeys(row.option for row in sensitivity.rows))[:MOST_OPTIONS]
    rows = [
        (name, *(formats.share(errors.get(option)) for option in options))
        for name, errors in ranked[:MOST_SHOWN]
    ]
    names = (formats.option(option).replace(" ", "\n") for option in options)
    heads = ("layer", *(name.replace("_with_", "_\nwith_") for name in names))
    against = f"{sensitivity.reference} ({sensitivity.method.replace('_', ' ')})"
    return [
        Line(f"gradient error against {against}, grad_weight's by half", "bold"),
        *([Line(sensitivity.table_check, "bold")] if sensitivity.table_check else []),
        Table(heads, rows, numbers=range(1, len(heads))),
        *map(Line, and_more(len(ranked) - MOST_SHOWN, "layer", " in sensitivity.json")),
        *map(Line, sensitivity_sentences(sensitivity)),
        _cost(sensitivity.step_equivalents),
        *notes(sensitivity.notes),
    ]


def _search_parts(search: Search) -> list[Part]:
    """Return the Pareto front and what was chosen."""
    chosen = {"chosen": search.chosen.options, "exact": search.exact.options}
    rows = []
    for point in search.front:
        marks = ", ".join(name for name, options in chosen.items() if options == point.options)
        counts = map(str, formats.precision_counts(point.options).values())
        errors = (formats.share(point.grad_error), formats.share(point.grad_error_measured))
        rows.append((formats.ms(point.step_ms), *errors, *counts, marks))
    heads = ("step ms", "gradient error", "measured", *(p.value for p in Precision), "")
    title = "Pareto front (additive model; gradient error measured where a trial ran it)"
    return [
        Line(title, "bold"),
        Table(heads, rows, numbers=range(6)),
        *_measured_front_parts(search),
        Line(
            f"{count_of(len(search.trials), 'trial')}, {search.duplicates_skipped} duplicates "
            f"skipped, gradient error budget {formats.share(search.grad_error_budget)}; no plan "
            f"within it can be faster than {formats.ms(search.bound_ms)} ms (proven on the "
            "additive model)"
        ),
    ]


def _measured_front_parts(search: Search) -> list[Part]:
    """Return the measured plans that no other beats in time, gradient error and bytes."""
    if not search.measured_front:
        return []
    rows = []
    for p in search.measured_front:
        error = formats.with_stderr(p.grad_error_measured or 0.0, p.grad_error_stderr)
        counts = map(str, formats.precision_counts(p.options).values())
        mark = "chosen" if p.options == search.chosen.options else ""
        rows.append((formats.ms(p.step_ms), error, *counts, mark))
    heads = ("step ms", "gradient error", *(p.value for p in Precision), "")
    return [Line("measured front (joint gradient error)", "bold"), Table(heads, rows)]


def _plan_parts(plan: Plan, width: int) -> list[Part]:
    """Return every layer of a plan with its reason, and what is known of the whole."""
    found = summarise_run(RunRecords(plan=plan))
    made = plan.fingerprint
    tokens = f"{count_of(made.tokens_per_step, 'token')} a step, " if made.tokens_per_step else ""
    lines = [
        found.counted or "0 layers: none",
        f"made for {made.device}, {tokens}{made.structure}",
        f"outside any layer: {', '.join(plan.uncovered)}" if plan.uncovered else "",
    ]
    return [
        *layers_parts(found.layers, width),
        *_steps_parts(found),
        Line(""),
        *(Line(line) for line in lines if line),
        *_loss_lines(found),
        *([Line(found.answer.fp8)] if found.answer.fp8 else []),
        *notes(note for note in plan.notes if not note.startswith("FP8 ")),  # said above
    ]


def _verification_parts(verification: Verification) -> list[Part]:
    """Return the seeds, the gaps and the verdict."""
    found = summarise_run(RunRecords(verification=verification))
    return [
        branch_table(verification),
        *_steps_parts(found),
        Line(""),
        *_loss_lines(found),
        *notes(verification.notes),
    ]


def _diagnosis_parts(diagnosis: Diagnosis) -> list[Part]:
    """Return the abilities of this machine."""
    device, is_healthy = diagnosis.device, diagnosis.is_healthy
    health = "healthy" if is_healthy else "unwell"
    missing = {fact: f"not known: {reason}" for fact, reason in device.missing}
    return [
        Table(("fact", "value"), list((device_facts(device) | missing).items())),
        _checks_table(diagnosis.checks),
        *section(f"GEMM {diagnosis.gemm} (MxKxN)"),
        *map(Line, _gemm_sentences(diagnosis.gemm_ms)),
        Line(f"this machine is {health}{_slow_bf16(diagnosis.gemm_ms)}", (BAD, GOOD)[is_healthy]),
    ]


def _slow_bf16(times: dict[str, Timing]) -> str:
    fp32, bf16 = times.get("fp32"), times.get("bf16")
    if not fp32 or not bf16 or bf16.median_ms < SLOW * fp32.median_ms:
        return ""
    slower = formats.ratio(bf16.median_ms / fp32.median_ms)
    return f", but BF16 takes {slower} as long as FP32: 16-bit training does not pay here"


def _plan_check_parts(check: PlanCheck) -> list[Part]:
    """Return the checks of a plan, and whether all are good."""
    words = "is good" if check.is_good else "FAILS"
    return [_checks_table(check.checks), Line(f"{check.plan} {words}", (BAD, GOOD)[check.is_good])]


def _checks_table(checks: Sequence[Check]) -> Table:
    words = {True: Line("ok", "green"), False: Line("FAIL", BAD)}
    rows = [(check.name, words[check.is_good], check.detail) for check in checks]
    return Table(("check", "", "seen"), rows)


def _gemm_sentences(times: dict[str, Timing]) -> Iterator[str]:
    base = times.get("bf16")
    for label, timing in times.items():
        ratio = base.median_ms / timing.median_ms if base and timing.median_ms else None
        beside = "" if label == "bf16" else f", {formats.ratio(ratio)} as fast as BF16"
        samples = count_of(timing.samples, "sample")
        yield f"{label}: {formats.ms(timing.median_ms)} ms ({samples}, {timing.basis}){beside}"


def _cost(step_equivalents: float) -> Line:
    return Line(f"cost: {step_equivalents:.1f} FP32 training steps")
