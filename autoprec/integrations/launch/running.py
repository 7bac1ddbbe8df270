"""A script run with a plan to its end: in this process, and in those that it spawns.

`torch.multiprocessing.spawn` calls a function with a rank in each process. It gets that function
with a watch of its own around it here, which applies the plan there and tells this process.
"""

import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import SimpleQueue
from typing import Any

from torch.multiprocessing.spawn import ProcessRaisedException

from autoprec.errors import AutoprecError
from autoprec.integrations.launch.patches import Function, patched_spawn
from autoprec.integrations.launch.script import Script, run_script
from autoprec.integrations.launch.watch import Watch
from autoprec.records import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOutcome:
    """How a script ended: its exit status, and what became of the plan, in one line."""

    status: int
    message: str
    was_applied: bool


def run_with_plan(
    script: Script,
    plan: Plan,
    *,
    guard: bool | None = None,
    tell: Callable[[str], None] = logger.info,
) -> RunOutcome:
    """Run a script in this process with `plan` applied to the model that it trains.

    A Guard watches the run if `guard` says so; with None, if the plan has a precision schedule.
    `tell` gets a line where the plan was applied, before the model's first step.

    Raises:
        AutoprecError: there is no such script, or the plan could not be applied when it should.
    """
    guard = bool(plan.schedule) if guard is None else guard
    make_watch = partial(Watch, plan, guard=guard, tell=tell)
    spawned, watch = Spawned(make_watch), make_watch()
    with patched_spawn(spawned.around):
        status = watch.follow(run_script, script)
    was_applied = bool(watch.applied) or spawned.was_applied()
    return RunOutcome(status, watch.describe(), was_applied)


class Spawned:
    """What a script spawns, with the plan; each process tells here what became of it."""

    def __init__(self, make_watch: Callable[[], Watch]) -> None:
        self._make_watch = make_watch
        self._told: SimpleQueue[bool | AutoprecError] | None = None  # it needs a process of its own

    def around(self, call: Function, /, fn: Function, *args: Any, **kwargs: Any) -> Any:
        """Start processes by torch's function; raise what autoprec raised in one of them."""
        # of the context whose locks every kind of process can have
        self._told = self._told or multiprocessing.get_context("spawn").SimpleQueue()
        try:
            return call(partial(_train, self._told, self._make_watch, fn), *args, **kwargs)
        except ProcessRaisedException:
            self.was_applied()
            raise

    def was_applied(self) -> bool:
        """Whether a process that has ended had the plan; raise the error of one that could not."""
        found = []
        while self._told is not None and not self._told.empty():
            found.append(self._told.get())
        for error in found:
            if isinstance(error, AutoprecError):
                raise error
        return any(found)


def _train(
    told: "SimpleQueue[bool | AutoprecError]",
    make_watch: Callable[[], Watch],
    function: Function,
    rank: int,
    *args: Any,
) -> None:
    """Be a process of the script."""
    watch = make_watch()
    try:
        watch.follow(function, rank, *args)
    except AutoprecError as error:
        told.put(error)
        raise
    finally:
        told.put(bool(watch.applied))
