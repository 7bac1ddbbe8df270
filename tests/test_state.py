"""What training writes into beside its trained weights: teachers, hidden states, counters."""

import copy
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprec
from autoprec.integrations.launch import Script, record_workload
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.state import kept_state, put_back_state
from autoprec.records import BF16_O2, Plan, Recipe, fp8_option
from autoprec.runtime import install_options, uniform_plan, verify_applied
from autoprec.sensitivity.warm_up import restore, train_steps
from autoprec.verification.branches import evaluate, state_of
from autoprec.verification.session import BranchStore
from autoprec.workload.functions import Workload, workload_from
from tests.launch_scripts import own_main

__all__ = ["own_main"]
KEPT, STEPS = 0.99, 25
Update = Callable[[Tensor, Tensor], None]


def replaced(teacher: Tensor, student: Tensor) -> None:
    """Follow as MoCo's encoder does; `p.data = ...` is of whoever has the parameter."""
    teacher.data = teacher.data * KEPT + student.data * (1 - KEPT)


def in_place(teacher: Tensor, student: Tensor) -> None:
    """Follow as DINO's teacher does: no version counts it."""
    teacher.data.mul_(KEPT).add_((1 - KEPT) * student.detach().data)


def by_lerp(teacher: Tensor, student: Tensor) -> None:
    """Follow by an average that is the student's own weight until a step is made."""
    teacher.data = torch.lerp(teacher.data, student.data.to(teacher.dtype), 1 - KEPT)


def encoder() -> nn.Sequential:
    """Return layers of three kinds."""
    layers = (nn.Conv1d(1, 8, 3), nn.Flatten(), nn.LayerNorm(112), nn.PReLU(), nn.Linear(112, 32))
    return nn.Sequential(*layers)


class Pair(nn.Module):
    """A student, and a teacher that follows it in forward; its loss pulls both together."""

    def __init__(self, update: Update, *, through: bool = False) -> None:
        super().__init__()
        self.update, self.through = update, through
        self.student, self.head = encoder(), nn.Linear(32, 32)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.offset = nn.Parameter(torch.zeros(16), requires_grad=False)  # outside of any layer
        self.own = nn.Parameter(torch.zeros(16))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher towards the student."""
        for name, teacher in self.teacher.named_parameters():
            self.update(teacher, self.student.get_parameter(name))
        self.update(self.offset, self.own)

    def forward(self, x: Tensor) -> Tensor:
        self.follow()
        predicted = self.head(self.student((x + self.own)[:, None]))
        with torch.set_grad_enabled(self.through):
            wanted = self.teacher(((predicted if self.through else x) * 1.0)[:, None][..., :16])
            wanted = wanted + self.offset.sum()
        return F.mse_loss(predicted, x.repeat(1, 2)) + F.mse_loss(predicted, wanted)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of most."""
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def workload_of(
    build: Callable[[], nn.Module],
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
) -> Workload:
    """Return a model that gives its loss as a workload."""
    return workload_from(
        {
            "build_model": build,
            "train_batches": lambda seed: (
                torch.randn(16, 16, generator=torch.Generator().manual_seed(seed + i))
                for i in range(64)
            ),
            "loss_fn": lambda model, x: model(x),
            "build_optimizer": build_optimizer,
        }
    )


def teachers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of what follows."""
    every = (name for name, _ in model.named_parameters())
    return tuple(sorted(n for n in every if n.startswith("teacher.") or n == "offset"))


def moved_by(plan: Plan | None, update: Update) -> tuple[float, nn.Module]:
    """Train a pair, with a plan or in FP32, and return how far its teacher came."""
    torch.manual_seed(0)
    model: nn.Module = Pair(update)
    before = copy.deepcopy(model.state_dict())
    if plan is not None:
        model, _ = autoprec.apply(plan, model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for i in range(STEPS):
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        torch.autograd.backward(model(x))
        optimizer.step()
    after = model.state_dict()
    far = [(after[name].float() - before[name]).norm() ** 2 for name in teachers(model)]
    return float(torch.stack(far).sum() ** 0.5), model


def plan_of(model: nn.Module) -> Plan:
    """Return BF16 O2 for all layers, with the teacher's weights kept."""
    return uniform_plan(model, "bf16_o2").model_copy(update={"followers": teachers(model)})


