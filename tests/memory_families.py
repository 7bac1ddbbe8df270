"""Models of different shape, whose bytes per parameter and per layer-I/O element are measured."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.workload.functions import Workload, workload_from

Draw = Callable[[torch.Generator], Tensor]  # a batch
Loss = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """A transformer block: fused qkv, attention, and a GELU of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 4, -1)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return hidden


class Decoder(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return logits


class Scored(nn.Module):
    """Attention that is written out: no layer's inputs and outputs tell of its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 4, 8)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # a tensor


def family(build_model: Callable[[], nn.Module], draw: Draw, loss_fn: Loss) -> Workload:
    """Return a workload whose batches `draw` makes."""

    def train_batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(generator)

    functions = {"build_model": build_model, "train_batches": train_batches, "loss_fn": loss_fn}
    return workload_from(SimpleNamespace(**functions), name="family")


def values(*shape: int) -> Draw:
    """Return what draws normal values."""
    return lambda generator: torch.randn(shape, generator=generator)


def tokens(classes: int, *shape: int) -> Draw:
    """Return what draws tokens."""
    return lambda generator: torch.randint(classes, shape, generator=generator)


def decoder(*, width: int, depth: int, batch: int, sequence: int = 16) -> Workload:
    """Return a next-token workload."""
    classes = 64

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    draw = tokens(classes, batch, sequence + 1)
    return family(lambda: Decoder(width, depth, classes), draw, loss_fn)


def mlp(*, width: int, depth: int, batch: int, hidden: int | None = None) -> Workload:
    """Return a regression workload of linears and GELUs."""
    widths = [width, *[hidden or width] * depth]

    def build_model() -> nn.Module:
        pairs = list(pairwise(widths))
        layers = [f for ends in pairs for f in (nn.Linear(*ends), nn.GELU())]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 16))

    return family(build_model, values(batch, width), _mean_square)


def convolutions(*, width: int, depth: int, batch: int, side: int = 8) -> Workload:
    """Return a regression workload of convolutions, batch norms and ReLUs."""

    def build_model() -> nn.Module:
        layers: list[nn.Module] = []
        for place in range(depth):
            before = width if place else 3
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 16))

    return family(build_model, values(batch, 3, side, side), _mean_square)


def _mean_square(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x.flatten(1)[:, :16]).square().mean()
    return loss
