"""Branches as independent jobs: on this machine by processes, on a cluster through submitit.

What a verification trains is a fixed grid, variants x seeds, and each point of it writes one file
(session.py). So a job is a point: it reads the common warm-up, trains, writes its file and is
forgotten. One that is killed or preempted leaves no file and is simply run again. A seed's
reference comes first, since its curve is the yardstick of divergence for the others. No job is
left behind: whatever ends the run (Ctrl-C, an error, a kill) ends those that it started.

    --workers 4                                   4 processes here, on the CUDA devices in turn
                                                  (on cuda:1 alone, if that is the target)
    --workers 16 --launcher slurm:partition=gpu   an array of jobs, 16 at a time
    --launcher local                              submitit's own processes: to try it out

Processes on one device share its memory, and --memory-limit with it. On a CPU they share its
threads, and sums then round as with that number of threads. A cluster's nodes must see the run's
folder and the workload's file.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from autoprec.common.text import error_line, shown_bytes
from autoprec.common.versions import software_versions
from autoprec.device.local import release_memory, resolve_device
from autoprec.device.memory import free_bytes, limit_memory
from autoprec.errors import AutoprecError, DeviceError, WorkerError
from autoprec.model.context import Context
from autoprec.model.memory import step_bytes
from autoprec.records import ModelSpec
from autoprec.verification.branches import train_seed
from autoprec.verification.sequential import Terms
from autoprec.verification.session import REFERENCE, BranchStore, Session, Variant, Workers
from autoprec.workload.functions import move_batch
from autoprec.workload.loading import load_workload

LOCAL = "local"  # submitit's processes on this machine
# parameters that submitit has for every cluster; others are the cluster's own
SHARED = ("name", "nodes", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")
Results = Generator[AutoprecError | None, None, None]
POLL_S = 1.0  # how often local jobs are looked at; a cluster's every 10 s


@dataclass(frozen=True)
class Job:
    """One branch to train, as another process needs it: all of it can be pickled."""

    workload: str  # a file, as `load_workload` takes it
    device: str
    context_seed: int
    terms: Terms
    folder: Path  # of the branches
    setup: str  # the digest of what all branches share
    variant: Variant = REFERENCE
    seed: int = 0
    threads: int = 0  # of the CPU; 0: as the process has
    memory_limit: int | None = None  # of this branch alone
    cwd: str = field(default_factory=os.getcwd)
    software: dict[str, str] = field(default_factory=software_versions)

    def __call__(self) -> AutoprecError | None:
        """Train the branch and write its file; return the error of the user's code, if any."""
        os.chdir(self.cwd)
        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            train_seed(self._session(), [self.variant], self.seed)
        except AutoprecError as error:
            return error
        return None

    def _session(self) -> Session:
        """Return the session of the branches, as the run that made the job has it."""
        if (here := software_versions()) != self.software:
            raise WorkerError(
                f"a worker must have the run's software ({self.software}), but it has {here}; "
                "start it in the same environment"
            )
        device = resolve_device(self.device)
        if self.memory_limit is not None:
            limit_memory(device, self.memory_limit)
        workload = load_workload(self.workload)
        store = BranchStore(self.setup, self.folder)
        checkpoint = store.find_warm_up()
        if checkpoint is None:
            raise WorkerError(
                f"a worker must see the run's folder, but the warm-up is not in {self.folder}; use "
                "an --out that all nodes share"
            )
        return Session(
            context=Context(workload, device, self.context_seed, memory_limit=self.memory_limit),
            terms=self.terms,
            loss_tolerance=0.0,  # no branch knows it
            evaluation=[move_batch(batch, device) for batch in workload.eval_batches()],
            checkpoint=checkpoint,
            store=store,
            control=None,
            checkpoint_path="",
            floor=0.0,  # the run measures it
        )

    def __submitit_checkpoint__(self) -> Any:  # Any: submitit's, which need not be there
        """Return the job that a cluster queues again after a preemption: the same one."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_room_of_branches(context: Context, spec: ModelSpec, workers: Workers) -> None:
    """Check that the branches that train at once fit into the memory of the devices they share.

    Raises:
        DeviceError: they do not; with the number that does.
    """
    size = max(step_bytes(spec, is_16_bit=is_16_bit) for is_16_bit in (False, True))
    limit, places = context.memory_limit, _places(context.device, workers)
    count = math.ceil(workers.count / places)
    # one branch alone may still fit where the prediction says no: training says so itself
    free = free_bytes(context.device) if count > 1 else None
    room = min((each for each in (limit, free) if each is not None), default=None)
    if room is None or count * size <= room:
        return
    fit = room // size * places
    what = "--memory-limit" if room == limit else "what is free"
    way_out = f"give --workers {fit}" if fit else "make the batch smaller"
    raise DeviceError(
        f"branches that train at once must keep within {what} on {context.device} "
        f"({shown_bytes(room)}), but {count} of them take about {shown_bytes(count * size)} "
        f"({shown_bytes(size)} each); {way_out}"
    )


def train_branches(session: Session, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """Train what is missing of variants x seeds in other processes; nothing without workers.

    The branches are then in the session's store.

    Raises:
        WorkerError: a worker died, or the cluster refused or lost a job.
        WorkloadError: a branch cannot be trained.
    """
    workers, context, folder = session.workers, session.context, session.store.folder
    if not workers.are_other_processes:
        return
    if folder is None or not context.workload.reference:
        raise WorkerError(
            "workers train in other processes, which need the workload as a file and a folder for "
            f"their branches, but {context.workload.name} has none; verify without workers"
        )
    limit, places = context.memory_limit, _places(context.device, workers)
    job = Job(
        workload=context.workload.reference,
        device=str(context.device),
        context_seed=context.seed,
        terms=session.terms,
        folder=folder.absolute(),
        setup=session.store.setup,
        memory_limit=limit and limit // math.ceil(workers.count / places),
    )
    release_memory(context.device)  # what this process keeps in reserve, the others need
    with _own_processes(workers.count) as pool:
        # the references first: their curves tell the others when they have diverged
        for stage in ([REFERENCE], [each for each in variants if not each.is_reference]):
            missing = {
                (variant.digest, seed): replace(job, variant=variant, seed=seed)
                for seed in seeds
                for variant in stage
                if not session.store.has(variant.digest, seed)
            }
            jobs = list(missing.values())
            results = _on_cluster(jobs, workers) if workers.launcher else _here(jobs, pool, workers)
            with closing(results):
                for done, error in enumerate(results, start=1):
                    context.progress("verify: branches", done, len(jobs))
                    if error is not None:
                        raise error


@contextmanager
def _own_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Make a pool, started by its first job, whose processes end where the context ends early."""
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, spawn, initializer=_end_with_parent)
    try:
        yield pool
    except BaseException:
        # a branch may take hours: those in flight are given up, as after a kill
        with _interrupts_blocked():  # a second Ctrl-C waits
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _end_with_parent() -> None:
    """End this process when the one that started it ends, however that is."""
    sys.stdout = sys.stderr  # the parent's is for results, not for what the user's code prints
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Let processes that start inside ignore Ctrl-C, which a terminal sends to them too."""
    if sys.platform == "win32":  # which has no signal masks
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited, not lost here
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _here(jobs: Sequence[Job], pool: ProcessPoolExecutor, workers: Workers) -> Results:
    """Run jobs in processes of this machine; yield their results as they come."""
    devices = _devices(torch.device(jobs[0].device)) if jobs else []
    threads = max(torch.get_num_threads() // workers.count, 1)
    placed = [
        replace(job, device=devices[number % len(devices)], threads=threads)
        for number, job in enumerate(jobs)
    ]
    try:
        with _interrupts_blocked():
            futures = [pool.submit(job) for job in placed]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a worker must live until its branch is trained, but one was killed (for memory, "
            "perhaps); finished branches are kept: go on with fewer --workers (tune: and --resume)"
        ) from error


def _devices(device: torch.device) -> list[str]:
    """Return the devices that local processes take in turn: all GPUs, for the first of them."""
    if device.type != "cuda" or device.index:
        return [str(device)]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def _places(device: torch.device, workers: Workers) -> int:
    """Return how many devices the branches that train at once are spread over."""
    if workers.launcher is None:
        return len(_devices(device))
    # submitit's local jobs all run on the device of the run; a cluster gives each job its own
    return 1 if workers.launcher[0] == LOCAL else workers.count


def _on_cluster(jobs: Sequence[Job], workers: Workers) -> Results:
    """Run jobs by submitit, `count` of them at a time; yield their results as they come."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

    if workers.launcher is None or not jobs:
        return
    cluster, parameters = workers.launcher
    own = {k if k in SHARED else f"{cluster}_{k}": value for k, value in parameters}
    # a cluster holds an array of jobs back by itself; local processes would all start at once
    if cluster != LOCAL:
        own[f"{cluster}_array_parallelism"] = workers.count
    size = workers.count if cluster == LOCAL else len(jobs)
    submitted: list[Any] = []  # Any: submitit's jobs
    try:
        executor = submitit.AutoExecutor(jobs[0].folder / "jobs", cluster=cluster)
        executor.update_parameters(**own)
        for start in range(0, len(jobs), size):
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs[start : start + size]]
            poll_s = POLL_S if cluster == LOCAL else 10.0
            for job in submitit.helpers.as_completed(submitted, poll_frequency=poll_s):
                yield job.result()
        submitted = []
    except (FailedJobError, FailedSubmissionError, UncompletedJobError, RuntimeError) as error:
        raise WorkerError(
            f"a job of {cluster!r} must run to its end, but {error_line(error)}; finished branches "
            f"are kept, logs are in {jobs[0].folder / 'jobs'}: start again (tune: with --resume)"
        ) from error
    finally:
        for job in submitted:  # none where all went well
            if not job.done():
                job.cancel(check=False)
