"""One rule for `tune` and `apply`: what either takes the other takes, whatever shape it has."""

import pytest
import torch

import autoprec
from autoprec.errors import PlanMismatchError, WorkloadError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.sensitivity.reference import gradient_of
from autoprec.workload.functions import workload_from
from autoprec.workload.training import start_training
from tests.models import Mlp, mlp_workload
from tests.optimizer_shapes import HoldsModel, OwnList
from tests.optimizer_zoo import ZOO, Kind
from tests.plans import plan_for
from tests.runtime_training import batches, exact, same, train
from tests.test_workload import workload_with

KINDS = {kind.name: kind for kind in ZOO}
SHAPES = (
    "Lookahead around AdamW",
    "momentum in a dict of its own",
    "momentum by ids",
    "a list of its own, an EMA",
    "gradients from hooks",
)


@pytest.mark.parametrize("name", SHAPES)
def test_an_optimizer_of_any_shape_trains_the_masters(name: str) -> None:
    losses = []
    for is_planned in (False, True):
        torch.manual_seed(0)
        model = Mlp()
        optimizer = KINDS[name].make(model)
        if is_planned:
            autoprec.apply(plan_for(model), model, optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        losses.append(train(model, optimizer, 20))
        assert not same(before, [p.detach() for p in model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0][-1] < 0.9 * losses[0][0]
    every = {id(p) for p in model.parameters()}
    for value in vars(optimizer).values():  # parameters are back in their places
        held = value if isinstance(value, list | dict) else ()
        assert {id(p) for p in held if isinstance(p, torch.nn.Parameter)} <= every


def test_capture_steps_an_optimizer_whose_hooks_keep_gradients() -> None:
    workload = workload_with(build_optimizer=KINDS["gradients from hooks"].make)
    assert capture_model(Context(workload, torch.device("cpu"))).optimizer == "FromHooks"


def test_an_average_within_the_optimizer_is_of_the_masters() -> None:
    torch.manual_seed(0)
    model = Mlp()
    optimizer = OwnList(model.parameters(), lr=1e-4)  # steps that BF16 would lose
    autoprec.apply(plan_for(model), model, optimizer)
    expected = [average.clone() for average in optimizer.average]
    for step in range(3):
        train(model, optimizer, 1, first=step)
        torch._foreach_lerp_(expected, exact(model), 0.1)
    assert same(expected, optimizer.average)


@pytest.mark.parametrize("kind", [kind for kind in ZOO if kind.refusal], ids=lambda kind: kind.name)
def test_what_tune_refuses_apply_refuses_too(kind: Kind) -> None:
    plain = mlp_workload()
    functions = {name: getattr(plain, name) for name in ("build_model", "train_batches", "loss_fn")}
    workload = workload_from(functions | {"build_optimizer": kind.make})
    model = workload.build_model(seed=0)
    with pytest.raises(WorkloadError, match=kind.refusal):
        start_training(workload, model).step([next(batches())])
    model = Mlp()
    optimizer = kind.make(model)
    x, y = next(batches())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        torch.autograd.backward(loss)
        return loss

    def trained() -> None:
        autoprec.apply(plan_for(model), model, optimizer)
        closure()
        optimizer.step(closure)  # type: ignore[arg-type]  # torch's stub wants a float

    with pytest.raises(PlanMismatchError, match=kind.refusal):
        trained()


def test_a_sparse_gradient_is_weighed_as_a_whole_one() -> None:
    table = torch.nn.Embedding(8, 4, sparse=True)
    torch.autograd.backward(table(torch.tensor([1, 1, 5])).sum())
    expected = torch.zeros(8, 4)
    expected[1], expected[5] = 2.0, 1.0
    assert torch.equal(gradient_of(table.weight), expected)


def test_a_step_past_the_masters_is_no_silence() -> None:
    model = Mlp()
    optimizer = HoldsModel(model, 1e-2, hidden=True)
    autoprec.apply(plan_for(model), model, optimizer)
    with pytest.raises(PlanMismatchError, match="HoldsModel writes into the model"):
        train(model, optimizer, 1)
