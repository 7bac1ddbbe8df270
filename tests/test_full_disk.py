"""A disk that is full while a record, a checkpoint or a report is saved."""

import errno
import resource
import signal
from pathlib import Path
from typing import IO, Any

import optuna
import pytest
import torch
import torch.distributed as dist

from autoprec.cli.ending import terminated_as_interrupted
from autoprec.cli.main import main
from autoprec.common.files import replace_file, write_atomically
from autoprec.errors import NoRoomError, RecordError
from autoprec.profiler import KeptRows
from autoprec.runtime.checkpoint import Checkpoint, save_content
from autoprec.runtime.sharded_state import write_shards
from autoprec.search.storage import _QuickSqlite, open_study


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
    needs = r"an output file must find room, but \S+profile.json takes 2.00 KiB and .* are free "
    with pytest.raises(NoRoomError, match=needs + r"\(No space.*--resume"):
        write_atomically(path, "x" * 2048)
    assert path.read_text() == "old"
    with pytest.raises(
        NoRoomError, match=r"branch.pt takes 39.1 KiB"
    ):  # torch's own error wraps it
        save_content(tmp_path / "branch.pt", {"model": {"weight": torch.zeros(10_000)}})
    assert [each.name for each in tmp_path.iterdir()] == ["profile.json"]


def test_shards_that_do_not_fit_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    shards = Checkpoint({"weight": torch.ones(100_000)}, {"state": {}}, is_sharded=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
    )
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(NoRoomError, match=r"find room, but \S+warm_up takes 391 KiB and "):
            write_shards(tmp_path / "warm_up", shards)
        assert not list(tmp_path.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        write_shards(tmp_path / "warm_up", shards)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dist.destroy_process_group()
    assert [each.name for each in tmp_path.iterdir()] == ["warm_up"]


def test_a_study_that_does_not_fit_is_one_line_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with open_study(url, "autoprec", tables="same") as (study, _):
        study.add_trial(optuna.trial.create_trial(values=[1.0, 1.0, 1.0]))

    class Full(_QuickSqlite):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.execute("PRAGMA max_page_count=1").close()  # SQLite takes what there is

    with monkeypatch.context() as patch:
        patch.setattr("autoprec.search.storage._QuickSqlite", Full)
        says = r"a study must find room to grow, but sqlite:\S+ has none .*full.; make room"
        with (
            pytest.raises(NoRoomError, match=says),
            open_study(url, "autoprec", tables="same") as (study, _),
        ):
            study.set_user_attr("long", "x" * 50_000)
        with (
            pytest.raises(NoRoomError, match=says),
            open_study(f"sqlite:///{tmp_path / 'new.db'}", "autoprec", tables="same"),
        ):
            pass
    with open_study(url, "autoprec", tables="same") as (study, _):
        assert len(study.trials) == 1


def test_a_quota_is_no_room_and_a_read_only_disk_another_error(tmp_path: Path) -> None:
    def fail(number: int) -> Path:
        def write(_: IO[bytes]) -> None:
            raise OSError(number, "told by the system")

        return replace_file(tmp_path / "a.json", write, size=10)

    with pytest.raises(NoRoomError, match=r"takes 10 B \(told by the system\)"):
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
    assert said == ("autoprec: --resume keeps profile, sensitivity; made now: search")


def test_a_schedulers_end_is_an_interrupt_and_not_a_layers_fault() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_script_forks_ends_by_the_signal_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool ends its workers so; each of them wrote a traceback."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with terminated_as_interrupted():
            monkeypatch.setattr("os.getpid", lambda: 1)
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]
