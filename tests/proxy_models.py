"""A family of stacks at any width and depth: `large` is for --meta, `small` its proxy."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(torch.relu(self.fc1(self.norm(x))))
        return out


class Stack(nn.Module):
    def __init__(self, width: int, blocks: int, head: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.add_module(head, nn.Linear(width, width))
        self.last = head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.get_submodule(self.last)(x)
        return out


@dataclass(frozen=True)
class Family:
    """A workload: the functions of a model.py as methods."""

    width: int
    blocks: int
    tokens: int
    head: str = "head"

    def build_model(self) -> nn.Module:
        return Stack(self.width, self.blocks, self.head)

    def train_batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(1, self.width, generator=generator).expand(self.tokens, -1)

    def loss_fn(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = (model(batch) - batch.flip(-1)).square().mean() + 1.0
        return loss


class LateOutlier(nn.Module):
    """A linear that from training step 55 on sees one token 2^24 times as large as the others."""

    steps: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += int(self.training)
        rows = torch.ones(len(x), 1, device=x.device)
        rows[:1] = torch.where(self.steps > 55, 2.0**24, 1.0)
        out: Tensor = self.linear(x * rows) / rows
        return out


class LateStack(nn.Module):
    """Blocks in which FP8 fails after the steps that the sensitivity has seen."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, width),
                LateOutlier(width),
                nn.SiLU(),
                nn.Linear(width, width),
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


@dataclass(frozen=True)
class LateFamily:
    """A workload whose FP8 fails late."""

    width: int
    blocks: int
    tokens: int

    def build_model(self) -> nn.Module:
        return LateStack(self.width, self.blocks)

    def train_batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(self.tokens, self.width, generator=generator)

    def loss_fn(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = (model(batch) - torch.tanh(batch.roll(1, -1)) * batch).square().mean()
        return loss


large = Family(4096, 3, 4096)
small = Family(32, 2, 32)
other = Family(32, 2, 32, head="unembed")
odd = Family(20, 2, 32)  # 20 is no multiple of 16
late_large, late_small = LateFamily(4096, 4, 4096), LateFamily(64, 2, 256)
