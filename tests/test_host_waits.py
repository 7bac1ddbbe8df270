"""No step of an applied plan, its optimizer or its guard waits for the device."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoprec.device.late import LateValues
from autoprec.errors import TrainingStoppedError
from autoprec.guard import Guard, Limits, watch
from autoprec.guard.holding import FLAG, HeldSteps, can_hold
from autoprec.records import APPLICABLE_RECIPES, BF16_O2, Option, fp8_option
from autoprec.runtime import attach_optimizer
from autoprec.runtime.masters import CLOSE_LOOKS
from tests.host_waits import HostWaits
from tests.test_guard import QUIET, Chain, Run, lines, plan_for

OPTIONS = [BF16_O2, *map(fp8_option, APPLICABLE_RECIPES)]


class LateRun(Run):
    """A run with a fused optimizer, whose guard does not ask the device, as on a GPU."""

    def __init__(self, **guard: Any) -> None:  # Any: a guard's
        super().__init__(**guard)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        attach_optimizer(self.model, self.optimizer)
        given = {"limits": QUIET, **guard}
        plan = given.pop("plan", None) or plan_for(self.model)
        self.guard = Guard(self.model, self.optimizer, plan, **given)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    asks = watch._need_not_wait
    monkeypatch.setattr(watch, "_need_not_wait", lambda optimizer, _, on: asks(optimizer, gpu, on))


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


def test_an_optimizer_that_cannot_is_asked_for_at_once() -> None:
    run = Run()  # AdamW, not fused
    assert not run.guard._is_late
    run.train(4, run.spoil("third", 3))
    assert run.good == [True, True, True, False]
