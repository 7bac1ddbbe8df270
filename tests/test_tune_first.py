import subprocess
from pathlib import Path

import pytest

from autoprec.cli.first import tune_first
from autoprec.cli.main import main
from autoprec.errors import SettingsError
from autoprec.records import Verdict
from autoprec.report import RunRecords
from tests.report_runs import CPU, make_run, with_verdict


def fake_tune(monkeypatch: pytest.MonkeyPatch, run: RunRecords, status: int) -> list[list[str]]:
    """Replace the tuning process by one that leaves these records; return its commands."""
    commands = []

    def write(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        for record in (run.profile, run.sensitivity, run.search, run.plan, run.verification):
            assert record
            record.save(folder / f"{record.KIND}.json")
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", write)
    return commands


@pytest.mark.parametrize(
    ("run", "status", "said"),
    [
        (make_run(), 0, "training with it now"),
        (with_verdict(make_run(), Verdict.INCONCLUSIVE), 1, "not trained; to train with it"),
        (with_verdict(make_run(), Verdict.REFUTED), 1, "not trained; to train with it"),
        (make_run(keep=("*=fp8_o1",), machine=CPU, M=2048, width=256), 1, "not trained; "),
    ],
)
def test_a_proven_plan_alone_is_trained_with_after_three_lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    run: RunRecords,
    status: int,
    said: str,
) -> None:
    commands = fake_tune(monkeypatch, run, status)
    found = tune_first("train.py", ["--lr", "1"], tmp_path / "out" / "plan.json")
    assert found == status
    assert commands[0][3:6] == ["tune", "--script", "train.py"]
    assert commands[0][-3:] == ["--", "--lr", "1"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith(f"autoprec: {said}")
    assert lines[2].endswith("it now" if status == 0 else "train.py --lr 1")


def test_a_module_is_tuned_first_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = with_verdict(make_run(), Verdict.REFUTED)
    commands = fake_tune(monkeypatch, run, 1)
    plan = tmp_path / "out" / "plan.json"
    with pytest.raises(SystemExit):
        main(["run", "--tune-first", "--plan", str(plan), "-m", "pkg.train", "--lr", "1"])
    assert commands[0][4:6] == ["--script", "-m"]
    assert commands[0][-4:] == ["--", "pkg.train", "--lr", "1"]
    again = f"autoprec run --plan {plan} -m pkg.train --lr 1"
    assert capsys.readouterr().err.rstrip().endswith(again)


def test_a_tuning_that_failed_has_said_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake_tune(monkeypatch, make_run(), 2)
    assert tune_first("train.py", (), tmp_path / "out" / "plan.json") == 2
    assert capsys.readouterr().err == ""


def test_what_cannot_be_tuned_first_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"give FOLDER/plan\.json"):
        tune_first("train.py", (), tmp_path / "other.json")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="torchrun started many"):
        tune_first("train.py", (), tmp_path / "plan.json")
