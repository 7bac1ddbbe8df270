"""The command line end to end, as a user types it."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from autoprec.cli.main import leave, main
from autoprec.errors import WorkloadError
from autoprec.records import Plan, Profile, Search, Sensitivity, Verification
from autoprec.tuning import doctor
from autoprec.tuning.ranks import LAUNCHED_BY

TINY = str(Path(__file__).parent / "workloads" / "tiny.py")
QUICK = (
    *("--trials", "3", "--recipes", "tensorwise", "--seeds", "2", "--json"),
    *("--warmup-steps", "8", "--branch-steps", "4"),
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line: arguments -> status, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(leaving.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one whole `tune` of the tiny workload; its JSON is in tune.json."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as leaving:
        main(["tune", TINY, "--out", str(out), *QUICK])
    assert leaving.value.code in (0, 1)
    (out / "tune.json").write_text(said.getvalue())
    return out


def _workload(folder: Path, **functions: str) -> Path:
    """Write a copy of the tiny workload with some functions replaced (or removed, with '')."""
    text = Path(TINY).read_text()
    for name, body in functions.items():
        start = text.index(f"def {name}(")
        end = text.find("\n\n\n", start)
        text = text[:start] + textwrap.dedent(body) + (text[end:] if end >= 0 else "")
    path = folder / "model.py"
    path.write_text(text)
    return path


def _is_one_line(stderr: str, *words: str) -> bool:
    lines = [line for line in stderr.splitlines() if not line.endswith("...")]
    return (
        len(lines) == 1
        and lines[0].startswith("autoprec: error: ")
        and all(word in lines[0] for word in words)
    )


def test_tune_prints_one_json_object_with_what_it_found(tuned: Path) -> None:
    found = json.loads((tuned / "tune.json").read_text())
    baselines = {"as_written", "fp32", "bf16_o2", "autocast_bf16"}
    assert set(found["step_ms"]) == {"plan", *baselines}
    assert set(found["step_speedup"]) == {f"vs_{label}" for label in baselines}
    assert found["step_ms"]["as_written"] is None  # it is that of plain FP32
    assert {"mean", "low", "high"} <= set(found["loss_gap"])
    assert found["verdict"] in {"verified", "refuted", "inconclusive"}
    assert sum(found["layers"].values()) == 4
    assert found["extra_steps"] >= 0.0
    assert found["time_to_loss_speedup"] == pytest.approx(
        found["step_speedup"]["vs_fp32"] / (1 + found["extra_steps"])
    )
    assert found["step_speedup"]["vs_fp32"] == pytest.approx(
        found["step_ms"]["fp32"] / found["step_ms"]["plan"]
    )
    assert found["out"] == str(tuned)


def test_tune_leaves_every_record_and_report(tuned: Path) -> None:
    plan = Plan.load(tuned / "plan.json")
    verification = Verification.load(tuned / "verification.json")
    assert verification.plan == plan.digest
    assert plan.certificate is not None
    assert plan.certificate.verdict is verification.verdict
    structures = {
        plan.fingerprint.structure,
        Profile.load(tuned / "profile.json").model.structure,
        Sensitivity.load(tuned / "sensitivity.json").structure,
        Search.load(tuned / "search.json").structure,
    }
    assert len(structures) == 1
    assert "<html" in (tuned / "report.html").read_text()
    assert len((tuned / "layers.csv").read_text().splitlines()) == 1 + len(plan.layers)
    assert not list(tuned.glob(".*"))


def test_resume_repeats_no_finished_stage(tuned: Path, run: Run) -> None:
    names = ("profile", "sensitivity", "search", "verification")
    before = {name: (tuned / f"{name}.json").stat().st_mtime_ns for name in names}
    status, _, err = run("tune", TINY, "--out", tuned, *QUICK, "--resume")
    assert status in (0, 1)
    assert "..." not in err  # no stage drew progress
    assert {name: (tuned / f"{name}.json").stat().st_mtime_ns for name in names} == before


@pytest.fixture
def tuned_copy(tuned: Path, tmp_path: Path) -> Path:
    """Return a copy of the tuned folder, for a command that writes there."""
    return Path(shutil.copytree(tuned, tmp_path / "copy"))


@pytest.mark.slow  # tests/test_house.py shows in one import that no torch comes
def test_search_and_report_of_saved_records_are_quick_and_need_no_torch(tuned_copy: Path) -> None:
    folder = str(tuned_copy)
    code = textwrap.dedent(
        f"""
        import sys, time
        from autoprec.cli.main import main
        for arguments in (["report", {folder!r}], ["search", {folder!r}, "--json"]):
            try:
                main(arguments)
            except SystemExit as leaving:
                assert leaving.code == 0, leaving.code
            assert not {{"torch", "plotly"}} & set(sys.modules)
            assert ("optuna" in sys.modules) == (arguments[0] == "search")
        assert time.process_time() < 12.0  # 3 s here, of the processor: also where it is busy
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_plan_show_check_and_compare(tuned: Path, run: Run, tmp_path: Path) -> None:
    plan = tuned / "plan.json"
    assert run("plan", "show", plan)[0] == 0
    status, out, _ = run("plan", "check", plan, "--model", TINY, "--json")
    assert (status, json.loads(out)["plan"] != "") == (0, True)
    fields = json.loads(plan.read_text())
    first = fields["layers"][0]
    other = "bf16_o2" if first["precision"] == "fp32" else "fp32"
    first |= {"precision": other, "recipe": None, "gemms_hp": []}
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(fields))
    assert run("compare", plan, plan, "--fail-if", "plan")[0] == 0
    status, out, _ = run("compare", plan, edited, "--json", "--fail-if", "plan")
    assert status == 1
    assert [row["name"] for row in json.loads(out)["decisions"]] == [first["name"]]


