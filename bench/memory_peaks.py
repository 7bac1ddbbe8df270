"""Peaks of training and of the whole sensitivity stage on a CPU, in parts of the memory bars.

    python -m bench.memory_peaks [NAME ...]

Tracked at the dispatch level (tests/peaks.py); the table of docs/scale.md. The families are small
and keep to the bars here as large models do.
"""

import sys
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.memory import sensitivity_bar
from autoprec.sensitivity import room
from tests.memory_families import convolutions, decoder, family, mlp, tokens, values
from tests.peaks import sensitivity_peak, training_peak

CPU = torch.device("cpu")
STEPS = 13  # of the warm-up: beyond those after which the early error is measured


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    """Return the mean square of the output."""
    return model(x).square().mean()  # type: ignore[no-any-return]  # a tensor


def rebuilt(model: nn.Module, x: Tensor) -> Tensor:
    """Return an autoencoder's loss."""
    return (model(x) - x).square().mean()  # type: ignore[no-any-return]  # a tensor


def linears(*widths: int) -> nn.Module:
    """Return linears with GELUs between."""
    made = [part for ends in pairwise(widths) for part in (nn.Linear(*ends), nn.GELU())]
    return nn.Sequential(*made[:-1])


class Residual(nn.Module):
    """Two convolutions with batch norms, beside their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        pairs = [(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)) for _ in range(2)]
        self.parts = nn.Sequential(*pairs[0], nn.ReLU(), *pairs[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.parts(x))


class Recurrent(nn.Module):
    """An LSTM language model with more classes than its width."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(600, 128)
        self.lstm, self.head = nn.LSTM(128, 128, batch_first=True), nn.Linear(128, 600)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0])  # type: ignore[no-any-return]  # a tensor


def classified(model: nn.Module, x: Tensor) -> Tensor:
    """Return the cross-entropy of each token's own class."""
    return F.cross_entropy(model(x).flatten(0, 1), x.flatten())


def residual() -> nn.Module:
    """Return a small residual network."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Residual(16), Residual(16), *head)


def segmenting() -> nn.Module:
    """Return convolutions that give eight classes for each pixel."""
    sizes = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*sizes, nn.ConvTranspose2d(64, 32, 2, 2), nn.ReLU(), nn.Conv2d(32, 8, 1))


def folded() -> nn.Module:
    """Return a convolutional autoencoder."""
    down = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    up = [nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1)]
    return nn.Sequential(*down, *up)


FAMILIES = {
    "MLP, 2 layers of 256, 2048 rows": mlp(width=256, depth=2, batch=2048),
    "MLP, 4 layers of 64, 4096 rows": mlp(width=64, depth=4, batch=4096),
    "one hidden layer of 512, 4096 rows of 64": family(
        lambda: nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10)),
        values(4096, 64),
        lambda model, x: F.cross_entropy(model(x), (x[:, 0] > 0).long()),
    ),
    "one linear, 256 to 256, 8192 rows": family(
        lambda: linears(256, 256), values(8192, 256), mean_square
    ),
    "one linear, 32 to 1024, 2048 rows": family(
        lambda: linears(32, 1024), values(2048, 32), mean_square
    ),
    "one linear, 1024 to 8, 2048 rows": family(
        lambda: linears(1024, 8), values(2048, 1024), mean_square
    ),
    "one convolution, 3 to 64 channels": family(
        lambda: nn.Sequential(nn.Conv2d(3, 64, 3, padding=1)), values(16, 3, 32, 32), mean_square
    ),
    "autoencoder of 6 linears": family(
        lambda: linears(256, 128, 64, 16, 64, 128, 256), values(2048, 256), rebuilt
    ),
    "convolutional autoencoder": family(folded, values(16, 3, 32, 32), rebuilt),
    "residual convolutions, 16 channels": family(residual, values(16, 3, 16, 16), mean_square),
    "2 convolutions of 64 channels": convolutions(width=64, depth=2, batch=8, side=16),
    "embedding bag, 1.28 M parameters": family(
        lambda: nn.Sequential(nn.EmbeddingBag(20_000, 64), nn.Linear(64, 8)),
        tokens(20_000, 256, 32),
        lambda model, x: F.cross_entropy(model(x), x[:, 0] % 8),
    ),
    "embedding and a head of 2000 classes": family(
        lambda: nn.Sequential(nn.Embedding(2000, 32), nn.Tanh(), nn.Linear(32, 2000)),
        tokens(2000, 64, 32),
        classified,
    ),
    "decoder, 3 blocks of 32, 512 tokens": decoder(width=32, depth=3, batch=32),
    "LSTM, a head of 600 classes": family(Recurrent, tokens(600, 16, 32), classified),
    "convolutions to 8 classes a pixel": family(
        segmenting,
        values(8, 3, 32, 32),
        lambda model, x: F.cross_entropy(model(x), (x[:, 0] > 0).long()),
    ),
}


def show(name: str) -> None:
    """Print one row of the table."""
    workload = FAMILIES[name]
    context = Context(workload, CPU)
    spec = capture_model(context)
    training = training_peak(workload)
    reference, whole = sensitivity_peak(context, spec, steps=STEPS)
    shares = [f"{peak.rise_bytes / sensitivity_bar(spec):.2f}" for peak in (training, whole)]
    parked = "yes" if reference.is_parked else "no"
    of = f"{reference.groups} of {len(spec.layers)}, {parked}"
    print("|", " | ".join((name, *shares, of)), "|", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    room.SMALL = 0
    for chosen in sys.argv[1:] or FAMILIES:
        show(chosen)
