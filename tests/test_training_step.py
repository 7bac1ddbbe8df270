"""A training step as its user makes it: accumulation, clipping, schedule; in a file or a script."""

import copy
import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules

from autoprec.errors import WorkloadError
from autoprec.integrations.launch import Script, record_workload
from autoprec.integrations.launch.optimizers import copy_optimizer
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import BF16_O2, FP32
from autoprec.runtime import attach_optimizer, install_options
from autoprec.sensitivity.preconditioner import read_preconditioner
from autoprec.sensitivity.reference import prepare_reference
from autoprec.sensitivity.warm_up import restore
from autoprec.verification import branches
from autoprec.verification.gate import open_session
from autoprec.verification.sequential import Terms
from autoprec.verification.session import REFERENCE
from autoprec.workload.functions import Workload, workload_from
from autoprec.workload.training import Schedule, start_training, step_batches
from tests.launch_scripts import HEAD, LOOP, own_main, write_script

__all__ = ["own_main"]
CPU = torch.device("cpu")
WIDTH, BATCH = 16, 32


def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(BATCH, WIDTH, generator=generator)
        yield x, x.sin()


def make(**more: Any) -> Workload:
    functions: dict[str, Any] = {
        "build_model": lambda: nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)),
        "train_batches": train_batches,
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        "build_optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
    }
    return workload_from({**functions, **more})


def cosine(optimizer: Optimizer, *, rise: int = 2, steps: int = 40) -> schedules.LRScheduler:
    parts: list[schedules.LRScheduler] = [
        schedules.LinearLR(optimizer, 0.01, total_iters=rise),
        schedules.CosineAnnealingLR(optimizer, steps - rise),
    ]
    return schedules.SequentialLR(optimizer, parts, milestones=[rise])


def by_hand(workload: Workload, *, count: int, clip: float, accumulate: int) -> nn.Module:
    """Train as a user's own loop would."""
    model = workload.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedule = cosine(optimizer)
    stream = workload.train_batches(1)
    for _ in range(count):
        optimizer.zero_grad()
        for x, y in islice(stream, accumulate):
            (F.mse_loss(model(x), y) / accumulate).backward()  # type: ignore[no-untyped-call]  # torch's own stub
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return model


def test_a_step_is_the_users_own_bit_for_bit() -> None:
    workload = make(build_scheduler=cosine, accumulation_steps=3, clip_norm=0.05)
    training = start_training(workload, workload.build_model())
    for batches in step_batches(workload, workload.train_batches(1), count=10):
        training.step(batches)
    other = by_hand(workload, count=10, clip=0.05, accumulate=3)
    for mine, wanted in zip(training.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, wanted)


class OwnAdam(Optimizer):
    """Adam's steps by RMS alone, in train mode alone; `behind` is done to each gradient then."""

    def __init__(self, params: Any, behind: str) -> None:  # Any: torch's own
        super().__init__(params, {"lr": 0.01})
        self.behind, self.is_training = behind, False
        self.clip = partial(torch.clamp, min=-5.0, max=5.0)

    def train(self) -> None:
        """Begin to train, as schedule-free's must be told."""
        self.is_training = True

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]  # torch overloads it
        """Step, and leave gradients as they are, normalised or nowhere."""
        assert self.is_training
        for parameter in self.param_groups[0]["params"]:
            v = self.state[parameter].setdefault("second", torch.zeros_like(parameter))
            v.lerp_(parameter.grad.square(), 0.05)
            update = self.clip(parameter.grad / (v.sqrt() + 1e-8))
            parameter.add_(update, alpha=-0.01)
            if self.behind == "normalised":
                parameter.grad.copy_(update)
            elif self.behind == "dropped":
                parameter.grad = None


def test_p_is_read_at_the_gradients_of_the_last_step_whatever_the_optimizer_did_to_them() -> None:
    weights = []
    for behind in ("kept", "normalised", "dropped"):
        workload = make(build_optimizer=lambda model, b=behind: OwnAdam(model.parameters(), b))
        context = Context(workload, CPU)
        reference = prepare_reference(context, capture_model(context), warmup_steps=12)
        read = reference.preconditioner
        assert (read.name, read.note) == ("second", "")
        weights.append([read.weight(p, at=torch.ones_like(p)) for p in read.rules])
    kept, *others = weights
    assert len(kept) == 4
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(kept, other, strict=True))


def test_a_copied_optimizer_has_its_functions_and_no_patched_method() -> None:
    model = nn.Linear(4, 4)
    other, optimizer = copy.deepcopy(model), OwnAdam(model.parameters(), "kept")
    optimizer.train()
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]  # as schedulers do
    copied = copy_optimizer(optimizer, model, other)
    assert "step" not in vars(copied)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    copied.step()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert not any(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulation_steps", 0),
        ("accumulation_steps", 1.5),
        ("clip_norm", -1.0),
        ("clip_norm", "1"),
    ],
)
def test_bad_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(WorkloadError, match=f"{name} must be"):
        make(**{name: value})


