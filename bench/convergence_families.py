"""The model families of bench/convergence.py: eight kinds of network, eight optimizers.

    chars         character decoder, GELU, of the standard library's source            AdamW
    swiglu        character decoder, SwiGLU and RMSNorm, of its docstrings             Lion
    mixer         MLP-mixer with ReLU on noisy, shifted digits                         SGD, momentum
    encoder       the masked character of a piece of source                            RMSprop
    recommender   user and item embeddings and a ReLU MLP, clicks of a random teacher  Adagrad
    denoiser      noise that was added to a digit, SiLU                                Adam
    seq2seq       from a piece of source to the next, with cross attention             Adafactor
    convnet       convolutions and a ReLU head on noisy, shifted digits                NAdam

The last two fit nothing: they are held back. One linear of each has two outlier rows, undone at its
output: exact in FP32 and BF16, harmful in FP8 with a scale per tensor. They are 2^17 in all.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from convergence_data import (
    MASKED,
    Batch,
    Draw,
    all_sources,
    docstrings,
    draw_clicks,
    draw_digits,
    draw_few_digits,
    draw_masked,
    draw_noise,
    draw_text,
)
from torch import Tensor, nn
from torch.optim import Optimizer

WIDTH = 32
VOCABULARY = 128  # ASCII
EVAL_BATCHES = 16


@dataclass(frozen=True)
class Family:
    """A workload: `draw` makes its batches, `fault` is the linear with outlier rows."""

    build: Callable[[], nn.Module]
    draw: Draw
    loss: Callable[[Any, Batch], Tensor]  # Any: the model, or what calls one replica of it
    optimizer: Callable[[nn.Module], Optimizer]
    fault: tuple[str, int]

    def build_model(self) -> nn.Module:
        model = self.build()
        plant_outlier_rows(model, self.fault[0], exponent=self.fault[1])
        return model

    def train_batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.draw(generator, False)

    def eval_batches(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(12345)
        return [self.draw(generator, True) for _ in range(EVAL_BATCHES)]

    def loss_fn(self, model: Any, batch: Batch) -> Tensor:  # Any: as above
        return self.loss(model, batch)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        return self.optimizer(model)


# --- parts ---------------------------------------------------------------------------------------


class Rescale(nn.Module):
    """Divide the outputs of the layer before it by what its weight's rows were multiplied with."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, output: Tensor) -> Tensor:
        return output / self.get_buffer("scale").to(output.dtype)


def plant_outlier_rows(model: nn.Module, name: str, *, exponent: int, rows: int = 2) -> None:
    """Multiply the first rows of a linear by 2^exponent and divide its outputs by the same.

    The layer's name becomes `name.0`.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"a fault is planted in nn.Linear, not in {type(layer).__name__}")
    scale = torch.ones(layer.out_features)
    scale[:rows] = 2.0**exponent
    with torch.no_grad():
        layer.weight.mul_(scale[:, None])
        layer.bias.mul_(scale)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.Sequential(layer, Rescale(scale)))


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 80), nn.Linear(WIDTH, 80)
        self.down = nn.Linear(80, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, (k, v) = self.q(x), self.kv(memory).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -1e9).triu(1)
        mixed = scores.softmax(-1) @ v
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm attention (and cross attention) and MLP."""

    def __init__(
        self,
        *,
        causal: bool,
        norm: type[nn.Module] = nn.LayerNorm,
        mlp: type[nn.Module] = Gelu,
        cross: bool = False,
    ) -> None:
        super().__init__()
        make: Any = norm  # Any: a norm of one width
        self.norm1, self.norm2 = make(WIDTH), make(WIDTH)
        self.attention, self.mlp = Attention(causal), mlp()
        self.cross = Attention(False) if cross else None
        self.norm3 = make(WIDTH) if cross else nn.Identity()

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed)
        if self.cross is not None:
            x = x + self.cross(self.norm3(x), memory)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Embedded(nn.Module):
    """Tokens and their places."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(length, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.tokens(tokens) + self.places[: tokens.shape[1]]
        return out


class Decoder(nn.Module):
    def __init__(self, length: int, norm: type[nn.Module], mlp: type[nn.Module]) -> None:
        super().__init__()
        self.embedded = Embedded(length)
        self.blocks = nn.ModuleList(Block(causal=True, norm=norm, mlp=mlp) for _ in range(2))
        make: Any = norm  # Any: a norm of one width
        self.norm, self.head = make(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedded(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedded = Embedded(16)
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedded(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, MASKED])
        return logits


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedded = Embedded(16)
        self.encoder, self.decoder = Block(causal=False), Block(causal=True, cross=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        decoded = self.decoder(self.embedded(target), self.encoder(self.embedded(source)))
        logits: Tensor = self.head(self.norm(decoded))
        return logits


class Mixer(nn.Module):
    """Sixteen patches of 2 x 2 pixels; two layers that mix patches, then channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, WIDTH)
        self.mixing = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.mixed = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))
        self.fc1 = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.fc2 = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(F.unfold(images, 2, stride=2).transpose(1, 2))
        for i in range(2):
            across = self.norms[2 * i](x).transpose(1, 2)
            x = x + self.mixed[i](F.relu(self.mixing[i](across))).transpose(1, 2)
            x = x + self.fc2[i](F.relu(self.fc1[i](self.norms[2 * i + 1](x))))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(128, 32), nn.Embedding(128, 32)
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 16)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        x = torch.cat([self.users(users), self.items(items)], -1)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x))))).mean(-1)
        return logits


