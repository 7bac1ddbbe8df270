"""What each command other than `tune` prints: one function per record, and `print_record`."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from autoprec.records import (
    BF16_O2,
    FP32,
    Diagnosis,
    Difference,
    Estimate,
    LayerTiming,
    Option,
    Plan,
    PlanCheck,
    Precision,
    Profile,
    Record,
    Search,
    Sensitivity,
    Timing,
    Verification,
)
from autoprec.report.answers import profile_notes, verdict_sentence
from autoprec.report.formats import (
    UNKNOWN,
    count_of,
    shown_bytes,
    shown_gap,
    shown_grad_error,
    shown_ms,
    shown_option,
    shown_ratio,
    shown_share,
)
from autoprec.report.layer_table import print_layers
from autoprec.report.recipes import recipe_rows
from autoprec.report.runs import RunRecords
from autoprec.report.summary import summarise_run
from autoprec.report.tables import VERDICT_STYLES, Column, cell, heading, new_table, say
from autoprec.report.terminal import print_steps
from autoprec.sensitivity.gap import HORIZON_STEPS

MOST_OPTIONS = 5  # columns of the table of sensitivities
MOST_SHOWN = 30  # rows of a stage's own table; the record has them all
CHECK_WORDS = {True: ("ok", "green"), False: ("FAIL", "bold red")}


def print_record(record: Record, console: Console) -> None:
    """Print a record as its type is drawn; one of another type as indented JSON."""
    printers: dict[type, Callable[[Any, Console], None]] = {  # Any: each takes its own record
        Profile: print_profile,
        Sensitivity: print_sensitivity,
        Search: print_search,
        Plan: print_plan,
        Verification: print_verification,
        Difference: print_difference,
        Diagnosis: print_diagnosis,
        PlanCheck: print_plan_check,
    }
    printer = printers.get(type(record))
    if printer is None:
        console.print_json(record.model_dump_json())
    else:
        printer(record, console)


def print_profile(profile: Profile, console: Console) -> None:
    """Print what the options cost: the slowest shapes first, then the whole steps."""
    say(console, f"{profile.device.name}: {count_of(len(profile.model.layers), 'layer')}", "bold")
    names = ["layers", "FP32 ms", "BF16 ms", "FP8 ms", "FP8 vs BF16"]
    columns = [Column("layer (first of its shape)", ratio=1), Column("best FP8 recipe")]
    table = new_table([*columns, *(Column(name, is_number=True) for name in names)])
    shapes = _shapes(profile)
    for rows in shapes[:MOST_SHOWN]:
        table.add_row(*(cell(console, text) for text in _shape_texts(rows)))
    console.print(table, highlight=False)
    _say_rest(console, len(shapes) - MOST_SHOWN, "shape", "profile.json")
    print_steps(summarise_run(RunRecords(profile=profile)), console)
    for note in profile_notes(profile):
        say(console, f"note: {note}", "dim")
    say(console, f"cost: {profile.step_equivalents:.1f} FP32 training steps")


def print_sensitivity(sensitivity: Sensitivity, console: Console) -> None:
    """Print the gradient error per layer and option, the layers with the largest first."""
    method = sensitivity.method.replace("_", " ")
    say(console, f"gradient error against {sensitivity.reference} ({method})", "bold")
    by_layer = _ranked_effects(sensitivity)
    options = list(dict.fromkeys(row.option for row in sensitivity.rows))[:MOST_OPTIONS]
    names = [
        shown_option(option).replace(" ", "\n").replace("_with_", "_\nwith_") for option in options
    ]
    columns = [Column("layer", ratio=1), *(Column(name, is_number=True) for name in names)]
    table = new_table(columns)
    for name, effects in by_layer[:MOST_SHOWN]:
        texts = [shown_share(effects[o].mean) if o in effects else UNKNOWN for o in options]
        table.add_row(*(cell(console, text) for text in (name, *texts)))
    console.print(table, highlight=False)
    _say_rest(console, len(by_layer) - MOST_SHOWN, "layer", "sensitivity.json")
    for recipe, linears, grad_error, gap in recipe_rows(sensitivity):
        say(
            console,
            f"{recipe} in all {linears} linears: gradient error {grad_error}, predicted loss gap "
            f"after {HORIZON_STEPS} steps {gap}",
        )
    for joint in sensitivity.joint:
        measured = shown_grad_error(joint.grad_error.mean, joint.grad_error.stderr)
        predicted = shown_share(joint.predicted_grad_error)
        say(console, f"{joint.label}, all layers at once: {measured}, sum of parts {predicted}")
    say(
        console,
        f"BF16 activations alone: {_shown(sensitivity.activation_error)}; two runs of the "
        f"reference: {_shown(sensitivity.floor)}; "
        f"{count_of(sensitivity.batches, 'batch', 'batches')}, {sensitivity.preconditioner} "
        f"preconditioner; cost: {sensitivity.step_equivalents:.1f} FP32 training steps",
    )
    for note in sensitivity.notes:
        say(console, f"note: {note}", "dim")


def print_search(search: Search, console: Console) -> None:
    """Print the Pareto front and what was chosen."""
    say(
        console,
        "Pareto front (additive model; gradient error measured where a trial ran it)",
        "bold",
    )
    names = ("step ms", "gradient error", "measured", "fp8_o1", "bf16_o2", "fp32")
    table = new_table([*(Column(name, is_number=True) for name in names), Column("")])
    for point in search.front:
        marks = [name for name in ("chosen", "exact") if point.options == _options(search, name)]
        counts = [sum(o.precision is p for o in point.options) for p in Precision]
        texts = [
            shown_ms(point.step_ms),
            shown_share(point.grad_error),
            shown_share(point.grad_error_measured),
        ]
        table.add_row(*(cell(console, text) for text in (*texts, *counts, ", ".join(marks))))
    console.print(table, highlight=False)
    say(
        console,
        f"{count_of(len(search.trials), 'trial')}, {search.duplicates_skipped} duplicates skipped, "
        f"gradient error budget {shown_share(search.grad_error_budget)}; no plan within it can be "
        f"faster than {shown_ms(search.bound_ms)} ms (proven on the additive model)",
    )


def print_plan(plan: Plan, console: Console) -> None:
    """Print every layer of a plan with its reason, and what is known of the whole."""
    run = RunRecords(plan=plan)
    found = summarise_run(run)
    print_layers(found.rows, console)
    print_steps(found, console)
    console.print()
    counts = [f"{count} in {precision}" for precision, count in found.counts.items() if count]
    say(console, f"{count_of(len(plan.layers), 'layer')}: {', '.join(counts) or 'none'}")
    if plan.grad_error is not None:
        say(console, f"gradient error {shown_share(plan.grad_error)} ({plan.grad_error_basis})")
    made = plan.fingerprint
    say(console, f"made for {made.device}, {made.tokens_per_step} tokens a step, {made.structure}")
    if plan.uncovered:
        say(console, f"outside any layer: {', '.join(plan.uncovered)}")
    say(console, verdict_sentence(run), VERDICT_STYLES[found.verdict])
    for note in plan.notes:
        say(console, f"note: {note}", "dim")


def print_verification(verification: Verification, console: Console) -> None:
    """Print the seeds, the gaps and the verdict."""
    columns = [Column("seed", is_number=True), Column("branch"), Column("loss", is_number=True)]
    table = new_table([*columns, Column("gap", is_number=True)])
    references = {b.seed: b.eval_loss for b in verification.branches if b.label == "reference"}
    for branch in verification.branches:
        loss, reference = branch.eval_loss, references.get(branch.seed)
        gap = (loss - reference) / abs(reference) if loss is not None and reference else None
        shown = f"{loss:.5f}" if loss is not None else f"diverged at {branch.diverged_at}"
        texts = (branch.seed, branch.label, shown, shown_share(gap, sign=True))
        table.add_row(*(cell(console, text) for text in texts))
    console.print(table, highlight=False)
    run = RunRecords(verification=verification)
    print_steps(summarise_run(run), console)
    console.print()
    say(console, verdict_sentence(run), VERDICT_STYLES[verification.verdict])
    if verification.control_gap:
        say(console, f"for scale: BF16 O2's own gap is {shown_gap(verification.control_gap)}")
    for note in verification.notes:
        say(console, f"note: {note}", "dim")


def print_difference(difference: Difference, console: Console) -> None:
    """Print what differs between two records, or that nothing does."""
    if not difference.rows:
        say(console, f"no difference between {difference.before} and {difference.after}")
        return
    columns = [Column("name", ratio=1), Column("before"), Column("after")]
    table = new_table(columns, title=f"{difference.before} -> {difference.after}")
    for row in difference.rows:
        table.add_row(*(cell(console, text) for text in (row.name, row.before, row.after)))
    console.print(table, highlight=False)
    say(console, f"{count_of(len(difference.rows), 'difference')}")


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print what this machine can do."""
    device = diagnosis.device
    facts = [
        ("device", f"{device.name} ({device.kind} {device.capability})".strip()),
        ("memory", shown_bytes(device.memory_bytes)),
        ("driver", device.driver or UNKNOWN),
        ("FP8", ", ".join(device.fp8_recipes) or f"none: {device.fp8_reason}"),
        *device.software.items(),
        *((fact, f"not known: {reason}") for fact, reason in device.missing),
    ]
    table = new_table([Column("fact"), Column("value", ratio=1)])
    for row in facts:
        table.add_row(*(cell(console, text) for text in row))
    console.print(table, highlight=False)
    _print_checks(diagnosis.checks, console)
    _print_gemm(diagnosis.gemm, diagnosis.gemm_ms, console)
    word, style = ("healthy", "bold green") if diagnosis.is_healthy else ("unwell", "bold red")
    say(console, f"this machine is {word}", style)