def test_keep_decides_a_layer(tuned_copy: Path, run: Run) -> None:
    status, _, _ = run("search", tuned_copy, "--keep", "3=fp32", "--trials", "2", "--json")
    plan = Plan.load(tuned_copy / "plan.json")
    assert status == 0
    assert next(layer for layer in plan.layers if layer.name == "3").precision == "fp32"
    status, _, err = run("search", tuned_copy, "--keep", "block*=fp32", "--trials", "2")
    assert status == 2
    assert _is_one_line(err, "block*")


BROKEN = {
    "a missing function": ({"loss_fn": ""}, "loss_fn"),
    "a loss that is no scalar": (
        {"loss_fn": "def loss_fn(model, batch):\n    return model(batch[0])"},
        "scalar",
    ),
    "a NaN loss": (
        {"loss_fn": "def loss_fn(model, batch):\n    return model(batch[0]).mean() * float('nan')"},
        "finite",
    ),
    "a model without parameters": (
        {"build_model": "def build_model():\n    return nn.ReLU()"},
        "parameters",
    ),
    "batches that differ": (
        {
            "train_batches": "def train_batches(seed):\n    while True:\n        yield "
            "torch.randn(16, WIDTH), torch.randn(16, 10)"
        },
        "same batches",
    ),
    "user code that raises": (
        {"build_model": "def build_model():\n    raise KeyError('weights')"},
        "KeyError",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_workload_gets_one_clear_line(case: str, run: Run, tmp_path: Path) -> None:
    functions, word = BROKEN[case]
    path = _workload(tmp_path, **functions)
    status, out, err = run("tune", path, "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert _is_one_line(err, word)
    assert not list((tmp_path / "out").glob("*.json"))


def test_code_that_changes_the_directory_leaves_the_run_folder(
    run: Run, tuned_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tuned_copy.parent)
    elsewhere = tuned_copy.parent / "elsewhere"
    elsewhere.mkdir()
    arguments = ("tune", "model.py", "--out", tuned_copy.name, "--json")

    def make(made: object) -> object:
        os.chdir(elsewhere)  # as the user's code may
        return made

    monkeypatch.setattr("autoprec.tuning.run.Run.make", make)
    monkeypatch.setattr("autoprec.tuning.run.Run.exit_code", 0)
    status, out, _ = run(*arguments)
    assert (status, json.loads(out)["out"]) == (0, str(tuned_copy))


def test_a_wrong_target_or_folder_gets_one_clear_line(run: Run, tmp_path: Path) -> None:
    status, _, err = run("tune", TINY, "--target", "h1oo-sxm", "--out", tmp_path / "out")
    assert status == 2
    assert _is_one_line(err, "h1oo-sxm")
    (tmp_path / "file").write_text("")
    status, _, err = run("tune", TINY, "--out", tmp_path / "file" / "out")
    assert status == 2
    assert _is_one_line(err, "--out")
    status, _, err = run("tune", tmp_path / "nowhere.py")
    assert status == 2
    assert _is_one_line(err, "nowhere.py")
    status, _, err = run("report", tmp_path / "file")
    assert status == 2
    assert _is_one_line(err, f"give {tmp_path}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("tune",),
        ("tune", TINY, "--bogus"),
        ("tune", "x" * 300),  # longer than a file's name may be
        ("tune", "--script", "x" * 300),
        ("bogus",),
        ("tune", TINY, "--loss-tolerance", "5"),
        ("tune", TINY, "--recipes", "mxfp4"),
        ("tune", TINY, "--time-budget", "soon"),
        ("tune", TINY, "--trials", "-1"),
    ],
)
def test_a_wrong_argument_gets_one_clear_line(arguments: tuple[str, ...], run: Run) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert _is_one_line(err)


def test_a_command_that_is_written_wrongly_is_told_how_it_is_written(run: Run) -> None:
    told = {
        ("compare", "a"): (
            "a command is `autoprec compare [OPTIONS] BEFORE AFTER`, but 'AFTER' is missing; see "
            "`autoprec compare --help`"
        ),
        ("doctor", "--tagret"): (
            "a command is `autoprec doctor [OPTIONS]`, but no such option: --tagret; near to it: "
            "--target; see `autoprec doctor --help`"
        ),
        ("plan", "shw"): (
            "a command is `autoprec plan [OPTIONS] COMMAND [ARGS]...`, but no such command 'shw'; "
            "near to it: show; see `autoprec plan --help`"
        ),
        ("search", "x", "--trials", "two"): (
            "'--trials' must be a valid integer, but it is 'two'; see `autoprec search --help`"
        ),
        ("report", "a", "b"): (
            "a command is `autoprec report [OPTIONS] FOLDER`, but got unexpected extra argument(s) "
            "(b); see `autoprec report --help`"
        ),
        ("doctor", "--target"): (
            "a command is `autoprec COMMAND [OPTIONS] ...`, but option '--target' requires an "
            "argument; see `autoprec COMMAND --help`"
        ),
    }
    for arguments, line in told.items():
        assert run(*arguments) == (2, "", f"autoprec: error: {line}\n")
    status, _, err = run("plan")
    assert status == 2
    assert err.startswith("Usage: autoprec plan")


EDITS: dict[str, Callable[[str], str]] = {
    "an unknown field": lambda text: text.replace('"layers"', '"colour": 1, "layers"', 1),
    "an unknown version": lambda text: text.replace('"version": 2', '"version": 99', 1),
    "an unknown precision": lambda text: text.replace('"precision": "', '"precision": "int', 1),
    "a truncated file": lambda text: text[: len(text) // 2],
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_plan_gets_one_clear_line(
    edit: str, tuned: Path, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(EDITS[edit]((tuned / "plan.json").read_text()))
    for arguments in (("plan", "show", path), ("plan", "check", path, "--model", TINY)):
        status, _, err = run(*arguments)
        assert status == 2
        assert _is_one_line(err, "plan.json")


def test_a_plan_for_another_model_fails_the_check(tuned: Path, run: Run, tmp_path: Path) -> None:
    other = _workload(
        tmp_path,
        build_model="def build_model():\n    return nn.Sequential(nn.Linear(WIDTH, 10))",
    )
    status, out, err = run("plan", "check", tuned / "plan.json", "--model", other)
    assert status == 1
    assert "Traceback" not in out + err


INTERRUPTED_ONCE = """
def loss_fn(model, batch):
    from pathlib import Path
    folder = Path(__file__).parent
    if (folder / "run" / "profile.json").exists() and not (folder / "interrupted").exists():
        (folder / "interrupted").touch()
        raise KeyboardInterrupt
    return F.mse_loss(model(batch[0]), batch[1])
"""


def test_an_interrupt_ends_with_130_and_resume_goes_on(run: Run, tmp_path: Path) -> None:
    """The interrupt comes from the workload, in the stage after the profile, and not by a clock."""
    out = tmp_path / "run"
    arguments = ["tune", str(_workload(tmp_path, loss_fn=INTERRUPTED_ONCE)), "--out", str(out)]
    arguments += ["--trials", "0", "--no-verify", "--json", "--target", "h100-sxm"]
    status, _, err = run(*arguments)
    assert status == 130, err
    *_, kept, last = err.splitlines()
    assert last.startswith("autoprec: interrupted")
    assert kept.endswith("has profile.json of this run")
    assert "Traceback" not in err
    assert (out / "profile.json").exists()
    assert not (out / "sensitivity.json").exists()
    assert not list(out.glob(".*"))
    profile = (out / "profile.json").read_bytes()
    assert run(*arguments, "--resume")[0] == 0
    assert (out / "profile.json").read_bytes() == profile


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_says_that_all_were_interrupted(
    run: Run, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoprec.cli.main.app", interrupt)
    for name in LAUNCHED_BY:
        monkeypatch.setenv(name, str(rank) if name == "RANK" else "2")
    status, _, err = run("tune")
    assert (status, "interrupted" in err) == (130, rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_all_ranks_is_left_to_the_first(
    run: Run, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """The others give torchrun the time to end them; one that fails alone says so then."""

    def fail(**_: object) -> None:
        raise WorkloadError("a batch must have rows, but it has none")

    waits: list[float] = []
    monkeypatch.setattr("autoprec.cli.main.app", fail)
    monkeypatch.setattr("autoprec.cli.main.time.sleep", waits.append)
    for name in LAUNCHED_BY:
        monkeypatch.setenv(name, str(rank) if name == "RANK" else "2")
    status, _, err = run("tune")
    assert (status, len(waits)) == (2, rank)
    assert "autoprec: error: a batch must have rows" in err


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_says_what_torchrun_will_call_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    for name in LAUNCHED_BY:
        monkeypatch.setenv(name, str(rank) if name == "RANK" else "2")
    for status in (0, 1):
        with pytest.raises(typer.Exit) as leaving:
            leave(status)
        assert leaving.value.exit_code == (status if rank == 0 else 0)
        assert ("torchrun calls that a failure" in caplog.text) == (rank == 0 and status == 1)


def test_help_imports_nothing_that_is_slow() -> None:
    code = textwrap.dedent(
        """
        import sys
        from autoprec.cli.main import main
        try:
            main(["--help"])
        except SystemExit:
            print(sorted({"torch", "pandas", "optuna", "scipy"} & set(sys.modules)))
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("tune", "profile", "sensitivity", "search", "verify", "report", "plan", "doctor"):
        assert name in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_help_and_is_on_the_page_on_usage() -> None:
    import typer

    from autoprec.cli.main import app

    readme = (Path(__file__).parent.parent / "docs" / "usage.md").read_text()
    root = typer.main.get_command(app)
    commands = getattr(root, "commands", {})
    assert commands
    for name, command in commands.items():
        assert command.help, name
        assert f"autoprec {name}" in readme, name
        for inner, sub in getattr(command, "commands", {}).items():
            assert sub.help, f"{name} {inner}"
            assert f"{name} {inner}" in readme, f"{name} {inner}"


def test_the_version_is_told(run: Run) -> None:
    status, out, _ = run("--version")
    assert status == 0
    assert re.fullmatch(r"autoprec \S+, torch \S+, torchao \S+\n", out)


def test_doctor_is_healthy_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GEMM", doctor.SMALL_GEMM)
    status, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert all(check["is_good"] for check in found["checks"])
    assert {"fp32", "bf16"} <= set(found["gemm_ms"])
