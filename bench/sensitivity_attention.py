"""More families for bench/sensitivity.py: sets, latents and graphs that attend, and four others.

Only the set transformers (which part of a square kinks are) and the equilibrium (what is made under
no_grad) served for anything.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sensitivity_families import (
    LENGTH,
    VOCABULARY,
    WIDTH,
    Activation,
    Family,
    images,
    last_point_loss,
    next_token_loss,
    reversed_sequences,
    sequences,
    series,
)
from torch import Tensor, nn


def clusters(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield sets of points around the four centres of a class, and which class it is."""
    centres = torch.randn(16, 4, 16, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(16, (32,), generator=generator)
        which = torch.randint(4, (32, 24), generator=generator)
        noise = 0.8 * torch.randn(32, 24, 16, generator=generator)
        yield (centres[labels[:, None], which] + noise).movedim(-1, 1), labels


def learned(*shape: int) -> nn.Parameter:
    """Return vectors that are trained themselves."""
    return nn.Parameter(0.3 * torch.randn(1, *shape))


def layers(count: int, inputs: int, outputs: int) -> nn.ModuleList:
    """Return linears of one size."""
    return nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(count))


class Attend(nn.Module):
    """Some vectors read others, then an MLP; normalised behind both."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = layers(4, WIDTH, WIDTH)
        self.f1, self.f2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.activation = activation

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """Shapes [B, N, WIDTH] and [B, M, WIDTH]."""
        q, k, v = (
            y.unflatten(-1, (4, -1)).transpose(1, 2)
            for y in (self.q(x), self.k(other), self.v(other))
        )
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.n1(x + self.o(read))
        found: Tensor = self.n2(x + self.f2(self.activation(self.f1(x))))
        return found


class SetTransformer(nn.Module):
    """Points through eight inducing vectors, pooled by a seed."""

    def __init__(self, activation: Activation = F.relu) -> None:
        super().__init__()
        self.embed = nn.Linear(16, WIDTH)
        self.induce, self.seed = learned(8, WIDTH), learned(1, WIDTH)
        self.m1, self.m2, self.pool = (Attend(activation) for _ in range(3))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        x, count = self.embed(x.movedim(1, -1)), len(x)
        x = self.m2(x, self.m1(self.induce.expand(count, -1, -1), x))
        found: Tensor = self.head(self.pool(self.seed.expand(count, -1, -1), x).squeeze(1))
        return found


class Perceiver(nn.Module):
    """Six latents read the patches of a picture, each other, and the patches again."""

    def __init__(self, activation: Activation = F.relu) -> None:
        super().__init__()
        self.patch = nn.Linear(48, WIDTH)
        self.place, self.latents = learned(16, WIDTH), learned(6, WIDTH)
        self.r1, self.s1, self.r2 = (Attend(activation) for _ in range(3))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(F.unfold(x, 4, stride=4).transpose(1, 2)) + self.place
        z = self.r1(self.latents.expand(len(x), -1, -1), patches)
        z = self.r2(self.s1(z, z), patches)
        found: Tensor = self.head(z.mean(1))[:, :10]
        return found


class GraphAttention(nn.Module):
    """Three rounds of attention with a leaky kink in its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.w = nn.Linear(16, WIDTH), layers(3, WIDTH, WIDTH)
        self.left, self.right = layers(3, WIDTH, 16), layers(3, WIDTH, 16)
        self.o, self.head = layers(3, WIDTH, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x.movedim(1, -1))
        for w, left, right, o in zip(self.w, self.left, self.right, self.o, strict=True):
            v = w(hidden)
            scores = left(v)[:, :, None, :4] + right(v)[:, None, :, :4]
            weights = F.leaky_relu(scores, 0.2).softmax(2)
            read = torch.einsum("bijh,bjhd->bihd", weights, v.unflatten(-1, (4, -1))).flatten(2)
            hidden = F.layer_norm(hidden + F.relu(o(read)), (WIDTH,))
        found: Tensor = self.head(hidden.mean(1))
        return found