@pytest.mark.parametrize("update", [replaced, in_place, by_lerp])
def test_what_training_writes_into_is_found_and_followed_in_fp32(update: Update) -> None:
    workload = workload_of(lambda: Pair(update))
    spec = capture_model(Context(workload, torch.device("cpu")))
    model = Pair(update)
    assert spec.moving == teachers(model)
    assert spec.is_deterministic  # the second step starts from the first one's teacher

    plan = plan_of(model)
    wanted, _ = moved_by(None, update)
    assert moved_by(plan, update)[0] == pytest.approx(wanted, rel=0.02)
    lost, _ = moved_by(plan.model_copy(update={"followers": ()}), update)
    assert abs(lost / wanted - 1) > 0.05  # so there is something to lose


class Following(torch.optim.Adam):
    """Adam that moves the teacher of a pair behind its step."""

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self.pairs = [(named[name], named[own]) for name, own in followed(model)]
        super().__init__((p for p in named.values() if p.requires_grad), lr=1e-3)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # Any: torch's
        """Step the student, then move the teacher."""
        found = super().step(closure)
        for teacher, student in self.pairs:
            teacher.lerp_(student, 1 - KEPT)
        return found


def followed(model: nn.Module) -> list[tuple[str, str]]:
    """Return the teacher's names and the student's."""
    return [(n, n.replace("teacher", "student")) for n in teachers(model) if n != "offset"]


def test_a_teacher_that_the_optimizer_moves_stays_fp32() -> None:
    """It ended in "expected dtype BFloat16 for `end`", with the plan alone."""
    workload = workload_of(lambda: Pair(lambda teacher, student: None), Following)
    spec = capture_model(Context(workload, torch.device("cpu")))
    model: nn.Module = Pair(lambda teacher, student: None)
    assert spec.moving == tuple(name for name, _ in followed(model))
    plan = uniform_plan(model, "bf16_o2").model_copy(update={"followers": spec.followers})
    model, optimizer = autoprec.apply(plan, model, Following(model))
    before = copy.deepcopy(model.state_dict())
    torch.autograd.backward(model(torch.ones(16, 16)))
    optimizer.step()
    after = model.state_dict()
    for teacher, student in followed(model):
        assert after[teacher].dtype is torch.float32
        moved = (after[student].float() - before[teacher]) * (1 - KEPT)
        torch.testing.assert_close(after[teacher] - before[teacher], moved, rtol=0.01, atol=1e-4)


def test_a_kept_weight_is_multiplied_in_bf16_and_given_back() -> None:
    _, model = moved_by(plan_of(Pair(in_place)), in_place)
    named = dict(model.named_parameters())
    assert {named[name].dtype for name in teachers(model)} == {torch.float32}
    checks = verify_applied(model, torch.ones(16, 16), loss_fn=lambda model, x: model(x))
    ran = {check.name: check.detail for check in checks}
    assert "addmm bfloat16" in ran["teacher.4"]
    assert "convolution bfloat16" in ran["teacher.0"]
    kept = {name: named[name].detach().clone() for name in teachers(model)}
    autoprec.undo(model)
    assert all(torch.equal(dict(model.named_parameters())[n], own) for n, own in kept.items())


def test_a_teacher_with_gradients_through_it_takes_fp8() -> None:
    model = Pair(in_place, through=True)
    plan = plan_of(model)
    fp8 = fp8_option(Recipe.TENSORWISE)
    plan = uniform_plan(model, fp8.key).model_copy(update={"followers": plan.followers})
    model, _ = autoprec.apply(plan, model)
    x = torch.ones(16, 16)
    detail = {c.name: c.detail for c in verify_applied(model, x, loss_fn=lambda m, x: m(x))}
    assert "_scaled_mm float8_e4m3fn" in detail["teacher.4"]


