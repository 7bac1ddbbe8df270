"""The end of `tune` in a terminal: layers, steps, loss, verdict, and the line to paste."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from autoprec.records import FP32, Basis, Verdict
from autoprec.report import formats
from autoprec.report.formats import UNKNOWN, step_title
from autoprec.report.layer_table import layers_parts
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import Speedup, spread_title
from autoprec.report.summary import Summary, apply_line, summarise_run
from autoprec.report.text_table import STYLES, Line, Part, Table, notes, print_parts, section


def print_summary(run: RunRecords, console: Console, *, out: Path | str | None = None) -> None:
    """Print what a run found; `out` is its folder, as the user will write it."""
    found = summarise_run(run)
    parts = layers_parts(found.layers, console.width) if len(found.layers) else []
    parts += [*steps_parts(found), *section("Loss"), *_loss_lines(found)]
    parts += [*section("Answer"), *_answer_lines(found), *notes(found.notes)]
    parts += [*section("Next"), *_next_lines(found, out)]
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


def proof_lines(found: Summary) -> Iterator[Line]:
    """Yield what is proven of the plan's loss, and the gap of BF16 O2 beside it."""
    yield Line(found.verdict_sentence, STYLES[found.verdict])
    proof = found.run.verification
    if proof and proof.control_gap:
        spread = proof.seed_spread
        beside = f"; seeds differ by {formats.share(spread)}" if spread is not None else ""
        yield Line(f"for scale: BF16 O2's own gap is {formats.gap(proof.control_gap)}{beside}")


def _speedup(speedup: Speedup) -> str:
    interval = formats.interval(speedup.low, speedup.high, formats.ratio)
    return formats.ratio(speedup.value) + (f" ({interval})" if interval else "")


def _loss_lines(found: Summary) -> Iterator[Line]:
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
    yield from proof_lines(found)


def _answer_lines(found: Summary) -> list[Line]:
    lines = [
        Line(found.counted),
        Line(found.fp8_answer, "bold"),
        Line(found.memory_answer, "bold"),
        Line(found.ceiling.sentence if found.ceiling else ""),
    ]
    return [line for line in lines if line.text]


def _next_lines(found: Summary, out: Path | str | None) -> Iterator[Line]:
    plan = found.run.plan
    if plan is None:
        yield Line("there is no plan yet: run `autoprec tune MODEL.py`")
    elif set(plan.options) == {FP32}:
        yield Line("FP32 everywhere is the answer here: there is nothing to apply")
    elif found.verdict is Verdict.REFUTED:
        yield Line(
            "do not train with this plan: allow a larger --loss-tolerance, fix sensitive layers "
            "with --keep 'NAME=bf16_o2', or give the search more --trials"
        )
    else:
        yield from map(Line, _before_pasting(found))
        yield Line("  import autoprec", "bold", is_whole=True)
        yield Line(f"  {apply_line(out)}", "bold", is_whole=True)
    if out is not None:
        yield Line(f"report: {(Path(out) / 'report.html').as_posix()}", is_whole=True)


def _before_pasting(found: Summary) -> Iterator[str]:
    step = found.steps.get("plan")
    if step is not None and step.basis is not Basis.MEASURED:
        yield "step times are predicted: run `autoprec verify` on the target before you rely on it"
        return
    speedups = found.speedups.items()
    faster = [label for label, each in speedups if each.high is not None and each.high < 1.0]
    if faster:  # beyond doubt: the whole interval
        names = " and ".join(map(step_title, faster))
        yield f"beware: {names} took less time than this plan when measured"
    yield "paste into the training script, after the optimizer is made:"
