"""Small model families for bench/sensitivity.py: smooth ones, and ones whose derivative jumps.

Each takes seconds on one thread. Nothing was fitted to those in HELD_BACK.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

Activation = Callable[[Tensor], Tensor]
Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
VOCABULARY, LENGTH, SEQUENCES, WIDTH, HEADS = 64, 32, 16, 64, 4
FIELDS, ROWS, FEATURES = 6, 200, 16  # of the recommender
adamw = partial(torch.optim.AdamW, lr=2e-3)


@dataclass(frozen=True)
class Family:
    """A workload of its own: the functions of a model.py."""

    build_model: Callable[[], nn.Module]
    train_batches: Batches
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer] = adamw
    parameters: Callable[[nn.Module], Any] = nn.Module.parameters  # Any: or groups of them

    def loss_fn(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(model(batch[0]), batch[1])

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(model))


# --- data ------------------------------------------------------------------------------------


def sequences(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens of a fixed random Markov chain, and the tokens that follow."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(VOCABULARY, (SEQUENCES, 1), generator=generator)
        for _ in range(LENGTH):
            rows = table[tokens[:, -1]].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(rows, 1, generator=generator)], 1)
        yield tokens[:, :-1], tokens[:, 1:]


def reversed_sequences(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens of `sequences` and the same backwards."""
    return ((tokens, tokens.flip(1)) for tokens, _ in sequences(seed))


def clicks(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield categories and whether they were clicked, by hidden factors of each category."""
    factors = torch.randn(FIELDS, ROWS, 4, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = (torch.rand(256, FIELDS, generator=generator).square() * ROWS).long()  # some are rare
        taken = torch.stack([factors[i, x[:, i]] for i in range(FIELDS)])
        score = taken.sum(0).square().sum(1) - taken.square().sum((0, 2))
        noise = torch.randn(len(x), generator=generator)
        yield x, (score + noise > 0).float()


def images(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield noisy copies of ten fixed pictures, shifted, and which they are."""
    pictures = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pictures = F.avg_pool2d(pictures, 5, 1, 2) * 4
    generator = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(10, (32,), generator=generator)
        shift = int(torch.randint(4, (1,), generator=generator))
        noise = torch.randn(32, 3, 16, 16, generator=generator)
        yield pictures[labels].roll(shift, -1) + noise, labels


def denoised_images(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield noisy pictures and the pictures without their noise."""
    pictures = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pictures = F.avg_pool2d(pictures, 5, 1, 2) * 4
    return ((noisy, pictures[labels]) for noisy, labels in images(seed))


def series(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield noisy sums of sines, and what comes a step later."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(65.0)
    while True:
        rate, phase = (torch.rand(8, 16, 3, 1, generator=generator) for _ in range(2))
        x = (rate * time + 6.3 * phase).sin().sum(2) + 0.1 * torch.randn(
            8, 16, 65, generator=generator
        )
        yield x[..., :-1], x[..., 1:]


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


# --- models ----------------------------------------------------------------------------------


class Recommender(nn.Module):
    """Embeddings and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, FEATURES) for _ in range(FIELDS))
        widths = [FIELDS * FEATURES, 128, 64, 32]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], -1)
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        logits: Tensor = self.head(hidden)[:, 0]
        return logits


class EncoderDecoder(nn.Module):
    """torch's own encoder-decoder with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.body = nn.Transformer(WIDTH, HEADS, 2, 2, 4 * WIDTH, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        source = self.embedding(tokens) + self.places
        shifted = F.pad(tokens.flip(1)[:, :-1], (1, 0))
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        hidden = self.body(source, self.embedding(shifted) + self.places, tgt_mask=mask)
        logits: Tensor = self.head(hidden)
        return logits


class Mlp(nn.Module):
    """The two linears of a block, with any function between them."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(self.activation(self.up(x)))
        return hidden


