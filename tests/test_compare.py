"""Two runs against each other: no difference where there is none, and those that there are."""

import io
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # it ships no types
from rich.console import Console
from scipy.special import stdtrit

from autoprec.cli.main import main
from autoprec.errors import RecordError, SettingsError
from autoprec.records import (
    BF16_O2,
    Certificate,
    Comparison,
    Estimate,
    Plan,
    Profile,
    Timing,
    Verdict,
)
from autoprec.records.cost import student_factor
from autoprec.report import RunRecords, print_record
from autoprec.report.compare import compare_runs
from autoprec.report.compare_views import comparison_html, comparison_markdown, headline
from autoprec.report.formats import share
from autoprec.tuning.comparing import compare_paths, parse_condition
from tests.golden_text import check_golden
from tests.report_runs import CPU, H100, ROWWISE, TENSORWISE, make_run, predicted_run, renamed

SLOWER = replace(H100, rates={**H100.rates, ROWWISE: 420.0, TENSORWISE: 480.0})
WORKFLOW = Path(__file__).parent.parent / "examples" / "github-actions.yml"
SAMPLES = 12


def save(run: RunRecords, folder: Path) -> Path:
    folder.mkdir()
    for name in ("plan", "profile", "sensitivity", "search", "verification"):
        record = getattr(run, name)
        if record is not None:
            record.save(folder / f"{name}.json")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a run, and one of the same model where FP8's GEMMs are slower."""
    root = tmp_path_factory.mktemp("compared")
    slower = make_run(machine=SLOWER)
    return save(make_run(), root / "a"), save(slower, root / "b")


# --- what differs -------------------------------------------------------------------------------


def test_a_run_does_not_differ_from_itself() -> None:
    found = compare_runs(make_run(), make_run())
    assert headline(found) == "No difference beyond noise"
    assert (found.facts, found.decisions, found.layer_times, found.layer_errors) == ((),) * 4
    assert (found.layers_compared, found.times_compared, found.errors_compared) == (15, 57, 42)


def test_what_stays_fp32_beside_layers_is_a_decision() -> None:
    run = make_run(blocks=1)
    assert run.plan
    norm = next(layer for layer in run.plan.layers if layer.name.endswith("norm1"))
    kept = {"fp32_outputs": ("class_token", norm.name)}
    found = compare_runs(run, replace(run, plan=run.plan.model_copy(update=kept)))
    token, own = found.decisions
    assert (token.name, token.before, token.after) == ("class_token", "bf16_o2", "fp32")
    assert (own.name, own.before) == (norm.name, norm.option.key)
    assert own.after == f"{norm.option.key}, FP32 behind it"
    assert ", FP32 behind it" in comparison_markdown(found)


def test_slower_fp8_is_found_where_it_is_and_nowhere_else() -> None:
    found = compare_runs(make_run(), make_run(machine=SLOWER))
    assert found.step
    assert found.step.is_beyond_noise
    assert {change.option for change in found.layer_times} == {ROWWISE.key, TENSORWISE.key}
    assert {step.name for step in found.steps if step.is_beyond_noise} == {"plan", "fp8_o1"}
    assert found.speedup
    assert (found.speedup.name, found.speedup.is_beyond_noise) == ("fp32", True)


def test_a_comparison_as_people_see_it(folders: tuple[Path, Path]) -> None:
    found = compare_paths(*folders, fail_if=["slower=2%", "verdict", "plan"])
    named = found.model_copy(update={"before": "A", "after": "B"})
    check_golden("compare.md", comparison_markdown(named))
    terminal = Console(file=io.StringIO(), width=80)
    print_record(named, terminal)
    assert isinstance(terminal.file, io.StringIO)
    check_golden("compare_80.txt", terminal.file.getvalue())


def test_equal_runs_differ_by_chance_in_one_comparison_of_twenty_at_most() -> None:
    chance = random.Random(0)
    for noise_between in (0.0, 0.05):
        base, wrong = _rows(16), 0
        for _ in range(120):
            pair = [_drawn(base, chance, between=noise_between) for _ in range(2)]
            wrong += bool(compare_runs(*pair).layer_times)
        assert wrong <= 11, noise_between  # of 120 at 5 %: 98 in 100 have at most 11


