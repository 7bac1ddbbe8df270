"""What the families of bench/convergence_families.py train on: text, digits, noise, clicks."""

import ast
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODULES = (
    *("argparse", "ast", "codecs", "datetime", "doctest", "enum", "inspect", "pickle"),
    *("pdb", "smtplib", "socket", "ssl", "statistics", "tarfile", "typing", "zipfile"),
)
MASKED = 8  # the character of a piece that the encoder is to find
Batch = tuple[Tensor, ...]
Draw = Callable[[torch.Generator, bool], Batch]  # a batch; True: a held-out one


def _ascii(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii", "ignore")))


@cache
def sources() -> tuple[Tensor, ...]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return tuple(_ascii((folder / f"{name}.py").read_text("utf-8")) for name in MODULES)


@cache
def all_sources() -> Tensor:
    return torch.cat(sources())


@cache
def docstrings() -> Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"])
    kinds = ast.FunctionDef | ast.ClassDef | ast.Module
    trees = (ast.parse(file.read_text("utf-8")) for file in sorted(folder.glob("*.py")))
    found = (ast.get_docstring(n) for tree in trees for n in ast.walk(tree) if isinstance(n, kinds))
    return _ascii("\n\n".join(text for text in found if text))


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return pixels[order], torch.tensor(labels)[order]


def windows(text: Tensor, held_out: bool, count: int, length: int, generator: Any) -> Tensor:
    """Return pieces of a text: of its last tenth where held out."""
    cut = len(text) * 9 // 10
    low, high = (cut, len(text) - length) if held_out else (0, cut - length)
    starts = torch.randint(low, high, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length)]


def draw_few_digits(generator: torch.Generator, held_out: bool) -> Batch:
    images, labels = draw_digits(generator, held_out)
    return images[:16], labels[:16]


def draw_digits(generator: torch.Generator, held_out: bool) -> Batch:
    images, labels = digits()
    low, high = (1400, len(labels)) if held_out else (0, 1400)
    chosen = torch.randint(low, high, (32,), generator=generator)
    across, down = torch.randint(-1, 2, (2,), generator=generator).tolist()
    shifted = images[chosen].roll((across, down), (2, 3))
    return shifted + 0.8 * torch.randn(32, 1, 8, 8, generator=generator), labels[chosen]


def draw_noise(generator: torch.Generator, held_out: bool) -> Batch:
    images, _ = digits()
    low, high = (1400, len(images)) if held_out else (0, 1400)
    clean = images[torch.randint(low, high, (64,), generator=generator)].flatten(1)
    level = 1.5 * torch.rand(64, 1, generator=generator)  # an angle: 0 is clean
    noise = torch.randn(64, 64, generator=generator)
    return level.cos() * clean + level.sin() * noise, level, noise


def draw_clicks(generator: torch.Generator, held_out: bool) -> Batch:
    """Return users, items and clicks; who clicks on what is decided by random tastes."""
    teacher = torch.Generator().manual_seed(7)
    tastes, traits = torch.randn(2, 128, 4, generator=teacher)
    users, items = torch.randint(0, 128, (2, 256), generator=generator)
    chance = torch.sigmoid(1.5 * (tastes[users] * traits[items]).sum(-1))
    return users, items, (torch.rand(256, generator=generator) < chance).float()


def draw_text(text: Callable[[], Tensor], count: int, length: int) -> Draw:
    def draw(generator: torch.Generator, held_out: bool) -> Batch:
        return (windows(text(), held_out, count, length, generator),)

    return draw


def draw_masked(generator: torch.Generator, held_out: bool) -> Batch:
    pieces = windows(all_sources(), held_out, 16, 16, generator)
    hidden = pieces[:, MASKED].clone()
    pieces[:, MASKED] = 0
    return pieces, hidden
