"""Tensor parallelism through DTensor, in two real processes: split after apply, and before."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import autoprec
from autoprec.errors import PlanMismatchError, RecordError
from autoprec.records import BF16_O2, Option, Recipe, fp8_option
from autoprec.runtime import attach_optimizer
from tests.models import WIDTH
from tests.plans import plan_for
from tests.ranks import run_ranks

Style = Callable[[], ParallelStyle]
RANKS, STEPS, HEADS = 2, 2, 2
OPTIONS = (fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE))
ATTENTION = dict.fromkeys(("query", "value", "out"), BF16_O2)


class Block(nn.Module):
    """Attention and MLP, as tensor parallelism splits them: heads and hidden units over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, value = (
            part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.query(normed), self.value(normed))
        )
        mixed = F.scaled_dot_product_attention(query, query, value).transpose(1, 2)
        x = x + self.out(mixed.flatten(2))
        logits: Tensor = self.head(x + self.down(F.gelu(self.up(x))))
        return logits


def _split(
    model: nn.Module, columns: Style = ColwiseParallel, rows: Style = RowwiseParallel
) -> nn.Module:
    styles = {"out": rows(), "down": rows()}
    styles |= {name: columns() for name in ("query", "value", "up")}
    parallelize_module(model, init_device_mesh("cpu", (RANKS,)), styles)
    return model


def _batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(WIDTH, 16, generator=torch.Generator().manual_seed(99)) / 4
    while True:
        x = torch.randn(4, 8, WIDTH, generator=generator)
        yield x, x @ target


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _, (x, y) in zip(range(STEPS), _batches(), strict=False):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _applied(
    option: Option, *, is_split: bool, apply_first: bool = True
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = Block()
    if apply_first:
        autoprec.apply(plan_for(model, option, ATTENTION), model)
    if is_split:
        _split(model)
    if not apply_first:
        autoprec.apply(plan_for(model, option, ATTENTION), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach_optimizer(model, optimizer)
    return model, optimizer


def _see_options(folder: Path) -> None:
    losses = []
    for option in OPTIONS:
        model, optimizer = _applied(option, is_split=True)
        losses.append(_train(model, optimizer))
        _check_masters(model, optimizer)
        with pytest.raises(RecordError, match=r"use torch.distributed.checkpoint|sharded"):
            autoprec.save_checkpoint(folder / "run.pt", model, optimizer)
        with pytest.raises(PlanMismatchError, match="'query' is sharded over ranks; save its"):
            autoprec.undo(model, optimizer)
        model, optimizer = _applied(option, is_split=True, apply_first=False)
        assert _train(model, optimizer) == losses[-1]
        _check_masters(model, optimizer)
        autoprec.undo(model, optimizer)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    float8 = importlib.import_module("torchao.float8.float8_tensor_parallel")
    whole = Block()
    autoprec.apply(plan_for(whole, OPTIONS[0]), whole)
    with pytest.raises(PlanMismatchError, match="use torch's ColwiseParallel and RowwiseParallel"):
        _split(whole, float8.Float8ColwiseParallel, float8.Float8RowwiseParallel)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(losses))


def _check_masters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weight: Any = model.get_parameter("up.weight")
    assert isinstance(weight, DTensor)
    assert weight.dtype is torch.bfloat16
    assert weight.to_local().shape == (WIDTH, WIDTH)
    masters = {n: s["master_weight"] for n, s in optimizer.state_dict()["state"].items()}
    assert all(master.dtype is torch.float32 for master in masters.values())
    assert any(isinstance(master, DTensor) for master in masters.values())


def test_a_split_block_trains_as_the_whole_one(tmp_path: Path) -> None:
    run_ranks(_see_options, tmp_path, ranks=RANKS)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS))
    assert first == second
    for option, losses in zip(OPTIONS, first, strict=True):
        assert losses == pytest.approx(_train(*_applied(option, is_split=False)), rel=5e-3)
        assert losses[-1] < 0.9 * losses[0]
