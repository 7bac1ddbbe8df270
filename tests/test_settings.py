"""What the command line asks for is checked before anything is captured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from autoprec.cli.main import main
from autoprec.errors import DeviceError, RecordError, SettingsError
from autoprec.records import Constraint, Plan
from autoprec.runtime import uniform_plan
from autoprec.tuning.parsing import parse_memory
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings
from autoprec.verification import Terms


@pytest.mark.parametrize("target", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize("parallel", ["tp=8", "nonsense"])
def test_parallel_on_a_device_that_is_here_is_refused(target: str, parallel: str) -> None:
    with pytest.raises(DeviceError, match="--parallel needs a device profile as its target"):
        Settings(target=target, parallel=parallel)
    assert not Settings(target=target).parallel


def test_parallel_is_read_before_anything_runs() -> None:
    settings = Settings(target="h100-sxm", parallel="FSDP=8")
    with pytest.raises(DeviceError, match="--parallel must be fsdp=N, tp=N, gather=fp8"):
        replace(settings, parallel="nonsense")


@pytest.mark.parametrize("options", [["nonsense"], ["tp=8"], ["nope=1", "--target", "h100-sxm"]])
def test_the_command_line_says_it_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    command = ["profile", str(tmp_path / "none.py"), "--out", str(tmp_path), "--parallel", *options]
    with pytest.raises(SystemExit) as leaving:
        main(command)
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert len(err.splitlines()) == 1
    assert "--parallel" in err
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.parametrize("command", ["tune", "profile"])
def test_the_help_names_every_part_of_parallel(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert [part for part in ("fsdp=", "tp=", "gather=fp8", "ac=full") if part not in shown] == []


TINY = str(Path(__file__).parent / "workloads" / "tiny.py")


@pytest.mark.parametrize("command", ["tune", "profile", "sensitivity", "verify"])
@pytest.mark.parametrize("target", ["cuda:99", "h1oo-sxm", "cudda", "cpu:1"])
def test_a_target_that_is_not_here_ends_every_command_at_once(
    command: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [TINY, str(_plan_file(tmp_path))] if command == "verify" else [TINY]
    with pytest.raises(SystemExit) as leaving:
        main([command, *words, "--target", target, "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert len(err.splitlines()) == 1
    assert target in err
    assert not list(tmp_path.glob("out/*.json"))


def test_a_gpu_by_number_is_a_device_and_no_profile() -> None:
    for target in ("auto", "cpu", "cuda", "cuda:0", "cuda:1"):
        assert Settings(target=target).is_local
    assert not Settings(target="h100-sxm").is_local


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--checkpoint", "nowhere.pt", "nowhere.pt"),
        ("--sensitivity", "nowhere.json", "nowhere.json"),
        ("--storage", "nonsense", "--storage"),
        ("--storage", "sqlite:////no/such/folder/study.db", "its folder is not there"),
        ("--storage", "sqlite://", "it names no file"),
        ("--storage", f"sqlite:///{TINY}", "file is not a database"),
        ("--storage", "sqlite:///{name}.db", "--storage"),
        ("--storage", "postgresql://host:port/db", "--storage"),
        ("--out", "x" * 300, "--out"),
        ("--memory", "much", "--memory"),
        ("--keep", "0=fp9", "--keep"),
        ("--keep", "bf16_o2", "--keep"),
        ("--keep", "nothing*=bf16_o2", "nothing*"),
        ("--keep", "2=fp8_o1", "cannot"),
        ("--keep", "0=fp8_o1:delayed", "cannot"),
    ],
)
def test_a_wrong_argument_ends_a_tune_before_it_profiles(
    option: str, value: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as leaving:
        main(["tune", TINY, "--out", str(out), option, value])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("...")]
    assert leaving.value.code == 2
    assert len(lines) == 1
    assert words in lines[0]
    assert not (out / "profile.json").exists()


def test_a_plan_of_another_model_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["verify", TINY, str(_plan_file(tmp_path)), "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert leaving.value.code == 2
    assert "must name every layer" in line


def test_verify_takes_the_tolerance_that_the_plan_was_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def verify(run: Run, _: Path) -> None:
        asked.append(run.settings.loss_tolerance)
        raise RecordError("enough")

    monkeypatch.setattr(Run, "verify", verify)
    plan, out = str(_plan_file(tmp_path, loss_tolerance=0.01)), str(tmp_path / "out")
    for options in ([], ["--loss-tolerance", "0.5%"]):
        with pytest.raises(SystemExit):
            main(["verify", TINY, plan, "--out", out, *options])
    assert asked == [0.01, 0.005]


def _plan_file(folder: Path, *, loss_tolerance: float = 1e-3) -> Path:
    plan = uniform_plan(nn.Linear(16, 16), "bf16_o2")
    asked = Constraint(loss_tolerance=loss_tolerance, grad_error_budget=None)
    changed: Plan = plan.model_copy(update={"constraint": asked})
    return changed.save(folder / "plan.json")


@pytest.mark.parametrize(
    ("text", "size"), [("40GiB", 40 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 1572864), (7, 7)]
)
def test_memory_is_read_with_its_unit(text: str | int, size: int) -> None:
    assert parse_memory(text) == size
    assert Settings.of(memory=text).constraint.memory_bytes == size


@pytest.mark.parametrize("seeds", ["1", "5:3", "3:", ":4", "3:65", "many", "2.5", "-3:4"])
def test_seeds_of_which_no_test_can_be_made_are_refused(seeds: str) -> None:
    with pytest.raises(SettingsError, match="--seeds must be LEAST:MOST or one number"):
        Settings.of(seeds=seeds)


def test_the_proof_goes_as_far_as_the_settings_say() -> None:
    assert Settings().terms == Terms()
    found = Settings.of(seeds="29", warmup_steps=0, branch_steps=200).terms
    assert found == Terms(seeds_min=29, seeds_max=29, warmup_steps=0, branch_steps=200)
    assert Settings.of(seeds=(4, 6)).seeds == (4, 6)
    with pytest.raises(SettingsError, match="--branch-steps must be at least 2"):
        Settings.of(branch_steps=1)
    with pytest.raises(SettingsError, match="--seed must be at least 0, but it is -1"):
        Settings.of(seed=-1)
    with pytest.raises(SettingsError, match="--seed must be at most 2147483647"):
        Settings.of(seed=2**32)


@pytest.mark.parametrize("number", [np.int64(3), "3", 3])
def test_numbers_of_other_libraries_and_texts_are_numbers(number: object) -> None:
    settings = Settings.of(seed=number, branch_steps=number)
    assert [type(x) for x in (settings.seed, settings.branch_steps)] == [int, int]


@pytest.mark.parametrize(
    "given",
    [
        {"verify": "no"},  # which is true
        {"gemms_hp": None},
        {"branch_steps": 2.5},
        {"trials": "ten"},
        {"target": None},
        {"horizons": 150},
        {"keep": np.ones(2)},
        {"out": None},
    ],
)
def test_a_value_of_a_wrong_type_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=r" cannot be .*; give a value as the command line"):
        Settings.of(**given)
