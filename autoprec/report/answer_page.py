"""What `tune` prints: the answer, what it rests on and what to do next, in at most 25 lines.

Every fact has at most three, but the proof, which ends with what its verdict does not show: that
has all that are left. A terminal narrower than COMMON has more lines of each, and facts that the
page has no room for are left out, the least needed first, or cut (`RESERVED`); `--verbose` and the
report have all.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from autoprec.records import Basis, Verdict
from autoprec.report import formats
from autoprec.report.answer import Advice, masters_sentence, written_loss
from autoprec.report.summary import Summary, apply_line
from autoprec.report.text_table import BAD, STYLES, Line, print_parts, shown_text

MOST_LINES = 25
MOST_OF_ONE = 3  # lines of a fact in COMMON columns
COMMON = 80
KEY = 10  # columns of the facts' names
CUT = " ..."
# lines that are left for these, which are cut where there are no more
RESERVED = {"check": 2, "BF16": 2, "further": 2, "FP8": 1}


def print_answer(found: Summary, console: Console, *, out: Path | str | None = None) -> None:
    """Print the short page; `out` is the run's folder as the user writes it."""
    style = "bold" if found.answer.advice is Advice.APPLY else "bold yellow"
    most = _lines_of(MOST_OF_ONE, console.width)
    head = _wrapped(found.answer.headline, console, console.width, style, most)
    below = [Line(""), *next_lines(found, out)]
    if out is not None:
        folder = Path(out).as_posix()
        below += [Line(f"report:    {folder}/report.html", is_whole=True)]
        said = f"layers:    autoprec report {shlex.quote(folder)} --layers (all: --verbose)"
        below += [Line(said, is_whole=True)]
    left = (
        _lines_of(MOST_LINES, console.width)
        - len(head)
        - sum(_height(line, console) for line in below)
    )
    lines: list[Text] = []
    facts, width = [*answer_facts(found)], console.width - KEY
    for place, (key, text, style) in enumerate(facts):
        later = sum(RESERVED.get(key, 0) for key, *_ in facts[place + 1 :])
        room, most = left - len(lines) - _lines_of(later, width), _lines_of(MOST_OF_ONE, width)
        if key == "proof":
            most = room
        elif key in RESERVED:
            most = min(most, room)
        wrapped = _wrapped(text, console, width, style, max(most, 1))
        if len(wrapped) <= room:
            keys = [key, *[""] * (len(wrapped) - 1)]
            lines += [Text(f"{k:{KEY}}").append_text(w) for k, w in zip(keys, wrapped, strict=True)]
    for line in (*head, *lines):
        console.print(line, highlight=False)
    print_parts(below, console)


def answer_facts(found: Summary) -> Iterator[tuple[str, str, str]]:
    """Yield name, text and style of what the answer rests on, the most needed first."""
    answer, promise, sensitivity = found.answer, found.promise, found.run.sensitivity
    is_said = answer.headline.partition(":")[0] in answer.fp8  # in the headline, in short
    has_plan = found.run.plan is not None
    facts = [
        ("memory", found.memory_answer, BAD),
        ("time", _time_text(found), ""),
        ("proof", promise.sentence if has_plan else "", STYLES[promise.verdict]),
        ("now", "" if (now := written_loss(found.run)) in answer.headline else now, ""),
        ("masters", masters_sentence(found.run), ""),
        ("refuted", found.refuted, ""),
        ("check", sensitivity.table_check if sensitivity else "", ""),
        ("BF16", found.bf16_answer.removeprefix("BF16 O2 "), ""),  # why a faster one is no plan
        ("further", promise.expectation if has_plan else "", ""),
        ("FP8", "" if is_said else answer.fp8.removeprefix("FP8 "), ""),
        ("kept", found.keep_answer, ""),
        ("skipped", found.passed_over, ""),
        ("layers", found.counted.partition(": ")[2], ""),
        *(("left out", text, "") for text in found.left_out),
        ("compile", found.compile_answer if has_plan else "", ""),
    ]
    return (fact for fact in facts if fact[1])


