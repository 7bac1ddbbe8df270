import json
import math
import shlex
from dataclasses import replace

import pytest

from autoprec.records import (
    BF16_O2,
    AsWritten,
    Basis,
    ExpectedGap,
    LayerKind,
    LossGap,
    PredictedStep,
    SumCheck,
    Verdict,
)
from autoprec.records.cost import BASELINES
from autoprec.report import RunRecords, formats, render_html, summary_object
from autoprec.report.answer import Answer
from autoprec.report.answer_page import answer_facts, next_lines
from autoprec.report.promise import Promise
from autoprec.report.step_times import Speedup, plan_speedups, plan_steps
from autoprec.report.summary import apply_line, summarise_run
from tests.report_runs import CPU, H100, make_run, predicted_run, total_ms, uncertified
from tests.report_runs import step as step_of


def test_json_has_the_promised_keys() -> None:
    found = summary_object(make_run(), "out")
    assert set(found["step_ms"]) == {"plan", "as_written", "fp32", "bf16_o2", "autocast_bf16"}
    assert set(found["step_speedup"]) == {f"vs_{each}" for each in BASELINES}
    assert set(found["loss_gap"]) >= {"mean", "low", "high"}
    assert found["layers"] == {"fp8_o1": 8, "bf16_o2": 7, "fp32": 0}
    assert found["verdict"] == "verified"
    assert found["out"] == "out"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_json_numbers_agree_with_each_other() -> None:
    found = summary_object(make_run(), "out")
    ms, speedup = found["step_ms"], found["step_speedup"]
    for label in ("fp32", "bf16_o2", "autocast_bf16"):
        assert speedup[f"vs_{label}"] == pytest.approx(ms[label] / ms["plan"])
    expected = speedup["vs_fp32"] / (1 + found["extra_steps"])
    assert found["time_to_loss_speedup"] == pytest.approx(expected)
    low, high = found["step_speedup_interval"]["vs_fp32"]
    assert low < speedup["vs_fp32"] < high


def test_the_answer_says_what_tensor_parallelism_leaves_whole() -> None:
    run, said = make_run(), "tp=8 splits no layer: none has a known role (first, second)"
    assert run.plan is not None
    told = replace(run, plan=run.plan.model_copy(update={"notes": (*run.plan.notes, said)}))
    assert said in [text for _, text, _ in answer_facts(summarise_run(told))]


def test_json_of_a_run_without_verification_is_predicted_and_has_nulls() -> None:
    found = summary_object(replace(uncertified(make_run()), verification=None), "out")
    assert found["verdict"] == "not_run"
    assert found["loss_gap"]["mean"] is None
    assert found["step_basis"]["plan"] == "predicted"
    assert found["step_basis"]["fp32"] == "measured"


def test_a_predicted_plan_is_compared_with_the_same_model_s_uniform_plans() -> None:
    run = replace(uncertified(make_run()), verification=None)
    assert run.plan
    assert run.plan.predicted
    speedups = plan_speedups(run)
    predicted: PredictedStep = run.plan.predicted
    assert speedups["bf16_o2"].value == predicted.bf16_o2_ms / predicted.plan_ms
    assert speedups["bf16_o2"].basis is Basis.PREDICTED
    assert speedups["bf16_o2"].low
    assert predicted.high_ms
    assert speedups["bf16_o2"].low == predicted.bf16_o2_ms / predicted.high_ms
    assert speedups["autocast_bf16"].basis is Basis.PREDICTED


def test_a_predicted_plan_that_is_a_baseline_has_no_interval_against_it() -> None:
    run = predicted_run("a100")
    speedups, steps = plan_speedups(run), plan_steps(run)
    plan, bf16 = steps["plan"], steps["bf16_o2"]
    assert (plan.timing.p20_ms, plan.ms, plan.timing.p80_ms) == pytest.approx(
        (bf16.timing.p20_ms, bf16.ms, bf16.timing.p80_ms)
    )
    assert speedups["bf16_o2"].value == pytest.approx(1.0)
    assert speedups["bf16_o2"].low is speedups["bf16_o2"].high is None


def test_a_predicted_speedup_is_as_unsure_as_what_differs() -> None:
    run = predicted_run()
    assert run.plan
    assert run.plan.predicted
    predicted, speedup = run.plan.predicted, plan_speedups(run)["bf16_o2"]
    fp8_ms = sum(layer.layer_ms or 0.0 for layer in run.plan.layers if layer.option.is_fp8)
    assert 0.0 < fp8_ms < predicted.plan_ms
    for step_ms, end in ((predicted.high_ms, speedup.low), (predicted.low_ms, speedup.high)):
        assert step_ms
        ms = predicted.plan_ms + fp8_ms * (step_ms / predicted.plan_ms - 1.0)
        assert end == pytest.approx(predicted.bf16_o2_ms / ms)
    against_fp32 = plan_speedups(run)["fp32"]
    assert predicted.high_ms
    assert against_fp32.low == pytest.approx(predicted.fp32_ms / predicted.high_ms)


