"""A step that is not finite: found, named where it begins, and never saved."""

import copy
import math
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import autoprec
from autoprec.device.late import LateValues
from autoprec.errors import PlanMismatchError, RecordError
from autoprec.guard import Guard
from autoprec.integrations.plans import apply_plan
from autoprec.records import BF16_O2, FP32, Recipe, fp8_option
from autoprec.runtime import install_options
from autoprec.runtime.finite import FIRST, StepWatch, watch_first_step
from tests.host_waits import HostWaits
from tests.models import WIDTH
from tests.plans import plan_for


class Scale(nn.Module):
    """A layer that multiplies, by the more the less precise its input is: a planted fault.

    Alone in 16 bits it gives 1e20; two of them after each other give more than any float can hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (1e20 if self.weight.dtype is torch.bfloat16 else 1.0)


class Faulty(nn.Module):
    """Two such layers between linears, and a mask of infinities that does no harm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.one, self.two = Scale(), Scale()
        self.mask = Mask()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.softmax(self.mask(self.two(self.one(self.first(x)))), dim=-1)
        logits: Tensor = self.head(hidden)
        return logits


class Mask(nn.Module):
    """Gives minus infinity on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hides = torch.arange(WIDTH) % 2 == 0
        return (x + self.weight).masked_fill(hides, -math.inf)


@pytest.fixture(autouse=True)
def _none_watched() -> None:
    """Forget models of earlier tests that were never trained."""
    FIRST.clear()


def seeded() -> Faulty:
    torch.manual_seed(0)
    return Faulty()


def step(model: nn.Module) -> None:
    torch.manual_seed(1)
    loss = F.cross_entropy(model(torch.randn(8, WIDTH)), torch.arange(8) % 4)
    torch.autograd.backward(loss)


@pytest.mark.parametrize(
    ("low", "expected"),
    [((), ()), (("one",), ()), (("two",), ()), (("one", "two"), ("two", "mask"))],
)
def test_parts_that_are_fine_alone_are_at_fault_together(
    low: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    model = seeded()
    options = {name: BF16_O2 if name in low else FP32 for name, _ in model.named_children()}
    with install_options(model, options):
        watch = StepWatch(model)
        step(model)
        found = watch.end(model, over_ranks=True)
    assert found[: len(expected)] == expected
    assert bool(found) == bool(expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_first_step_of_an_integration_stops_before_it_trains() -> None:
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    apply_plan(plan_for(model), model, optimizer)
    step(model)
    with pytest.raises(PlanMismatchError, match="it begins in 'two', 'mask'") as caught:
        optimizer.step()
    assert "nothing was trained or saved" in str(caught.value)
    assert not FIRST
    autoprec.undo(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_good_first_step_is_looked_at_once() -> None:
    model = seeded()
    apply_plan(plan_for(model, others={"one": FP32}), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model)
    optimizer.step()
    assert not FIRST
    assert not any(module._forward_hooks for module in model.modules())
    nn.init.constant_(model.first.weight, math.nan)
    step(model)
    optimizer.step()  # whoever wants more has a guard


def test_a_guard_looks_itself() -> None:
    model = seeded()
    apply_plan(plan_for(model), model, is_guarded=True)
    assert model not in FIRST
    autoprec.undo(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = plan_for(model)
    apply_plan(plan, model, optimizer)
    assert model in FIRST
    Guard(nn.DataParallel(model), optimizer, plan)
    assert model not in FIRST
    assert not any(module._forward_hooks for module in model.modules())


def test_copies_of_a_watched_model_are_not_watched() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    watch_first_step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.ones(1, 4))
        (hook,) = other[0]._forward_hooks.values()
        assert vars(hook)["flags"] is None
    del FIRST[model]


def test_compiled_code_keeps_one_graph_and_shows_its_gradients() -> None:
    torch._dynamo.reset()
    model = seeded()
    autoprec.apply(plan_for(model), model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    watch = StepWatch(compiled)
    step(compiled)
    assert not watch.outputs
    assert "two" in watch.end(compiled)
    step(compiled)
    assert counter.frame_count == 1


# --- a loop of the user's own --------------------------------------------------------------------


def test_an_fp8_layer_is_named_before_a_master_takes_its_fault() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters())
    options = {name: fp8_option(Recipe.TENSORWISE) for name, _ in model.named_children()}
    autoprec.apply(plan_for(model, others=options), model, optimizer)
    with torch.no_grad():
        for layer in list(model)[:2]:
            layer.get_parameter("weight").mul_(1e30)  # 1e30 times 1e30 is beyond BF16
    before = copy.deepcopy(model.state_dict())
    torch.autograd.backward(model(torch.randn(16, WIDTH)).square().mean())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # every gradient is NaN now
    with pytest.raises(PlanMismatchError, match="it begins in '1', '2', '0'; nothing was trained"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


class Overflowing(torch.autograd.Function):
    """Passes a tensor on, and gives a gradient that overflows."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def test_a_fault_of_backward_begins_behind_it_whatever_clipping_spreads() -> None:
    model = seeded()
    autoprec.apply(plan_for(model, others={"one": FP32, "two": FP32}), model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.one.register_forward_hook(
        lambda *args: Overflowing.apply(args[-1])  # type: ignore[no-untyped-call]  # torch's own
    )
    step(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # the mask's infinities did no harm, and the head's gradient was finite until it was clipped
    with pytest.raises(PlanMismatchError, match="it begins in 'one', 'first'; "):
        optimizer.step()


@pytest.mark.parametrize("is_made_before", [True, False])
def test_a_bad_part_of_an_accumulated_step_is_seen_whoever_made_the_optimizer(
    is_made_before: bool,
) -> None:
    model = seeded()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1) if is_made_before else None
    autoprec.apply(plan_for(model, others={"one": FP32}), model, optimizer)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model.two.weight.fill_(1e20)
    step(model)  # bad
    with torch.no_grad():
        model.two.weight.fill_(1.0)
    step(model)  # good
    with pytest.raises(PlanMismatchError, match="it begins in 'two', 'mask'"):
        optimizer.step()


def test_a_closure_that_makes_the_gradients_is_looked_at() -> None:
    for plan_options, is_bad in (({}, True), ({"one": FP32}, False)):
        model = seeded()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        autoprec.apply(plan_for(model, others=plan_options), model, optimizer)

        def closure(model: nn.Module = model) -> float:
            step(model)
            return 1.0

        with pytest.raises(PlanMismatchError, match="'two'") if is_bad else nullcontext():
            assert optimizer.step(closure) == 1.0
        assert not FIRST


def test_a_gradient_scaler_may_leave_out_steps_until_one_is_good() -> None:
    model = seeded()
    optimizer: Any = torch.optim.AdamW(model.parameters(), fused=True)
    autoprec.apply(plan_for(model, others={"one": FP32}), model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    for _ in range(2):  # too large a scale, then a good one
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.randn(8, WIDTH)), torch.arange(8) % 4)
        torch.autograd.backward(scaler.scale(loss * 4.0))
        scaler.step(optimizer)
        scaler.update(2.0)
        if model in FIRST:
            assert not FIRST[model].outputs
    assert not FIRST
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_first_step_waits_once_and_the_next_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LateValues, "read", lambda _: [])  # what a GPU copied a step before
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    autoprec.apply(plan_for(model, others={"one": FP32}), model, optimizer)
    for expected in (["tolist"], [], []):
        with HostWaits() as waits:
            step(model)
            optimizer.step()
        assert waits.found == expected