class Denoiser(nn.Module):
    """The noise in a digit of 64 pixels; the noise level comes as eight sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(80, 64), nn.Linear(64, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(3))

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        angles = level * torch.arange(1, 9, dtype=level.dtype)
        x = self.into(torch.cat([noisy, angles.sin(), angles.cos()], -1))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.silu(layer(norm(x)))
        noise: Tensor = self.out(x)
        return noise


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.fc1, self.fc2, self.head = nn.Linear(128, 64), nn.Linear(64, 64), nn.Linear(64, 16)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(images)))).flatten(1)
        logits: Tensor = self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return logits


class Lion(Optimizer):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms"."""

    def __init__(self, params: Any, lr: float) -> None:  # Any: what torch's optimizers take
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                average = state.setdefault("exp_avg", torch.zeros_like(parameter))
                update = torch.lerp(parameter.grad, average, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
                average.lerp_(parameter.grad, 1 - beta2)


class Adafactor(Optimizer):
    """Shazeer and Stern, "Adafactor", without momentum; leading dimensions are many models."""

    def __init__(self, params: Any, lr: float) -> None:  # Any: what torch's optimizers take
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state, dims = self.state[parameter], tuple(range(1, parameter.dim()))
                state["count"] = state.get("count", 0) + 1
                beta2 = 1 - state["count"] ** -0.8
                squares = parameter.grad.square() + 1e-30
                if parameter.dim() > 2:
                    row = state.setdefault("row", torch.zeros_like(squares.mean(-1, keepdim=True)))
                    column = state.setdefault(
                        "column", torch.zeros_like(squares.mean(-2, keepdim=True))
                    )
                    row.lerp_(squares.mean(-1, keepdim=True), 1 - beta2)
                    column.lerp_(squares.mean(-2, keepdim=True), 1 - beta2)
                    second = row * column / row.mean(-2, keepdim=True)
                else:
                    second = state.setdefault("second", torch.zeros_like(squares))
                    second.lerp_(squares, 1 - beta2)
                update = parameter.grad * second.rsqrt()
                update /= update.square().mean(dims, keepdim=True).sqrt().clamp(min=1.0)
                size = parameter.square().mean(dims, keepdim=True).sqrt().clamp(min=1e-3)
                parameter.sub_(group["lr"] * size * update)


# --- losses -------------------------------------------------------------------------------------


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    (pieces,) = batch
    return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def next_piece_loss(model: nn.Module, batch: Batch) -> Tensor:
    (pieces,) = batch
    logits = model(pieces[:, :16], pieces[:, 15:-1])
    return F.cross_entropy(logits.flatten(0, 1), pieces[:, 16:].flatten())


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def click_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0], batch[1]), batch[2])


def noise_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0], batch[1]), batch[2])


# --- families ------------------------------------------------------------------------------------

OPT = torch.optim
FAMILIES = {
    "chars": Family(
        lambda: Decoder(16, nn.LayerNorm, Gelu),
        draw_text(all_sources, 8, 17),
        next_token_loss,
        lambda m: OPT.AdamW(m.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
        ("blocks.0.mlp.fc1", 17),
    ),
    "swiglu": Family(
        lambda: Decoder(16, nn.RMSNorm, SwiGlu),
        draw_text(docstrings, 8, 17),
        next_token_loss,
        lambda m: Lion(m.parameters(), lr=1e-3),
        ("blocks.1.mlp.up", 17),
    ),
    "mixer": Family(
        Mixer,
        draw_few_digits,
        class_loss,
        lambda m: OPT.SGD(m.parameters(), lr=0.05, momentum=0.9),
        ("fc1.0", 17),
    ),
    "encoder": Family(
        Encoder,
        draw_masked,
        class_loss,
        lambda m: OPT.RMSprop(m.parameters(), lr=1e-3),
        ("blocks.0.attention.kv", 17),
    ),
    "recommender": Family(
        Recommender,
        draw_clicks,
        click_loss,
        lambda m: OPT.Adagrad(m.parameters(), lr=0.1),
        ("fc2", 17),
    ),
    "denoiser": Family(
        Denoiser,
        draw_noise,
        noise_loss,
        lambda m: OPT.Adam(m.parameters(), lr=2e-3),
        ("layers.1", 17),
    ),
    "seq2seq": Family(
        Seq2Seq,
        draw_text(all_sources, 8, 32),
        next_piece_loss,
        lambda m: Adafactor(m.parameters(), lr=0.02),
        ("decoder.mlp.fc1", 17),
    ),
    "convnet": Family(
        ConvNet,
        draw_digits,
        class_loss,
        lambda m: OPT.NAdam(m.parameters(), lr=1e-3),
        ("fc2", 17),
    ),
}
HELD_BACK = ("seq2seq", "convnet")
