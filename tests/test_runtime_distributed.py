"""A plan under DDP and FSDP2, in two real processes that talk through gloo."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

import autoprec
from autoprec.errors import PlanMismatchError
from autoprec.records import BF16_O2, Option, Recipe, fp8_option
from autoprec.runtime import attach_optimizer
from tests.models import BATCH, Mlp, mlp_workload
from tests.ranks import leave_group
from tests.runtime_plans import plan_for

RANKS, STEPS = 2, 6
OPTIONS = (BF16_O2, fp8_option(Recipe.TENSORWISE))
Losses = list[float]


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, of: int) -> Losses:
    """Train on a rank's share of every batch; return the losses of the whole batch."""
    losses = []
    for x, y in itertools.islice(mlp_workload().train_batches(0), STEPS):
        share = slice(rank * BATCH // of, (rank + 1) * BATCH // of)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[share]), y[share])
        torch.autograd.backward(loss)
        optimizer.step()
        total = loss.detach().clone()
        if of > 1:
            dist.all_reduce(total)
        losses.append(total.item() / of)
    return losses


def _ddp(rank: int, option: Option) -> Losses:
    torch.manual_seed(rank)  # DDP gives rank 0's weights to all; the masters must follow
    model = Mlp()
    _, optimizer = autoprec.apply(plan_for(model, option), model, _adam(model))
    if rank == 0:
        model.load_state_dict(model.state_dict() | {"head.bias": torch.rand(10)})
        torch.manual_seed(0)
        model.load_state_dict(Mlp().state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses = _train(wrapped, optimizer, rank, RANKS)
    with pytest.raises(PlanMismatchError, match="give its 'module'"):
        autoprec.undo(wrapped)
    gathered: list[Any] = [None] * RANKS
    masters = [p.detach() for p in autoprec.master_view(model).parameters()]
    dist.all_gather_object(gathered, masters)
    assert all(torch.equal(a, b) for a, b in zip(*gathered, strict=True))
    return losses


def _fsdp(rank: int, option: Option) -> Losses:
    torch.manual_seed(0)
    model = Mlp()
    autoprec.apply(plan_for(model, option), model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh)
    optimizer = _adam(model)
    attach_optimizer(model, optimizer)
    with pytest.raises(PlanMismatchError, match="is now a"):
        autoprec.undo(model)
    losses = _train(model, optimizer, rank, RANKS)
    masters = [s["master_weight"] for s in optimizer.state_dict()["state"].values()]
    assert all(isinstance(master, DTensor) and master.dtype is torch.float32 for master in masters)
    assert any(not torch.equal(m.to_local(), m.to_local().bfloat16().float()) for m in masters)
    return losses


def _rank(rank: int, folder: str, run: Callable[[int, Option], Losses]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, init_method=store)
    losses = [run(rank, option) for option in OPTIONS]
    if rank == 0:
        torch.save(losses, Path(folder) / "losses.pt")
    leave_group()


@pytest.mark.parametrize("run", [_ddp, _fsdp], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(run: Callable[[int, Option], Losses], tmp_path: Path) -> None:
    spawn(_rank, args=(str(tmp_path), run), nprocs=RANKS)  # type: ignore[no-untyped-call]  # torch's
    for option, losses in zip(OPTIONS, torch.load(tmp_path / "losses.pt"), strict=True):
        torch.manual_seed(0)
        model = Mlp()
        _, optimizer = autoprec.apply(plan_for(model, option), model, _adam(model))
        assert losses == pytest.approx(_train(model, optimizer, 0, 1), rel=5e-3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_distributed_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    model = Mlp()
    _, optimizer = autoprec.apply(plan_for(model), model, _adam(model))
    _train(model, optimizer, 0, 1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    expected = _train(model, optimizer, 0, 1)
    other = Mlp()
    _, other_optimizer = autoprec.apply(plan_for(other), other, _adam(other))
    model_state, optimizer_state = get_state_dict(other, other_optimizer)
    load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    set_state_dict(
        other, other_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )
    assert _train(other, other_optimizer, 0, 1) == expected