def print_plan_check(check: PlanCheck, console: Console) -> None:
    """Print the checks of a plan, and whether all are good."""
    _print_checks(check.checks, console)
    word, style = ("is good", "bold green") if check.is_good else ("FAILS", "bold red")
    say(console, f"{check.plan} {word}", style)


def _print_checks(checks: Sequence[Any], console: Console) -> None:  # Any: records.Check
    table = new_table([Column("check"), Column(""), Column("seen", ratio=1)])
    for check in checks:
        word, style = CHECK_WORDS[check.is_good]
        name, detail = cell(console, check.name), cell(console, check.detail)
        table.add_row(name, cell(console, word, style), detail)
    console.print(table, highlight=False)


def _print_gemm(gemm: str, times: dict[str, Timing], console: Console) -> None:
    heading(console, f"GEMM {gemm} (MxKxN)")
    base = times.get("bf16")
    for label, timing in times.items():
        ratio = base.median_ms / timing.median_ms if base and timing.median_ms else None
        beside = "" if label == "bf16" else f", {shown_ratio(ratio)} as fast as BF16"
        say(
            console,
            f"{label}: {shown_ms(timing.median_ms)} ms "
            f"({count_of(timing.samples, 'sample')}, {timing.basis}){beside}",
        )


def _shapes(profile: Profile) -> list[list[LayerTiming]]:
    """Return the profile's rows by shape, the longest in BF16 first."""
    found: dict[tuple[str, ...], list[LayerTiming]] = {}
    for row in profile.layers:
        found.setdefault(row.names, []).append(row)
    return sorted(found.values(), key=_bf16_ms, reverse=True)


