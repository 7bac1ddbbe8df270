"""A character GPT on the text that every machine has: Python's own standard library.

autoprec tune examples/char_gpt.py
"""

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 128  # characters per sequence
BATCH = 8  # sequences per batch
WIDTH, HEADS, DEPTH = 256, 4, 4


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).unbind(2)
        heads = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.proj(heads.transpose(1, 2).reshape(batch, length, WIDTH))
        hidden: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return hidden


class CharGPT(nn.Module):
    """A small GPT: logits for the next of 256 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.position = nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


@cache
def text() -> Tensor:
    """Return the standard library's sources as one tensor of byte values."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    joined = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def sample(generator: torch.Generator, part: Tensor) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(part) - BLOCK - 1, (BATCH,), generator=generator)
    rows = torch.stack([part[start : start + BLOCK + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def build_model() -> nn.Module:
    return CharGPT()


def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sample(generator, text()[: int(0.9 * len(text()))])


def eval_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [sample(generator, text()[int(0.9 * len(text())) :]) for _ in range(16)]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