def test_json_says_whether_the_plan_fits_in_memory() -> None:
    assert summary_object(make_run(), "out")["memory"] == ""
    assert summary_object(predicted_run(), "out")["memory"] == ""
    tight = predicted_run(memory_gb=2.0)
    assert summary_object(tight, "out")["memory"].startswith("does not fit in memory")
    assert tight.plan
    alone = RunRecords(plan=tight.plan)
    assert summary_object(alone, "out")["memory"].startswith("does not fit in memory")
    assert not any(note.startswith("does not fit in memory") for note in summarise_run(alone).notes)


def test_a_plan_that_a_proxy_verified_is_not_to_be_trained_where_it_does_not_fit() -> None:
    run, verified = predicted_run(memory_gb=2.0), Promise(Verdict.VERIFIED)
    assert Answer.of(run, {}, verified).headline.startswith("Too large for the device: FP8 in 10 ")
    assert Answer.of(predicted_run(), {}, verified).headline.startswith("Train with FP8 in 10 ")


def test_lines_to_paste_name_a_folder_with_a_space_as_one_word() -> None:
    lines = [line.text for line in next_lines(summarise_run(predicted_run()), "my runs/a*")]
    pasted = [shlex.split(line) for line in lines if "plan.json --" in line or "TRAIN.py" in line]
    assert pasted
    assert all("my runs/a*/plan.json" in words for words in pasted)


def test_lines_to_paste_attach_the_other_optimizers() -> None:
    run = predicted_run()
    assert run.profile
    model = run.profile.model.model_copy(update={"optimizer": "Muon and AdamW"})
    several = replace(run, profile=run.profile.model_copy(update={"model": model}))
    own, added = (
        [line.text.strip() for line in next_lines(summarise_run(each), "out")]
        for each in (run, several)
    )
    place = next(i for i, line in enumerate(own) if "autoprec.apply(" in line) + 1
    assert added[place].startswith("autoprec.attach_optimizer(model, other)  # each of the other")
    assert own == added[:place] + added[place + 1 :]


def test_verification_s_steps_are_compared_among_themselves() -> None:
    run = make_run()
    assert run.verification
    steps = plan_steps(run)
    samples = {steps[x].timing.samples for x in ("plan", "fp32", "bf16_o2")}
    assert samples == {12}  # the verification's
    # what was timed with the layers alone, on a machine that may have been busy then, is a ratio
    assert "fp8_o1" not in steps
    said = [note for note in summarise_run(run).notes if "timed with the layers" in note]
    assert said == [
        "timed with the layers, in times of BF16 O2's step there: FP8 where eligible 0.78x "
        "(measured)"
    ]
    assert run.profile
    busy = with_steps(run, "eager", bf16_o2=900.0, fp8_o1=1000.0)
    notes = summarise_run(busy).notes
    assert any("FP8 where eligible 1.11x (measured)" in note for note in notes)
    times = formats.ratio(900.0 / steps["bf16_o2"].ms)
    assert (
        f"a step in BF16 O2 took {times} as long when the layers were timed as beside the plan"
        in (notes)
    )


def test_a_certificate_alone_gives_measured_steps_without_interval() -> None:
    run = RunRecords(plan=make_run().plan)
    speedup = plan_speedups(run)["fp32"]
    assert speedup.basis is Basis.MEASURED
    assert speedup.low is None
    assert summarise_run(run).promise.verdict is Verdict.VERIFIED
    assert "within" not in summarise_run(run).promise.sentence
    assert summarise_run(run).promise.sentence.startswith(
        "verified over 75 steps (50 in FP32, 25 with the plan): the loss gap to FP32 is +0.021 %"
    )


def test_the_plans_note_on_fp8_is_the_answer_and_no_note_beside_it() -> None:
    run = make_run(machine=H100)
    answer = (
        "FP8 pays on 8 of 10 linear layers: 14.2 ms a step less in them than in BF16 (measured)"
    )
    assert summarise_run(run).answer.fp8 == answer
    assert run.plan
    assert answer in run.plan.notes
    assert answer not in summarise_run(run).notes
    plan = run.plan.model_copy(update={"notes": ("written by hand",)})
    own = summarise_run(replace(run, plan=plan)).answer.fp8
    assert own == "FP8 pays here: the plan is 1.28x as fast as BF16 O2"


