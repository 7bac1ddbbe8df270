"""A small convolutional network with batch norm on scikit-learn's handwritten digits.

autoprec tune examples/digits_cnn.py
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

BATCH = 256
HELD_OUT = 256  # the last images are for evaluation


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def build_model() -> nn.Module:
    return nn.Sequential(
        convolution(1, 32),
        convolution(32, 64),
        nn.MaxPool2d(2),
        convolution(64, 128),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128 * 4, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return images [n, 1, 8, 8] in 0..1 and labels [n], shuffled once."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return pixels[order], torch.tensor(labels)[order]


def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(labels) - HELD_OUT, (BATCH,), generator=generator)
        yield images[chosen], labels[chosen]


def eval_batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = digits()
    chunks = (torch.split(part[-HELD_OUT:], 64) for part in (images, labels))
    return list(zip(*chunks, strict=True))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels, label_smoothing=0.1)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return the accuracy in percent: shown beside the loss, tested with `--metric-tolerance`."""
    hits = [(model(images).argmax(-1) == labels).float() for images, labels in eval_batches()]
    return {"accuracy": 100 * torch.cat(hits).mean().item()}
