"""Branches as jobs: the same numbers in other processes, whatever ends one, and on a cluster."""

import multiprocessing
import pickle
import signal
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autoprec.errors import DeviceError, SettingsError, WorkerError, WorkloadError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.memory import step_bytes
from autoprec.records import BF16_O2, Branch, Verification
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings
from autoprec.verification import Terms, Workers, verify_plans
from autoprec.verification import workers as workers_module
from autoprec.verification.branches import train_branch
from autoprec.verification.gate import open_session
from autoprec.verification.session import REFERENCE, Session
from autoprec.verification.workers import (
    Job,
    _interrupts_blocked,
    _own_processes,
    check_room_of_branches,
    train_branches,
)
from autoprec.workload.loading import load_workload
from tests.ranks import FORKS
from tests.test_verification_gate import CPU, plan_of

TINY = Path(__file__).parent / "workloads" / "tiny.py"
TERMS = Terms(seeds_min=2, seeds_max=2, warmup_steps=4, branch_steps=4)


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start workers as forks of this process, which has imported torch; jobs are still pickled."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKS)


def verified(folder: Path, workers: Workers | None = None, *, model: Path = TINY) -> Verification:
    context = Context(load_workload(str(model)), CPU)
    plan = plan_of(capture_model(context), BF16_O2)
    return verify_plans(
        context, [plan], loss_tolerance=0.5, state_dir=folder, terms=TERMS, workers=workers
    )


def opened(path: Path, folder: Path | None, workers: Workers) -> Session:
    context = Context(load_workload(str(path)), CPU)
    return open_session(context, TERMS, loss_tolerance=0.5, state_dir=folder, workers=workers)


def losses(branches: tuple[Branch, ...]) -> list[tuple[str, int, tuple[float, ...]]]:
    return [(each.label, each.seed, each.eval_losses) for each in branches]


def test_workers_give_the_numbers_of_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = tmp_path / "measured.py"
    model.write_text(
        TINY.read_text()
        + "def evaluate(model):\n"
        + "    return sum(p.abs().sum() for p in model.parameters()) + torch.rand(())\n"
        + "fp32_model, fp32_loss = build_model, loss_fn\n"
        + "def build_model():\n"
        + "    return fp32_model().bfloat16()\n"
        + "def loss_fn(model, batch):\n"
        + "    dtype = model[0].weight.dtype\n"
        + "    return fp32_loss(lambda x: model(x.to(dtype)).float(), batch)\n"
    )
    alone = verified(tmp_path / "alone", model=model)
    together = verified(tmp_path / "together", Workers(2), model=model)
    assert losses(together.branches) == losses(alone.branches)
    assert together.metrics == alone.metrics
    assert [metric.name for metric in alone.metrics] == ["metric"]
    assert together.own_gap == alone.own_gap is not None
    assert together.written_gap == alone.written_gap is not None
    files = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "together").iterdir()} == files


def test_a_killed_worker_ends_the_run_and_loses_no_finished_branch(tmp_path: Path) -> None:
    model, survives = tmp_path / "killed.py", tmp_path / "survives"
    model.write_text(
        TINY.read_text()
        + "import os, signal\n"
        + "first = train_batches\n"
        + "def train_batches(seed):\n"
        + f"    if seed == 2 and not os.path.exists({str(survives)!r}):\n"
        + "        os.kill(os.getpid(), signal.SIGKILL)\n"
        + "    return first(seed)\n"
    )
    session = opened(model, tmp_path / "out", Workers(2))
    with pytest.raises(WorkerError, match=r"one was killed .*fewer --workers"):
        train_branches(session, [], [2])
    assert not session.store.has(REFERENCE.digest, 2)
    survives.touch()
    train_branches(session, [], [2])
    assert session.store.has(REFERENCE.digest, 2)


def interrupted_while_training() -> None:
    with _own_processes(1) as pool:
        with _interrupts_blocked():
            first = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
            pool.submit(time.sleep, 600.0)
        assert signal.SIGINT in first.result()  # a terminal's Ctrl-C is for the run alone
        raise KeyboardInterrupt


def test_an_interrupt_ends_the_workers_and_not_their_branches_first() -> None:
    before = set(multiprocessing.active_children())
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted_while_training()
    assert time.monotonic() - start < 120.0
    assert set(multiprocessing.active_children()) == before


@pytest.mark.slow  # an interpreter of its own
def test_a_launcher_trains_the_same_branches_as_jobs(tmp_path: Path) -> None:
    session = opened(TINY, tmp_path, Workers(2, ("local", (("timeout_min", 5),))))
    train_branches(session, [], [1])
    assert session.store.has(REFERENCE.digest, 1)
    assert any((tmp_path / "jobs").glob("*_log.out"))
    torch.set_num_threads(1)
    alone = opened(TINY, None, Workers())
    expected = alone.store.branch(REFERENCE.digest, 1, lambda: trained(alone))
    found = session.store.branch(REFERENCE.digest, 1, lambda: trained(session))
    assert found.eval_losses == pytest.approx(expected.eval_losses, rel=1e-6)