def _time_text(found: Summary) -> str:
    """Return the plan's step and its speedup over each baseline; without a plan, all steps."""
    own = found.steps.get("plan")
    if own is None:
        steps = found.steps.items()
        return ", ".join(f"{found.title(label)} {formats.ms(step.ms)} ms" for label, step in steps)
    gains = [f"{each} over {found.title(label)}" for label, each in found.speedups.items()]
    without = f"; {found.without}" if found.without else ""
    return f"{formats.ms(own.ms)} ms a step ({own.basis}): {', '.join(gains)}{without}"


def next_lines(found: Summary, out: Path | str | None) -> Iterator[Line]:
    """Yield what to do: lines to paste where there is a plan to apply."""
    match found.answer.advice:
        case Advice.TUNE:
            yield Line("run `autoprec tune MODEL.py`")
        case Advice.DISCARD:
            yield Line(
                "allow a larger --loss-tolerance, fix sensitive layers with --keep "
                "'NAME=bf16_o2', or give the search more --trials"
            )
        case Advice.SLOWER if found.is_held_back:
            yield Line("leave --keep out, and the search has the free choice")
        case Advice.SLOWER if found.answer.rival == "bf16_o2":
            yield Line("for BF16 O2 in its place, tune with --keep '*=bf16_o2' --resume")
        case Advice.APPLY:
            yield from _apply_lines(found, out)


def _apply_lines(found: Summary, out: Path | str | None) -> Iterator[Line]:
    yield from _beware_lines(found)
    path = shlex.quote((Path(out or ".") / "plan.json").as_posix())
    run = f"autoprec run --plan {path} {found.run.script or 'TRAIN.py'}"
    if found.run.script:
        yield Line("train with it, the script as it is:")
        yield Line(f"  {run}", "bold", is_whole=True)
        return
    yield Line("paste into the training script, after the optimizer is made:")
    yield Line("  import autoprec", "bold", is_whole=True)
    yield Line(f"  {apply_line(out)}", "bold", is_whole=True)
    plan, profile = found.run.plan, found.run.profile
    if profile and " and " in profile.model.optimizer:  # names of several
        other = "autoprec.attach_optimizer(model, other)  # each of the other optimizers"
        yield Line(f"  {other}", "bold", is_whole=True)
    if found.compile_advice:
        yield Line("  model.compile()", "bold", is_whole=True)
    yield Line(f"as it is:  {run}", is_whole=True)
    in_fp8 = {layer.name for layer in plan.layers if layer.option.is_fp8} if plan else set()
    specs = [x for x in profile.model.layers if x.name in in_fp8] if profile else []
    if specs and all(spec.is_torchs_linear for spec in specs):  # others convert no more
        export = f"autoprec plan export {path} --to torchao"  # which can say every plan
        yield Line(f"elsewhere: {export}", is_whole=True)


def _beware_lines(found: Summary) -> Iterator[Line]:
    step, is_trained = found.steps.get("plan"), found.promise.verdict is not Verdict.NOT_RUN
    if step is not None and step.basis is not Basis.MEASURED:
        if is_trained:  # else the proof says so
            yield Line("predicted: run `autoprec verify` on the target before you rely on it")
    elif faster := [label for label, speedup in found.speedups.items() if speedup.is_loss]:
        names = " and ".join(map(found.title, faster))
        yield Line(f"beware: {names} took less time than this plan when measured")


def _lines_of(lines: int, width: int) -> int:
    """Return the lines that hold what so many of a common terminal do."""
    return max(lines, lines * COMMON // width)


def _wrapped(text: str, console: Console, width: int, style: str, most: int) -> list[Text]:
    """Return a text in lines of that width, cut after `most`."""
    lines = list(shown_text(Line(text, style), console).wrap(console, width))
    for line in lines:
        line.rstrip()
    if len(lines) > most:
        last = lines[most - 1]
        last.truncate(width - len(CUT))
        last.rstrip()
        lines = [*lines[: most - 1], last.append(CUT)]
    return lines


def _height(line: Line, console: Console) -> int:
    if line.is_whole or not line.text:
        return 1
    return len(shown_text(line, console).wrap(console, console.width))
