"""No public entry moves the random state of torch, numpy or `random`."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprec
from autoprec.device import fp8
from autoprec.device.fp8 import fp8_self_test
from autoprec.device.random_state import random_state_kept
from autoprec.records import Plan, Recipe, fp8_option
from autoprec.runtime import classes
from tests.models import Mlp
from tests.plans import plan_for
from tests.runtime_training import same

ROWWISE = fp8_option(Recipe.ROWWISE)
CPU = torch.device("cpu")


class Setup:
    """A model with dropout, its FP8 plan and optimizer; `applied` applies it at once."""

    def __init__(self, folder: Path, *, applied: bool = True) -> None:
        self.model: nn.Module = nn.Sequential(Mlp(), nn.Dropout(0.5))
        self.plan: Plan = plan_for(self.model, ROWWISE)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.x, self.folder = torch.ones(32, 32), folder
        if applied:
            autoprec.apply(self.plan, self.model, self.optimizer)

    def backward(self) -> Tensor:
        with random_state_kept():  # the user's own step draws for dropout
            loss: Tensor = self.model(self.x).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        return loss


def _states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()  # Any: a name, an array of words, numbers
    words = [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state]
    return torch.get_rng_state(), random.getstate(), words


def _attach(setup: Setup) -> None:
    autoprec.attach_optimizer(setup.model, torch.optim.SGD(setup.model.parameters(), lr=0.1))


def _verify(setup: Setup) -> None:
    def noisy(model: nn.Module, x: Tensor) -> Tensor:
        np.random.rand()  # as user code does
        random.random()
        loss: Tensor = model(x).mean()
        return loss

    autoprec.verify_applied(setup.model, setup.x, loss_fn=noisy)


def _guard(setup: Setup) -> None:
    with autoprec.Guard(setup.model, setup.optimizer, setup.plan) as guard:
        guard.step(setup.backward())
        guard.load_state_dict(guard.state_dict())


def _save(setup: Setup) -> None:
    autoprec.save_checkpoint(setup.folder / "run.pt", setup.model, setup.optimizer)


def _load(setup: Setup) -> None:
    _save(setup)
    autoprec.load_checkpoint(setup.folder / "run.pt", setup.model, setup.optimizer)


ENTRIES: dict[str, Callable[[Setup], object]] = {
    "Guard": _guard,
    "apply": lambda setup: autoprec.apply(setup.plan, setup.model, setup.optimizer),
    "attach_optimizer": _attach,
    "load_checkpoint": _load,
    "master_view": lambda setup: autoprec.master_view(setup.model),
    "save_checkpoint": _save,
    "undo": lambda setup: autoprec.undo(setup.model, setup.optimizer),
    "verify_applied": _verify,
}


@pytest.fixture(autouse=True)
def as_in_a_fresh_process() -> None:
    """What a first `apply` does once in a process is done again."""
    fp8.tried_recipes.cache_clear()
    cast("Any", classes.layer_class).cache_clear()  # Any: typed as what it caches


@pytest.mark.parametrize("name", ENTRIES)
def test_a_public_entry_draws_nothing(name: str, tmp_path: Path) -> None:
    setup = Setup(tmp_path, applied=name != "apply")
    before = _states()
    ENTRIES[name](setup)
    assert same(before, _states())


def test_every_public_function_is_looked_at() -> None:
    """New ones of the runtime belong into ENTRIES; records, errors and settings draw nothing."""
    homes = {name: getattr(getattr(autoprec, name), "__module__", "") for name in autoprec.__all__}
    own = {
        n for n, home in homes.items() if home.startswith(("autoprec.runtime", "autoprec.guard"))
    }
    functions = {name for name in own if name in ENTRIES or callable(getattr(autoprec, name))}
    assert {n for n in functions if n not in {"Action", "GuardEvent", "Limits"}} == set(ENTRIES)


def test_the_self_test_draws_nothing() -> None:
    before = _states()
    fp8_self_test(CPU)
    assert same(before, _states())


def test_an_fp8_run_sees_the_dropout_of_one_without_a_plan(tmp_path: Path) -> None:
    masks = []
    for with_plan in (False, True):
        torch.manual_seed(7)
        Setup(tmp_path, applied=with_plan)
        masks.append(F.dropout(torch.ones(64), 0.5))
    assert torch.equal(*masks)


@pytest.mark.parametrize("with_plan", [False, True])
def test_a_resumed_script_goes_on_bit_for_bit(tmp_path: Path, with_plan: bool) -> None:
    """It saves and restores its random state itself, and applies the plan after that."""
    first = Setup(tmp_path, applied=with_plan)
    _train(first, 2)
    saved = (first.model.state_dict(), first.optimizer.state_dict(), torch.get_rng_state())
    torch.save(saved, tmp_path / "own.pt")
    expected = _train(first, 2)

    fp8.tried_recipes.cache_clear()  # as in the process that resumes
    cast("Any", classes.layer_class).cache_clear()
    second = Setup(tmp_path, applied=False)
    weights, state, generator = torch.load(tmp_path / "own.pt")
    torch.set_rng_state(generator)
    if with_plan:
        autoprec.apply(second.plan, second.model, second.optimizer)
    second.model.load_state_dict(weights)
    second.optimizer.load_state_dict(state)
    assert _train(second, 2) == expected


def _train(setup: Setup, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = setup.model(setup.x).square().mean()
        setup.optimizer.zero_grad()
        loss.backward()
        setup.optimizer.step()
        losses.append(loss.item())
    return losses
