"""bench/gpu.py on a CPU with tiny shapes: every section, and what it writes when one fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Called = tuple[Path, dict[str, tuple[int, str]]]  # its folder, status and stderr by case
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu.py"
SCRIPT_CALLS = """
import contextlib, io, json, sys
sys.path[:0] = [{bench!r}]
import gpu, torch
from pathlib import Path

out = Path({out!r})
refused = {{}}
for name, arguments in (("cuda", []), ("cpu", ["--device", "cpu"])):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = gpu.main([*arguments, "--out", str(out / name)])
    refused[name] = (status, said.getvalue())

def good(run, found, deadline):
    found["rows"] = [{{"a": 1, "b": 2.5}}]

def bad(run, found, deadline):
    found["half"] = "kept"
    raise RuntimeError("the second half\\nis missing")

def late(run, found, deadline):
    found["taken"] = list(run.within([1, 2], gpu.Deadline(-1.0), "late"))

run = gpu.Run(torch.device("cpu"), out / "failing", True)
gpu.run_sections(run, {{"good": (9, good), "bad": (9, bad), "late": (9, late)}})
print(json.dumps(refused))
"""


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def called(tmp_path_factory: pytest.TempPathFactory) -> Called:
    """Call the script's functions in one process; return its folder and what it refused."""
    out = tmp_path_factory.mktemp("called")
    done = start("-c", SCRIPT_CALLS.format(bench=str(SCRIPT.parent), out=str(out)))
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_a_machine_without_cuda_is_one_line_and_status_2(
    called: Called,
) -> None:
    out, refused = called
    status, stderr = refused["cuda"]
    assert status == 2
    assert len(stderr.strip().splitlines()) == 1
    assert "no CUDA device is here" in stderr
    assert not (out / "cuda").exists()


def test_the_cpu_is_for_a_quick_test_alone(
    called: Called,
) -> None:
    out, refused = called
    assert refused["cpu"][0] == 2
    assert not (out / "cpu").exists()


def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    done = start(str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    sections: dict[str, dict[str, Any]] = results["sections"]
    assert list(sections) == ["facts", "profile", "gemms", "linears", "compare", "steps", "kernels"]
    assert not [note for note in results["skipped"] if " failed: " in note]
    assert "means anything" in results["claim"]
    assert {row["kernel"] for row in sections["gemms"]["rows"]} >= {"bf16"}
    assert {row["mode"] for row in sections["linears"]["rows"]} <= {"eager", "default"}
    steps = sections["steps"]["rows"]
    assert {(row["arm"], row["mode"]) for row in steps} >= {
        ("bf16_o2", "eager"),
        ("bf16_o2", "default"),
    }
    assert all(row["ms"] > 0 and row["shipped ms"] >= 0 for row in steps)
    scored = (tmp_path / "linears.csv").read_text().splitlines()
    measured = [row for row in sections["linears"]["rows"] if row["speedup"]]
    assert len(scored) == 1 + len(measured) == 1 + len(sections["compare"]["rows"])
    text = (tmp_path / "results.md").read_text()
    assert all(f"## {name}" in text for name in sections)


def test_what_was_measured_is_written_though_a_section_fails(
    called: Called,
) -> None:
    folder = called[0] / "failing"
    results = json.loads((folder / "results.json").read_text())
    assert results["sections"]["good"]["rows"] == [{"a": 1, "b": 2.5}]
    assert results["sections"]["bad"]["half"] == "kept"
    assert results["sections"]["late"]["taken"] == []
    assert results["skipped"] == [
        "bad failed: RuntimeError: the second half",
        "late: -1 s were over before 1, 2",
    ]
    text = (folder / "results.md").read_text()
    assert "| a | b |" in text
    assert "the second half" in text
