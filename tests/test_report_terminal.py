import io
import itertools
import random
import sys
from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from autoprec.records import (
    Check,
    Diagnosis,
    PlanCheck,
    Precision,
    Record,
    Refusal,
    Verdict,
)
from autoprec.records.plan import Certificate
from autoprec.records.verification import LossGap, Proxy
from autoprec.report import RunRecords, formats, layers_frame, print_record, print_summary
from autoprec.report.answer_page import print_answer
from autoprec.report.formats import clean_text
from autoprec.report.layer_frame import CODES, reason_code
from autoprec.report.layer_table import fold_layers, layers_parts
from autoprec.report.page import render_html
from autoprec.report.promise import Promise
from autoprec.report.summary import Summary, summarise_run
from autoprec.report.text_table import print_parts
from autoprec.tuning.plan import Plan as PlanWithVerbs
from tests.golden_text import check_golden
from tests.report_runs import (
    CPU,
    GW_HP,
    H100,
    answers,
    device_facts,
    make_run,
    predicted_run,
    renamed,
    timing,
    uncertified,
)

WIDTHS = (80, 100, 120, 160, 200)
PASTED = ("  model, optimizer", "as it is:", "elsewhere:", "report:", "layers:")


def console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def printed(target: Console) -> str:
    file = target.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def summary_text(
    run: RunRecords, *, width: int = 80, out: str | None = "OUT", verbose: bool = False
) -> str:
    target = console(width)
    print_summary(run, target, out=out, verbose=verbose)
    return printed(target)


def squeezed(text: str) -> str:
    return " ".join(text.split())


def record_text(record: Record) -> str:
    target = console()
    print_record(record, target)
    return printed(target)


def test_the_answer_in_every_case_at_80_and_120_columns() -> None:
    check_golden("answers.txt", sections(answers(), (80, 120)))


def test_a_proof_on_a_proxy_is_not_cut_before_what_takes_it_back() -> None:
    run = make_run()
    assert run.verification
    proxy = Proxy(
        name="small.py",
        structure="0",
        parameters=180_416,
        model_structure="1",
        model_parameters=1_300_000_000,
        plan="2",
        grad_error=0.01,
    )
    gap = LossGap(mean=2.2e-5, low=-1.6e-4, high=2.1e-3, confidence=0.95, seeds=3)
    advice = "so would be one that learned nothing, as these branches lower the held-out loss"
    known = {"proxy": proxy, "gap": gap, "loss_tolerance": 3e-3, "advice": advice}
    proof = run.verification.model_copy(update=known)
    off = (
        "the table of gradient errors is off where it was measured jointly: rows are a guess; " * 3
    )
    assert run.sensitivity
    table = run.sensitivity.model_copy(update={"table_check": f"{off}."})
    target = console(80)
    full = summarise_run(replace(run, verification=proof, sensitivity=table))
    print_answer(replace(full, left_out=("what has no FP8 option " * 8,) * 3), target)
    assert "\ncheck " in printed(target)  # said, whatever else there is no room for
    long = proof.model_copy(update={"advice": " ".join([advice] * 4)})
    target = console(80)
    print_answer(summarise_run(replace(run, verification=long, sensitivity=table)), target)
    assert all(f"\n{key} " in printed(target) for key in ("check", "further", "FP8"))
    target = console(80)
    print_answer(summarise_run(replace(run, verification=proof)), target)
    assert f"3 seeds); the tolerance is 0.30 %; {advice}" in squeezed(printed(target))
    little = "in branches that learned less than the tolerance"
    assert f"proxy over {proof.warmup_steps + proof.branch_steps} steps, {little}" in squeezed(
        printed(target)
    )
    short = Promise.of(Certificate.of(proof), run.plan)  # what the plan's own file keeps of it
    assert short.words.endswith(little)
    assert short.badge.endswith(little)


def test_the_answer_of_every_size_at_every_width() -> None:
    sizes = {f"{count} layers": make_run(layers=count) for count in (5, 30, 300)}
    check_golden("answer_sizes.txt", sections(sizes, WIDTHS))


def test_the_layers_of_every_size_at_every_width() -> None:
    runs = {f"{count} layers": make_run(layers=count) for count in (5, 30, 300)}
    shown = [
        f"----- {name}, {width} columns\n{layers_text(frame, width)}"
        for name, frame in ((name, layers_frame(run)) for name, run in runs.items())
        for width in (60, 80, 100, 160)  # where a table gets further columns
    ]
    check_golden("layer_sizes.txt", "\n".join(shown))


def layers_text(frame: pd.DataFrame, width: int) -> str:
    target = console(width)
    print_parts(layers_parts(frame, width), target)
    return printed(target)


