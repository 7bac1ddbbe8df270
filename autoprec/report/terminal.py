"""The end of `tune` in a terminal: layers, steps, loss, verdict, and the line to paste."""

from pathlib import Path

from rich.console import Console

from autoprec.records import Basis, Verdict
from autoprec.report.answers import fp8_ceiling, is_all_fp32, unmeasured
from autoprec.report.formats import (
    UNKNOWN,
    clean_text,
    count_of,
    shown_gap,
    shown_grad_error,
    shown_ms,
    shown_ratio,
    shown_share,
    step_title,
)
from autoprec.report.layer_table import print_layers
from autoprec.report.runs import RunRecords
from autoprec.report.steps import Speedup, Step, spread_title
from autoprec.report.summary import Summary, apply_line, summarise_run
from autoprec.report.tables import (
    VERDICT_STYLES,
    Column,
    cell,
    heading,
    new_table,
    say,
    say_line,
)


def print_summary(run: RunRecords, console: Console, *, out: Path | str | None = None) -> None:
    """Print what a run found; `out` is its folder, as the user will write it."""
    found = summarise_run(run)
    if found.rows:
        print_layers(found.rows, console)
    print_steps(found, console)
    _print_loss(run, found, console)
    _print_answers(run, found, console)
    _print_next(run, found, console, out)


def print_steps(found: Summary, console: Console) -> None:
    """Print the whole-step times and the plan's speedup over each baseline."""
    if not found.steps:
        return
    spread = spread_title(found.steps.values())
    columns = [Column("step")]
    columns += [Column(name, is_number=True) for name in ("ms", spread, "samples")]
    columns += [Column("basis")]
    if found.speedups:
        columns += [Column("plan's speedup", is_number=True)]
    console.print()
    table = new_table(columns)
    for label, step in found.steps.items():
        texts = _step_texts(label, step, found)[: len(columns)]
        table.add_row(*(cell(console, text) for text in texts))
    console.print(table, highlight=False)


def _step_texts(label: str, step: Step, found: Summary) -> tuple[str, ...]:
    low, high = step.low_ms, step.high_ms
    has_spread = low is not None and high is not None and low < high
    spread = f"{shown_ms(low)}..{shown_ms(high)}" if has_spread else ""
    speedup = found.speedups.get(label)
    return (
        step_title(label),
        shown_ms(step.ms),
        spread,
        str(step.samples) if step.samples else UNKNOWN,
        step.basis.value,
        _shown_speedup(speedup) if speedup else "",
    )


def _shown_speedup(speedup: Speedup) -> str:
    if speedup.low is None or speedup.high is None:
        return shown_ratio(speedup.value)
    return (
        f"{shown_ratio(speedup.value)} ({shown_ratio(speedup.low)} to {shown_ratio(speedup.high)})"
    )


def _print_loss(run: RunRecords, found: Summary, console: Console) -> None:
    heading(console, "Loss")
    if found.grad_error is not None:
        say(
            console,
            f"gradient error {shown_grad_error(found.grad_error.mean, found.grad_error.stderr)} "
            f"({found.grad_error_basis}) => "
            f"{shown_share(found.extra_steps, sign=True)} training steps",
        )
    if found.time_to_loss is not None and found.extra_steps is not None:
        step = found.speedups["fp32"]
        say(
            console,
            f"time-to-loss speedup over FP32 = {shown_ratio(step.value)} / "
            f"{1 + found.extra_steps:.4f} = {_shown_speedup(found.time_to_loss)} (predicted)",
        )
    say(console, found.verdict_sentence, VERDICT_STYLES[found.verdict])
    if found.control_gap is not None:
        spread = run.verification.seed_spread if run.verification else None
        beside = f"; seeds differ by {shown_share(spread)}" if spread is not None else ""
        say(console, f"for scale: BF16 O2's own gap is {shown_gap(found.control_gap)}{beside}")


def _print_answers(run: RunRecords, found: Summary, console: Console) -> None:
    heading(console, "Answer")
    counts = [f"{count} in {precision}" for precision, count in found.counts.items() if count]
    if counts:
        say(console, f"{count_of(len(found.rows), 'layer')}: {', '.join(counts)}")
    if found.fp8_answer:
        say(console, found.fp8_answer, "bold")
    if found.memory_answer:
        say(console, found.memory_answer, "bold")
    ceiling = fp8_ceiling(run, found.rows)
    if ceiling is not None:
        say(console, ceiling.sentence)
    for note in unmeasured(run):
        say(console, f"note: {note}", "dim")


def _print_next(run: RunRecords, found: Summary, console: Console, out: Path | str | None) -> None:
    heading(console, "Next")
    for line in _advice(run, found):
        say(console, line)
    if run.plan is not None and found.verdict is not Verdict.REFUTED and not is_all_fp32(run):
        say_line(console, "  import autoprec", "bold")
        say_line(console, f"  {apply_line(out)}", "bold")
    if out is not None:
        report = (Path(out) / "report.html").as_posix()
        say_line(console, f"report: {clean_text(report)}")


def _advice(run: RunRecords, found: Summary) -> list[str]:
    if run.plan is None:
        return ["there is no plan yet: run `autoprec tune MODEL.py`"]
    if is_all_fp32(run):
        return ["FP32 everywhere is the answer here: there is nothing to apply"]
    if found.verdict is Verdict.REFUTED:
        return [
            "do not train with this plan: allow a larger --loss-tolerance, fix sensitive layers "
            "with --keep 'NAME=bf16_o2', or give the search more --trials"
        ]
    step = found.steps.get("plan")
    if step is not None and step.basis is not Basis.MEASURED:
        return [
            "step times are predicted: run `autoprec verify` on the target before you rely on it"
        ]
    return [*_slower(found), "paste into the training script, after the optimizer is made:"]


def _slower(found: Summary) -> list[str]:
    """Return a warning for each baseline that is faster than the plan beyond doubt."""
    faster = [
        label
        for label, speedup in found.speedups.items()
        if speedup.high is not None and speedup.high < 1.0
    ]
    names = " and ".join(step_title(label) for label in faster)
    return [f"beware: {names} took less time than this plan when measured"] if faster else []
