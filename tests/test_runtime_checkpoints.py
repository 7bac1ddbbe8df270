import copy
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import autoprec
from autoprec.errors import PlanMismatchError
from autoprec.runtime import attach_optimizer
from autoprec.workload.optimizers import trained_by
from tests.models import Mlp
from tests.runtime_training import (
    OPTIMIZERS,
    applied,
    batches,
    exact,
    same,
    train,
    weights,
)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize(
    "name", ["adamw-foreach", "adamw-fused", "sgd", "sgd-momentum", "adafactor"]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str, order: str) -> None:
    model, optimizer = applied(OPTIMIZERS[name])
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    train(model, optimizer, 3)
    scheduler.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    losses = train(model, optimizer, 3, first=3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(77)
    other, other_optimizer = applied(OPTIMIZERS[name])
    other_scheduler = LambdaLR(other_optimizer, lambda step: 0.9**step)
    if order == "model first":
        other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    if order == "optimizer first":
        other.load_state_dict(saved[0])
    other_scheduler.load_state_dict(saved[2])
    assert train(other, other_optimizer, 3, first=3) == losses
    assert same(exact(other), exact(model))
    assert same(other_optimizer.state_dict(), optimizer.state_dict())


class LooksUp(torch.optim.Adam):
    """Looks up what was saved again once it is loaded, as pytorch-optimizer's do."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load it, and take over what torch casts."""
        super().load_state_dict(state_dict)
        for parameter, saved in zip(trained_by(self), state_dict["state"].values(), strict=True):
            own = self.state[parameter]
            self.state[parameter] = {name: own[name] for name in saved}


def test_an_optimizer_that_looks_up_what_was_saved_resumes_bit_for_bit() -> None:
    model, optimizer = applied(LooksUp)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, 3, first=3)
    other, resumed = applied(LooksUp)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(other, resumed, 3, first=3) == losses
    assert all("master_weight" not in state for state in resumed.state.values())


def test_an_evaluation_before_the_first_step_after_a_resume_is_the_saved_runs(
    tmp_path: Path,
) -> None:
    """Of the model, of a view of its masters that is older than the resume, and of a new one."""

    def evaluated(model: nn.Module) -> float:
        x, y = next(batches(7))
        with torch.no_grad():
            return F.mse_loss(model(x), y).item()

    model, optimizer = applied()
    train(model, optimizer, 3)
    autoprec.save_checkpoint(tmp_path / "run.pt", model, optimizer)
    other, other_optimizer = applied()
    view = autoprec.master_view(other)
    stale = evaluated(view)
    autoprec.load_checkpoint(tmp_path / "run.pt", other, other_optimizer)
    in_fp32 = evaluated(view)
    assert in_fp32 == evaluated(autoprec.master_view(model)) != stale
    assert evaluated(other) == evaluated(model)
    assert evaluated(autoprec.master_view(other)) == in_fp32


def test_the_state_dict_is_the_plain_one_and_the_masters() -> None:
    model, optimizer = applied()
    plain = torch.optim.AdamW(Mlp().parameters(), lr=1e-3, foreach=True)
    assert optimizer.state_dict()["state"] == {}  # nothing that a plain AdamW would trip over
    plain.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    assert same(state["param_groups"], plain.state_dict()["param_groups"])
    assert same([s["master_weight"] for s in state["state"].values()], exact(model))
    assert all(
        s.keys() == {"step", "exp_avg", "exp_avg_sq", "master_weight"}
        for s in state["state"].values()
    )
    assert all("master_weight" not in s for s in optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_made_without_autoprec_loads(dtype: torch.dtype) -> None:
    plain = Mlp()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    train(plain, plain_optimizer, 2)
    plain.to(dtype)
    model, optimizer = applied()
    optimizer.load_state_dict(plain_optimizer.state_dict())
    model.load_state_dict(plain.state_dict())
    if dtype is torch.float32:
        assert same(exact(model), weights(plain))
    assert same(weights(model), [value.bfloat16() for value in weights(plain)])
    assert same([master.bfloat16() for master in exact(model)], weights(model))
    for index, state in plain_optimizer.state_dict()["state"].items():
        loaded = optimizer.state_dict()["state"][index]
        assert same({k: v for k, v in loaded.items() if k != "master_weight"}, state)


def test_a_checkpoint_made_with_autoprec_loads_without_it() -> None:
    model, optimizer = applied()
    train(model, optimizer, 3)
    plain = Mlp()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    plain.load_state_dict(model.state_dict())
    plain_optimizer.load_state_dict(optimizer.state_dict())
    assert same(weights(plain), [p.float() for p in weights(model)])
    train(plain, plain_optimizer, 2, first=3)


def test_an_fp32_checkpoint_of_the_view_brings_the_masters_back_exactly() -> None:
    model, optimizer = applied()
    train(model, optimizer, 2)
    values = exact(model)
    saved = copy.deepcopy(autoprec.master_view(model).state_dict())
    assert saved.keys() == Mlp().state_dict().keys()
    train(model, optimizer, 2)
    model.load_state_dict(saved)
    assert same(exact(model), values)
    model.load_state_dict({"head.bias": torch.full((10,), 1 / 3)}, strict=False)
    assert same(exact(model)[-1], torch.full((10,), 1 / 3))


def test_masters_of_another_checkpoint_do_not_overwrite_the_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, optimizer = applied()
    train(model, optimizer, 1)
    stale = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 20)
    values = weights(model)
    optimizer.load_state_dict(stale)
    with caplog.at_level(logging.WARNING):
        masters = exact(model)
    assert same([master.bfloat16() for master in masters], values)
    assert "load the model and the optimizer of one checkpoint" in caplog.text


def test_replacing_parameters_by_loading_is_refused() -> None:
    model, _ = applied()
    with pytest.raises(PlanMismatchError, match="load with assign=False"):
        model.load_state_dict(Mlp().state_dict(), assign=True)


def test_a_master_of_another_shape_is_refused() -> None:
    model, optimizer = applied()
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["master_weight"] = torch.zeros(3)
    with pytest.raises(PlanMismatchError, match=r"shape \(64, 32\), but it has \(3,\)"):
        optimizer.load_state_dict(state)


def test_a_state_loaded_before_attaching_is_refused_because_its_bits_are_lost() -> None:
    model, optimizer = applied()
    train(model, optimizer, 1)
    late = torch.optim.AdamW(model.parameters(), lr=1e-3)
    late.load_state_dict(optimizer.state_dict())
    with pytest.raises(PlanMismatchError, match="then load its state"):
        attach_optimizer(model, late)
    with pytest.raises(PlanMismatchError, match="then load its state"):
        train(model, late, 1)


def test_copies_and_pickles_of_model_and_optimizer_train_alike() -> None:
    model, optimizer = applied()
    train(model, optimizer, 2)
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    loaded, loaded_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    losses = train(model, optimizer, 3, first=2)
    assert train(copied, copied_optimizer, 3, first=2) == losses
    assert train(loaded, loaded_optimizer, 3, first=2) == losses
    assert same(exact(copied), exact(model))
    assert same(exact(loaded), exact(model))
    assert copied.get_parameter("head.bias") is not model.get_parameter("head.bias")
