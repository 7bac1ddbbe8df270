"""A small regression that a whole `tune` gets through in seconds; BF16 and FP8 can both run it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, BATCH = 64, 32


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 256),
        nn.GELU(),
        nn.LayerNorm(256),
        nn.Linear(256, WIDTH),
        nn.Linear(WIDTH, 10),
    )


def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(WIDTH, 10, generator=torch.Generator().manual_seed(99)) / 8
    while True:
        x = torch.randn(BATCH, WIDTH, generator=generator)
        yield x, (x @ target).tanh() + 0.3 * torch.randn(BATCH, 10, generator=generator)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)