def test_a_group_of_layers_is_one_line_from_100_columns_whatever_its_name() -> None:
    names = {"head": "model." + "very_long_name." * 12 + "head"}
    frame = layers_frame(renamed(make_run(blocks=8), names))
    for width in WIDTHS[1:]:
        lines = layers_text(frame, width).splitlines()
        rule = next(index for index, line in enumerate(lines) if line.startswith("\u2500"))
        rows = list(itertools.takewhile(str.strip, lines[rule + 1 :]))
        assert len(rows) == len(fold_layers(frame))
        assert max(map(len, lines)) <= width
        heads = [row for row in rows if row.startswith("model.") and "name.head " in row]
        assert any("..." in row for row in heads)


def test_the_code_of_a_reason_follows_from_the_layer_s_times() -> None:
    times = [f"{label}total_ms" for label in ("", "bf16_o2_", "fp32_", "best_fp8_")]
    row = dict.fromkeys(("reason", "calls", *times))
    known = row | {"total_ms": 2.0, "bf16_o2_total_ms": 3.0, "best_fp8_total_ms": 2.0}
    found = {
        "faster": known | {"option": "fp8_o1:rowwise"},
        "forced": known | {"option": "fp8_o1:rowwise", "bf16_o2_total_ms": 2.0},
        "kept": known | {"option": "bf16_o2", "reason": "kept by --keep 'head=bf16_o2'"},
        "slower": known | {"option": "bf16_o2", "best_fp8_total_ms": 2.5},
        "costs": known | {"option": "bf16_o2", "best_fp8_total_ms": 1.5},
        "unsure": known | {"option": "bf16_o2", "fp32_total_ms": 1.5},
        "no-fp8": row | {"option": "bf16_o2"},
        "fp32": known | {"option": "fp32"},
        "fp32-costs": known | {"option": "fp32", "bf16_o2_total_ms": 1.0},
        "no-bf16": row | {"option": "fp32"},
        "uncalled": known | {"option": "bf16_o2", "calls": 0},
    }
    assert {code: reason_code(each) for code, each in found.items()} == {x: x for x in CODES}
    assert reason_code(row | {"option": None}) == ""


def sections(runs: dict[str, RunRecords], widths: tuple[int, ...]) -> str:
    return "\n".join(
        f"----- {name}, {width} columns\n{answer_text(found, width)}"
        for name, found in ((name, summarise_run(run)) for name, run in runs.items())
        for width in widths
    )


def answer_text(found: Summary, width: int) -> str:
    target = console(width)
    print_answer(found, target, out="autoprec-out")
    return printed(target)


def test_the_answer_has_at_most_25_lines_none_too_wide_and_comes_first() -> None:
    """Whatever a run holds, names and sentences of any length among it."""
    drawn = random.Random(0)
    for run in answers().values():
        assert run.plan
        for _ in range(2):
            words = " ".join("word" * drawn.randint(1, 5) for _ in range(drawn.randint(0, 150)))
            notes = [f"{start}{words}" for start in ("no time is known for ", "FP8 is not ")]
            plan = run.plan.model_copy(update={"notes": (*notes, *run.plan.notes)})
            names = {"head": "model." + "long_name." * drawn.randint(1, 30)}
            changed = renamed(run, names) if drawn.random() < 0.5 else replace(run, plan=plan)
            if drawn.random() < 0.3:
                changed = replace(changed, profile=None, sensitivity=None)
            found = summarise_run(changed)
            for width in (44, 80, 133):
                lines = answer_text(found, width).splitlines()
                assert len(lines) <= (25 if width >= 80 else 25 * 80 / width)
                assert max(len(x) for x in lines if not x.startswith(PASTED)) <= width
                assert found.answer.headline in squeezed("\n".join(lines[:10]))


def test_a_forced_plan_that_is_slower_is_never_said_to_pay() -> None:
    run = answers()["forced and slower"]
    assert run.plan
    # the additive model of the search may say otherwise, of the layers
    plan = run.plan.model_copy(update={"notes": ("FP8 pays on 112 of 113 linear layers",)})
    changed = replace(run, plan=plan, verification=None)
    for each in (run, changed):
        text = summary_text(each, verbose=True, width=160)
        assert text.startswith("FP8 is not worth it: the forced plan is 0.")
        assert "FP8 pays" not in text + render_html(each)
        assert "autoprec.apply" not in text


@pytest.mark.parametrize("stage", ["profile", "sensitivity", "search", "plan", "verification"])
def test_each_stage_prints_its_record(stage: str) -> None:
    check_golden(f"{stage}.txt", record_text(getattr(make_run(machine=H100), stage)))


