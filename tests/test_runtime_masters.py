import copy
import functools
import itertools
import logging
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import autoprec
from autoprec.errors import PlanMismatchError
from autoprec.records import BF16_O2, FP32
from autoprec.runtime import attach_optimizer, install_options
from autoprec.runtime.masters import _warn_of_fp32, masters_of
from tests.models import Mlp, TiedTokens, token_workload
from tests.plans import plan_for
from tests.runtime_training import (
    OPTIMIZERS,
    MakeOptimizer,
    applied,
    batches,
    exact,
    same,
    train,
    weights,
)


class HandMade:
    """The reference: BF16 weights whose masters an optimizer of their own trains."""

    def __init__(self, make: MakeOptimizer) -> None:
        self.model = Mlp()
        self.masters = weights(self.model)
        install_options(self.model, dict.fromkeys(("first", "second", "norm", "head"), BF16_O2))
        self.optimizer = make(self.masters)

    def train(self, steps: int) -> None:
        for x, y in itertools.islice(batches(), steps):
            self.model.zero_grad()
            torch.autograd.backward(F.mse_loss(self.model(x), y))
            for parameter, master in zip(self.model.parameters(), self.masters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
            self.optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(self.model.parameters(), self.masters, strict=True):
                    parameter.copy_(master)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_does_what_hand_made_masters_do(name: str) -> None:
    make = OPTIMIZERS[name]
    torch.manual_seed(1)
    reference = HandMade(make)
    reference.train(4)
    torch.manual_seed(1)
    model, optimizer = applied(make)
    train(model, optimizer, 4)
    assert same(exact(model), reference.masters)
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.parameters())
    moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert all(moment.dtype is not torch.bfloat16 for moment in moments)


def test_muon_trains_matrices() -> None:
    model = Mlp()
    matrices = [model.first.weight, model.second.weight]
    optimizer = torch.optim.Muon(matrices, lr=1e-3)
    autoprec.apply(plan_for(model), model, optimizer)
    before = exact(model)
    train(model, optimizer, 2)
    assert not torch.equal(exact(model)[0], before[0])


def test_updates_below_the_resolution_of_bf16_accumulate() -> None:
    model = nn.Linear(16, 16, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    autoprec.apply(plan_for(model), model, optimizer)
    tiny = 2.0**-14  # half a BF16 step at 1.0 is 2^-9
    for _ in range(64):
        model.weight.grad = torch.full_like(model.weight, tiny)
        optimizer.step()
    assert torch.equal(exact(model)[0], torch.full((16, 16), 1 - 64 * tiny))
    assert torch.equal(model.weight.float(), torch.full((16, 16), 1 - 2.0**-8))


def test_the_objects_the_user_holds_stay_the_same() -> None:
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    groups, parameters = optimizer.param_groups, list(model.parameters())
    storages = []
    result = autoprec.apply(plan_for(model), model, optimizer)
    storages = [parameter.data_ptr() for parameter in parameters]
    train(model, optimizer, 2)
    assert result == (model, optimizer)
    assert optimizer.param_groups is groups
    assert all(a is b for a, b in zip(groups[0]["params"], parameters, strict=True))
    assert all(a is b for a, b in zip(optimizer.state, parameters, strict=True))
    assert [parameter.data_ptr() for parameter in parameters] == storages


def test_moments_made_before_apply_are_kept_bit_for_bit() -> None:
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 3)
    moments, values = copy.deepcopy(optimizer.state_dict()), weights(model)
    autoprec.apply(plan_for(model), model, optimizer)
    assert same(exact(model), values)
    for index, state in optimizer.state_dict()["state"].items():
        assert same(
            {k: v for k, v in state.items() if k != "master_weight"}, moments["state"][index]
        )


def test_a_gradient_from_before_apply_is_used() -> None:
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x, y = next(batches())
    torch.autograd.backward(F.mse_loss(model(x), y))
    expected = [
        p.detach() - p.grad.bfloat16().float() for p in model.parameters() if p.grad is not None
    ]
    autoprec.apply(plan_for(model), model, optimizer)
    optimizer.step()
    assert same(exact(model), expected)


@pytest.mark.parametrize("first", ["scheduler", "apply"])
def test_schedulers_work_made_before_or_after(first: str) -> None:
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if first == "apply":
        autoprec.apply(plan_for(model), model, optimizer)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    if first == "scheduler":
        autoprec.apply(plan_for(model), model, optimizer)
    before = exact(model)
    train(model, optimizer, 1)
    scheduler.step()  # warns when it did not see the step
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not same(exact(model), before)


def test_a_closure_given_by_name_works_too() -> None:
    model, optimizer = applied()
    before = exact(model)
    x, y = next(batches())

    def closure() -> float:
        loss = F.mse_loss(model(x), y)
        torch.autograd.backward(loss)
        return loss.item()

    assert optimizer.step(closure=closure) > 0
    assert not same(exact(model), before)