class SwiGlu(nn.Module):
    """The three linears of a gated block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return hidden


class Mixture(nn.Module):
    """The best two of four experts for each token, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(Mlp(F.gelu) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        chosen, which = self.router(flat).topk(2)
        weights, out = chosen.softmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, places = (which == number).nonzero(as_tuple=True)
            part = weights[rows, places, None] * expert(flat[rows])
            out = out.index_add(0, rows, part.to(out.dtype))
        return out.view_as(x)


class Block(nn.Module):
    """Pre-norm attention and an MLP of any kind."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0)
        q, k, v = (part.transpose(-3, -2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(-3, -2).flatten(-2))
        hidden: Tensor = x + self.mlp(self.norms[1](x))
        return hidden


class Decoder(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(*(Block(mlp()) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.embedding(tokens) + self.places)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def convolutions() -> nn.Module:
    """Return convolutions with ReLU and max pooling, and a ReLU head."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Clamp(nn.Module):
    """A clamp to [-1, 1.5]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-1.0, 1.5)


def hard_layers() -> nn.Module:
    """Return linears with hardswish, hardtanh and a clamp between them."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(768, 128), nn.Hardswish(), nn.LayerNorm(128)),
        *(nn.Linear(128, 128), nn.Hardtanh(), nn.Linear(128, 64), Clamp(), nn.Linear(64, 10)),
    )


class UNet(nn.Module):
    """Down by max pooling, up by linears on pixels, and across."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.middle, self.merge = nn.Linear(64, 64), nn.Linear(96, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.first(x))
        coarse = F.relu(self.inner(F.max_pool2d(fine, 2))).movedim(1, -1)
        coarse = F.relu(self.middle(coarse)).movedim(-1, 1)
        both = torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], 1).movedim(1, -1)
        found: Tensor = self.head(F.relu(self.merge(both))).movedim(-1, 1)
        return found


class TemporalConvolutions(nn.Module):
    """Causal dilated convolutions and linears with LeakyReLU, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, WIDTH)
        self.convolutions = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 2, dilation=d) for d in (1, 2, 4))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.movedim(1, -1))
        for past, convolution, mix in zip((1, 2, 4), self.convolutions, self.mixes, strict=True):
            padded = F.pad(hidden.movedim(-1, 1), (past, 0))
            inner = F.leaky_relu(convolution(padded).movedim(1, -1), 0.1)
            hidden = hidden + F.leaky_relu(mix(inner), 0.1)
        found: Tensor = self.head(hidden).movedim(-1, 1)
        return found


class PooledSet(nn.Module):
    """A set of points: an MLP with a leaky kink at each, the largest of all, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(
            *(nn.Linear(16, WIDTH), nn.LeakyReLU(0.01), nn.Linear(WIDTH, 2 * WIDTH)),
            *(nn.LayerNorm(2 * WIDTH), nn.Hardswish(), nn.Linear(2 * WIDTH, 2 * WIDTH)),
        )
        self.all = nn.Sequential(
            *(nn.Linear(2 * WIDTH, WIDTH), nn.PReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU6()),
            nn.Linear(WIDTH, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.each(x.movedim(1, -1)).amax(1)
        found: Tensor = self.all(hidden)
        return found


class Maxout(nn.Module):
    """A residual network whose blocks keep the larger of two linears, and soft thresholds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(768, 96)
        self.blocks = nn.ModuleList(nn.Linear(96, 192) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(96) for _ in range(3))
        self.head = nn.Linear(96, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.softshrink(self.first(x.flatten(1)), 0.1)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            hidden = hidden + block(norm(hidden)).unflatten(-1, (96, 2)).amax(-1)
        found: Tensor = self.head(hidden)[:, :10]
        return found


class HardGates(nn.Module):
    """A recurrent network: gates of hard sigmoids, a state of a clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, WIDTH)
        self.gates, self.state = nn.Linear(2 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        inputs, hidden, found = self.first(x.movedim(1, -1)), x.new_zeros(len(x), WIDTH), []
        for step in range(16):
            seen = torch.cat([inputs[:, step], hidden.to(inputs.dtype)], -1)
            update, reset = F.hardsigmoid(self.gates(seen)).chunk(2, -1)
            seen = torch.cat([inputs[:, step], (reset * hidden).to(inputs.dtype)], -1)
            hidden = hidden + update * (F.hardtanh(self.state(seen)) - hidden)
            found.append(self.head(hidden))
        return torch.stack(found, -1)


class LargestOfNeighbours(nn.Module):
    """A graph of points: three rounds of edge messages, of which each point takes the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, WIDTH)
        self.messages = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(3))
        self.updates = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        points = F.elu(self.first(x.movedim(1, -1)))
        for message, update in zip(self.messages, self.updates, strict=True):
            near = torch.stack([points.roll(shift, 1) for shift in (-3, -1, 1, 3)], 2)
            pairs = torch.cat([points.unsqueeze(2).expand_as(near), near - points.unsqueeze(2)], -1)
            most = F.relu(message(pairs)).amax(2)
            points = points + F.elu(update(torch.cat([points, most], -1)))
        found: Tensor = self.head(points).movedim(-1, 1)
        return found