def test_the_ceiling_is_amdahl_s_law() -> None:
    run = make_run(machine=H100)
    assert run.profile
    ceiling = summarise_run(run).ceiling
    assert ceiling
    eligible = [x.name for x in run.profile.model.layers if len(x.options) > 2]
    part = sum(total_ms(run.profile, name, BF16_O2) for name in eligible)
    step = run.profile.step("bf16_o2")  # of the layers' turn, not the one beside the plan
    assert step
    share = part / step.timing.median_ms
    limit = formats.ratio(1 / (1 - share / 2))
    assert f"{len(eligible)} FP8-eligible linears, {100 * share:.0f} % of the BF16 O2" in ceiling
    assert f"FP8 can gain at most {limit}" in ceiling


def test_a_cpu_has_no_fp8_rate_that_could_be_a_ceiling() -> None:
    assert summarise_run(make_run(machine=CPU, M=2048, width=256)).ceiling == ""


def test_no_plan_no_answer() -> None:
    run = replace(make_run(), plan=None, verification=None)
    assert summarise_run(run).answer.fp8 == ""
    found = summary_object(run, "out")
    assert found["plan"] is None
    assert found["step_ms"]["plan"] is None
    assert found["step_ms"]["fp32"] is not None


def test_what_was_not_measured_is_listed() -> None:
    run = make_run(machine=CPU, M=2048, width=256)
    notes = summarise_run(replace(run, search=None)).notes
    assert any("class_token" in note for note in notes)
    assert any("unused.adapter" in note for note in notes)
    assert any("power is not known: NVML needs an NVIDIA GPU" in note for note in notes)
    assert any(note.startswith("no search.json") for note in notes)
    assert any("tied layers" in note for note in notes)


def test_a_refuted_plan_is_called_refuted() -> None:
    run = make_run()
    assert run.verification
    fields = {"verdict": Verdict.REFUTED, "advice": "the plan diverged at step 3"}
    run = replace(run, verification=run.verification.model_copy(update=fields))
    sentence = summarise_run(run).promise.sentence
    assert sentence.startswith("refuted over 75 steps (")
    assert sentence.endswith("the plan diverged at step 3")


def test_the_apply_line_is_python() -> None:
    line = apply_line('odd "folder"')
    compile(line, "line", "exec")
    assert (
        line == 'model, optimizer = autoprec.apply("odd \\"folder\\"/plan.json", model, optimizer)'
    )


@pytest.mark.parametrize(
    ("low", "mean", "high", "exponent", "said"),
    [
        (2e-4, 4e-4, 6e-4, 0.1, ("never reached within this run", "ahead, ")),
        (2e-4, 4e-4, 6e-4, 1e-6, ("never reached within this run", "behind (predicted)")),
        (-3e-4, -2e-4, -1e-4, 0.1, ("final loss is reached within this run", "ahead")),
        (-1e-4, 1e-4, 3e-4, 0.1, ("is not decided", "ahead")),
    ],
)
def test_the_plan_stands_against_bf16_at_equal_steps_and_at_equal_time(
    low: float, mean: float, high: float, exponent: float, said: tuple[str, ...]
) -> None:
    run = make_run()
    assert run.verification
    gap = LossGap(mean=mean, low=low, high=high, confidence=0.95, seeds=3)
    proof = run.verification.model_copy(update={"bf16_gap": gap, "loss_exponent": exponent})
    sentence = summarise_run(replace(run, verification=proof)).bf16_sentence
    assert all(part in sentence for part in said), sentence
    # 4e-4 above BF16 after as many steps, r log(s) better by the more steps in the same time
    speed = plan_speedups(run)["bf16_o2"].value
    net = abs(mean - exponent * math.log(speed))
    assert f"it would be {formats.share(net)} " in sentence
    # with a loss that falls as steps^-r the gap takes exp(gap / r) times the steps to close
    is_known = abs(mean) < 3 * exponent
    assert ("reach BF16's final loss in" in sentence) == is_known
    if is_known:
        assert f"in {formats.ratio(math.exp(mean / exponent) / speed)} of its time" in sentence


def test_equal_time_is_not_told_by_a_loss_and_a_speed_that_may_go_either_way() -> None:
    run = make_run()
    assert run.verification
    gap = LossGap(mean=1e-4, low=-1e-3, high=3e-3, confidence=0.95, seeds=3)
    proof = run.verification.model_copy(update={"bf16_gap": gap, "loss_exponent": 1e-3})
    sentence = summarise_run(replace(run, verification=proof)).bf16_sentence
    assert sentence.endswith(" as fast, it may be ahead or behind"), sentence