def test_a_step_that_raises_changes_nothing() -> None:
    model, optimizer = applied()
    train(model, optimizer, 1)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())

    def closure() -> float:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        optimizer.step(closure)
    assert same(weights(model), before)
    assert same(optimizer.state_dict(), state)
    assert all(p.dtype is torch.bfloat16 for g in optimizer.param_groups for p in g["params"])
    train(model, optimizer, 1, first=1)


def test_the_users_clipping_accumulation_and_zeroing_are_respected() -> None:
    model, optimizer = applied(functools.partial(torch.optim.SGD, lr=1.0))
    stream = batches()
    for _ in range(2):
        x, y = next(stream)
        torch.autograd.backward(F.mse_loss(model(x), y) / 2)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    expected = [m - g for m, g in zip(exact(model), gradients, strict=True)]
    optimizer.step()
    assert same(exact(model), expected)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.step()
    assert same(exact(model), expected)


def test_parameters_without_a_gradient_do_not_move() -> None:
    model = TiedTokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    autoprec.apply(plan_for(model), model, optimizer)
    before = model.unused.weight.detach().clone()
    workload = token_workload()
    torch.autograd.backward(workload.loss_fn(model, next(workload.train_batches(0))))
    optimizer.step()
    assert torch.equal(model.unused.weight, before)
    assert model.unused.weight not in optimizer.state


def test_groups_and_ones_added_later_keep_their_settings() -> None:
    model = Mlp()
    optimizer = torch.optim.SGD([{"params": model.first.parameters(), "lr": 0.0}], lr=1.0)
    autoprec.apply(plan_for(model), model, optimizer)
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 1e-5})
    before = exact(model)
    train(model, optimizer, 3)
    moved = [not torch.equal(a, b) for a, b in zip(before, exact(model), strict=True)]
    assert dict(zip(dict(model.named_parameters()), moved, strict=True)) == {
        name: name.startswith("head") for name, _ in model.named_parameters()
    }


def test_an_optimizer_that_writes_into_its_groups_and_itself_keeps_what_it_wrote() -> None:
    class Counting(torch.optim.SGD):
        taken = 0

        def step(self, closure: Any = None) -> Any:
            self.taken += 1
            self.param_groups[0]["taken"] = self.param_groups[0].get("taken", 0) + 1
            self.state["all"] = {"taken": self.taken}  # type: ignore[index]  # as Prodigy does
            return super().step(closure)

    model, optimizer = applied(functools.partial(Counting, lr=0.01))
    train(model, optimizer, 3)
    assert isinstance(optimizer, Counting)
    assert (optimizer.taken, optimizer.param_groups[0]["taken"]) == (3, 3)
    assert dict[Any, Any](optimizer.state)["all"] == {"taken": 3}


def test_the_users_step_hooks_see_the_optimizer_and_the_new_weights() -> None:
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen: list[Any] = []
    optimizer.register_step_post_hook(
        lambda opt, _a, _k: seen.append((opt, model.head.bias.detach().clone()))
    )
    autoprec.apply(plan_for(model), model, optimizer)
    before = model.head.bias.detach().clone()
    train(model, optimizer, 1)
    assert seen[0][0] is optimizer
    assert not torch.equal(seen[0][1], before)

    def halve(opt: torch.optim.Optimizer, *_: object) -> None:
        for parameter in opt.param_groups[0]["params"]:
            parameter.grad.zero_()

    optimizer.register_step_pre_hook(halve)
    values = exact(model)
    train(model, optimizer, 1)
    assert same(exact(model), values)


def test_sparse_gradients_reach_sparse_optimizers() -> None:
    model = nn.Embedding(32, 16, sparse=True)
    optimizer: Any = torch.optim.SparseAdam(list(model.parameters()), lr=1e-2)
    autoprec.apply(plan_for(model), model, optimizer)
    before = exact(model)[0]
    torch.autograd.backward(model(torch.tensor([1, 1, 5])).sum())
    optimizer.step()
    moved = (exact(model)[0] != before).any(1).nonzero().flatten().tolist()
    assert moved == [1, 5]