def trained(session: Session) -> Branch:
    return train_branch(session, REFERENCE, seed=1)


def test_an_error_of_the_user_s_code_in_a_job_is_that_error(tmp_path: Path) -> None:
    model = tmp_path / "broken.py"
    model.write_text(
        TINY.read_text()
        + "first = train_batches\n"
        + "def train_batches(seed):\n"
        + "    return iter(()) if seed == 1 else first(seed)\n"
    )
    session = opened(model, tmp_path / "out", Workers(2))
    job = Job(str(model), "cpu", 0, TERMS, tmp_path / "out", session.store.setup, seed=1)
    found = pickle.loads(pickle.dumps(job))()
    assert isinstance(pickle.loads(pickle.dumps(found)), WorkloadError)
    assert "train_batches(seed=1) must yield at least one" in str(found)


def test_a_job_refuses_other_software_and_a_folder_that_it_cannot_see(tmp_path: Path) -> None:
    job = Job(str(TINY), "cpu", 0, TERMS, tmp_path, "0123", seed=1)
    assert "must see the run's folder" in str(job())
    assert "same environment" in str(replace(job, software={"torch": "1.0"})())


def test_workers_need_a_file() -> None:
    for given in ({"workers": 2}, {"launcher": "local"}):
        with pytest.raises(WorkloadError, match=r"need the workload as a file .*--script x.py"):
            Settings.of(script="x.py", **given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("pbs", r"must be slurm or local, .* but it is 'pbs'"),
        ("slurm:partition", r"but it is 'slurm:partition'"),
        ("slurm", r"there is no sbatch here"),
    ],
)
def test_a_wrong_launcher_is_one_line(given: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=match):
        Settings.of(workload="m.py", launcher=given)


def test_branches_that_train_at_once_share_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = Context(load_workload(str(TINY)), CPU)
    spec = capture_model(context)
    size = max(step_bytes(spec), step_bytes(spec, is_16_bit=True))
    limited = replace(context, memory_limit=2 * size)
    check_room_of_branches(limited, spec, Workers(2))
    check_room_of_branches(limited, spec, Workers(9, ("slurm", ())))  # each job has a device
    for workers in (Workers(3), Workers(3, ("local", ()))):
        with pytest.raises(DeviceError, match=r"within --memory-limit .* 3 of .*give --workers 2"):
            check_room_of_branches(limited, spec, workers)
    # before any branch, and in `tune` before anything is timed
    plans = [plan_of(spec, BF16_O2)]
    with pytest.raises(DeviceError, match="give --workers 2"):
        verify_plans(limited, plans, loss_tolerance=0.5, spec=spec, workers=Workers(3))
    settings = Settings.of(
        workload=str(TINY), out=tmp_path, target="cpu", workers=3, memory_limit=2 * size
    )
    with pytest.raises(DeviceError, match="give --workers 2"):
        _ = Run(settings).profile
    # without a limit what is free decides, on two GPUs twice
    monkeypatch.setattr(workers_module, "free_bytes", lambda device: size)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"what is free on cuda:0 .* 2 of .*give --workers 2"):
        check_room_of_branches(replace(context, device=torch.device("cuda:0")), spec, Workers(3))
    monkeypatch.setattr(workers_module, "free_bytes", lambda device: size - 1)
    with pytest.raises(DeviceError, match="make the batch smaller"):
        check_room_of_branches(context, spec, Workers(2))
    check_room_of_branches(context, spec, Workers(1))  # it may fit all the same


def test_a_worker_keeps_within_its_share_on_the_next_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(TINY, tmp_path, Workers(4))
    context = replace(session.context, device=torch.device("cuda:0"), memory_limit=1000)
    session = replace(session, context=context)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sent: list[Job] = []

    def submit(job: Job) -> Future[None]:
        sent.append(job)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    pool = SimpleNamespace(submit=submit)
    monkeypatch.setattr(workers_module, "_own_processes", lambda count: nullcontext(pool))
    monkeypatch.setattr(workers_module, "release_memory", lambda device: None)
    train_branches(session, [], [1, 2, 3])
    assert [job.device for job in sent] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {job.memory_limit for job in sent} == {500}
    limits: list[tuple[torch.device, int]] = []
    monkeypatch.setattr(workers_module, "limit_memory", lambda *given: limits.append(given))
    own = replace(sent[0], device="cpu")._session()
    assert (limits, own.context.memory_limit) == ([(CPU, 500)], 500)


def test_a_preempted_job_is_queued_again_as_it_is(tmp_path: Path) -> None:
    job = Job(str(TINY), "cpu", 0, TERMS, tmp_path, "0123")
    assert job.__submitit_checkpoint__().function is job
