"""bench/gpu_day.py where no GPU is: its sections on a CPU, and what it does with a bad child."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprec.model.meta import capture_on_meta
from autoprec.profiler.compiling import COMPILED, made_graphs, open_compilation
from autoprec.records import BF16_O2, Recipe, fp8_option
from tests.constant_clock import CPU
from tests.fake_gpu import GPU, FakeGpu
from tests.ranks import every_recipe, start_ranks

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu_day.py"
ALL_BUT_TUNE = ("facts", "steps", "gemms", "linears", "profile", "predictions")
LEFT_OUT = (  # for the time that they take; begun before, as by a child that died
    *(("facts", "compiled self-test"), ("steps", "plan, default"), ("steps", "bf16, eager")),
    *(("steps", "fp8 rowwise, default"), ("steps", "bf16 again, default")),
    *(("linears", "64x64x32, default"), ("linears", "64x64x32, eager")),
)
CHILD = """
import os, sys, time
sys.path[:0] = [{bench!r}]
from pathlib import Path
from gpu_running import begun, write_row

out = Path({out!r})
tried = begun(out, "section")
for item in ("first", "crashes", "hangs", "last"):
    if item in tried:
        continue
    write_row(out, {{"section": "section", "begun": item}})
    if item == "crashes":
        os.abort()
    if item == "hangs":
        time.sleep(600)
    write_row(out, {{"section": "section", "item": item, "ms": 1.0}})
