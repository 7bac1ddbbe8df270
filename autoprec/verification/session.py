"""What the plans of one verification share: checkpoint, clock, and every finished branch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from autoprec import __version__
from autoprec.common.progress import Progress
from autoprec.errors import InfeasibleError, RecordError, WorkloadError
from autoprec.records import BF16_O2, FP32, Branch, ModelSpec, Option, Plan
from autoprec.runtime.checkpoint import Checkpoint, read_checkpoint
from autoprec.verification.branches import (
    Arm,
    Bench,
    evaluate,
    replay_reference,
    restore,
    seeded,
    train_branch,
    warm_up,
)
from autoprec.verification.sequential import Looks
from autoprec.verification.state import BranchStore, file_digest, open_store
from autoprec.workload.functions import Workload, check_batches, move_batch

REFERENCE = Arm(label="reference", options={})
REPLAY_STEPS = 2  # the second loss already depends on a whole forward, backward and update
STATE_RTOL = 1e-3  # a saved warm-up must evaluate to what it did, up to another thread count
SMALLEST_LOSS = 1e-6  # a gap relative to less than this is a gap relative to rounding


@dataclass(frozen=True)
class Terms:
    """What is tested and how far the test may go."""

    tolerance: float
    looks: Looks
    warmup_steps: int
    branch_steps: int
    seed: int
    time_budget_s: float | None

    def __post_init__(self) -> None:
        if not self.tolerance >= 0.0:
            raise InfeasibleError(
                f"the loss tolerance must be zero or more, but it is {self.tolerance}; "
                "0.001 is 0.1 %"
            )
        if self.warmup_steps < 0 or self.branch_steps < 2:
            raise InfeasibleError(
                "warmup_steps >= 0 and branch_steps >= 2 must hold, but got "
                f"{self.warmup_steps} and {self.branch_steps}"
            )


@dataclass
class Session:
    """The common ground of all branches; `floor` is known once the first reference has run."""

    bench: Bench
    terms: Terms
    store: BranchStore
    checkpoint: Checkpoint
    warmup_steps: int  # that really ran
    control: dict[str, Option] | None  # None: every layer of the plan in BF16 O2
    checkpoint_path: str
    software: dict[str, str]
    started_s: float
    floor: float | None = None

    def arms(self, plan: Plan) -> tuple[Arm, Arm, Arm]:
        """Return reference, control and plan."""
        options = {layer.name: layer.option for layer in plan.layers}
        control = dict.fromkeys(options, BF16_O2) if self.control is None else self.control
        return (
            REFERENCE,
            Arm(label="bf16_o2", options=control, uncovered=plan.uncovered),
            Arm(label="plan", options=options, uncovered=plan.uncovered),
        )

    def train_seed(self, arms: Sequence[Arm], seed: int) -> tuple[Branch, ...]:
        """Return the seed's branch of every arm, training those that are not there yet."""
        reference = self._reference(arms[0], seed)
        return (reference, *(self._branch(arm, seed, reference.curve) for arm in arms[1:]))

    def is_out_of_time(self, next_s: float) -> bool:
        """Whether something that takes `next_s` would end after the time budget."""
        if self.terms.time_budget_s is None:
            return False
        return time.monotonic() - self.started_s + next_s > self.terms.time_budget_s

    def _reference(self, arm: Arm, seed: int) -> Branch:
        branch = self._branch(arm, seed, ())
        if branch.diverged_at is not None or branch.eval_loss is None:
            raise WorkloadError(
                f"the FP32 reference must train, but its loss became NaN or infinite at step "
                f"{branch.diverged_at} of the branch of seed {seed}; lower the learning rate"
            )
        if abs(branch.eval_loss) < SMALLEST_LOSS:
            raise WorkloadError(
                "a relative loss gap needs an evaluation loss away from zero, but the "
                f"reference's is {branch.eval_loss:.3g}; evaluate on harder held-out batches"
            )
        if branch.eval_losses == self.checkpoint.eval_losses:
            raise WorkloadError(
                f"training must move the evaluation loss, but it stays {branch.eval_loss:.6g} over "
                f"{len(branch.curve)} steps; check that the loss depends on the parameters"
            )
        if self.floor is None:
            self.floor = _floor(self.bench, self.checkpoint, branch)
        return branch

    def _branch(self, arm: Arm, seed: int, reference: Sequence[float]) -> Branch:
        found = self.store.find(arm, seed)
        if found is None:
            found = train_branch(self.bench, self.checkpoint, arm, seed=seed, reference=reference)
            self.store.add(arm, found)
        return found