def test_a_change_beyond_the_noise_between_runs_is_found() -> None:
    chance = random.Random(1)
    base = _rows(40)
    changed = [ms * (1.2 if index < 10 else 1.0) for index, ms in enumerate(base)]
    pair = _drawn(base, chance, between=0.005), _drawn(changed, chance, between=0.005)
    found = compare_runs(*pair)
    assert found.noise_between
    assert 0.002 < found.noise_between < 0.03
    assert {change.name for change in found.layer_times} == {f"layer{i}" for i in range(10)}


def _rows(count: int) -> list[float]:
    return [0.5 + 0.1 * index for index in range(count)]


@cache
def _template() -> Profile:
    profile = make_run().profile
    assert profile
    return profile


def _drawn(medians: list[float], chance: random.Random, *, between: float) -> RunRecords:
    """Return the profile of layers that take so long, with the noise of samples and of a run."""
    template = _template()
    drift = 0.0 if not between else chance.gauss(0.0, between)
    layers = []
    for index, ms in enumerate(medians):
        moment = ms * math.exp(drift + chance.gauss(0.0, between))
        samples = sorted(moment * math.exp(chance.gauss(0.0, 0.02)) for _ in range(SAMPLES))
        timing = Timing(
            median_ms=(samples[5] + samples[6]) / 2,
            p20_ms=samples[2] + 0.2 * (samples[3] - samples[2]),
            p80_ms=samples[8] + 0.8 * (samples[9] - samples[8]),
            samples=SAMPLES,
        )
        row = {"names": (f"layer{index}",), "option": BF16_O2, "total": timing}
        layers.append(template.layers[0].model_copy(update=row))
    specs = [
        template.model.layers[0].model_copy(update={"name": f"layer{index}"})
        for index in range(len(medians))
    ]
    model = template.model.model_copy(update={"layers": tuple(specs)})
    return RunRecords(
        profile=template.model_copy(update={"layers": tuple(layers), "model": model, "steps": ()})
    )


def test_the_factor_is_students() -> None:
    for freedom, confidence in ((3, 0.95), (11, 0.95), (11, 0.999), (19, 0.9995), (1e6, 0.95)):
        exact = float(stdtrit(freedom, (1.0 + confidence) / 2.0))
        assert student_factor(freedom, confidence) == pytest.approx(exact, rel=0.05)


def test_a_machine_that_stood_still_in_one_of_three_samples_tells_nothing() -> None:
    still = Timing(median_ms=0.01, p20_ms=0.01, p80_ms=30.0, samples=3)
    run = make_run()
    assert run.profile
    layers = tuple(layer.model_copy(update={"total": still}) for layer in run.profile.layers)
    steps = tuple(step.model_copy(update={"timing": still}) for step in run.profile.steps)
    unlucky = run.profile.model_copy(update={"layers": layers, "steps": steps})
    found = compare_runs(run, replace(run, profile=unlucky))
    assert (found.layer_times, found.speedup and found.speedup.is_beyond_noise) == ((), False)


def test_few_layers_tell_nothing_of_the_noise_between_runs() -> None:
    chance = random.Random(2)
    found = compare_runs(*(_drawn(_rows(5), chance, between=0.0) for _ in range(2)))
    assert found.noise_between is None
    assert "noise between the runs is not known" in found.notes[0]


def test_no_layer_is_told_apart_on_a_machine_that_does_other_work() -> None:
    chance = random.Random(3)
    base = _rows(20)
    changed = [3.0 * base[0], *base[1:]]
    pair = _drawn(base, chance, between=0.2), _drawn(changed, chance, between=0.2)
    found = compare_runs(*pair)
    assert (found.layer_times, found.times_compared) == ((), 20)
    assert "run both on a quiet one" in found.notes[0]


def test_gradient_errors_differ_beyond_their_batches() -> None:
    run = make_run()
    assert run.sensitivity
    rows = list(run.sensitivity.rows)
    for index, factor in ((3, 3.0), (7, 1.15)):  # stderr is 10 % of each
        error = rows[index].grad_error
        larger = Estimate(mean=error.mean * factor, stderr=error.stderr)
        rows[index] = rows[index].model_copy(update={"grad_error": larger})
    other = replace(run, sensitivity=run.sensitivity.model_copy(update={"rows": tuple(rows)}))
    (change,) = compare_runs(run, other).layer_errors
    assert change.names == (rows[3].name,)
    assert change.ratio == pytest.approx(3.0)


