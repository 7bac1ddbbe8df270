"""A disk that is full while a record, a checkpoint or a report is saved."""

import errno
import signal
from pathlib import Path
from typing import IO

import pytest
import torch

from autoprec.cli.ending import terminated_as_interrupted
from autoprec.cli.main import main
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


def test_a_command_says_what_a_full_disk_left_and_resume_what_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, out = Path(__file__).parent / "workloads" / "tiny.py", tmp_path / "out"
    words = ["tune", str(tiny), "--target", "h100-sxm", "--meta", "--out", str(out), "--no-verify"]
    words += ["--trials", "0"]

    def fail(*_: object) -> None:
        raise NoRoomError("an output file must find room, but study.db takes 1 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("autoprec.tuning.run.make_search", fail)
        with pytest.raises(SystemExit) as ended:
            main(words)
    assert ended.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert line.endswith(f"; {out} has profile.json, sensitivity.json of this run")
    with pytest.raises(SystemExit):
        main([*words, "--resume"])
    said = capsys.readouterr().err.splitlines()[0]
    assert said == ("autoprec: --resume keeps profile, sensitivity; made now: search, verification")


def test_a_schedulers_end_is_an_interrupt_and_not_a_layers_fault() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