def _bf16_ms(rows: Sequence[LayerTiming]) -> float:
    row = next((row for row in rows if row.option == BF16_O2), None)
    return row.total.median_ms * len(row.names) if row and row.total else 0.0


def _shape_texts(rows: Sequence[LayerTiming]) -> tuple[str, ...]:
    times = {row.option: row.total.median_ms for row in rows if row.total}
    fp8 = {option: ms for option, ms in times.items() if option.is_fp8}
    best = min(fp8, key=lambda option: fp8[option], default=None)
    bf16_ms, fp8_ms = times.get(BF16_O2), fp8[best] if best else None
    return (
        rows[0].names[0],
        shown_option(best).removeprefix("fp8_o1 "),
        f"{len(rows[0].names)}",
        shown_ms(times.get(FP32)),
        shown_ms(bf16_ms),
        shown_ms(fp8_ms),
        shown_ratio(bf16_ms / fp8_ms) if bf16_ms is not None and fp8_ms else UNKNOWN,
    )


def _ranked_effects(sensitivity: Sensitivity) -> list[tuple[str, dict[Option, Estimate]]]:
    """Return every layer's gradient error per option, the layer with the largest one first."""
    found: dict[str, dict[Option, Estimate]] = {}
    for row in sensitivity.rows:
        found.setdefault(row.name, {})[row.option] = row.grad_error
    return sorted(
        found.items(), key=lambda item: -max(grad_error.mean for grad_error in item[1].values())
    )


def _say_rest(console: Console, rest: int, noun: str, where: str) -> None:
    if rest > 0:
        say(console, f"... and {count_of(rest, noun)} more in {where}")


def _options(search: Search, name: str) -> object:
    return getattr(search, name).options


def _shown(estimate: Estimate) -> str:
    return shown_grad_error(estimate.mean, estimate.stderr)