def test_a_schedule_that_follows_a_loss_is_refused() -> None:
    workload = make(build_scheduler=schedules.ReduceLROnPlateau)
    with pytest.raises(WorkloadError, match="ReduceLROnPlateau follows a loss"):
        start_training(workload, workload.build_model())


def test_an_optimizer_that_cannot_step_is_said_in_one_line() -> None:
    workload = make(build_optimizer=lambda model: torch.optim.SparseAdam(model.parameters()))
    training = start_training(workload, workload.build_model())
    with pytest.raises(WorkloadError, match=r"SparseAdam.step\(\) must .*dense gradients"):
        training.step([next(workload.train_batches(0))])


def test_a_long_rise_is_climbed_in_half_of_the_warm_up() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = Schedule(cosine(optimizer, rise=100, steps=400), warmup_steps=10)
    assert (schedule.peak, schedule.length) == (100, 400)
    rates = []
    for _ in range(8):
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[4] == pytest.approx(1.0)
    assert rates[3] < 0.9  # the peak, after half of ten
    assert schedule.position == 103
    assert rates[5] > rates[6] > rates[7] > 0.99


def test_looking_ahead_changes_nothing() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = schedules.OneCycleLR(optimizer, max_lr=1.0, total_steps=50)  # it moves betas too
    before = copy.deepcopy(optimizer.state_dict()), scheduler.last_epoch
    schedule = Schedule(scheduler)
    assert (optimizer.state_dict(), scheduler.last_epoch) == before
    assert schedule.peak == 14
    assert schedule.length == 50
    schedule.go_to(50)
    last = optimizer.param_groups[0]["lr"]
    schedule.go_to(60)  # beyond its end the rates stay
    assert optimizer.param_groups[0]["lr"] == last


def test_a_schedule_that_fails_later_is_said_in_one_line() -> None:
    def build(optimizer: Optimizer) -> schedules.LRScheduler:
        first, second = schedules.ConstantLR(optimizer), schedules.ConstantLR(optimizer)
        chained = schedules.ChainedScheduler([second])  # which torch cannot go over to
        return schedules.SequentialLR(optimizer, [first, chained], [3])

    workload = make(build_scheduler=build)
    with pytest.raises(WorkloadError, match=r"SequentialLR.step\(\) must give the next learning"):
        start_training(workload, workload.build_model())


def test_rates_that_overflow_are_said_to_have_no_peak() -> None:
    workload = make(build_scheduler=lambda o: schedules.LambdaLR(o, lambda n: 10.0 ** (10 * n)))
    with pytest.raises(WorkloadError, match="rates must have a peak, but those of LambdaLR rise"):
        start_training(workload, workload.build_model())


def test_a_schedule_without_an_end_is_looked_ahead_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprec.workload.training.LONGEST_SCHEDULE", 500)
    asked: list[int] = []

    def rate(step: int) -> float:
        asked.append(step)
        return 1.0

    workload = make(build_scheduler=lambda optimizer: schedules.LambdaLR(optimizer, rate))
    for seed in range(3):
        schedule = start_training(workload, workload.build_model(seed=seed)).schedule
        assert schedule is not None
        assert (schedule.peak, schedule.length) == (0, None)
    assert max(asked) == 499
    assert len(asked) == 500 + 2  # the others are at their starts


def test_branches_go_on_in_the_schedule_and_anneal_on_top(tmp_path: Path) -> None:
    seen: list[float] = []

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss comes back
            seen.append(self.param_groups[0]["lr"])
            super().step(closure)

    workload = make(
        build_optimizer=lambda model: Noting(model.parameters(), lr=0.5),
        build_scheduler=cosine,
        accumulation_steps=2,
    )
    context, terms = Context(workload, CPU), Terms(warmup_steps=6, branch_steps=4)
    session = open_session(context, terms, loss_tolerance=0.1, state_dir=tmp_path)
    branch = branches.train_branch(session, REFERENCE, seed=1)
    own = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    scheduled = cosine(own)
    wanted = []
    for step in range(10):
        anneal = 1.0 if step < 6 else (10 - step) / 4
        wanted.append(own.param_groups[0]["lr"] * anneal)
        own.step()
        scheduled.step()
    assert seen == pytest.approx(wanted)
    # a run that goes on from the files goes on there in the schedule
    seen.clear()
    again = open_session(context, terms, loss_tolerance=0.1, state_dir=tmp_path)
    assert branches.train_branch(again, REFERENCE, seed=1) == branch
    assert seen == pytest.approx(wanted[6:])