def test_a_plan_with_verbs_prints_as_its_record() -> None:
    plan = make_run().plan
    assert plan
    assert record_text(PlanWithVerbs.of(plan)) == record_text(plan)


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_line_is_wider_than_the_console_but_those_to_paste(width: int) -> None:
    names = {"head": "model." + "very_long_name." * 12 + "head"}
    text = summary_text(renamed(make_run(), names), width=width, verbose=True)
    wide = [line for line in text.splitlines() if len(line.rstrip()) > width]
    assert all(line.startswith(PASTED) for line in wide)


def test_long_names_are_shown_whole() -> None:
    name = "model." + "very_long_name." * 12 + "head"
    text = summary_text(renamed(make_run(), {"head": name}), width=80, verbose=True)
    shown = "".join(text.split())
    assert name[:20] in shown
    assert all(part in shown for part in name.split("."))


def test_many_layers_are_folded() -> None:
    text = summary_text(make_run(blocks=40), width=100, verbose=True)
    assert "blocks.{0-39}.fc1 (x40)" in text
    assert text.count("\n") < 90
    assert "all 243 layers" in text


def test_a_pipe_gets_no_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding="ascii", write_through=True))
    print_summary(make_run(), Console(), out="OUT")
    text = pipe.getvalue().decode("ascii")
    assert "\x1b" not in text
    assert 'autoprec.apply("OUT/plan.json", model, optimizer)' in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_names_are_neither_markup_nor_control() -> None:
    names = {
        "head": "[red]head[/red]",
        "token": "tok\x1b[31men\r\n",
        "router": "rou\u202eter",
        "blocks.0.qkv": "[/nothing]",
    }
    text = summary_text(renamed(make_run(), names), width=160, verbose=True)
    assert "[red]head[/red]" in text
    assert "tok\\x1b[31men\\x0d\\x0a" in text
    assert "rou\\u202eter" in text
    assert "[/nothing]" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_names_that_the_terminal_cannot_show_are_escaped() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    run = renamed(make_run(), {"head": "t\u00eate"})
    print_summary(run, Console(file=stream, width=80), verbose=True)
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    assert b"t\\xeate" in raw.getvalue()


@pytest.mark.parametrize("missing", ["plan", "profile", "sensitivity", "search", "verification"])
def test_a_missing_record_is_said_and_does_not_stop_the_summary(missing: str) -> None:
    run = replace(make_run(), **{missing: None})  # type: ignore[arg-type]
    assert f"no {missing}.json" in squeezed(summary_text(run, verbose=True))


def test_nothing_but_a_profile_asks_for_the_next_stage() -> None:
    text = summary_text(RunRecords(profile=make_run().profile))
    assert "run `autoprec tune MODEL.py`" in text
    assert "autoprec.apply" not in text


def test_a_refuted_plan_is_not_offered_for_pasting() -> None:
    run = make_run()
    assert run.verification
    proof = run.verification.model_copy(update={"verdict": Verdict.REFUTED})
    text = summary_text(replace(run, verification=proof))
    assert "autoprec.apply" not in text
    assert text.startswith("Do not train with this plan")


def test_a_plan_that_a_baseline_beats_is_marked() -> None:
    text = summary_text(make_run(machine=CPU, M=2048, width=256))
    assert "beware: BF16 O2 took less time than this plan when measured" in text
    assert "beware" not in summary_text(make_run(machine=H100))


def test_all_fp32_needs_nothing_applied() -> None:
    run = make_run()
    assert run.plan
    layers = tuple(
        layer.model_copy(update={"precision": Precision.FP32, "recipe": None})
        for layer in run.plan.layers
    )
    plan = run.plan.model_copy(update={"layers": layers})
    text = summary_text(replace(run, plan=plan, verification=None))
    assert text.startswith("Train in FP32: there is nothing to apply")
    assert "FP8 pays" not in text
    assert "autoprec.apply" not in text
    assert plan.predicted
    decided = {
        "predicted": plan.predicted.model_copy(update={"left_out": 0.8}),
        "notes": ("BF16 is not worth it here: by its layers",),
    }
    text = summary_text(replace(run, plan=plan.model_copy(update=decided), verification=None))
    assert text.startswith("Train in FP32 until BF16 is timed: no time is known for 80 % of the we")


@pytest.mark.parametrize(
    ("left_out", "basis"),
    [(0.4, "predicted"), (0.8, "predicted without 80 % of the weights")],
)
def test_a_predicted_step_says_so_and_what_it_is_without(left_out: float, basis: str) -> None:
    run = make_run()
    assert run.plan
    assert run.plan.predicted
    predicted = run.plan.predicted.model_copy(update={"left_out": left_out})
    plan = run.plan.model_copy(update={"certificate": None, "predicted": predicted})
    run = replace(run, plan=plan, verification=None)
    text = summary_text(run)
    assert text.startswith("Not verified: FP8 in 8 of 15 layers, 8.34x as fast as FP32")
    assert summarise_run(run).answer.headline.endswith(f"as fast as BF16 O2 ({basis})")
    assert "not verified: no training was compared" in text


