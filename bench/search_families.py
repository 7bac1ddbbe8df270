"""Small networks with kinks, whose plans are few enough to measure every one.

Probes differentiate, so that where a derivative jumps (ReLU, max pooling, top-k) a table of single
layers may be wrong by several times. Each family has at most six linears that are chosen.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.workload.functions import Workload, workload_from

BATCH, WIDTH = 256, 32
Batch = tuple[Tensor, Tensor]


class ReluMlp(nn.Module):
    """A plain ReLU network, without norms or residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        out: Tensor = self.head(x)
        return out


class Recommender(nn.Module):
    """Embeddings, two ReLU towers and their products."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(64, WIDTH)
        self.bottom1, self.bottom2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.top1, self.top2 = nn.Linear(2 * WIDTH, 64), nn.Linear(64, WIDTH)
        self.top3, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, :4] * 8.0).long().remainder(64)
        item = self.items(ids).sum(1)
        user = F.relu(self.bottom2(F.relu(self.bottom1(x))))
        joined = torch.cat([user, user * item], dim=1)
        out: Tensor = self.head(F.relu(self.top3(F.relu(self.top2(F.relu(self.top1(joined)))))))
        return out


class PooledConv(nn.Module):
    """Convolution, ReLU, max pooling, and a ReLU head of linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * WIDTH // 2, 64), nn.Linear(64, 64)
        self.fc3, self.fc4 = nn.Linear(64, 64), nn.Linear(64, WIDTH)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.conv(x[:, None])), 2).flatten(1)
        for layer in (self.fc1, self.fc2, self.fc3, self.fc4):
            x = F.relu(layer(x))
        out: Tensor = self.head(x)
        return out


class ReluBlocks(nn.Module):
    """Two pre-norm residual blocks with squared ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 64) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(64, WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.relu(up(norm(x))).square())
        out: Tensor = self.head(F.relu(self.mix(x)))
        return out


class TopK(nn.Module):
    """Hidden units of which the largest few pass, and hard activations."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 64) for _ in range(2))
        self.back = nn.ModuleList(nn.Linear(64, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer, back in zip(self.layers, self.back, strict=True):
            hidden = layer(x)
            least = hidden.topk(8, dim=-1).values[:, -1:]
            x = x + back(torch.where(hidden >= least, F.hardswish(hidden), 0.0))
        out: Tensor = self.head(x)
        return out


class Gates(nn.Module):
    """Clamped and hard gates on two residual paths, normalised over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm, self.mix = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 64)
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        for value, gate in zip(self.value, self.gate, strict=True):
            x = x + value(x).clamp(-1.5, 1.5) * F.hardsigmoid(3.0 * gate(x))
        out: Tensor = self.head(F.relu6(self.mix(self.norm(x))))
        return out


class MaxOut(nn.Module):
    """The larger of several pieces, twice, and one skip around both."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, 64)
        self.pieces1, self.pieces2 = nn.Linear(32, 96), nn.Linear(32, 96)
        self.skip, self.out = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x).view(-1, 32, 2).amax(-1)
        for pieces in (self.pieces1, self.pieces2):
            hidden = pieces(hidden).view(-1, 32, 3).amax(-1)
        found: Tensor = self.head(self.out(hidden + self.skip(x)).abs())
        return found


class ReluAttention(nn.Module):
    """Attention over eight pieces of the input, weighed by ReLU, and a ReLU MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.cat([x.view(-1, 4, 8), x.view(-1, 8, 4).transpose(1, 2)], -1)
        weights = F.relu(self.q(pieces) @ self.k(pieces).transpose(1, 2))
        hidden = weights @ self.v(pieces) / 4
        hidden = hidden + self.down(F.relu(self.up(hidden)))
        out: Tensor = self.head(hidden.mean(1))
        return out


class LargestMessage(nn.Module):
    """Two rounds of messages on a ring, of which each point takes the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(16, 32)
        self.tell = nn.ModuleList(nn.Linear(64, 32) for _ in range(2))
        self.take = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        points = torch.cat([x.view(-1, 4, 8), x.flip(1).view(-1, 4, 8)], -1)
        hidden = F.leaky_relu(self.enter(points), 0.2)
        for tell, take in zip(self.tell, self.take, strict=True):
            told = [tell(torch.cat([hidden, hidden.roll(s, 1)], -1)) for s in (1, 2, 3)]
            hidden = hidden + F.relu(take(torch.stack(told).amax(0)))
        out: Tensor = self.head(hidden.amax(1))
        return out


class Margins(nn.Module):
    """Absolute values, soft thresholds, clamped gates; for a hinge."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, 48)
        self.mix1, self.mix2 = nn.Linear(48, 48), nn.Linear(48, 48)
        self.gate = nn.Linear(WIDTH, 48)
        self.back, self.head = nn.Linear(48, WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.softshrink(self.mix1(self.enter(x).abs()), 0.2) * F.hardtanh(self.gate(x))
        hidden = hidden + F.relu6(self.mix2(hidden))
        out: Tensor = self.head(F.celu(self.back(hidden)))
        return out


def _batches(seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(WIDTH, 16, generator=torch.Generator().manual_seed(99))
    while True:
        x = torch.randn(BATCH, WIDTH, generator=generator)
        yield x, (torch.relu(x) @ teacher).argmax(-1)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _hinge(model: nn.Module, batch: Batch) -> Tensor:
    return F.multi_margin_loss(model(batch[0]), batch[1])


def _optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), lr=2e-3)
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def _workload(
    model: Callable[[], nn.Module],
    optimizer: str = "adamw",
    loss: Callable[[nn.Module, Batch], Tensor] = _loss,
) -> Workload:
    functions = {
        "build_model": model,
        "train_batches": _batches,
        "loss_fn": loss,
        "build_optimizer": partial(_optimizer, kind=optimizer),
    }
    return workload_from(SimpleNamespace(**functions), name=model.__name__)


FAMILIES: dict[str, Callable[[], Workload]] = {
    "relu_mlp": partial(_workload, ReluMlp),
    "recommender": partial(_workload, Recommender),
    "pooled_conv": partial(_workload, PooledConv, "sgd"),
}
HELD_BACK: dict[str, Callable[[], Workload]] = {  # looked at once, when all was settled
    "relu_blocks": partial(_workload, ReluBlocks),
    "top_k": partial(_workload, TopK),
    "gates": partial(_workload, Gates),
    "maxout": partial(_workload, MaxOut, "sgd"),
    "relu_attention": partial(_workload, ReluAttention),
    "largest_message": partial(_workload, LargestMessage, "sgd"),
    "margins": partial(_workload, Margins, "rmsprop", _hinge),
}
