"""Toy models and workloads for the tests: small, deterministic, one trait each."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.workload.functions import Workload, workload_from

WIDTH, CLASSES, BATCH = 32, 16, 48


class Mlp(nn.Module):
    """Three linears: eligible, eligible, and a head whose N = 10 FP8 cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 64)
        self.second = nn.Linear(64, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x + self.second(F.gelu(self.first(x)))
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class TiedTokens(nn.Module):
    """An embedding whose weight is the head's, a class token, dropout, and an unused layer."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.dropout(self.mix(x))
        logits: Tensor = self.head(x[:, 1:])
        return logits


class ConvNet(nn.Module):
    """Convolution, batch norm and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 16)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.norm(self.conv(images))).mean((2, 3)))
        return logits


def sine_batches(seed: int, *, rows: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield points and the 16 sines of one random projection of them, endlessly."""
    truth = torch.randn(width, 16, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(rows, width, generator=generator)
        yield x, (x @ truth / 4).sin()


def mlp_workload() -> Workload:
    """Return a workload that regresses a fixed random function with the Mlp."""

    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        target = torch.randn(WIDTH, 10, generator=torch.Generator().manual_seed(99))
        while True:
            x = torch.randn(BATCH, WIDTH, generator=generator)
            yield x, x @ target

    return _workload(Mlp, train_batches, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))


def token_workload(*, dropout: float = 0.0) -> Workload:
    """Return a next-token workload for TiedTokens."""

    def train_batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(CLASSES, (4, 16), generator=generator).cumsum(1) % CLASSES

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return _workload(lambda: TiedTokens(dropout=dropout), train_batches, loss_fn)


def conv_workload() -> Workload:
    """Return an image classification workload for ConvNet."""

    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            images = torch.randn(16, 1, 8, 8, generator=generator)
            yield images, (images.sum((1, 2, 3)) > 0).long()

    return _workload(
        ConvNet, train_batches, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    )


def _workload(build_model: object, train_batches: object, loss_fn: object) -> Workload:
    functions = {"build_model": build_model, "train_batches": train_batches, "loss_fn": loss_fn}
    return workload_from(SimpleNamespace(**functions), name="toy")
