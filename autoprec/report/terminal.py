"""The end of `tune` in a terminal: layers, steps, loss, verdict, and the line to paste."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from autoprec.records import Basis, Verdict
from autoprec.report import formats
from autoprec.report.answers import fp8_ceiling, is_all_fp32, unmeasured
from autoprec.report.formats import UNKNOWN, step_title
from autoprec.report.layer_frame import options_frame
from autoprec.report.layer_table import layers_parts
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import Speedup, spread_title
from autoprec.report.summary import Summary, apply_line, summarise_run
from autoprec.report.text_table import STYLES, Line, Part, Table, notes, print_parts, section


def print_summary(run: RunRecords, console: Console, *, out: Path | str | None = None) -> None:
    """Print what a run found; `out` is its folder, as the user will write it."""
    found = summarise_run(run)
    parts = layers_parts(found.layers, console.width) if len(found.layers) else []
    parts += [*steps_parts(found), *section("Loss"), *_loss_lines(run, found)]
    parts += [*section("Answer"), *_answer_lines(run, found)]
    parts += [*section("Next"), *_next_lines(run, found, out)]
    print_parts(parts, console)


def steps_parts(found: Summary) -> list[Part]:
    """Return the whole-step times and the plan's speedup over each baseline."""
    if not found.steps:
        return []
    heads = ["step", "ms", spread_title(found.steps.values()), "samples", "basis"]
    heads += ["plan's speedup"] if found.speedups else []
    rows = []
    for label, step in found.steps.items():
        low, high = step.low_ms, step.high_ms
        has_spread = low is not None and high is not None and low < high
        spread = f"{formats.ms(low)}..{formats.ms(high)}" if has_spread else ""
        counts = (str(step.samples or UNKNOWN), step.basis.value)
        speedup = found.speedups.get(label)
        texts = (step_title(label), formats.ms(step.ms), spread, *counts)
        rows.append((*texts, _speedup(speedup) if speedup else "")[: len(heads)])
    return [Line(""), Table(heads, rows, numbers=(1, 2, 3, 5))]


def _speedup(speedup: Speedup) -> str:
    interval = formats.interval(speedup.low, speedup.high, formats.ratio)
    return formats.ratio(speedup.value) + (f" ({interval})" if interval else "")


def _loss_lines(run: RunRecords, found: Summary) -> Iterator[Line]:
    if found.grad_error is not None:
        yield Line(
            f"gradient error {formats.grad_error(found.grad_error)} ({found.grad_error_basis}) => "
            f"{formats.share(found.extra_steps, sign=True)} training steps"
        )
    if found.time_to_loss is not None and found.extra_steps is not None:
        yield Line(
            "time-to-loss speedup over FP32 = "
            f"{formats.ratio(found.speedups['fp32'].value)} / {1 + found.extra_steps:.4f} = "
            f"{_speedup(found.time_to_loss)} (predicted)"
        )
    yield Line(found.verdict_sentence, STYLES[found.verdict])
    if found.control_gap is not None:
        spread = run.verification.seed_spread if run.verification else None
        beside = f"; seeds differ by {formats.share(spread)}" if spread is not None else ""
        yield Line(f"for scale: BF16 O2's own gap is {formats.gap(found.control_gap)}{beside}")


def _answer_lines(run: RunRecords, found: Summary) -> list[Part]:
    ceiling = fp8_ceiling(run, found.layers, options_frame(run))
    lines = [
        Line(found.counted),
        Line(found.fp8_answer, "bold"),
        Line(found.memory_answer, "bold"),
        Line(ceiling.sentence if ceiling else ""),
    ]
    return [*(line for line in lines if line.text), *notes(unmeasured(run))]


def _next_lines(run: RunRecords, found: Summary, out: Path | str | None) -> Iterator[Line]:
    yield from map(Line, _advice(run, found))
    if run.plan is not None and found.verdict is not Verdict.REFUTED and not is_all_fp32(run):
        yield Line("  import autoprec", "bold", is_whole=True)
        yield Line(f"  {apply_line(out)}", "bold", is_whole=True)
    if out is not None:
        yield Line(f"report: {(Path(out) / 'report.html').as_posix()}", is_whole=True)


def _advice(run: RunRecords, found: Summary) -> Iterator[str]:
    step = found.steps.get("plan")
    if run.plan is None:
        yield "there is no plan yet: run `autoprec tune MODEL.py`"
    elif is_all_fp32(run):
        yield "FP32 everywhere is the answer here: there is nothing to apply"
    elif found.verdict is Verdict.REFUTED:
        yield (
            "do not train with this plan: allow a larger --loss-tolerance, fix sensitive layers "
            "with --keep 'NAME=bf16_o2', or give the search more --trials"
        )
    elif step is not None and step.basis is not Basis.MEASURED:
        yield "step times are predicted: run `autoprec verify` on the target before you rely on it"
    else:
        speedups = found.speedups.items()
        faster = [label for label, each in speedups if each.high is not None and each.high < 1.0]
        if faster:  # beyond doubt: the whole interval
            names = " and ".join(map(step_title, faster))
            yield f"beware: {names} took less time than this plan when measured"
        yield "paste into the training script, after the optimizer is made:"