def test_a_kept_weight_compiles_to_one_graph() -> None:
    model = Pair(in_place)
    model.update = lambda teacher, student: None  # a write is torch's to trace, or not
    model, _ = autoprec.apply(plan_of(model), model)
    x = torch.ones(16, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


class Recurrent(nn.Module):
    """Carries a hidden state from call to call, and anneals its loss; neither is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(16, 16), nn.Linear(16, 16)
        self.calls = 0
        self.carried: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.carried[0] if hasattr(self, "carried") else torch.zeros_like(x)
        hidden = self.cell(x, hidden)
        self.carried = [hidden.detach()]
        return min(1.0, self.calls / 20) * F.mse_loss(self.head(hidden), x.roll(1, 0))


def test_a_state_in_attributes_is_kept_and_goes_with_a_checkpoint() -> None:
    workload = workload_of(Recurrent)
    context = Context(workload, torch.device("cpu"))
    spec = capture_model(context)
    assert spec.moving == ("calls", "carried")
    assert spec.is_deterministic
    batches = list(workload.eval_batches())

    training = restore(context, None)
    train_steps(training, context, workload.train_batches(0), range(1, 6), of=5, stage="test")
    state = state_of(context, training, batches, [])
    assert training.model.calls == 5  # an evaluation counts no calls
    fresh = restore(context, state).model
    assert fresh.calls == 5
    assert evaluate(context, fresh, batches) == state.eval_losses

    with install_options(fresh, dict.fromkeys(("cell", "head"), BF16_O2)):
        workload.loss_fn(fresh, batches[0])
        assert vars(fresh)["carried"][0].dtype is torch.bfloat16
    workload.loss_fn(fresh, batches[0])  # in FP32 with that state

    untouched = workload.build_model()
    kept = kept_state(untouched)
    workload.loss_fn(untouched, batches[0])
    put_back_state(untouched, kept)
    assert not hasattr(untouched, "carried")


class Drawing(nn.Module):
    """Draws from generators of its own, and remembers its last outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.torchs = torch.Generator().manual_seed(0)
        self.numpys, self.legacy = np.random.default_rng(0), np.random.RandomState(0)
        self.pythons = random.Random(0)
        self.bank: deque[Tensor] = deque(maxlen=3)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, generator=self.torchs) > 0.3
        scale = self.numpys.random() + self.legacy.rand() + self.pythons.random()
        y = self.layer(x * kept) * scale
        self.bank.append(y.detach())
        return F.mse_loss(y, torch.stack(list(self.bank)).mean(0).to(y.dtype) + x)


def test_generators_and_memories_of_a_model_go_with_a_checkpoint(tmp_path: Path) -> None:
    workload = workload_of(Drawing)
    context = Context(workload, torch.device("cpu"))
    spec = capture_model(context)
    assert spec.moving == ("bank", "legacy", "numpys", "pythons", "torchs")
    assert spec.is_deterministic
    batches = list(workload.eval_batches())
    training = restore(context, None)
    train_steps(training, context, workload.train_batches(0), range(1, 6), of=5, stage="test")
    store = BranchStore("setup", tmp_path)
    store.add_warm_up(state_of(context, training, batches, []))
    saved = store.find_warm_up()
    assert saved is not None
    fresh = restore(context, saved).model
    assert vars(fresh)["bank"].maxlen == 3
    assert evaluate(context, fresh, batches) == saved.eval_losses
    assert len(set(saved.eval_losses)) > 1


class Strict(Recurrent):
    """Takes no weights but those that it was built with."""

    def __init__(self) -> None:
        super().__init__()
        self.total = float(self.head.weight.detach().sum())

    def forward(self, x: Tensor) -> Tensor:
        loss = super().forward(x)
        if float(self.head.weight.detach().sum()) > self.total + 0.1:
            raise ValueError("not of mine")
        return loss


def test_a_model_that_takes_no_moved_weights_is_captured_all_the_same() -> None:
    context = Context(workload_of(Strict), torch.device("cpu"))
    assert capture_model(context).moving == ("calls", "carried")


def test_an_evaluation_leaves_what_forward_moves() -> None:
    workload = workload_of(lambda: Pair(in_place))
    context = Context(workload, torch.device("cpu"))
    capture_model(context)
    model = workload.build_model()
    optimizer = workload.build_optimizer(model)
    batches = list(workload.eval_batches())
    torch.autograd.backward(workload.loss_fn(model, batches[0]))
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    losses = evaluate(context, model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert evaluate(context, model, batches) == losses


@pytest.mark.usefixtures("own_main")
def test_what_a_script_writes_between_steps_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "train.py"
    path.write_text(
        "import copy, torch\n"
        "from torch import nn\n"
        "class Learner(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = nn.Linear(16, 16)\n"
        "        self.target = copy.deepcopy(self.net).requires_grad_(False)\n"
        "    def forward(self, x):\n"
        "        with torch.no_grad():\n"
        "            wanted = self.target(x)\n"
        "        return (self.net(x + 1) - wanted).square().mean()\n"
        "model = Learner()\n"
        "optimizer = torch.optim.Adam(model.parameters())\n"
        "for _ in range(20):\n"
        "    optimizer.zero_grad()\n"
        "    model(torch.randn(8, 16)).backward()\n"
        "    optimizer.step()\n"
        "    for own, p in zip(model.target.parameters(), model.net.parameters()):\n"
        "        own.data = own.data * 0.9 + p.data * 0.1\n"
    )
    workload = record_workload(Script(str(path), ()), steps=8)
    spec = capture_model(Context(workload, torch.device("cpu")))
    assert spec.moving == ("target.bias", "target.weight")
    assert "target.bias, target.weight: the script writes into them between" in caplog.text