def test_intervals_of_predictions_are_not_called_percentiles() -> None:
    text = summary_text(predicted_run(), verbose=True)
    assert "80 % interval" in text
    assert "p20..p80" not in text
    assert "p20..p80" in summary_text(make_run(), verbose=True)
    profile = predicted_run().profile
    assert profile
    assert "p20..p80" not in record_text(profile)
    mixed = replace(uncertified(make_run()), verification=None)
    assert "spread" in summary_text(mixed, verbose=True)
    assert "80 %" not in summary_text(mixed)


def test_a_plan_that_does_not_fit_is_said_once_in_the_answer() -> None:
    text = squeezed(summary_text(predicted_run(memory_gb=2.0), width=200, verbose=True))
    assert text.count("does not fit in memory: the plan needs at least") == 1
    assert "h100-sxm has 2 GB: shard further" in text
    assert "does not fit" not in summary_text(predicted_run())


def test_a_table_that_is_off_is_said_in_the_answer() -> None:
    run = make_run(machine=H100)
    assert run.sensitivity is not None
    off = "the table of gradient errors is off by more than a factor of two"
    sensitivity = run.sensitivity.model_copy(update={"table_check": off})
    assert off in summary_text(replace(run, sensitivity=sensitivity), width=140)
    assert record_text(sensitivity).index(off) < 200


def test_a_diagnosis_shows_facts_checks_and_the_gemm() -> None:
    diagnosis = Diagnosis(
        device=device_facts(H100),
        checks=(
            Check(name="tensorwise", is_good=True, detail="off by 3 %"),
            Check(name="rowwise", is_good=False, detail="off by 90 %"),
        ),
        gemm="2048x1024x1024",
        gemm_ms={"bf16": timing(2.0), "fp8": timing(1.0)},
    )
    text = record_text(diagnosis)
    assert "NVIDIA H100 80GB HBM3" in text
    assert "FAIL" in text
    assert "fp8: 1.00 ms (20 samples, measured), 2.00x as fast as BF16" in text
    assert "this machine is unwell\n" in text
    slow = diagnosis.model_copy(update={"gemm_ms": {"fp32": timing(1.0), "bf16": timing(5.6)}})
    assert "unwell, but BF16 takes 5.60x as long as FP32" in record_text(slow)


def test_a_plan_check_says_whether_it_is_good() -> None:
    good = Check(name="file", is_good=True, detail="well-formed")
    assert "p.json is good" in record_text(PlanCheck(plan="p.json", checks=(good,)))
    bad = Check(name="fits", is_good=False, detail="no layer 'head'")
    assert "p.json FAILS" in record_text(PlanCheck(plan="p.json", checks=(good, bad)))


def test_a_record_without_a_picture_of_its_own_is_json() -> None:
    text = record_text(Refusal(precision=Precision.FP8_O1, reason="K=10"))
    assert '"reason": "K=10"' in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (0.0, "0"),
        (642.4, "642"),
        (1234.0, "1,230"),
        (39.06, "39.1"),
        (0.00123, "0.00123"),
        (9.999, "10.0"),
        (-0.5, "-0.500"),
        (1e-9, "1.00e-09"),
    ],
)
def test_times_have_three_significant_digits(value: float | None, expected: str) -> None:
    assert formats.ms(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "-"), (0.0, "0 %"), (0.0043, "0.43 %"), (0.00996, "1.0 %"), (-0.00013, "-0.013 %")],
)
def test_shares_have_two_significant_digits(value: float | None, expected: str) -> None:
    assert formats.share(value) == expected


def test_other_numbers_and_options() -> None:
    assert formats.share(0.0001, sign=True) == "+0.010 %"
    assert formats.ratio(1.644) == "1.64x"
    assert formats.ratio(float("inf")) == "-"
    assert formats.size(0) == "0 B"
    assert formats.size(1536) == "1.50 KiB"
    assert formats.size(5 * 1024**4) == "5.00 TiB"
    assert formats.option(GW_HP) == "fp8_o1 rowwise_with_gw_hp"
    assert formats.option(None) == "-"


def test_clean_text_leaves_plain_words_alone() -> None:
    assert clean_text("t\u00eate \u6a21\u578b.0") == "t\u00eate \u6a21\u578b.0"
    assert clean_text("\x00\u200b\ud800\n") == "\\x00\\u200b\\ud800\\x0a"