def test_sparse_gradients_are_looked_at() -> None:
    model = nn.Sequential(nn.Embedding(9, WIDTH, sparse=True), nn.Linear(WIDTH, 4))
    autoprec.apply(plan_for(model, FP32), model)
    torch.autograd.backward(model(torch.arange(4)).sum() * math.inf)
    with pytest.raises(PlanMismatchError, match="it begins in '1', '0'"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_compiling_between_apply_and_the_first_step_compiles_once() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    autoprec.apply(plan_for(model), model, optimizer)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        torch.autograd.backward(compiled(torch.randn(8, WIDTH)).sum())
        optimizer.step()
    assert not FIRST
    assert counter.frame_count == 1
    copy.deepcopy(model)(torch.randn(8, WIDTH))  # the dead hooks do nothing in a copy


def test_transforms_and_meta_tensors_say_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    autoprec.apply(plan_for(model), model)
    values: dict[str, Tensor] = dict(model.named_parameters())
    torch.func.vmap(lambda x: torch.func.functional_call(model, values, (x,)))(torch.ones(3, 4))
    torch.autograd.backward(model(torch.ones(2, 4)).sum())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not FIRST


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_poisoned_checkpoint_is_not_written(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer)
    model.register_buffer("mask", torch.full((2,), -math.inf))  # on purpose
    optimizer = torch.optim.AdamW(model.parameters())
    autoprec.apply(plan_for(model), model, optimizer)
    torch.autograd.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    path = autoprec.save_checkpoint(tmp_path / "run.pt", model, optimizer, step=1)
    good = path.read_bytes()
    optimizer.state[layer.bias]["exp_avg"][1] = math.inf
    with pytest.raises(RecordError, match=r"in optimizer\['state'\]\[1\]\['exp_avg'\]; .*run.pt"):
        autoprec.save_checkpoint(path, model, optimizer, step=2)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(RecordError, match=r"there is a NaN or an infinity in 0.weight, optim"):
        autoprec.save_checkpoint(path, model, optimizer, step=2)
    assert path.read_bytes() == good
    assert [*tmp_path.iterdir()] == [path]
    autoprec.save_checkpoint(path, model, optimizer, step=2, must_be_finite=False)
    assert path.read_bytes() != good