def test_what_the_user_writes_into_a_weight_reaches_the_master() -> None:
    model, optimizer = applied(functools.partial(torch.optim.SGD, lr=1e-6))
    train(model, optimizer, 1)
    lower_bits = exact(model)[2]
    with torch.no_grad():
        model.get_parameter("second.weight")[0].zero_()
    train(model, optimizer, 1)
    master = exact(model)[2]
    assert master[0].abs().max() < 1e-4
    assert torch.allclose(master[1:], lower_bits[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("factor", "count"), [(0.999, 1), (0.9, 0)])
def test_writes_that_bf16_loses_are_said(
    factor: float, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = applied(functools.partial(torch.optim.SGD, lr=1e-6))
    for step in range(6):
        train(model, optimizer, 1, first=step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)  # weight decay by hand
    assert caplog.text.count("smaller than BF16 resolves") == count


def test_writes_through_data_are_found_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = applied(functools.partial(torch.optim.SGD, lr=1e-6))
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            train(model, optimizer, 1, first=step)
            for parameter in model.parameters():
                parameter.data.clamp_(-0.01, 0.01)
    assert caplog.text.count("written through .data") == 1
    assert all(master.abs().max() < 0.0101 for master in exact(model))


def test_a_converted_model_is_refused_at_the_next_step() -> None:
    model, optimizer = applied()
    x, y = next(batches())
    torch.autograd.backward(F.mse_loss(model(x), y))
    model.float()
    with pytest.raises(PlanMismatchError, match=r"must stay so, but first\.weight is now float32"):
        optimizer.step()


def test_an_average_stands_in_for_weights_as_classes_for_ema_exchange_data(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _warn_of_fp32.cache_clear()
    pairs = []
    for _ in range(2):
        torch.manual_seed(1)
        pairs.append(applied())
        train(*pairs[-1], 2)
    (model, optimizer), (twin, its_optimizer) = pairs
    x, _ = next(batches())
    for copies in (False, True):
        own = [p.detach().float() if copies else p.data for p in model.parameters()]
        for parameter in model.parameters():
            parameter.data = torch.full(parameter.shape, 0.01)
        with torch.inference_mode():
            evaluated = model(x)
        assert (evaluated == evaluated[:, :1]).all()  # all rows of the head are alike
        for parameter, data in zip(model.parameters(), own, strict=True):
            parameter.data = data
        train(model, optimizer, 1, first=2)
        train(twin, its_optimizer, 1, first=2)
        assert same(exact(model), exact(twin))
    assert caplog.text.count("were given FP32 data") == 1


def test_an_optimizer_made_after_apply_is_attached_by_hand_or_at_its_first_step() -> None:
    for by_hand in (True, False):
        torch.manual_seed(5)
        model, optimizer = Mlp(), None
        autoprec.apply(plan_for(model), model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        if by_hand:
            attach_optimizer(model, optimizer)
            attach_optimizer(model, optimizer)
        train(model, optimizer, 3)
        assert all(s["exp_avg"].dtype is torch.float32 for s in optimizer.state.values())
        assert not same(exact(model), [p.float() for p in weights(model)])


def test_a_bf16_model_gets_masters_and_fp32_moments() -> None:
    model = Mlp().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    values = weights(model)
    autoprec.apply(plan_for(model), model, optimizer)
    assert all(s["momentum_buffer"].dtype is torch.float32 for s in optimizer.state.values())
    assert same(exact(model), [value.float() for value in values])
    train(model, optimizer, 3)
    assert not same(exact(model), [value.float() for value in weights(model)])


def test_two_optimizers_of_one_model_and_one_of_two_models() -> None:
    model, other = Mlp(), Mlp()
    first = torch.optim.SGD(model.first.parameters(), lr=1e-3)
    rest = torch.optim.Adam([*model.second.parameters(), *other.parameters()], lr=1e-3)
    autoprec.apply(plan_for(model), model, first)
    attach_optimizer(model, rest)
    autoprec.apply(plan_for(other), other, rest)
    before = exact(model) + exact(other)
    x, y = next(batches())
    torch.autograd.backward(F.mse_loss(model(x) + other(x), y))
    first.step()
    rest.step()
    names = [*dict(model.named_parameters()), *dict(other.named_parameters())]
    moved = [
        not torch.equal(a, b) for a, b in zip(before, exact(model) + exact(other), strict=True)
    ]
    still = {n for n, m in zip(names[:8], moved[:8], strict=True) if not m}
    assert still == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert all(moved[8:])


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    model, optimizer = applied()
    train(model, optimizer, 1)
    gone = weakref.ref(model)
    masters = weakref.ref(masters_of(model))
    del model, optimizer
    assert gone() is None
    assert masters() is None


def test_optimizers_that_cannot_have_masters_are_refused() -> None:
    model = Mlp()
    autoprec.apply(plan_for(model), model)
    with pytest.raises(PlanMismatchError, match="trains no parameter of this model"):
        attach_optimizer(model, torch.optim.SGD(Mlp().parameters(), lr=0.1))
    with pytest.raises(PlanMismatchError, match=r"not a torch\.optim\.Optimizer"):
        attach_optimizer(model, "adam")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(PlanMismatchError, match="turn it off"):
        attach_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True))
    with pytest.raises(PlanMismatchError, match=r"call autoprec\.apply"):
        attach_optimizer(Mlp(), torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_all_fp32_plan_changes_nothing_for_the_optimizer() -> None:
    torch.manual_seed(9)
    plain = Mlp()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    losses = train(plain, plain_optimizer, 3)
    torch.manual_seed(9)
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    autoprec.apply(plan_for(model, FP32), model, optimizer)
    assert train(model, optimizer, 3) == losses
    assert same(optimizer.state_dict(), plain_optimizer.state_dict())