def first_steps_loss(found: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(found, target[..., : found.shape[-1]])


def last_point_loss(found: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(found, target[..., -1], beta=0.05)


def pruned_decoder() -> nn.Module:
    """Return a ReLU decoder without half of its MLPs' weights, one by a mask in a hook."""
    mlps = [Mlp(F.relu) for _ in range(2)]
    model = Decoder(partial(next, iter(mlps)))
    for mlp in mlps:
        prune.l1_unstructured(mlp.up, "weight", 0.5)  # type: ignore[no-untyped-call]  # torch
    weight = mlps[0].down.weight
    mask = (weight.detach().abs() > weight.detach().abs().median()).float()
    weight.data *= mask
    weight.register_hook(lambda gradient: gradient * mask)  # type: ignore[no-untyped-call]  # torch
    return model


def encoder_slowly(model: nn.Module) -> list[dict[str, Any]]:  # Any: groups hold settings
    """Return two groups: the encoder at 1e-4 of the learning rate of all else."""
    slow = {id(p) for p in model.get_submodule("body.encoder").parameters()}
    return [
        {"params": [p for p in model.parameters() if id(p) not in slow]},
        {"params": [p for p in model.parameters() if id(p) in slow], "lr": 2e-7},
    ]


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def decoder(mlp: Callable[[], nn.Module]) -> Family:
    return Family(partial(Decoder, mlp), sequences, next_token_loss)


SMOOTH = {"gelu_decoder": decoder(partial(Mlp, F.gelu)), "swiglu_decoder": decoder(SwiGlu)}
KINKED = {
    "recommender_adagrad": Family(
        *(Recommender, clicks, F.binary_cross_entropy_with_logits),
        optimizer=partial(torch.optim.Adagrad, lr=0.05),
    ),
    "recommender_sgd": Family(
        *(Recommender, clicks, F.binary_cross_entropy_with_logits),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    ),
    "encoder_decoder": Family(EncoderDecoder, reversed_sequences, next_token_loss),
    "convolutions": Family(convolutions, images, F.cross_entropy),
    "mixture": decoder(Mixture),
    "pruned_decoder": Family(pruned_decoder, sequences, next_token_loss),
    "two_rates": Family(
        *(EncoderDecoder, reversed_sequences, next_token_loss), parameters=encoder_slowly
    ),
    "hard_layers": Family(hard_layers, images, F.cross_entropy),
    "unet": Family(UNet, denoised_images, F.mse_loss),
    "squared_relu_decoder": decoder(partial(Mlp, squared_relu)),
    "pooled_set": Family(PooledSet, series, last_point_loss),
    "maxout": Family(Maxout, images, F.cross_entropy),
    "temporal_convolutions": Family(TemporalConvolutions, series, F.mse_loss),
}
HELD_BACK = {
    "hard_gates": Family(HardGates, series, first_steps_loss),
    "largest_of_neighbours": Family(LargestOfNeighbours, series, F.mse_loss),
}
FAMILIES: dict[str, Any] = {**SMOOTH, **KINKED, **HELD_BACK}  # Any: a workload's functions
