"""The folder of a run takes one writer at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from autoprec.errors import RecordError
from autoprec.tuning.folder import LOCK, Folder

HOLD = """
import sys
from pathlib import Path
from autoprec.tuning.folder import Folder
with Folder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_gets_one_line_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with (
            pytest.raises(RecordError, match="takes one run at a time") as refused,
            Folder(tmp_path).locked(),
        ):
            pytest.fail("two runs wrote into one folder")
        assert str(tmp_path) in str(refused.value)
        assert "\n" not in str(refused.value)
        first.communicate()
    with Folder(tmp_path).locked():  # free again
        pass
    with Folder(tmp_path / "new").locked():  # nothing is finished in it
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        first.stdout.readline()
        first.kill()
    assert (tmp_path / LOCK).exists()
    with Folder(tmp_path).locked():
        pass
