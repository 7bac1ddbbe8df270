"""What people put around an optimizer: gradient scalers, weight averages, copies of layers."""

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    update_bn,
)

import autoprec
from autoprec.integrations.launch.patches import patched
from autoprec.runtime.averages import _warn_of_average, around_clone, around_lerp
from autoprec.runtime.masters import LIVE
from autoprec.runtime.state_dicts import save_exactly
from tests.models import Mlp
from tests.plans import plan_for
from tests.runtime_training import OPTIMIZERS, applied, batches, exact, same, train, weights


def test_a_grad_scaler_is_harmless() -> None:
    torch.manual_seed(3)
    model, optimizer = applied(OPTIMIZERS["adamw-fused"])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in itertools.islice(batches(), 3):
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(F.mse_loss(model(x), y)))
        scaler.step(optimizer)
        scaler.update()
    torch.manual_seed(3)
    plain, plain_optimizer = applied(OPTIMIZERS["adamw-fused"])
    train(plain, plain_optimizer, 3)
    assert same(exact(model), exact(plain))  # powers of two scale exactly


@pytest.mark.parametrize("name", ["adamw-fused", "adamw-foreach", "sgd"])
def test_a_grad_scaler_skips_steps_that_overflow(name: str) -> None:
    model, optimizer = applied(OPTIMIZERS[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before, seen = exact(model), list[bool]()
    for x, y in itertools.islice(batches(), 60):
        optimizer.zero_grad()
        torch.autograd.backward(scaler.scale(F.mse_loss(model(x), 1e4 * y)))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        seen.append(same(exact(model), before))
    assert seen[0]
    assert not seen[-1]
    assert all(value.isfinite().all() for value in exact(model))


def test_an_average_of_the_view_follows_the_masters() -> None:
    model, optimizer = applied(functools.partial(torch.optim.SGD, lr=1e-4))
    view = autoprec.master_view(model)
    average = get_ema_multi_avg_fn(0.999)  # type: ignore[no-untyped-call]  # torch's
    ema = AveragedModel(view, multi_avg_fn=average)
    ema.update_parameters(view)
    expected = exact(model)[0]
    for step in range(3):
        train(model, optimizer, 1, first=step)
        ema.update_parameters(view)
        expected = torch.lerp(expected, exact(model)[0], 1 - 0.999)
    averaged = next(ema.module.parameters())
    assert averaged.dtype is torch.float32
    assert torch.allclose(averaged, expected, rtol=0, atol=1e-9)
    assert not torch.equal(averaged, exact(model)[0])
    assert {type(m) for m in ema.module.modules()} == {Mlp, nn.Linear, nn.LayerNorm}


def test_weight_averaging_trains_evaluates_and_renews_its_batch_norms() -> None:
    """torch.optim.swa_utils whole: SWALR, AveragedModel of the view, update_bn."""
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    scheduler = SWALR(optimizer, swa_lr=1e-5, anneal_epochs=2)
    autoprec.apply(plan_for(model), model, optimizer)
    view = autoprec.master_view(model)
    average: Any = AveragedModel(view)
    seen = []
    for step in range(4):
        train(model, optimizer, 1, first=step)
        scheduler.step()
        average.update_parameters(view)
        seen.append(exact(model)[0])
    found = next(average.module.parameters())
    assert optimizer.param_groups[0]["lr"] == 1e-5
    assert torch.allclose(found, torch.stack(seen).mean(0), rtol=0, atol=1e-7)
    data = [x for x, _ in itertools.islice(batches(), 8)]
    update_bn(data, average)
    expected = torch.stack([average.module[0](x).mean(0) for x in data]).mean(0)
    norm = average.module[1]
    assert torch.allclose(norm.running_mean, expected, atol=1e-5)
    assert not torch.equal(norm.running_mean, model[1].get_buffer("running_mean"))
    average.eval()
    assert average(data[0]).dtype is torch.float32


def test_a_copied_layer_gets_masters_of_its_own_and_comes_back() -> None:
    """As PEFT's modules_to_save does: a layer of the model becomes a trained copy of itself."""
    model: Any = Mlp()
    autoprec.apply(plan_for(model), model)
    model.head = copy.deepcopy(model.head)
    new = [store for store in LIVE if model.head.weight in store.values]
    assert [len(store.values) for store in new] == [2]  # not those of the whole model
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1e-6)
    train(model, optimizer, 3)
    view: Any = autoprec.master_view(model)
    master = view.head.weight.detach().clone()
    assert not torch.equal(master, model.head.weight.float())
    autoprec.undo(model, optimizer)
    assert torch.equal(model.head.weight, master)


UPDATES: dict[str, Any] = {
    "lerp_": lambda a, p: a.lerp_(p, 0.01),
    "lerp_ by name": lambda a, p: a.lerp_(end=p, weight=0.01),
    "lerp_ of data": lambda a, p: a.data.lerp_(p.data, 0.01),
    "lerp_ of detached": lambda a, p: a.detach().lerp_(p.detach(), weight=0.01),
    "foreach": lambda a, p: torch._foreach_lerp_([a.detach()], [p.detach()], 0.01),
    "foreach by name": lambda a, p: torch._foreach_lerp_(
        [a.detach()], tensors1=[p.detach()], weight=0.01
    ),
}


class Cloning(nn.Module):
    """Copies its weight within forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight.clone()
        assert weight.dtype is torch.bfloat16
        return F.linear(self.first(x), weight)


def test_what_a_script_clones_of_weights_is_fp32_as_averages_by_hand_need_it() -> None:
    model = Cloning()
    plan = plan_for(model)
    autoprec.apply(plan, model, torch.optim.SGD(model.parameters()))
    weight = model.first.weight
    with patched(Tensor, "clone", around_clone):
        for copied in (weight.data.clone(), weight.clone().detach(), weight.detach().clone()):
            assert torch.equal(copied, weight.float())
            assert copied.dtype is torch.float32
        model(torch.randn(4, 16)).sum().backward()
        assert weight.grad is not None
        assert weight.grad.clone().dtype is torch.bfloat16
        assert copy.deepcopy(model).first.weight.dtype is torch.bfloat16
        assert torch.ones(2, dtype=torch.bfloat16).clone().dtype is torch.bfloat16


@pytest.mark.parametrize("is_older", [True, False])
@pytest.mark.parametrize("update", UPDATES.values(), ids=list(UPDATES))
def test_an_average_by_hand_is_of_the_masters(update: Any, *, is_older: bool) -> None:
    """A copy that is older than the plan stays FP32; one of the planned model has masters."""
    torch.manual_seed(0)
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # steps that BF16 would lose
    average = copy.deepcopy(model) if is_older else model
    autoprec.apply(plan_for(model), model, optimizer)
    average = copy.deepcopy(average).requires_grad_(False)
    expected = exact(model)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            with torch.no_grad(), patched(torch.Tensor, "lerp_", around_lerp):
                update(a, p)
        torch._foreach_lerp_(expected, exact(model), 0.01)
    found = weights(average) if is_older else exact(average)
    assert same(found, expected)
    assert not same(expected, exact(model))
    assert same(
        [value.to(p.dtype) for value, p in zip(found, average.parameters(), strict=True)],
        weights(average),
    )


@pytest.mark.parametrize("is_older", [True, False])
@pytest.mark.parametrize("kind", ["avg_fn", "multi_avg_fn", "mean"])
def test_an_averaged_model_is_of_the_masters_from_its_first_copy(
    kind: str, *, is_older: bool
) -> None:
    """Torch copies the weights at first, and gives pairs of BF16 weights to an `avg_fn`."""
    torch.manual_seed(0)
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # steps that BF16 would lose
    made: dict[str, Any] = {"avg_fn": get_ema_avg_fn, "multi_avg_fn": get_ema_multi_avg_fn}
    options = {kind: made[kind](0.99)} if kind in made else {}
    average: Any = AveragedModel(model, **options) if is_older else None
    autoprec.apply(plan_for(model), model, optimizer)
    average = average or AveragedModel(model, **options)
    expected: list[torch.Tensor] = []
    for step in range(4):
        train(model, optimizer, 1, first=step)
        average.update_parameters(model)
        expected = expected or exact(model)
        torch._foreach_lerp_(expected, exact(model), 0.01 if options else 1 / (step + 1))
    found = weights(average.module) if is_older else exact(average.module)
    moved = max((a - b).abs().max() for a, b in zip(exact(model), expected, strict=True))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 0.01 * moved
    assert average.multi_avg_fn is options.get("multi_avg_fn")


def test_an_average_in_bf16_is_said_to_lose_small_changes(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = applied()
    _warn_of_average.cache_clear()
    weight = next(model.parameters()).detach()
    torch._foreach_lerp_([weight.clone()], [weight], 0.01)
    assert "an average of a plan's weights is kept in BF16" in caplog.text
    copied = copy.deepcopy(model)
    train(model, optimizer, 3)
    assert caplog.text.count("a copy of a model with a plan is not trained") == 1
    del copied


class Codebook(nn.Module):
    """An average of activations within forward, and a `lerp_` with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("average", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        self.get_buffer("average").lerp_(y.detach().mean(0), 0.1)
        return (x * 1).lerp_(y, 0.5)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_an_average_within_forward_is_as_before(*, is_compiled: bool) -> None:
    model: Any = Codebook()
    autoprec.apply(plan_for(model), model)
    run = torch.compile(model, backend="eager") if is_compiled else model
    x = torch.ones(4, 16)
    out = run(x)
    y = F.linear(x.bfloat16(), model.layer.weight, model.layer.bias).float()
    assert torch.allclose(model.average, 0.1 * y.mean(0), atol=1e-2)
    assert torch.allclose(out, (x + y) / 2, atol=1e-2)
    torch.autograd.backward(out.sum())
    assert model.layer.weight.grad is not None


def test_lerp_is_torchs_own_for_all_else() -> None:
    applied()
    own = torch.Tensor.lerp_
    a, b = torch.zeros(4), torch.ones(4, requires_grad=True)
    with patched(torch.Tensor, "lerp_", around_lerp):
        torch.autograd.backward((a * b).lerp_(b, 0.5).sum())
        assert torch.equal(b.grad, torch.full((4,), 0.5))  # type: ignore[arg-type]  # there
        with pytest.raises(RuntimeError, match="expected dtype"):
            a.lerp_(b.detach().double(), 0.5)
    assert torch.Tensor.lerp_ is own


STATES: dict[str, Any] = {
    "foreach": lambda a, p: torch._foreach_lerp_(a, p, weight=0.01),
    "in place": lambda a, p: [x.mul_(0.99).add_(y, alpha=0.01) for x, y in zip(a, p, strict=True)],
    "a copy": lambda a, p: [x.copy_(0.99 * x + 0.01 * y) for x, y in zip(a, p, strict=True)],
}


class WithAverage(nn.Module):
    """A model that keeps an average of itself, as timm's tasks do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Mlp()
        self.average = copy.deepcopy(self.model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)  # type: ignore[no-any-return]  # a module's


@pytest.mark.parametrize("where", ["part of the model", "a copy"])
@pytest.mark.parametrize("update", STATES.values(), ids=list(STATES))
def test_an_average_through_state_dicts_arrives_in_its_model(update: Any, where: str) -> None:
    """In scripts, whose state dicts are FP32: writes go into the masters, and from there on."""
    torch.manual_seed(0)
    whole = WithAverage()
    model = whole if where == "part of the model" else whole.model
    optimizer = torch.optim.SGD(whole.model.parameters(), lr=1e-4)  # steps that BF16 would lose
    autoprec.apply(plan_for(model), model, optimizer)
    average = whole.average if model is whole else copy.deepcopy(model)
    save_exactly([*whole.modules(), *average.modules()])

    def masters(of: nn.Module) -> list[torch.Tensor]:
        stores = {p: store for store in LIVE for p in store.values}
        return [stores[p].current(p).clone() for p in of.parameters()]

    expected = masters(average)
    for step in range(3):
        train(whole, optimizer, 1, first=step)
        states = [[*m.state_dict().values()] for m in (average, whole.model)]
        with torch.no_grad():
            update(*states)
            update(expected, masters(whole.model))
    x = next(batches())[0]
    plain = Mlp()
    plain.load_state_dict(dict(zip(plain.state_dict(), expected, strict=True)))
    autoprec.apply(plan_for(plain), plain)
    assert torch.equal(average(x), plain(x))  # before anything asks for the state again
    assert same([*average.state_dict().values()], expected)
    assert not same(masters(whole.model), expected)


def test_a_teacher_that_is_updated_by_hand_is_said_to_lose_small_changes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def trained(update: Any) -> str:
        caplog.clear()
        whole = WithAverage()
        whole.average.requires_grad_(False)
        optimizer = torch.optim.SGD(whole.model.parameters(), lr=1e-2)
        autoprec.apply(plan_for(whole), whole, optimizer)
        for step in range(4):
            train(whole, optimizer, 1, first=step)
            with torch.no_grad(), patched(torch.Tensor, "lerp_", around_lerp):
                pairs = zip(whole.average.parameters(), whole.model.parameters(), strict=True)
                for a, p in pairs:
                    update(a, p)
        return caplog.text

    said = "not trained, but written into"
    assert trained(lambda a, p: a.mul_(0.99).add_(p, alpha=0.01)).count(said) == 1
    assert trained(lambda a, p: setattr(a, "data", 0.9 * a + 0.1 * p)).count(said) == 1
    assert said not in trained(lambda a, p: a.lerp_(p, 0.01))
    assert said not in trained(lambda a, p: None)


def test_what_is_written_into_a_first_state_dict_is_trained_from_there() -> None:
    torch.manual_seed(0)
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    autoprec.apply(plan_for(model), model, optimizer)
    save_exactly(model.modules())
    for value in model.state_dict().values():
        value.mul_(1.001)
    written = copy.deepcopy(exact(model))
    train(model, optimizer, 1)
    moved = [(a - b).abs().max() for a, b in zip(exact(model), written, strict=True)]
    assert 0.0 < max(moved) < 1e-3 * max(w.abs().max() for w in written)
    (store,) = [store for store in LIVE if next(model.parameters()) in store.values]
    assert not store.lent
    assert all(map(store.is_trained, model.parameters()))