class GatedTime(nn.Module):
    """Convolutions over time with ReLU and hard gates, and ReLU MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.a, self.gate = layers(3, 3 * WIDTH, WIDTH), layers(3, 3 * WIDTH, WIDTH)
        self.f1, self.f2 = layers(3, WIDTH, 2 * WIDTH), layers(3, 2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for a, gate, f1, f2 in zip(self.a, self.gate, self.f1, self.f2, strict=True):
            before = [F.pad(x, (0, 0, back, 0))[:, : x.shape[1]] for back in range(3)]
            window = torch.cat(before, -1)
            x = x + F.relu(a(window)) * F.hardsigmoid(gate(window))
            x = x + f2(F.relu(f1(F.layer_norm(x, (WIDTH,)))))
        found: Tensor = self.head(F.layer_norm(x, (WIDTH,)))
        return found


class ConvMixer(nn.Module):
    """Depthwise convolutions with ReLU, MLPs of pixels with ReLU6, and a ReLU head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.near = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1, groups=32) for _ in range(3))
        self.f1, self.f2 = layers(3, 32, 64), layers(3, 64, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.last, self.head = nn.Linear(16 * 32, 128), nn.Linear(128, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for near, f1, f2, norm in zip(self.near, self.f1, self.f2, self.norms, strict=True):
            pixels = (x + F.relu(near(x))).flatten(2).transpose(1, 2)
            pixels = pixels + f2(F.relu6(f1(norm(pixels))))
            x = pixels.transpose(1, 2).unflatten(2, (4, 4))
        found: Tensor = self.head(F.relu(self.last(x.flatten(1))))[:, :10]
        return found


class ReluAttention(nn.Module):
    """A model of tokens whose attention weighs by squared ReLU; one output for both layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), learned(LENGTH, WIDTH)
        self.q, self.k, self.v = (layers(2, WIDTH, WIDTH) for _ in range(3))
        self.f1, self.f2 = layers(2, WIDTH, 2 * WIDTH), layers(2, 2 * WIDTH, WIDTH)
        self.o, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        for q, k, v, f1, f2 in zip(self.q, self.k, self.v, self.f1, self.f2, strict=True):
            n = F.layer_norm(x, (WIDTH,))
            scores = F.relu(q(n) @ k(n).transpose(1, 2) / 8).square()
            x = x + self.o(scores / (scores.sum(-1, keepdim=True) + 1) @ v(n))
            x = x + f2(F.leaky_relu(f1(F.layer_norm(x, (WIDTH,))), 0.1))
        found: Tensor = self.head(F.layer_norm(x, (WIDTH,)))
        return found


class Equilibrium(nn.Module):
    """A fixed point of one block, stepped to without gradients, and twice more with them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.driven = nn.Embedding(VOCABULARY, 96), nn.Linear(192, 96)
        self.mix, self.up, self.down = nn.Linear(96, 96), nn.Linear(96, 192), nn.Linear(192, 96)
        self.norm, self.out, self.head = nn.LayerNorm(96), nn.Linear(96, 96), nn.Linear(96, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        driven = self.driven(torch.cat([x, F.pad(x, (0, 0, 1, 0))[..., :-1, :]], -1))
        z = torch.zeros_like(driven)
        for step in range(14):
            with torch.set_grad_enabled(step >= 12):
                made = torch.tanh(self.mix(z) + driven) + self.down(F.gelu(self.up(z)))
                z = (z + self.norm(made)) / 2
        found: Tensor = self.head(F.silu(self.out(z)))
        return found


def of_images(build: Callable[[], nn.Module], **settings: Any) -> Family:  # Any: an optimizer
    """Return a family that tells pictures apart."""
    return Family(build, images, F.cross_entropy, **settings)


FAMILIES: dict[str, Family] = {
    "set_transformer": Family(SetTransformer, clusters, F.cross_entropy),
    "set_regression": Family(SetTransformer, series, last_point_loss),
    "perceiver": of_images(Perceiver),
    "perceiver_gelu": of_images(partial(Perceiver, F.gelu)),
    "graph_attention": Family(
        GraphAttention, clusters, F.cross_entropy, partial(torch.optim.RMSprop, lr=1e-3)
    ),
    "gated_time": Family(
        GatedTime, sequences, next_token_loss, partial(torch.optim.NAdam, lr=2e-3)
    ),
    "conv_mixer": of_images(ConvMixer, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    "relu_attention": Family(
        ReluAttention, reversed_sequences, next_token_loss, partial(torch.optim.Adam, lr=2e-3)
    ),
    "equilibrium": Family(
        Equilibrium, sequences, next_token_loss, partial(torch.optim.RAdam, lr=2e-3)
    ),
}
