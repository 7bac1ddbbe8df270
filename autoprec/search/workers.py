"""Many processes on one study: which of them measures a plan, and what becomes of a killed one.

A worker that measures a plan says so in its trial, and the others leave that plan to it. It tells
Optuna's heartbeat while it measures (Optuna itself does so in `optimize` only, not between ask and
tell); the clock is the database's. A trial whose heartbeat has stopped for STALE_S is failed by
whoever looks next, so that its plan is free again: nothing else of a killed worker is lost.

All measure against the same reference: the first to measure writes a digest of its weights,
optimizer state and batches to the study, and of its packages; who has another is refused.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoprec.errors import RecordError

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

BEAT_S = 10
STALE_S = 60  # a device may keep the interpreter for some seconds; a measurement may take minutes
POLL_S = 0.2  # between two looks at what others do
PLAN = "autoprec_plan"  # the trial's user attribute that claims a plan
SOFTWARE = "autoprec_software"  # the study's, of all that may measure for it
REFERENCE = "autoprec_reference"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Team:
    """This process is one of several on a study.

    `reference` returns a digest of what errors are measured against, `software` that of versions
    that decide it; `is_worker`: it measures plans only, and another process makes the plan of them.
    """

    software: str
    reference: Callable[[], str]
    is_worker: bool = False


class Claims:
    """The plans that processes on one study are measuring; of a process alone there are none."""

    def __init__(
        self,
        study: "optuna.Study",
        database: "optuna.storages.RDBStorage | None" = None,
        team: Team | None = None,
    ) -> None:
        """Take a study, and of several processes the database it is in."""
        self._study, self._database = study, database
        self._team = team if database is not None else None
        self._is_checked = self._team is None
        if self._team is not None:
            self._check_same(SOFTWARE, self._team.software, "versions of autoprec and its packages")

    @property
    def is_worker(self) -> bool:
        """Whether another process makes the plan."""
        return self._team is not None and self._team.is_worker

    def taken(self, trials: "Sequence[FrozenTrial]") -> set[str]:
        """Return the plans that other processes are measuring."""
        if self._team is None:
            return set()
        running = (t for t in trials if not t.state.is_finished())
        return {str(t.user_attrs[PLAN]) for t in running if PLAN in t.user_attrs}

    @contextmanager
    def claimed(self, trial: "optuna.Trial", plan: str) -> Iterator[bool]:
        """Claim a plan for a trial while the context is open; gives False where another has it.

        A claim can be lost to another process that took this one for dead: what it wrote counts.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        if self._team is None:
            yield True
            return
        trial_id = trial._trial_id  # heartbeats go by it; Optuna has no public name for it
        stopped = threading.Event()
        beats = threading.Thread(target=self._beat, args=(trial_id, stopped), daemon=True)
        try:
            self._record_beat(trial_id)  # before the claim: one without heartbeats never ends
            trial.set_user_attr(PLAN, plan)
            beats.start()
            yield not self._is_claimed_before(trial.number, plan)
        except UpdateFinishedTrialError:
            logger.warning("trial %d was given up for dead; another takes its plan", trial.number)
        finally:
            stopped.set()
            if beats.is_alive():
                beats.join()

    def constrain(self, trial: "optuna.Trial", constraints: Mapping[str, float]) -> None:
        """Note a trial's constraints, which hold where they are <= 0.

        optuna-dashboard (0.21) reads the unnamed list of Optuna before 5, so a file has both.
        """
        for name, value in constraints.items():
            trial.set_constraint(name, value)
        if self._database is not None:
            unnamed = list(constraints.values())
            self._database.set_trial_system_attr(trial._trial_id, "constraints", unnamed)

    def check_reference(self) -> None:
        """Check that this process measures against the study's reference.

        Raises:
            RecordError: it does not.
        """
        if self._team is not None and not self._is_checked:
            self._check_same(REFERENCE, self._team.reference(), "reference weights and batches")
            self._is_checked = True

    def free_stale(self) -> None:
        """Fail the trials of processes that are gone, so that their plans are free."""
        from optuna.storages import fail_stale_trials

        if self._team is not None:
            fail_stale_trials(self._study)
            return
        # alone: whatever is under way was left by a run that is gone
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING":
                self._study.tell(trial.number, state=type(trial.state).FAIL)

    def wait(self) -> None:
        """Let others go on for a moment."""
        time.sleep(POLL_S)
        self.free_stale()

    def _is_claimed_before(self, number: int, plan: str) -> bool:
        trials = self._study.get_trials(deepcopy=False)
        same = (t for t in trials if t.user_attrs.get(PLAN) == plan and t.number < number)
        return any(t.state.name in ("RUNNING", "COMPLETE") for t in same)

    def _beat(self, trial_id: int, stopped: threading.Event) -> None:
        """Tell the heartbeat until the measurement is over, from a thread with its own session."""
        from optuna.exceptions import StorageInternalError

        try:
            while not stopped.wait(BEAT_S):
                self._record_beat(trial_id)
        except StorageInternalError:  # the database is gone: the measuring thread will say so
            logger.warning("the study's database takes no heartbeat")
        finally:
            if self._database is not None:
                self._database.remove_session()

    def _record_beat(self, trial_id: int) -> None:
        if self._database is not None:
            self._database.record_heartbeat(trial_id)

    def _check_same(self, name: str, own: str, what: str) -> None:
        if name not in self._study.user_attrs:
            self._study.set_user_attr(name, own)
        if (found := self._study.user_attrs[name]) != own:
            raise RecordError(
                f"all processes on a study must have the same {what}, but study "
                f"{self._study.study_name!r} has {found} and this one {own}; start it with the "
                "same packages, device and run folder, or give it another --study"
            )
