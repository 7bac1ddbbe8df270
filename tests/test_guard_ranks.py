"""Two real processes: what one of them sees, both decide."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from autoprec.device.ranks import local_part
from autoprec.guard import Guard, Limits
from autoprec.runtime import attach_optimizer, install_options
from tests.ranks import run_ranks
from tests.test_guard import Chain, Run, lines, plan_for


def train_on_rank(folder: Path) -> None:
    rank = dist.get_rank()
    run = Run(events=folder / "events.jsonl")
    run.batches.manual_seed(rank)
    run.train(6, run.spoil("third", 3) if rank else lambda step: None)
    found = {"good": run.good, "in_bf16": run.guard.in_bf16, "state": run.guard.state_dict()}
    found["ddp"] = wrapped(DistributedDataParallel, rank)
    found["fsdp2"] = wrapped(sharded, rank)
    found["skipped"] = skipped(rank, of=2)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model.get_submodule("norm"))  # FSDP2 wants one dtype in a group
    fully_shard(model)
    return model


def wrapped(wrap: Callable[[nn.Module], nn.Module], rank: int) -> list[object]:
    """Train a wrapped model of which one rank has a NaN; return what its guard decided."""
    torch.manual_seed(0)
    inner = Chain()
    plan = plan_for(inner)
    install_options(inner, {layer.name: layer.option for layer in plan.layers})
    model = wrap(inner)
    optimizer = torch.optim.AdamW(model.parameters())
    guard = Guard(model, optimizer, plan, limits=Limits(sample_every=2))
    good = []
    for step in range(5):
        loss = model(torch.randn(16, 16)).square().mean()
        loss.backward()
        weight: Any = inner.second.weight  # Any: a tensor or a DTensor
        if step == rank == 1:
            local_part(weight.grad).fill_(math.nan)
        good.append(guard.step(loss))
        optimizer.step()
        optimizer.zero_grad()
    finite = all(bool(local_part(p.detach()).isfinite().all()) for p in model.parameters())
    return [good, guard.in_bf16, finite, guard.state_dict()["norms"]]


def skipped(rank: int, *, of: int) -> list[Any]:  # Any: JSON values
    """Train a rank's share with a NaN in step 5, which the guard skips.

    Returns:
        The losses of the whole batch, and the layers in BF16.
    """
    torch.manual_seed(0)
    model: Any = Chain()  # Any: a Chain, sharded or not
    plan = plan_for(model)
    install_options(model, {layer.name: layer.option for layer in plan.layers})
    if of > 1:
        sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach_optimizer(model, optimizer)
    guard = Guard(model, optimizer, plan, limits=Limits(sample_every=10_000))
    batches = torch.Generator().manual_seed(0)
    losses = []
    for step in range(10):
        x = torch.randn(32, 16, generator=batches)[32 * rank // of : 32 * (rank + 1) // of]
        loss = (model(x) - x[:, :10]).square().mean()
        loss.backward()
        if step == 5 and rank == of - 1:
            local_part(model.third.weight.grad).fill_(math.nan)
        total = loss.detach().clone()
        if of > 1:
            dist.all_reduce(total)
        losses.append(total.item() / of)
        guard.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return [losses, guard.in_bf16]


def test_ranks_decide_alike_when_one_of_them_has_a_nan(tmp_path: Path) -> None:
    run_ranks(train_on_rank, tmp_path, ranks=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for wrap in ("ddp", "fsdp2"):
        assert first[wrap][:3] == [[True, False, True, True, True], ["second", "third"], True]
    assert first["good"] == [True, True, True, False, True, True]
    assert first["in_bf16"] == ["third"]
    assert len(lines(tmp_path / "events.jsonl")) == 1  # rank 0 writes
    losses, in_bf16 = skipped(0, of=1)
    assert list(in_bf16) == first["skipped"][1] == ["third"]
    assert first["skipped"][0] == pytest.approx(losses, rel=5e-3)
    assert losses[-1] < losses[0]
