"""Steps through masters in chunks, with what does not change kept: the same numbers for less."""

import copy
import math
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoprec
from autoprec.records import BF16_O2
from autoprec.runtime import masters, stepping
from autoprec.runtime.attach import ON_OPTIMIZER
from autoprec.runtime.masters import CLOSE_LOOKS
from tests.peaks import tracked_peak
from tests.plans import plan_for
from tests.runtime_training import OPTIMIZERS, applied, exact, same, train

WIDTH, LAYERS = 64, 6
FUSED: dict[str, Any] = {  # Any: optimizers
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
}


def stack(layers: int = LAYERS, width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def give_gradients(model: nn.Module, seed: int = 0) -> None:
    draws = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draws).to(parameter.dtype)


def stepped(optimizer: Any) -> list[list[int]]:  # Any: torch's optimizers
    """Return how many masters of each group every chunk of the last step had."""
    return [[len(group) for group in chunk.groups] for chunk in layout_of(optimizer).chunks]


def layout_of(optimizer: Any) -> stepping.Layout:  # Any: as above
    found: stepping.Layout = vars(optimizer)[ON_OPTIMIZER].layout
    return found


# --- in chunks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OPTIMIZERS, *FUSED])
def test_chunks_compute_what_one_step_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = {**OPTIMIZERS, **FUSED}[name]
    found = []
    for chunk_bytes in (stepping.CHUNK_BYTES, 4096):
        monkeypatch.setattr(stepping, "CHUNK_BYTES", chunk_bytes)
        torch.manual_seed(1)
        model, optimizer = applied(make)
        losses = train(model, optimizer, 4)
        found.append((losses, exact(model), str(optimizer.state_dict()["state"])))
        count = len(layout_of(optimizer).chunks)
    (losses, weights, state), (other_losses, other_weights, other_state) = found
    assert losses == other_losses
    assert same(weights, other_weights)
    assert state == other_state
    assert count > 1


def test_muon_takes_matrices_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk_bytes in (stepping.CHUNK_BYTES, 4 * WIDTH**2):
        monkeypatch.setattr(stepping, "CHUNK_BYTES", chunk_bytes)
        model = stack()
        optimizer = torch.optim.Muon(model.parameters())
        autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
        for seed in range(3):
            give_gradients(model, seed)
            optimizer.step()  # type: ignore[no-untyped-call]  # torch's own
        found.append(exact(model))
    assert stepped(optimizer) == [[1]] * LAYERS
    assert same(*found)


def test_groups_keep_their_settings_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "CHUNK_BYTES", 2 * 4 * WIDTH**2)
    model = stack()
    first, rest = list(model.parameters())[:3], list(model.parameters())[3:]
    optimizer = torch.optim.SGD([{"params": first, "lr": 1.0}, {"params": rest, "lr": 0.0}])
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
    before = exact(model)
    give_gradients(model)
    optimizer.step()
    assert stepped(optimizer) == [[2, 0], [1, 1], [0, 2]]
    moved = [not torch.equal(a, b) for a, b in zip(before, exact(model), strict=True)]
    assert moved == [True] * 3 + [False] * 3
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3]


def test_a_step_takes_a_chunk_of_memory_and_not_another_copy() -> None:
    model = stack(layers=8, width=128)
    size = 4 * 128**2
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "CHUNK_BYTES", 2 * size)
        give_gradients(model)
        for _ in range(CLOSE_LOOKS + 1):  # makes moments and the buffer
            optimizer.step()
        layout_of(optimizer).release()
        with tracked_peak() as peak:
            optimizer.step()
    assert 2 * size <= peak.rise_bytes <= 2.2 * size  # of 8


def test_an_optimizer_with_a_step_of_its_own_takes_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Global(torch.optim.SGD):  # a learning rate by the norm of all gradients
        def step(self, closure: Any = None) -> Any:  # Any: torch's own
            gradients = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
            self.param_groups[0]["lr"] = 1 / float(torch.nn.utils.get_total_norm(gradients))
            return super().step(closure)

    monkeypatch.setattr(stepping, "CHUNK_BYTES", 4 * WIDTH**2)
    model = stack()
    optimizer = Global(model.parameters(), lr=1.0)
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
    give_gradients(model)
    expected = 1 / float(
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    )
    optimizer.step()
    assert stepped(optimizer) == [[LAYERS]]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-3)


def test_a_closure_is_evaluated_for_all_parameters_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "CHUNK_BYTES", 4 * WIDTH**2)
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)

    def closure() -> Tensor:
        give_gradients(model)
        return torch.ones(())

    before = exact(model)
    optimizer.step(closure)
    assert stepped(optimizer) == [[LAYERS]]
    assert not any(map(torch.equal, before, exact(model)))
    give_gradients(model)
    optimizer.step()
    assert len(stepped(optimizer)) == LAYERS


def test_parameters_without_a_gradient_stay_where_they_are_and_come_back() -> None:
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
    give_gradients(model)
    optimizer.step()
    before = exact(model)
    model[2].weight.grad = None
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, exact(model), strict=True)]
    assert moved == [number != 2 for number in range(LAYERS)]
    give_gradients(model)
    optimizer.step()
    assert not torch.equal(before[2], exact(model)[2])


# --- what is kept -----------------------------------------------------------------------------


def python_calls(layers: int) -> int:
    """Return how many functions of ours a step of so many layers calls."""
    model = stack(layers)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
    give_gradients(model)
    for _ in range(5):
        optimizer.step()
    calls = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and "/autoprec/runtime/" in frame.f_code.co_filename

    sys.setprofile(count)
    optimizer.step()
    sys.setprofile(None)
    return calls


def test_a_step_costs_python_nothing_by_the_parameter() -> None:
    assert python_calls(40) == python_calls(4) < 60


def test_a_group_that_is_added_and_a_state_that_is_loaded_are_stepped() -> None:
    model = stack()
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights[:3], lr=0.1, fused=True)
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
    give_gradients(model)
    optimizer.step()
    optimizer.add_param_group({"params": weights[3:]})
    before = exact(model)
    optimizer.step()
    assert not any(map(torch.equal, before, exact(model)))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.step()
    expected = exact(model)
    optimizer.step()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.step()
    assert same(exact(model), expected)


def test_a_write_between_steps_is_taken_over_in_every_step() -> None:
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
    for seed in range(5):
        give_gradients(model, seed)
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.01, 0.01)
    optimizer.zero_grad()
    assert all(value.abs().max() <= 0.0101 for value in exact(model))


def test_a_write_through_data_is_found_in_any_piece_of_a_parameter(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(masters, "LOOK_ELEMENTS", 1000)
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    autoprec.apply(plan_for(model, BF16_O2), model, optimizer)
    weight = list(model.parameters())[3]
    give_gradients(model)
    optimizer.step()
    weight.data[-1, -1], weight.data[0, 0] = 3.0, math.nan
    optimizer.step()
    assert "through .data" not in caplog.text  # the device has not been asked
    optimizer.step()
    assert caplog.text.count("through .data") == 1
    found = exact(model)[3]
    assert found[-1, -1] == 3.0
    assert math.isnan(found[0, 0])
    assert int(found.isnan().sum()) == 1