"""


def run_sections(_: int, out: str) -> None:
    """Run all sections but `tune` in this process, as their children do one after the other."""
    sys.path.insert(0, str(ROOT / "bench"))
    sections = importlib.import_module("gpu_sections")
    with every_recipe():
        for name in ALL_BUT_TUNE:
            assert sections.run_section(Path(out), name, device="cpu", is_quick=True) == 0
    importlib.import_module("gpu_report").write_report(Path(out), is_quick=True)


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:  # Any: a module of bench/, by name
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


@pytest.mark.slow  # compiles
def test_every_section_but_tune_runs_on_a_cpu_and_is_reported(tmp_path: Path, bench: Any) -> None:
    running = bench("gpu_running")
    for section, item in LEFT_OUT:
        running.write_row(tmp_path, {"section": section, "begun": item})
    start_ranks(run_sections, str(tmp_path), ranks=1)
    rows = running.read_rows(tmp_path)
    assert [row for row in rows if "failed" in row] == []
    found = {name: running.results(rows, name) for name in ALL_BUT_TUNE}
    steps = [(row["arm"], row["mode"], row["fp8_layers"]) for row in found["steps"]]
    eager = ("fp8 tensorwise", "eager", 8)
    assert steps == [("bf16", "default", 0), ("fp8 tensorwise", "default", 8), eager]
    # Blocks share a graph, the tail has one; eager there is none.
    assert [row["graphs"] for row in found["steps"]] == [2, 2, 0]
    kernels = {row["kernel"] for row in found["gemms"]}
    assert kernels == {"bf16", "fp8_fast", "fp8_slow", "fp8_rowwise", "fp8 current", "fp8 delayed"}
    assert {row["mode"] for row in found["linears"]} == {"default", "eager"}
    assert all(row["speedup"] == row["bf16_ms"] / row["ms"] for row in found["linears"])
    # Every figure that a profile predicts stands beside its prediction.
    kinds = [row["kind"] for row in found["predictions"] if "kind" in row]
    assert kinds.count("step ms") == len(steps)
    assert kinds.count("linear speedup") == kinds.count("eager linear speedup") == 3
    assert kinds.count("gemm ms") == 8
    page = (tmp_path / "report.md").read_text()
    assert all(f"## {name}" in page for name in ALL_BUT_TUNE)
    assert "no figure here means anything" in page


@pytest.mark.slow
def test_what_is_timed_stays_on_its_device(tmp_path: Path, bench: Any) -> None:
    measuring = bench("gpu_measuring")
    day = measuring.Day(GPU, tmp_path, is_quick=True)
    option = fp8_option(Recipe.ROWWISE)
    step = measuring.linear_step(day, (64, 32, 48), option, measuring.EAGER)
    with FakeGpu() as gpu:
        step()
    assert gpu.mixed == []
    assert len(gpu.gemms) == 3
    for run in measuring.scaled_gemms(day, (64, 32, 48)).values():
        with FakeGpu() as gpu:
            run()
        assert gpu.mixed == []
        assert gpu.gemms == [(torch.float8_e4m3fn, torch.float8_e4m3fn)]
    spec = capture_on_meta(measuring.decoder_workload(day.sizes))
    options = measuring.options_of(spec, option)
    model, _ = measuring.build_arm(day, measuring.Arm("fp8", measuring.EAGER, options))
    tokens = torch.zeros(2, 16, dtype=torch.long, device=GPU)
    with FakeGpu() as gpu:
        torch.autograd.backward(model(tokens, tokens))
    assert gpu.mixed == []
    assert len(gpu.gemms) == 3 * 8


def test_a_compiled_linear_in_context_is_a_graph(tmp_path: Path, bench: Any) -> None:
    measuring = bench("gpu_measuring")
    day = measuring.Day(CPU, tmp_path, is_quick=True)
    with open_compilation(CPU, COMPILED, backend=day.backend):
        before = made_graphs()
        measuring.linear_step(day, (16, 32, 16), BF16_O2, COMPILED)()
        assert made_graphs() == before + 1


def test_tables_have_the_columns_of_bench_data(tmp_path: Path, bench: Any) -> None:
    running, report = bench("gpu_running"), bench("gpu_report")
    software = {"torch": "2.11.0", "cuda": "13.0"}
    times = {"ms": 1.0, "samples": 20, "sm_mhz": 1700, "watts": 650.0}
    shape = {"M": 64, "K": 32, "N": 48}
    step = {"mode": "default", "tokens": 8192, "parameters": 10**9}
    for section, row in (
        ("facts", {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "software": software}),
        ("gemms", shape | {"kernel": "bf16"} | times | {"ms": 1.5}),
        ("gemms", shape | {"kernel": "fp8_rowwise"} | times),
        ("linears", shape | step | {"recipe": "rowwise", "bf16_ms": 1.2, "speedup": 1.2} | times),
        ("steps", step | {"arm": "bf16", "fp8_layers": 0} | times | {"ms": 2.0}),
        ("steps", step | {"arm": "fp8 rowwise", "fp8_layers": 29} | times),
    ):
        running.write_row(tmp_path, {"section": section, **row})
    report.write_report(tmp_path, is_quick=False)
    for name, speedup in (("gemm.csv", "1.5"), ("linear_layers.csv", "1.2"), ("training.csv", "2")):
        written = (tmp_path / name).read_text().splitlines()
        known = (ROOT / "bench" / "data" / name).read_text().splitlines()[0]
        assert written[0] == known
        assert len(written) == 2
        assert f",{speedup}," in written[1]
        assert "NVIDIA H100 80GB HBM3" in written[1]


@pytest.mark.slow
def test_a_crash_or_a_hang_costs_one_item(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = bench("gpu_running")
    for name, value in (("LEAST_S", 0.0), ("LEAST_PATIENCE_S", 4.0), ("PATIENCE", 0.1)):
        monkeypatch.setattr(running, name, value)
    code = CHILD.format(bench=str(ROOT / "bench"), out=str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    (tmp_path / "rows.jsonl").touch()
    outcome = running.Child([sys.executable, "-c", code], tmp_path).run("section", seconds=40.0)
    rows = running.read_rows(tmp_path)
    assert [row["item"] for row in rows if "ms" in row] == ["first", "last"]
    failed = [row["failed"] for row in rows if "failed" in row]
    assert failed == ["crashes: died of signal 6", "hangs: out of time, ended"]
    assert outcome == failed[-1]


def test_a_section_that_cannot_start_is_tried_once(tmp_path: Path, bench: Any) -> None:
    (tmp_path / "rows.jsonl").touch()
    child = bench("gpu_running").Child([sys.executable, "-c", "raise SystemExit(7)"], tmp_path)
    assert child.run("facts", seconds=60.0) == "the start: ended with status 7 (log.txt)"
    assert len(bench("gpu_running").failures(bench("gpu_running").read_rows(tmp_path))) == 1


def test_what_a_section_leaves_is_shared_by_the_later_ones(bench: Any) -> None:
    share_out = bench("gpu_running").share_out
    assert share_out(100.0, [1.0, 3.0]) == 25.0
    assert share_out(90.0, [3.0]) == 90.0


def test_of_a_section_that_is_run_again_the_last_run_counts(tmp_path: Path, bench: Any) -> None:
    running = bench("gpu_running")
    for ms in (1.0, 2.0):
        running.write_row(tmp_path, {"section": "steps", "seconds_allowed": 9.0})
        assert running.begun(tmp_path, "steps") == []
        running.write_row(tmp_path, {"section": "steps", "begun": "bf16"})
        running.write_row(tmp_path, {"section": "steps", "item": "bf16", "ms": ms})
    assert [row["ms"] for row in running.results(running.read_rows(tmp_path), "steps")] == [2.0]


def test_a_row_that_a_crash_cut_off_is_no_row(tmp_path: Path, bench: Any) -> None:
    (tmp_path / "rows.jsonl").write_text('{"section": "a", "ms": 1}\n{"section": "a", "m')
    assert bench("gpu_running").read_rows(tmp_path) == [{"section": "a", "ms": 1}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "--device cpu is for --quick only"),
        (["--sections", "steps,nothing"], "it is 'nothing'"),
        ([], "no CUDA device is here"),
    ],
)
def test_what_cannot_run_is_one_line_and_status_2(
    tmp_path: Path,
    bench: Any,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "out"
    assert bench("gpu_day").main([*arguments, "--out", str(out)]) == 2
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1
    assert said in stderr
    assert not out.exists()


# --- the folder of packages -------------------------------------------------------------------


def test_packages_are_followed_up_to_what_the_machine_has(bench: Any) -> None:
    wheels = bench("gpu_wheels")

    def package(name: str, *needs: str) -> dict[str, Any]:
        return {"metadata": {"name": name, "version": "1.0", "requires_dist": list(needs)}}

    report = [
        package("Optuna", "numpy", "SQLAlchemy>=1", "tomli; python_version < '3.11'"),
        package("sqlalchemy", "typing_extensions", "greenlet; extra == 'asyncio'"),
        package("numpy", "only-numpy-needs-it"),
        package("typing-extensions"),
    ]
    direct = [wheels.Requirement("optuna>=5")]
    found = wheels.wanted_versions(report, direct)
    assert list(found) == ["optuna", "sqlalchemy", "typing-extensions"]


def test_the_docstring_names_what_is_required_and_not_there(bench: Any) -> None:
    text = SCRIPT.read_text()
    missing = bench("gpu_wheels").missing_requirements((ROOT / "pyproject.toml").read_text())
    assert {"torchao", "optuna", "pytest-timeout"} <= {one.name for one in missing}
    assert [one.name for one in missing if not re.search(rf"\b{one.name}\b", text)] == []


def test_a_folder_that_holds_something_is_refused(
    tmp_path: Path, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert bench("gpu_day").main(["--collect", str(tmp_path)]) == 2
    assert "new or empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_what_tests_need_is_an_extra_that_developers_get() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert any(text.startswith("autoprec[") and "test]" in text for text in extras["dev"])
    assert any(text.startswith("pytest-timeout") for text in extras["test"])


@pytest.mark.slow
def test_the_whole_script_runs_on_a_cpu(tmp_path: Path) -> None:
    done = start(str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row for row in rows if "failed" in row] == []
    assert (tmp_path / "tune" / "plan.json").exists()
    assert next(r["verdict"] for r in rows if "verdict" in r) == "not_run"