# --- what is not alike --------------------------------------------------------------------------


def test_another_device_is_said_and_compared() -> None:
    found = compare_runs(make_run(blocks=2), make_run(blocks=3, machine=CPU, M=2048))
    assert {row.name for row in found.facts} >= {"device", "tokens per step"}
    assert "blocks.2.fc1" in {row.name for row in found.decisions if row.before == "absent"}
    assert found.times_compared
    assert found.noise_between is None


def test_versions_that_differ_are_facts() -> None:
    run = make_run()
    assert run.profile
    software = {**run.profile.device.software, "torch": "2.14.0"}
    device = run.profile.device.model_copy(update={"software": software})
    newer = replace(run, profile=run.profile.model_copy(update={"device": device}))
    rows = [(row.name, row.before, row.after) for row in compare_runs(run, newer).facts]
    assert rows == [("torch", "2.13.0", "2.14.0")]


def test_plans_of_which_one_was_forced_are_not_made_alike() -> None:
    run = make_run()
    assert run.plan
    limits = run.plan.constraint.model_copy(update={"keep": ()})
    free = replace(run, plan=run.plan.model_copy(update={"constraint": limits}))
    rows = [(row.name, row.before, row.after) for row in compare_runs(free, run).facts]
    assert rows == [("--keep", "nothing", "head=bf16_o2")]


def test_predictions_are_compared_with_each_other_and_exactly() -> None:
    found = compare_runs(predicted_run("h100-sxm"), predicted_run("h200"))
    assert found.step
    assert found.step.low == found.step.high == found.step.ratio
    assert found.layer_times
    same = compare_runs(predicted_run("h100-sxm"), predicted_run("h100-sxm"))
    assert headline(same) == "No difference beyond noise"


def test_a_prediction_is_not_compared_with_a_measurement() -> None:
    run = make_run()
    predicted = predicted_run()
    assert predicted.plan
    names = {
        layer.name: own.name
        for layer, own in zip(
            predicted.plan.layers, run.plan.layers if run.plan else (), strict=False
        )
    }
    found = compare_runs(run, renamed(predicted, names))
    assert (found.steps, found.layer_times, found.speedup) == ((), (), None)
    assert "times of one are measured" in " ".join(found.notes)
    assert found.decisions


def test_runs_without_anything_in_common_are_refused() -> None:
    run = make_run()
    with pytest.raises(RecordError, match="no layer of one name"):
        compare_runs(run, predicted_run())
    with pytest.raises(RecordError, match="no record of one kind"):
        compare_runs(RunRecords(plan=run.plan), RunRecords(sensitivity=run.sensitivity))


# --- what may not be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "is_good"),
    [
        ("slower=2%", False),
        ("slower=20%", True),
        ("speedup=2%", False),
        ("speedup=20%", True),
        ("verdict", True),
        ("plan", True),
    ],
)
def test_conditions_hold_or_fail(
    folders: tuple[Path, Path], condition: str, *, is_good: bool
) -> None:
    (check,) = compare_paths(*folders, fail_if=[condition]).checks
    assert check.is_good is is_good
    assert compare_paths(folders[0], folders[0], fail_if=[condition]).is_good
    assert compare_paths(folders[1], folders[0], fail_if=[condition]).is_good  # faster is no fault


def test_a_weaker_proof_and_more_gradient_error_fail(tmp_path: Path) -> None:
    run = make_run()
    assert run.plan
    assert run.plan.certificate
    assert run.search
    refuted = run.plan.certificate.model_copy(update={"verdict": Verdict.REFUTED})
    plan = run.plan.model_copy(update={"certificate": refuted, "grad_error": 0.003})
    known = run.search.chosen.model_copy(update={"grad_error_stderr": 1e-5})
    search = run.search.model_copy(update={"chosen": known})
    before = save(replace(run, search=search, verification=None), tmp_path / "before")
    worse = replace(run, plan=plan, search=search, verification=None)
    after = save(worse, tmp_path / "after")
    conditions = ["verdict", "grad-error=10%", "grad-error=90%"]
    found = compare_paths(before, after, fail_if=conditions)
    assert [check.is_good for check in found.checks] == [False, False, True]
    back = compare_paths(after, before, fail_if=["verdict", "grad-error=10%"])
    assert back.is_good
    assert Certificate.model_validate(refuted).verdict is Verdict.REFUTED