def test_a_plan_that_is_bf16_has_nothing_to_say_against_it() -> None:
    run = make_run()
    assert run.verification
    same = LossGap(mean=0.0, low=0.0, high=0.0, confidence=0.95, seeds=3)
    proof = run.verification.model_copy(update={"bf16_gap": same, "loss_exponent": 0.1})
    assert summarise_run(replace(run, verification=proof)).bf16_sentence == ""


def with_steps(run: RunRecords, mode: str, **ms: float) -> RunRecords:
    assert run.profile
    device = run.profile.device.model_copy(update={"compile_mode": mode})
    steps = tuple(step_of(label, value, H100) for label, value in ms.items())
    return replace(run, profile=run.profile.model_copy(update={"device": device, "steps": steps}))


def test_what_torch_compile_does_to_fp8_is_said_in_ms_unless_bf16_was_timed_twice() -> None:
    times = {"bf16_o2": 80.0, "fp8_o1": 65.0, "eager_bf16_o2": 100.0, "eager_fp8_o1": 110.0}
    twice = with_steps(make_run(), "default", **times)
    assert summarise_run(twice).compile_answer == (
        "torch.compile: in times of compiled BF16, eager BF16 takes 1.25x, compiled FP8 everywhere "
        "0.81x; eager FP8 1.38x"
    )
    once = replace(twice, verification=None, plan=None)
    assert summarise_run(once).compile_answer == (
        "torch.compile: eager BF16 100 ms, compiled BF16 80.0 ms, compiled FP8 everywhere 65.0 ms; "
        "eager FP8 110 ms"
    )


def test_steps_that_did_not_compile_are_in_the_answer() -> None:
    run = with_steps(make_run(machine=CPU), "default", bf16_o2=80.0, fp32=90.0)
    assert run.profile
    first, *others = run.profile.steps
    steps = (first.model_copy(update={"note": "it does not compile (no fake)"}), *others)
    profile = run.profile.model_copy(update={"steps": steps})
    run = replace(run, plan=None, verification=None, profile=profile)
    said = "torch.compile: timed eagerly: BF16 O2; it does not compile (no fake)"
    assert summarise_run(run).compile_answer == said


@pytest.mark.parametrize(("note", "is_said"), [("", True), ("it does not compile", False)])
def test_a_plan_predicted_from_steps_that_do_not_compile_is_not_told_to_compile(
    note: str, is_said: bool
) -> None:
    run = with_steps(make_run(), "default", bf16_o2=80.0, fp32=90.0)
    assert run.profile
    assert run.plan
    fingerprint = run.plan.fingerprint.model_copy(update={"compile_mode": "default"})
    steps = tuple(step.model_copy(update={"note": note}) for step in run.profile.steps)
    predicted = RunRecords(
        profile=run.profile.model_copy(update={"steps": steps}),
        plan=run.plan.model_copy(update={"fingerprint": fingerprint, "certificate": None}),
    )
    assert bool(summarise_run(predicted).compile_advice) == is_said


def test_an_eager_answer_on_a_gpu_says_so_and_one_on_a_cpu_says_nothing() -> None:
    eager = summarise_run(with_steps(make_run(), "eager", bf16_o2=80.0))
    assert "judged without torch.compile" in eager.compile_answer
    assert eager.compile_answer.endswith("leave --eager out")
    assert summarise_run(make_run(machine=CPU)).compile_answer == ""


def test_where_to_compile_is_said_on_a_gpu_whether_it_was_timed_so_or_not() -> None:
    run = replace(with_steps(make_run(), "eager", bf16_o2=80.0), plan=None)
    assert "tune compiled first" in summarise_run(run).compile_advice
    assert summarise_run(RunRecords(profile=make_run(machine=CPU).profile)).compile_advice == ""


def test_a_gpu_on_which_torch_compile_does_not_work_is_not_told_to_leave_eager_out() -> None:
    run = with_steps(make_run(), "eager", bf16_o2=80.0)
    assert run.profile
    profile = run.profile.model_copy(update={"compile_problem": "it needs Triton"})
    answer = summarise_run(replace(run, profile=profile)).compile_answer
    assert answer.endswith("where compiled FP8 gains; it does not work here: it needs Triton")


