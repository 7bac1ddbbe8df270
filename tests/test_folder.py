"""The folder of a run takes one writer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from autoprec.errors import RecordError
from autoprec.tuning.folder import LOCK, Folder
from tests.ranks import FORKS


def _hold(folder: Path, end: Connection) -> None:
    with Folder(folder).locked():
        end.send("held")
        end.recv()


@contextmanager
def held(folder: Path) -> Iterator[tuple[ForkProcess, Connection]]:
    """Let another process hold the lock of a folder until it is sent something."""
    own, other = FORKS.Pipe()
    process = FORKS.Process(target=_hold, args=(folder, other))
    process.start()
    assert own.recv() == "held"
    yield process, own
    process.join()


def test_a_second_process_gets_one_line_and_writes_nothing(tmp_path: Path) -> None:
    with held(tmp_path) as (_, first):
        with (
            pytest.raises(RecordError, match="takes one run at a time") as refused,
            Folder(tmp_path).locked(),
        ):
            pytest.fail("two runs wrote into one folder")
        assert str(tmp_path) in str(refused.value)
        assert "\n" not in str(refused.value)
        first.send("enough")
    with Folder(tmp_path).locked():  # free again
        pass
    with Folder(tmp_path / "new").locked():  # nothing is finished in it
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    with held(tmp_path) as (process, _):
        process.kill()
    assert (tmp_path / LOCK).exists()
    with Folder(tmp_path).locked():
        pass
