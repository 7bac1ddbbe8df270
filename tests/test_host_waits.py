"""No step of an applied plan, its optimizer or its guard waits for the device."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoprec.device.late import LateValues
from autoprec.errors import RecordError, TrainingStoppedError
from autoprec.guard import Guard, Limits, watch
from autoprec.guard.holding import HeldSteps, can_hold, take_fused
from autoprec.records import APPLICABLE_RECIPES, BF16_O2, Option, fp8_option
from autoprec.runtime import attach_optimizer
from autoprec.runtime.checkpoint import save_checkpoint
from autoprec.runtime.masters import CLOSE_LOOKS
from autoprec.workload.optimizers import FLAG
from tests.host_waits import HostWaits
from tests.test_guard import QUIET, Chain, Run, lines, plan_for

OPTIONS = [BF16_O2, *map(fp8_option, APPLICABLE_RECIPES)]


class LateRun(Run):
    """A run whose guard does not ask the device, as on a GPU; of a fused optimizer by default."""

    def __init__(self, optimizer: Any = None, **guard: Any) -> None:  # Any: a maker, a guard's
        super().__init__(**guard)
        make = optimizer or partial(torch.optim.AdamW, lr=1e-2, fused=True)
        self.optimizer: Any = make(self.model.parameters())
        attach_optimizer(self.model, self.optimizer)
        given = {"limits": QUIET, **guard}
        plan = given.pop("plan", None) or plan_for(self.model)
        self.guard = Guard(self.model, self.optimizer, plan, **given)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "runs_behind", lambda _: True)


def read_unseen(late: LateValues, read: Any = LateValues.read) -> list[float]:
    """Read what a GPU copied to the host a step before."""
    with torch._C.DisableTorchFunction():
        values: list[float] = read(late)
    return values


# --- what waits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: float(x[0]),
    ],
)
def test_whatever_asks_for_a_value_is_seen(ask: Callable[[Tensor], object]) -> None:
    with HostWaits() as waits:
        ask(torch.ones(3))
    assert waits.found


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_no_part_of_a_step_waits_for_the_device(
    option: Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LateValues, "read", read_unseen)
    run = LateRun(plan=plan_for(Chain(), option), limits=Limits(sample_every=2))
    x, y = torch.randn(16, 16), torch.randn(16, 10)
    for _ in range(CLOSE_LOOKS + 2):  # close looks at values, sampled steps, and others
        with HostWaits() as waits:
            loss = (run.model(x) - y).square().mean()
            loss.backward()
            run.guard.step(loss)
            run.optimizer.step()
            run.optimizer.zero_grad()
        assert not waits.found


# --- a bad step is left out all the same ------------------------------------------------------


def state(run: Run) -> Any:  # Any: state dicts
    return copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()["state"]))


@pytest.mark.parametrize("value", [math.nan, 1e4])  # 1e4: a spike of the norm
def test_a_bad_step_changes_nothing_and_is_told_a_step_later(value: float, tmp_path: Path) -> None:
    run = LateRun(events=tmp_path / "events.jsonl")
    run.train(40)
    before = state(run)
    run.train(1, run.spoil("head", 40, value=value))
    assert str(state(run)) == str(before)
    assert all(run.good)
    assert not lines(tmp_path / "events.jsonl")
    run.train(2)
    assert run.good[40:] == [True, False, True]
    (event,) = lines(tmp_path / "events.jsonl")
    assert (event["step"], event["is_skipped"]) == (40, True)
    assert all(math.isfinite(loss) for loss in run.losses)
    assert str(state(run)) != str(before)


def test_layers_move_as_they_do_when_the_host_waits() -> None:
    late, waiting = LateRun(), Run()
    for run in (late, waiting):
        run.train(9, run.spoil("third", 4))
    assert late.guard.in_bf16 == waiting.guard.in_bf16 == ("third",)
    assert late.guard.demoted == waiting.guard.demoted  # since the same step


def test_a_loss_that_stays_high_is_left_out_from_the_step_on_that_patience_ends() -> None:
    run = LateRun()
    run.train(40)
    gradients = [parameter.grad for parameter in run.model.parameters()]
    assert gradients == [None] * len(gradients)
    for _ in range(3):
        torch.autograd.backward(run.model(torch.randn(16, 16)).square().mean())
        run.guard.step(10 * run.losses[-1])
        run.optimizer.step()
        run.optimizer.zero_grad()
    states = run.optimizer.state_dict()["state"].values()
    assert {int(own["step"]) for own in states} == {42}  # of 43: the third one is too many
    run.train(1)
    assert run.guard.in_bf16 == ("first", "second", "third")


def test_stop_leaves_the_step_out_and_stops_in_the_next() -> None:
    run = LateRun(on_alarm="stop")
    run.train(3)
    before = state(run)
    run.train(1, run.spoil("first", 3))
    assert str(state(run)) == str(before)
    with pytest.raises(TrainingStoppedError, match=r"at step 3 loss .* gradient norm nan is not"):
        run.train(1)


def test_the_last_step_is_judged_when_the_guard_closes(tmp_path: Path) -> None:
    run = LateRun(events=tmp_path / "events.jsonl")
    run.train(3)
    with run.guard:
        run.train(1, run.spoil("first", 3))
    assert [event["step"] for event in lines(tmp_path / "events.jsonl")] == [3]
    assert FLAG not in vars(run.optimizer)
    run.train(0)


def test_a_run_that_is_resumed_goes_on_bit_for_bit_with_a_step_not_yet_judged() -> None:
    limits = Limits(sample_every=7, quiet_steps=30, window=25)
    whole, first, second = (LateRun(limits=limits) for _ in range(3))
    whole.train(40, whole.spoil("third", 19))
    first.train(20, first.spoil("third", 19))
    saved = copy.deepcopy(
        (first.model.state_dict(), first.optimizer.state_dict(), first.guard.state_dict())
    )
    assert saved[2]["demoted"]
    for part, own in zip((second.model, second.optimizer, second.guard), saved, strict=True):
        part.load_state_dict(own)
    second.batches = first.batches
    second.train(20)
    assert second.losses == whole.losses[20:]
    assert second.guard.state_dict() == whole.guard.state_dict()


# --- which optimizers can --------------------------------------------------------------------


class OwnStep(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:  # Any: torch's own
        return super().step(closure)


def test_only_fused_optimizers_of_torch_leave_steps_out_by_themselves() -> None:
    weights = [torch.nn.Parameter(torch.ones(4))]
    fused = {
        torch.optim.Adam: {},
        torch.optim.AdamW: {},
        torch.optim.SGD: {"momentum": 0.9},
        torch.optim.Adagrad: {},
    }
    for kind, given in fused.items():
        optimizer: Any = kind(weights, lr=0.1, fused=True, **given)
        if kind is torch.optim.Adagrad and torch.__version__.startswith("2.11"):
            assert not can_hold(optimizer)  # its kernels took no flag there
            continue
        assert can_hold(optimizer)
        before = weights[0].detach().clone()
        weights[0].grad = torch.full((4,), math.nan)
        held = HeldSteps(optimizer)
        held.hold(torch.ones(()))
        optimizer.step()
        assert torch.equal(weights[0], before)
        weights[0].grad = torch.ones(4)
        optimizer.step()  # the flag was for one step
        assert not torch.equal(weights[0], before)
        held.close()
    assert not can_hold(torch.optim.AdamW(weights, foreach=True))
    assert not can_hold(torch.optim.RMSprop(weights))
    assert not can_hold(OwnStep(weights, fused=True))


@pytest.mark.parametrize(("scalers", "guards"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_grad_scalers_own_flag_counts_too(scalers: float, guards: float) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer: Any = torch.optim.SGD([weight], lr=0.1, fused=True)
    held = HeldSteps(optimizer)
    weight.grad = torch.ones(4)
    held.hold(torch.full((), guards))
    optimizer.grad_scale, optimizer.found_inf = None, torch.full((), scalers)  # GradScaler.step
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert torch.equal(weight, torch.ones(4)) == bool(scalers or guards)


LEFT: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
}


@pytest.mark.parametrize("name", LEFT)
def test_an_optimizer_left_to_torch_takes_fused_and_leaves_a_bad_step_out(name: str) -> None:
    run = LateRun(partial(getattr(torch.optim, name), lr=1e-2, **LEFT[name]))
    fused = LateRun(partial(getattr(torch.optim, name), lr=1e-2, fused=True, **LEFT[name]))
    other = LateRun(partial(getattr(torch.optim, name), lr=1e-2, foreach=True, **LEFT[name]))
    run.train(3)
    fused.train(3)
    assert str(state(run)) == str(state(fused))  # bit for bit what the user's own choice gives
    before = state(run)
    run.train(1, run.spoil("third", 3))
    assert str(state(run)) == str(before)
    # A checkpoint of another kernel brings its settings, and step counts on the host: fused again.
    other.train(2)
    run.optimizer.load_state_dict(other.optimizer.state_dict())
    assert run.optimizer.param_groups[0]["foreach"]
    del other.optimizer.param_groups[0]["foreach"]
    other.optimizer.param_groups[0]["foreach"] = None
    run.optimizer.load_state_dict(other.optimizer.state_dict())
    run.train(2)
    assert can_hold(run.optimizer)


def test_what_the_user_chose_and_sparse_gradients_stay_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    choices: tuple[dict[str, Any], ...] = (
        {"foreach": True},
        {"fused": False},
        {"capturable": True},
    )
    for chosen in choices:
        optimizer: Any = adamw([weight], **chosen)
        before = dict(optimizer.param_groups[0])
        assert not take_fused(optimizer)
        assert str(optimizer.param_groups[0]) == str(before)
    assert not take_fused(sgd([weight], lr=0.1, differentiable=True))
    assert not take_fused(torch.optim.RMSprop([weight]))
    assert not take_fused(OwnStep([weight]))
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    assert not take_fused(sgd(table.parameters(), lr=0.1))


def test_an_optimizer_that_cannot_is_asked_for_at_once_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for make, way_out in (
        (partial(torch.optim.AdamW, lr=1e-2, foreach=True), "AdamW is not fused; make it with"),
        (partial(torch.optim.RMSprop, lr=1e-3), "RMSprop has no fused kernels"),
    ):
        caplog.clear()
        run = LateRun(make)
        before = run.optimizer.param_groups[0].get("fused")
        run.train(4, run.spoil("third", 3))
        assert run.good == [True, True, True, False]
        assert run.optimizer.param_groups[0].get("fused") is before
        (said,) = [r.getMessage() for r in caplog.records if "waits for the device" in r.message]
        assert way_out in said


def test_any_optimizer_stops_a_step_late_and_nothing_poisoned_is_saved(tmp_path: Path) -> None:
    run = LateRun(partial(torch.optim.RMSprop, lr=1e-3), on_alarm="stop")
    run.train(3, run.spoil("third", 2))  # nobody has asked for step 2 yet
    assert not all(bool(p.isfinite().all()) for p in run.model.parameters())
    path = tmp_path / "run.pt"
    with pytest.raises(TrainingStoppedError, match="at step 2 "):
        save_checkpoint(path, run.model, run.optimizer, guard=run.guard)
    for guard in (run.guard, None):  # whoever goes on after the error, or has no guard in the file
        with pytest.raises(RecordError, match="NaN or an infinity"):
            save_checkpoint(path, run.model, run.optimizer, guard=guard)
    assert not path.exists()


def test_a_stop_of_any_optimizer_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateValues, "read", read_unseen)
    run = LateRun(partial(torch.optim.RMSprop, lr=1e-3), on_alarm="stop")
    run.train(CLOSE_LOOKS)
    with HostWaits() as waits:
        loss = run.model(torch.randn(16, 16)).square().mean()
        loss.backward()
        run.guard.step(loss)
        run.optimizer.step()
    assert not waits.found