def test_fp32_is_named_after_the_tf32_that_it_ran_in() -> None:
    run = make_run()
    assert run.profile
    first, *others = run.profile.model.layers
    convolution = first.model_copy(update={"kind": LayerKind.CONV})
    with_conv = run.profile.model.model_copy(update={"layers": (convolution, *others)})
    for model, kind, gemms, conv, title in (
        (run.profile.model, "cuda", True, True, "FP32 (TF32 GEMMs)"),
        (run.profile.model, "cuda", False, True, "FP32"),  # torch's default; it has none
        (with_conv, "cuda", True, True, "FP32 (TF32 GEMMs and convolutions)"),
        (with_conv, "cuda", False, True, "FP32 (TF32 convolutions)"),
        (with_conv, "cuda", False, False, "FP32"),
        (with_conv, "cpu", True, None, "FP32"),
    ):
        facts = {"allow_tf32": gemms, "allow_tf32_conv": conv, "kind": kind}
        device = run.profile.device.model_copy(update=facts)
        changed = run.profile.model_copy(update={"device": device, "model": model})
        assert summarise_run(RunRecords(profile=changed)).title("fp32") == title


def test_the_headline_is_against_what_the_user_runs_now() -> None:
    run = make_run()
    proof = run.verification
    assert proof
    plan_ms = next(each.timing.median_ms for each in proof.steps if each.label == "plan")
    steps = (*proof.steps, step_of("as_written", 2 * plan_ms, H100, samples=12))
    changed = replace(run, verification=proof.model_copy(update={"steps": steps}))
    headline = summarise_run(changed).answer.headline
    assert headline.startswith("Train with FP8 in 8 of 15 layers, 2.00x as fast as now, ")
    assert "FP32" not in headline


def test_a_predicted_gain_over_16_bits_as_written_is_as_sure_as_over_autocast() -> None:
    run = predicted_run()
    profile = run.profile
    assert profile
    autocast = profile.step("autocast_bf16")
    assert autocast
    steps = (*profile.steps, autocast.model_copy(update={"label": "as_written"}))
    for written, is_shared in ((AsWritten(autocast="bfloat16"), True), (AsWritten(), False)):
        model = profile.model.model_copy(update={"as_written": written})
        changed = profile.model_copy(update={"model": model, "steps": steps})
        found = summarise_run(replace(run, profile=changed)).speedups
        assert (found["as_written"] == found["autocast_bf16"]) is is_shared


@pytest.mark.parametrize(
    ("value", "is_gain", "is_loss"),
    [(1.003, False, False), (0.997, False, False), (1.2, True, False), (0.8, False, True)],
)
def test_a_ratio_without_an_interval_that_prints_as_1_is_no_gain(
    value: float, is_gain: bool, is_loss: bool
) -> None:
    found = Speedup(value, None, None, Basis.PREDICTED)
    assert (found.is_gain, found.is_loss) == (is_gain, is_loss)
    assert found.is_faster is is_gain
    sure = Speedup(value, value - 1e-3, value + 1e-3, Basis.MEASURED)
    assert sure.is_faster is (value > 1.0)


def test_what_is_faster_without_masters_is_not_said_to_learn_as_well() -> None:
    run = make_run()
    proof, profile = run.verification, run.profile
    assert proof
    assert profile
    plan_ms = next(each.timing.median_ms for each in proof.steps if each.label == "plan")
    steps = (*proof.steps, step_of("as_written", 0.9 * plan_ms, H100, samples=12))
    proof = proof.model_copy(update={"steps": steps})
    for written, is_said in (
        (AsWritten(parameters=("bfloat16",)), True),
        (AsWritten(autocast="bfloat16"), False),
    ):
        model = profile.model.model_copy(update={"as_written": written})
        changed = replace(
            run, verification=proof, profile=profile.model_copy(update={"model": model})
        )
        headline = summarise_run(changed).answer.headline
        lead = "No gain in time" if is_said else "Keep what you run"
        assert headline.startswith(f"{lead}: this plan is 0.90x as fast as now")
        assert headline.endswith("without FP32 masters cost in loss is not measured") is is_said


def held_in_bf16(run: RunRecords, *, speedup: float, **proof: object) -> RunRecords:
    """Return a run of a file that holds its parameters in BF16, with other facts of its proof."""
    assert run.verification
    assert run.profile
    plan_ms = next(each.timing.median_ms for each in run.verification.steps if each.label == "plan")
    steps = (
        *(each for each in run.verification.steps if each.label != "fp32"),
        step_of("as_written", speedup * plan_ms, H100, samples=12),
    )
    written = AsWritten(parameters=("bfloat16",))
    model = run.profile.model.model_copy(update={"as_written": written})
    return replace(
        run,
        profile=run.profile.model_copy(update={"model": model}),
        verification=run.verification.model_copy(update={"steps": steps, **proof}),
    )


ABOVE = LossGap(mean=0.013, low=0.009, high=0.017, confidence=0.95, seeds=3)
WITHIN = LossGap(mean=0.0002, low=-0.0001, high=0.0006, confidence=0.95, seeds=3)


