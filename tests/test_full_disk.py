"""A disk that is full while a record, a checkpoint or a report is saved."""

import errno
from pathlib import Path
from typing import IO

import pytest
import torch

from autoprec.common.files import replace_file, write_atomically
from autoprec.errors import NoRoomError, RecordError
from autoprec.profiler import KeptRows
from autoprec.runtime.checkpoint import save_content


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing beyond 1000 bytes of a file is written."""
    fdopen = __import__("os").fdopen

    class Full:
        def __init__(self, file: IO[bytes]) -> None:
            self.file, self.left = file, 1000

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

        def fileno(self) -> int:
            return self.file.fileno()

    monkeypatch.setattr("autoprec.common.files.os.fdopen", lambda *a: Full(fdopen(*a)))


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("old")
    needs = r"an output file must find room, but \S+profile.json takes 2.0 KiB and .* are free "
    with pytest.raises(NoRoomError, match=needs + r"\(No space.*--resume"):
        write_atomically(path, "x" * 2048)
    assert path.read_text() == "old"
    with pytest.raises(
        NoRoomError, match=r"branch.pt takes 39.1 KiB"
    ):  # torch's own error wraps it
        save_content(tmp_path / "branch.pt", {"model": {"weight": torch.zeros(10_000)}})
    assert [each.name for each in tmp_path.iterdir()] == ["profile.json"]


def test_a_quota_is_no_room_and_a_read_only_disk_another_error(tmp_path: Path) -> None:
    def fail(number: int) -> Path:
        def write(_: IO[bytes]) -> None:
            raise OSError(number, "told by the system")

        return replace_file(tmp_path / "a.json", write, size=10)

    with pytest.raises(NoRoomError, match=r"takes 10 bytes \(told by the system\)"):
        fail(errno.EDQUOT)
    with pytest.raises(RecordError, match="choose another folder") as found:
        fail(errno.EROFS)
    assert not isinstance(found.value, NoRoomError)
    with (
        pytest.raises(RecordError, match="must be writable"),
        KeptRows(tmp_path / "gone" / "rows.json", "digest").noting(),
    ):
        pass