def open_session(
    workload: Workload,
    terms: Terms,
    *,
    device: torch.device,
    spec: ModelSpec | None,
    state_dir: Path | None,
    checkpoint: Path | None,
    progress: Progress,
) -> Session:
    """Read or make the checkpoint that all branches start from."""
    started_s = time.monotonic()
    check_batches(workload, seed=terms.seed)
    bench = Bench(
        workload=workload,
        device=device,
        seed=terms.seed,
        branch_steps=terms.branch_steps,
        evaluation=[move_batch(batch, device) for batch in workload.eval_batches()],
        progress=progress,
    )
    start = None if checkpoint is None else read_checkpoint(checkpoint)
    steps = 0 if start is not None and start.optimizer is not None else terms.warmup_steps
    software = _software()
    setup = {
        "workload": [workload.name, workload.digest],
        "steps": [steps, terms.branch_steps],
        "seed": terms.seed,
        "device": device.type,
        "checkpoint": file_digest(checkpoint),
        "software": software,
    }
    store = open_store(setup, state_dir)
    return Session(
        bench=bench,
        terms=terms,
        store=store,
        checkpoint=_common_checkpoint(bench, store, steps=steps, start=start),
        warmup_steps=steps,
        control=None if spec is None else control_options(spec),
        checkpoint_path="" if checkpoint is None else str(checkpoint),
        software=software,
        started_s=started_s,
    )


def control_options(spec: ModelSpec) -> dict[str, Option]:
    """Return uniform BF16 O2: every layer that can take it, the others FP32."""
    return {layer.name: BF16_O2 if BF16_O2 in layer.options else FP32 for layer in spec.layers}


def _common_checkpoint(
    bench: Bench, store: BranchStore, *, steps: int, start: Checkpoint | None
) -> Checkpoint:
    saved = store.find_warm_up()
    if saved is not None:
        _check_saved(bench, saved, store)
        return saved
    checkpoint = warm_up(bench, steps=steps, start=start)
    store.add_warm_up(checkpoint)
    return checkpoint


def _check_saved(bench: Bench, saved: Checkpoint, store: BranchStore) -> None:
    """Refuse a saved warm-up that does not evaluate to what it did when it was saved."""
    with seeded(bench.device):
        model, _ = restore(bench, saved)
        losses = evaluate(bench, model)
    same = len(losses) == len(saved.eval_losses) and all(
        abs(now - then) <= STATE_RTOL * max(abs(then), SMALLEST_LOSS)
        for now, then in zip(losses, saved.eval_losses, strict=True)
    )
    if not same:
        raise RecordError(
            f"the saved branches in {store.folder} must be of this workload, but their warm-up "
            "evaluates to another loss now (its code or data changed); delete the folder"
        )


def _floor(bench: Bench, checkpoint: Checkpoint, first: Branch) -> float:
    """Return the relative gap between two runs of one reference: 0.0 when bit for bit."""
    replay = replay_reference(bench, checkpoint, seed=first.seed, steps=REPLAY_STEPS)
    if replay == first.curve[: len(replay)]:
        return 0.0
    again = train_branch(bench, checkpoint, REFERENCE, seed=first.seed)
    if again.eval_loss is None or first.eval_loss is None:
        raise WorkloadError(
            "two runs of the FP32 reference must both train, but one became NaN or infinite; "
            "lower the learning rate"
        )
    return abs(again.eval_loss - first.eval_loss) / abs(first.eval_loss)


def _software() -> dict[str, str]:
    found = {"autoprec": __version__}
    for package in ("torch", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