@pytest.mark.parametrize(
    ("gap", "speedup", "exponent", "verdict", "is_taken"),
    [
        (ABOVE, 0.97, 0.1, Verdict.VERIFIED, True),
        (ABOVE, 0.6, 0.1, Verdict.VERIFIED, False),  # in equal time the plan is behind
        (ABOVE, 0.97, None, Verdict.VERIFIED, False),  # nobody knows what time is worth
        (ABOVE, 0.97, 0.1, Verdict.INCONCLUSIVE, False),
        (WITHIN, 0.97, 0.1, Verdict.VERIFIED, False),
    ],
)
def test_a_plan_that_gains_no_time_is_worth_the_loss_that_16_bits_without_masters_cost(
    gap: LossGap, speedup: float, exponent: float | None, verdict: Verdict, is_taken: bool
) -> None:
    facts = {"written_gap": gap, "loss_exponent": exponent, "verdict": verdict}
    found = summarise_run(held_in_bf16(make_run(), speedup=speedup, **facts))
    headline, ends = found.answer.headline, formats.gap_ends(gap)
    lead = "For its loss, train with FP8 in 8 of" if is_taken else "No gain in time: this plan is"
    assert headline.startswith(lead)
    assert f"as fast as now (bfloat16 parameters){'' if is_taken else ' (measured)'}" in headline
    said = f"trained as now, the loss gap to FP32 is {ends}, with the plan +0.021 %"
    if is_taken:
        assert "; its loss gap is +0.021 %, as now +1.3 % (verified over 75 steps)" in headline
    assert (f"; {said}" in headline) is not is_taken
    assert (("now", said, "") in answer_facts(found)) is is_taken
    assert headline.endswith("(verified over 75 steps)") is is_taken
    may_be_behind = headline.endswith("; in equal time it may be behind")
    assert may_be_behind is (gap is ABOVE and not is_taken)
    assert any("apply" in line.text for line in next_lines(found, "out")) is is_taken
    assert ends in render_html(found.run)


def test_what_16_bits_without_masters_cost_is_told_beside_a_plan_that_is_faster() -> None:
    found = summarise_run(held_in_bf16(make_run(), speedup=1.5, written_gap=ABOVE))
    assert found.answer.headline.startswith(
        "Train with FP8 in 8 of 15 layers, 1.50x as fast as now"
    )
    said = (
        "trained as now, the loss gap to FP32 is +1.3 % (+0.90 % to +1.7 %), with the plan +0.021 %"
    )
    assert ("now", said, "") in answer_facts(found)
    masters = "4 bytes a parameter beside what is run now, and the optimizer's states in FP32"
    assert ("masters", masters, "") in answer_facts(found)
    assert "masters" not in [key for key, _, _ in answer_facts(summarise_run(make_run()))]
    assert summary_object(found.run, "out")["as_written_gap"]["mean"] == ABOVE.mean
    # but not where it is a proxy's alone
    assert found.run.profile
    model = found.run.profile.model.model_copy(update={"as_written": AsWritten()})
    other = replace(found.run, profile=found.run.profile.model_copy(update={"model": model}))
    assert "now" not in [key for key, _, _ in answer_facts(summarise_run(other))]


def test_the_loss_that_a_checkpoint_trained_to_falls_as_losses_do() -> None:
    facts = {"written_gap": ABOVE, "loss_exponent": None, "checkpoint": "trained.pt"}
    for speedup, lead in ((0.97, "For its loss, train with FP8"), (0.6, "No gain in time")):
        found = summarise_run(held_in_bf16(make_run(), speedup=speedup, **facts))
        assert found.answer.headline.startswith(lead)


