"""A plan under Accelerate: the same run as a loop by hand, whatever the Accelerator does around."""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs, DistributedType
from torch import Tensor, nn

import autoprec
from autoprec.errors import PlanMismatchError
from autoprec.integrations.accelerate import check_state, prepare
from autoprec.records import FP32, Plan, Recipe, fp8_option
from autoprec.runtime.masters import masters_of
from tests.accelerate_state import fresh_accelerate
from tests.models import BATCH, Mlp, TiedTokens
from tests.plans import plan_for
from tests.ranks import leave_group, start_ranks
from tests.runtime_training import batches, exact, same, weights

__all__ = ["fresh_accelerate"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
RANKS = 2
MIXED = {"second": fp8_option(Recipe.ROWWISE), "head": FP32}


@pytest.fixture(autouse=True)
def _one_run() -> None:
    torch.manual_seed(0)


def _mixed_plan() -> Plan:
    return plan_for(Mlp(), others=MIXED)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def _share(first: int, steps: int, parts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in itertools.islice(batches(), first, first + steps):
        yield from zip(x.chunk(parts), y.chunk(parts), strict=True)


def _by_hand(steps: int, *, parts: int = 1, norm: float = 0.5) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = Mlp()
    _, optimizer = autoprec.apply(_mixed_plan(), model, _adamw(model))
    losses = []
    for index, (x, y) in enumerate(_share(0, steps, parts)):
        loss = F.mse_loss(model(x), y)
        torch.autograd.backward(loss / parts)
        if (index + 1) % parts == 0:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def _prepared(accelerator: Accelerator) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = Mlp()
    return prepare(accelerator, _mixed_plan(), model, _adamw(model))


def _train(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, data: Any, guard: Any = None
) -> list[float]:
    losses = []
    for x, y in data:
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                if guard is not None:
                    guard.step(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_runs_the_plan_as_a_loop_by_hand_does(mixed_precision: str) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model, optimizer = _prepared(accelerator)
    losses = _train(accelerator, model, optimizer, _share(0, 5))
    other, expected = _by_hand(5)
    assert losses == expected
    assert same(exact(model), exact(other))
    ran = {check.name: check.detail for check in autoprec.verify_applied(model, next(batches())[0])}
    assert "_scaled_mm float8" in ran["second"]
    assert "addmm bfloat16" in ran["first"]
    assert "addmm float32" in ran["head"]


def test_gradient_accumulation_is_that_of_a_loop_by_hand() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer = _prepared(accelerator)
    losses = _train(accelerator, model, optimizer, _share(0, 3, parts=3))
    other, expected = _by_hand(3, parts=3)
    assert losses == expected
    assert same(exact(model), exact(other))


def test_a_loaded_state_goes_on_bit_for_bit_with_its_guard(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = _prepared(accelerator)
    guard = autoprec.Guard(model, optimizer, _mixed_plan())
    accelerator.register_for_checkpointing(guard)
    _train(accelerator, model, optimizer, _share(0, 3), guard)
    accelerator.save_state(str(tmp_path))
    losses = _train(accelerator, model, optimizer, _share(3, 3), guard)
    values, state = exact(model), guard.state_dict()
    guard.close()

    other_accelerator = Accelerator(cpu=True)
    other_accelerator._models.clear()
    model, optimizer = _prepared(other_accelerator)
    guard = autoprec.Guard(model, optimizer, _mixed_plan())
    other_accelerator.register_for_checkpointing(guard)
    other_accelerator.load_state(str(tmp_path))
    assert guard.steps == 3
    assert _train(other_accelerator, model, optimizer, _share(3, 3), guard) == losses
    assert same(exact(model), values)
    assert guard.state_dict() == state


def test_preparing_keeps_no_second_copy_of_the_masters() -> None:
    model, _ = _prepared(Accelerator(cpu=True))  # which loads the optimizer's state into itself
    assert masters_of(model).loaded == {}


def test_a_plan_for_another_model_is_refused_and_nothing_is_prepared() -> None:
    accelerator = Accelerator(cpu=True)
    model = Mlp()
    before = weights(model)
    optimizer = _adamw(model)
    with pytest.raises(PlanMismatchError, match="a plan must name every layer") as caught:
        prepare(accelerator, plan_for(TiedTokens()), model, optimizer)
    assert "\n" not in str(caught.value)
    assert type(model) is Mlp
    assert same(weights(model), before)
    assert not vars(optimizer).get("_autoprec")
    assert accelerator._models == []


def test_an_optimizer_that_accelerate_has_wrapped_is_refused_with_the_way_out() -> None:
    model = Mlp()
    wrapped = Accelerator(cpu=True).prepare(_adamw(model))
    with pytest.raises(PlanMismatchError, match=r"AcceleratedOptimizer .* give it AdamW itself"):
        autoprec.apply(_mixed_plan(), model, wrapped)


def test_a_precision_of_accelerates_own_is_refused() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="fp8", kwargs_handlers=[AORecipeKwargs()])
    model = Mlp()
    with pytest.raises(PlanMismatchError, match="mixed_precision is 'fp8'; set it to 'no'"):
        prepare(accelerator, _mixed_plan(), model, _adamw(model))
    assert type(model) is Mlp


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"])
def test_a_sharding_of_accelerates_own_is_refused(kind: str) -> None:
    state = SimpleNamespace(mixed_precision="no", distributed_type=DistributedType(kind))
    with pytest.raises(PlanMismatchError, match=f"Accelerate's {kind} replaces them"):
        check_state(state)


def _ddp(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = Mlp()
    with torch.no_grad():  # DDP gives rank 0's BF16 weights to all; lower bits must not stay
        for parameter in model.parameters():
            parameter.mul_(1 + rank * 1e-4)
    model, optimizer = prepare(accelerator, plan_for(model), model, _adamw(model))
    losses = []
    for x, y in itertools.islice(batches(), 4):
        share = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
        loss = F.mse_loss(model(x[share]), y[share])
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    masters = exact(accelerator.unwrap_model(model))
    torch.save((type(model).__name__, losses, masters), f"{folder}/{rank}.pt")
    leave_group()


def test_ranks_that_accelerate_wraps_in_ddp_keep_the_same_masters(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ranks(_ddp, port, str(tmp_path), ranks=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert first[0] == "DistributedDataParallel"
    assert same(first, second)
    assert first[1][-1] < first[1][0]
