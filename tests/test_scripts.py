"""Scripts of others, as they would write them, through `tune --script` and `run` unmodified."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from autoprec.integrations.launch import Script, record_workload, run_with_plan
from autoprec.records import Recipe, fp8_option
from tests.launch_scripts import own_main
from tests.plans import plan_for

__all__ = ["own_main"]
HERE = Path(__file__).resolve().parent
SCRIPTS = sorted(path.stem for path in (HERE / "scripts").glob("*.py"))
MARK = "# one-liner: "


@pytest.mark.slow  # test_launch_record.py and test_launch_run.py have smaller scripts
@pytest.mark.usefixtures("own_main")
@pytest.mark.parametrize("name", ["nanogpt"])
def test_a_script_is_recorded_and_trains_with_a_plan_as_by_the_one_liner(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = HERE / "scripts" / f"{name}.py"
    workload = record_workload(Script(str(path)), steps=8)
    assert workload.loss_fn(workload.build_model(), next(workload.train_batches(0))).isfinite()
    plan = plan_for(workload.build_model(), fp8_option(Recipe.TENSORWISE))
    plan.save(tmp_path / "plan.json")
    capsys.readouterr()
    assert run_with_plan(Script(str(path)), plan).was_applied
    printed = capsys.readouterr().out
    by_hand = tmp_path / path.name
    line = path.read_text().replace(MARK, "").replace("PLAN", repr(str(tmp_path / "plan.json")))
    by_hand.write_text(line)
    runpy.run_path(str(by_hand), run_name="__main__")
    assert capsys.readouterr().out == printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_goes_through_both_commands(name: str) -> None:
    command = [sys.executable, str(HERE.parent / "bench" / "scripts.py"), name, "--no-store"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = done.stdout.splitlines()
    assert rows, done.stderr
    assert all(" | yes | yes | " in row for row in rows), rows