def test_a_plan_is_worth_more_than_a_training_that_diverges() -> None:
    run = make_run()
    assert run.verification
    first = run.verification.branches[0]
    own = first.model_copy(update={"label": "as_written", "eval_loss": None, "diverged_at": 3})
    branches = (*run.verification.branches, own)
    found = summarise_run(held_in_bf16(run, speedup=0.6, branches=branches))
    assert found.answer.headline.startswith("For its loss, train with FP8 in 8 of 15 layers, 0.60x")
    assert "; its loss gap is +0.021 %, as now it diverges (verified" in found.answer.headline
    assert ("now", "trained as now, it diverged at step 3 of 25", "") in answer_facts(found)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        (
            {"fp32": 1.01},
            "No certain gain over FP32: FP8 in 8 of 15 layers, 1.01x (0.99x to 1.03x) as fast",
        ),
        ({"fp32": 0.8}, "Keep what you run: this plan is 0.80x as fast as FP32 (measured)"),
        ({"fp32": 0.995}, "Keep what you run: this plan is 0.99x (0.98x to 1.01x) as fast"),
        ({"as_written": 2.0, "fp32": 0.8}, "Train in FP32: this plan is 0.80x as fast as FP32"),
        ({"as_written": 0.9, "fp32": 2.0}, "Keep what you run: this plan is 0.90x as fast as now"),
        ({"bf16_o2": 1.01}, "Whether FP8 pays is not certain: FP8 in 8 of 15 layers"),
        ({"bf16_o2": 0.995}, "FP8 is not worth it: the plan is 0.99x (0.98x to 1.01x) as fast"),
    ],
)
def test_what_gains_nothing_over_what_needs_no_plan_is_not_offered(
    ratios: dict[str, float], said: str
) -> None:
    run = make_run()
    proof = run.verification
    assert proof
    steps = {each.label: each for each in proof.steps}
    plan_ms = steps["plan"].timing.median_ms
    steps |= {x: step_of(x, ratio * plan_ms, H100, samples=12) for x, ratio in ratios.items()}
    proof = proof.model_copy(update={"steps": tuple(steps.values())})
    found = summarise_run(replace(run, verification=proof))
    assert found.answer.headline.startswith(said)
    is_offered = any("apply" in line.text for line in next_lines(found, "out"))
    assert is_offered is all(ratio > 1.0 for ratio in ratios.values())
    assert found.answer.fp8.startswith("FP8 pays") is (is_offered and "bf16_o2" not in ratios)


def test_a_step_that_is_not_the_device_s_own_time_is_said_to_be_none() -> None:
    run = make_run()
    proof = run.verification
    assert proof
    first, *others = proof.steps
    odd = first.model_copy(update={"is_host_bound": True, "note": "it does not compile (graph)"})
    changed = replace(run, verification=proof.model_copy(update={"steps": (odd, *others)}))
    new = set(summarise_run(changed).notes) - set(summarise_run(run).notes)
    assert any(note.startswith("the host bounds the step 'FP32'") for note in new)
    assert "the step 'FP32' was timed eagerly: it does not compile (graph)" in new


def test_the_user_s_own_step_is_named_by_what_it_is() -> None:
    run = make_run()
    assert run.profile
    written = AsWritten(autocast="bfloat16", is_compiled=True)
    model = run.profile.model.model_copy(update={"as_written": written})
    found = summarise_run(replace(run, profile=run.profile.model_copy(update={"model": model})))
    assert found.title("as_written") == "as written (autocast bfloat16, compiled)"
    # it did not compile here, and its note says why
    eager = step_of("as_written", 9.0, H100).model_copy(update={"is_compiled": False})
    profile = run.profile.model_copy(update={"model": model, "steps": (eager,)})
    found = summarise_run(RunRecords(profile=profile))
    assert found.title("as_written") == "as written (autocast bfloat16)"


def test_the_sum_of_layers_stands_beside_the_whole_step() -> None:
    run = make_run()
    assert run.profile
    check = SumCheck(layers_ms=-1.25, steps_ms=-1.0)
    profile = run.profile.model_copy(update={"sum_check": check})
    said = "FP8 everywhere against BF16 O2: -1.25 ms by its layers, -1 ms by whole steps"
    assert said in summarise_run(replace(run, profile=profile)).notes


def expecting(run: RunRecords, expected: ExpectedGap | None) -> RunRecords:
    assert run.verification
    proof = run.verification.model_copy(update={"expected_gap": expected})
    return replace(run, verification=proof)


def expected_gap(
    mean: float | None, low: float | None, high: float | None, reason: str = ""
) -> ExpectedGap:
    return ExpectedGap(steps=2000, mean=mean, low=low, high=high, confidence=0.8, reason=reason)


def test_a_verdict_says_how_far_it_reaches_wherever_it_is_shown() -> None:
    run = make_run()
    found = summarise_run(run)
    assert found.answer.headline.endswith("; its loss gap is verified over 75 steps")
    assert found.promise.badge == "verified over 75 steps"
    assert summary_object(run, "out")["trained_steps"] == {"fp32": 50, "plan": 25}
    certified = summarise_run(replace(run, verification=None)).promise
    assert certified.words == found.promise.words
    assert certified.words == "verified over 75 steps (50 in FP32, 25 with the plan)"


