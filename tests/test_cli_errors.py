"""Output that cannot be written: one line, and no second failure when the interpreter ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = f"{sys.executable} -m autoprec devices show h200 --json"
SMALL_CODE = "from autoprec.cli import main as cli; cli.app = lambda **_: print(1); cli.main()"
SMALL = f'{sys.executable} -c "{SMALL_CODE}"'


def errors_of(script: str) -> str:
    done = subprocess.run(["bash", "-c", script], stderr=subprocess.PIPE, text=True)
    return done.stderr.strip()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("command", [COMMAND, SMALL], ids=["at once", "from the buffer"])
def test_a_full_disk_is_one_line_and_status_2(command: str) -> None:
    line, status = errors_of(f"{command} > /dev/full; echo $? >&2").splitlines()
    assert line.startswith("autoprec: error: ")
    assert "writing failed (No space left on device)" in line
    assert status == "2"


def test_a_reader_that_leaves_is_no_trouble() -> None:
    assert errors_of(f"({SMALL}; echo $? >&2) | exec true") in ("0", "1")


def test_an_interrupt_within_an_exec_ends_with_status_130(tmp_path: Path) -> None:
    """Of a module CPython notes one that passed through an exec of a text; it ends by SIGINT."""
    code = SMALL_CODE.replace("print(1)", "exec('raise KeyboardInterrupt')")
    (tmp_path / "stopped.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "stopped"],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("autoprec: interrupted")
    assert done.returncode == 130


def test_a_closed_stdout_is_no_trouble() -> None:
    assert errors_of(f"{COMMAND} >&-; echo $? >&2") == "0"
