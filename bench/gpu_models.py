"""What bench/gpu_day.py trains: decoders of Llama's shape, a linear in context, options by arm."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.records import BF16_O2, FP32, ModelSpec, Option, Profile
from autoprec.workload.functions import Workload, workload_from

Options = Mapping[str, Option]


@dataclass(frozen=True)
class Sizes:
    """A decoder and its batch; the defaults: Llama3-8B's width, 1.13 B parameters, 8192 tokens."""

    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    blocks: int = 4
    vocabulary: int = 32000
    batch: int = 2
    sequence: int = 4096


# For a whole `tune`: four shapes of linears, since each takes seconds to compile in each option
SMALL = Sizes(2048, 5632, 16, 16, blocks=2, vocabulary=8192, batch=4, sequence=1024)
TINY = Sizes(32, 64, 2, 1, blocks=1, vocabulary=64, batch=2, sequence=16)


class Block(nn.Module):
    """Pre-norm attention and a gated MLP, without position embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, hidden, self.heads = sizes.width, sizes.hidden, sizes.heads
        self.head_width = width // sizes.heads
        kv_width = sizes.kv_heads * self.head_width
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in "qo")
        self.k_proj, self.v_proj = (nn.Linear(width, kv_width, bias=False) for _ in "kv")
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in "gu")
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        # [batch, sequence, width] -> [batch, heads, sequence, head width]
        q, k, v = (
            part.view(*part.shape[:2], -1, self.head_width).transpose(1, 2)
            for part in (self.q_proj(y), self.k_proj(y), self.v_proj(y))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        hidden: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return hidden


class Tail(nn.Module):
    """Final norm, head and loss: one graph of its own, as it holds the largest activations."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Decoder(nn.Module):
    """Embedding, blocks and tail; returns the loss."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.blocks))
        self.tail = Tail(sizes)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.tail(x, targets)
        return loss

    def compile_parts(self, backend: str) -> None:
        """Compile block by block, as torchtitan does: equal blocks share one graph."""
        for part in (*self.blocks, self.tail):
            part.compile(backend=backend, dynamic=False)


def decoder_functions(sizes: Sizes) -> SimpleNamespace:
    """Return next-token training on tokens with something to learn: rare ones, and repetition."""

    def train_batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            half = torch.rand((sizes.batch, sizes.sequence // 2 + 1), generator=generator)
            tokens = (half.pow(3) * sizes.vocabulary).long()
            yield torch.cat([tokens, tokens], dim=1)[:, : sizes.sequence + 1]

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        loss: Tensor = model(tokens[:, :-1], tokens[:, 1:])
        return loss

    return SimpleNamespace(
        build_model=lambda: Decoder(sizes), train_batches=train_batches, loss_fn=loss_fn
    )


def decoder_workload(sizes: Sizes) -> Workload:
    return workload_from(decoder_functions(sizes), name="decoder")


def in_context(K: int, N: int, device: torch.device) -> nn.Sequential:
    """Return a linear with a norm before and an activation behind, which its casts fuse with."""
    with device:  # drawn there: a CPU needs seconds for a large weight
        return nn.Sequential(nn.LayerNorm(K), nn.Linear(K, N, bias=False), nn.Sigmoid())


def options_of(spec: ModelSpec, option: Option) -> dict[str, Option]:
    """Return the option for every layer that takes it, and BF16 for the others."""
    return {
        layer.name: option if option in layer.options else _bf16(layer.options)
        for layer in spec.layers
    }


def fastest_options(profile: Profile) -> dict[str, Option]:
    """Return each layer's fastest option by a profile, FP32 only where there is no other."""
    found = {layer.name: _bf16(layer.options) for layer in profile.model.layers}
    best: dict[str, float] = {}
    for row in profile.layers:
        if row.option == FP32 or row.infeasible or row.total is None:
            continue
        for name in row.names:
            if row.total.median_ms < best.get(name, float("inf")):
                best[name], found[name] = row.total.median_ms, row.option
    return found


def _bf16(options: tuple[Option, ...]) -> Option:
    return BF16_O2 if BF16_O2 in options else FP32