@pytest.mark.parametrize(
    ("gap", "sentence"),
    [
        (
            expected_gap(0.0019, 0.0012, 0.004),
            "after 2,000 steps with the plan a gap of +0.19 % is expected (80 % interval +0.12 % "
            "to +0.40 %, predicted), which is above the tolerance",
        ),
        (
            expected_gap(0.0009, 0.0005, 0.004),
            "after 2,000 steps with the plan a gap of +0.090 % is expected (80 % interval +0.050 % "
            "to +0.40 %, predicted), which may be above the tolerance",
        ),
        (
            expected_gap(0.0001, 0.0, 0.001, "by the gradient error"),
            "after 2,000 steps with the plan a gap of +0.010 % is expected (80 % interval 0 % "
            "to +0.10 %, predicted by the gradient error)",
        ),
        (expected_gap(0.0, 0.0, 0.0), "after 2,000 steps with the plan a gap of 0 % is expected"),
        (
            expected_gap(None, None, None, "no loss curve"),
            "after 2,000 steps with the plan the gap is not known: no loss curve",
        ),
        (None, "what the gap is after more steps is not known; --run-steps N predicts it"),
    ],
)
def test_what_is_expected_further_on_stands_beside_the_verdict(
    gap: ExpectedGap | None, sentence: str
) -> None:
    run = expecting(make_run(), gap)
    assert summarise_run(run).promise.expectation == sentence
    found = summary_object(run, "out")["expected_gap"]
    assert found == (gap.model_dump(mode="json") if gap else None)


def test_an_expected_gap_below_the_measured_one_is_not_to_be_relied_on() -> None:
    run = expecting(make_run(), expected_gap(1e-5, 1e-6, 2e-5))
    promise = summarise_run(run).promise
    assert promise.gap
    for low, is_more in ((1e-4, True), (1.5e-5, False)):
        gap = promise.gap.model_copy(update={"low": low})
        said = replace(promise, gap=gap).expectation
        assert said.endswith("is more, so it is not to be relied on") == is_more


def test_why_bf16_is_not_the_plan_is_part_of_the_answer() -> None:
    run = make_run()
    assert run.plan
    note = "BF16 O2 is 2.85x faster, but FP32 is the plan: BF16's gradient error is 3 %"
    assert summarise_run(run).bf16_answer == ""
    plan = run.plan.model_copy(update={"notes": (*run.plan.notes, note)})
    found = summarise_run(replace(run, plan=plan))
    assert note not in found.notes
    assert ("BF16", note.removeprefix("BF16 O2 "), "") in list(answer_facts(found))
    assert summary_object(replace(run, plan=plan), "out")["bf16"] == note
    names = [name for name, _, _ in answer_facts(found)]
    # a page that is full has no room for what comes last
    assert names.index("BF16") < names.index("further") < names.index("FP8")


def test_a_plan_that_was_refuted_before_is_part_of_the_answer() -> None:
    run = make_run()
    assert run.verification
    assert summarise_run(run).refuted == ""
    notes = ("refuted before: 2 bf16_o2 (diverged at step 0)", "refuted before: 1 bf16_o2 (no gap)")
    proof = run.verification.model_copy(update={"notes": notes})
    facts = list(answer_facts(summarise_run(replace(run, verification=proof))))
    assert ("refuted", "2 bf16_o2 (diverged at step 0) (and 1 more)", "") in facts
    proof = proof.model_copy(update={"notes": (f"on the proxy, {notes[0]}",)})
    assert summarise_run(replace(run, verification=proof)).refuted.startswith("on the proxy, 2 bf")


def test_fp32_everywhere_has_no_gap_to_expect() -> None:
    assert Promise.of(None, None).expectation == ""
    plan = make_run().plan
    assert plan
    layers = [each.model_copy(update={"precision": "fp32", "recipe": None}) for each in plan.layers]
    fp32 = plan.model_copy(update={"layers": tuple(layers), "certificate": None})
    assert Promise.of(None, fp32).expectation == ""
    assert "--run-steps" in Promise.of(None, plan).expectation


def test_what_was_tuned_by_its_script_is_trained_by_it() -> None:
    run = replace(make_run(), script="train.py --lr '1 e'")
    lines = [line.text.strip() for line in next_lines(summarise_run(run), "out")]
    assert "autoprec run --plan out/plan.json train.py --lr '1 e'" in lines
    assert not any("apply" in line for line in lines)
    assert "autoprec run --plan plan.json train.py" in render_html(run)


def test_a_keep_that_costs_nothing_is_not_advised_against() -> None:
    run = make_run(keep=("*=fp8_o1",), machine=CPU, M=2048, width=256)
    search = run.search
    assert search
    search = search.model_copy(update={"free": search.exact})
    same = summarise_run(replace(run, search=search))
    for found, is_advised in ((summarise_run(run), True), (same, False)):
        lines = [line.text for line in next_lines(found, "out")]
        assert any("leave --keep out" in line for line in lines) is is_advised