def test_a_checkpoint_brings_its_place_in_the_schedule() -> None:
    workload = make(build_scheduler=cosine)
    training = start_training(workload, workload.build_model())
    for batches in step_batches(workload, workload.train_batches(0), count=7):
        training.step(batches)
    state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    assert training.schedule is not None
    scheduler = {"lr_scheduler": training.schedule.scheduler.state_dict()}
    path = Path(__file__).with_name("unused")
    restored = {}
    for name, content in (("with", {**state, **scheduler}), ("without", state)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, content=content, **__: content)
            from autoprec.runtime.checkpoint import read_checkpoint

            restored[name] = restore(Context(workload, CPU), read_checkpoint(path))
    rate = training.optimizer.param_groups[0]["lr"]
    assert [r.optimizer.param_groups[0]["lr"] for r in restored.values()] == [rate, rate]
    assert restored["with"].schedule is not None
    assert restored["with"].schedule.position == 7
    assert restored["without"].schedule is None  # its rates stay


def test_clipping_is_that_of_a_plan_too() -> None:
    workload = make(clip_norm=1e-3)
    training = start_training(workload, workload.build_model())
    install_options(training.model, {"0": BF16_O2, "2": FP32})
    attach_optimizer(training.model, training.optimizer)
    before = [p.detach().float().clone() for p in training.model.parameters()]
    training.step([next(workload.train_batches(0))])
    pairs = zip(training.model.parameters(), before, strict=True)
    moved = [float((p.detach().float() - b).norm()) for p, b in pairs]
    assert 0.0 < math.hypot(*moved) <= 0.02  # lr times 1e-3, and BF16's rounding


def test_p_takes_in_the_clipped_gradient() -> None:
    clip = 0.01
    workload = make(
        clip_norm=clip, build_optimizer=lambda model: torch.optim.AdamW(model.parameters())
    )
    training = start_training(workload, workload.build_model())
    for batches in step_batches(workload, workload.train_batches(0), count=3):
        training.step(batches)
    assert 0.0 < training.clip_scale < 0.1
    found = read_preconditioner(training.optimizer, scale=training.clip_scale)
    weight = next(training.model.parameters())
    clipped = weight.grad
    assert clipped is not None
    # Adam's own v of the next step, if the next gradient were the last one again
    v = training.optimizer.state[weight]["exp_avg_sq"]
    after = (0.999 * v + 0.001 * clipped.square()) / (1 - 0.999**4)
    wanted = (after.sqrt() + 1e-8).rsqrt()
    given = found.weight(weight, at=clipped / training.clip_scale)
    near = after.sqrt() > 0.1 * after.sqrt().mean()  # above the floor under eps
    ratio = (given / wanted)[near]
    assert float(ratio.max() / ratio.min()) < 1.02


SCHEDULED = """
from torch.nn.utils import clip_grad_norm_
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
"""
STEP = "optimizer.step()"


@pytest.mark.usefixtures("own_main")
def test_a_script_brings_clipping_and_schedule(tmp_path: Path) -> None:
    own = f"clip_grad_norm_(model.parameters(), 0.25); {STEP}; schedule.step()"
    body = HEAD + SCHEDULED + LOOP.replace(STEP, own)
    workload = record_workload(Script(write_script(tmp_path, body), ("99",)), steps=8)
    assert workload.clip_norm == 0.25
    assert workload.accumulation_steps == 1
    optimizer = workload.build_optimizer(workload.build_model())
    scheduler = workload.build_scheduler(optimizer)
    assert scheduler is not None
    schedule = Schedule(scheduler, warmup_steps=10)
    assert schedule.peak == 99
    assert schedule.pace == 20
    for _ in range(5):
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)


def test_a_kept_reference_has_the_p_of_the_one_that_was_kept(tmp_path: Path) -> None:
    workload = make(
        clip_norm=0.01, build_optimizer=lambda model: Plain(model.parameters(), lr=1e-2)
    )
    context = Context(workload, CPU)
    spec = capture_model(context)
    path = tmp_path / "reference.pt"
    made, read = (prepare_reference(context, spec, warmup_steps=4, kept=path) for _ in range(2))
    assert read.model is not made.model
    for one, other in zip(made.model.parameters(), read.model.parameters(), strict=True):
        assert torch.equal(one, other)
        weights = (
            r.preconditioner.weight(p, at=torch.ones_like(p))
            for r, p in ((made, one), (read, other))
        )
        assert torch.equal(*weights)
    assert made.preconditioner.note == read.preconditioner.note


class Plain(torch.optim.Optimizer):
    """A sign of the gradient: its P is measured from its steps, at the last gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss comes back
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad.sign()