def test_an_error_of_zero_is_an_error_like_others(tmp_path: Path) -> None:
    run = make_run()
    assert run.plan
    exact = replace(run, plan=run.plan.model_copy(update={"grad_error": 0.0}), verification=None)
    usual = replace(run, verification=None)
    paths = save(exact, tmp_path / "a"), save(usual, tmp_path / "b")
    worse = compare_paths(*paths, fail_if=["grad-error=10%"])
    better = compare_paths(*reversed(paths), fail_if=["grad-error=10%"])
    assert (worse.is_good, better.is_good) == (False, True)
    told = [headline(found) for found in (worse, better)]
    error = share(run.plan.grad_error)
    assert f"its gradient error is {error}, A's 0 %" in told[0]
    assert f"its gradient error is 0 %, A's {error}" in told[1]


@pytest.mark.parametrize(
    "text", ["slower", "slower=x", "slower=300%", "verdict=1%", "faster=1%", ""]
)
def test_a_condition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--fail-if must be"):
        parse_condition(text)


def test_a_condition_that_cannot_be_judged_is_no_pass(folders: tuple[Path, Path]) -> None:
    plans = [folder / "plan.json" for folder in folders]
    with pytest.raises(SettingsError, match="needs the plan's step time, with its noise"):
        compare_paths(*plans, fail_if=["slower=2%"])
    with pytest.raises(SettingsError, match="needs a verdict in both"):
        compare_paths(*(f / "profile.json" for f in folders), fail_if=["verdict"])


# --- how it is shown ----------------------------------------------------------------------------


def test_names_cannot_break_a_table_or_a_page() -> None:
    name = "he|ad_<script>alert(1)</script>\n| x |"
    run, slower = (renamed(make_run(machine=m), {"head": name}) for m in (H100, SLOWER))
    found = compare_runs(run, slower)
    text = comparison_markdown(found)
    (line,) = {line for line in text.splitlines() if "alert" in line and "tensorwise" in line}
    assert line.replace("\\|", "").count("|") == 6
    assert "\\<script\\>" in line
    page = comparison_html(found)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_command_line_needs_no_torch_and_no_pandas(folders: tuple[Path, Path]) -> None:
    code = (
        "import sys; from autoprec.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as leaving: status = leaving.code\n"
        "heavy = {'torch', 'pandas', 'scipy', 'optuna', 'numpy'} & set(sys.modules)\n"
        "print(status, sorted(heavy), file=sys.stderr)"
    )
    arguments = ["compare", *map(str, folders), "--json", "--fail-if", "slower=2%"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    assert done.stderr.strip() == "1 []"
    found = Comparison.model_validate(json.loads(done.stdout))
    assert [check.is_good for check in found.checks] == [False]


def test_the_example_workflow_is_one_and_its_command_runs(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert "pull_request" in workflow[True]  # YAML 1.1 reads the key `on` as a truth value
    (job,) = workflow["jobs"].values()
    assert job["runs-on"]
    assert all(("uses" in step) is not ("run" in step) for step in job["steps"])
    (command,) = (s["run"] for s in job["steps"] if s.get("run", "").startswith("autoprec compare"))
    monkeypatch.chdir(tmp_path)
    words = command.partition(">")[0].replace('"', "").split()
    paths = {"$RUNNER_TEMP/base": folders[0], "$RUNNER_TEMP/head": folders[1]}
    words = [str(paths.get(word, word)).replace("$RUNNER_TEMP/", "") for word in words]
    with pytest.raises(SystemExit) as leaving:
        main(words[1:])
    assert leaving.value.code == 1
    assert "FAILS" in capsys.readouterr().out
    assert (tmp_path / "compare.html").read_text().startswith("<!doctype html>")


def test_a_plan_and_a_profile_are_compared_by_file(folders: tuple[Path, Path]) -> None:
    for name, record in (("plan", Plan), ("profile", Profile)):
        before, after = (folder / f"{name}.json" for folder in folders)
        assert record.load(before)
        found = compare_paths(before, after)
        assert bool(found.times_compared) is (name == "profile")
