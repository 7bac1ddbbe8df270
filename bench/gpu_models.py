"""What bench/gpu.py trains: one decoder block of any width, and the arms to compare of a model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from profiler import bf16_plan
from torch import Tensor, nn

from autoprec.records import BF16_O2, FP32, ModelSpec, Option, Profile
from autoprec.workload.functions import Workload, workload_from

Options = Mapping[str, Option]


@dataclass(frozen=True)
class Sizes:
    """A decoder block's dimensions and its batch; the defaults are LLaMA2-7B's, with one block."""

    width: int = 4096
    hidden: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    batch: int = 4
    sequence: int = 2048


class Block(nn.Module):
    """Pre-norm attention and a gated MLP, without position embedding."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.hidden
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in "qkvo"
        )
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in "gu")
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        hidden: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return hidden


class Decoder(nn.Module):
    """Embedding, one block, norm and head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.block = Block(sizes)
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.block(self.embed(tokens))))
        return logits


def decoder_workload(sizes: Sizes) -> Workload:
    """Return a next-token workload on random tokens."""

    def train_batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            shape = (sizes.batch, sizes.sequence + 1)
            yield torch.randint(sizes.vocabulary, shape, generator=generator)

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    functions = {"build_model": lambda: Decoder(sizes), "train_batches": train_batches}
    return workload_from(SimpleNamespace(**functions, loss_fn=loss_fn), name="decoder block")


def make_arms(
    spec: ModelSpec, predictions: Mapping[str, Profile], *, recipes: int | None
) -> dict[str, Options]:
    """Return uniform BF16, uniform FP8 by recipe, and each layer's fastest option as predicted."""
    arms: dict[str, Options] = {"bf16_o2": bf16_plan(spec)}
    options = [o for layer in spec.layers for o in layer.options if o.is_fp8]
    for option in list(dict.fromkeys(options))[:recipes]:
        arms[option.key] = {
            layer.name: option if option in layer.options else arms["bf16_o2"][layer.name]
            for layer in spec.layers
        }
    for label, profile in predictions.items():
        plan = {layer.name: fastest(profile, layer.name) for layer in spec.layers}
        if plan not in arms.values():
            arms[f"plan by {label.removesuffix(' ms')}"] = plan
    return arms


def fastest(profile: Profile, name: str) -> Option:
    """Return a layer's fastest option that is no FP32, where there is one."""
    rows = [row for row in profile.layers if name in row.names and not row.infeasible and row.total]
    timed = {row.option: row.total.median_ms for row in rows if row.total}
    low = {option: ms for option, ms in timed.items() if option != FP32}
    if low:
        return min(low, key=lambda option: low[option])
    layer = profile.model.layer(name)
    return BF16_O2 if BF16_O2 in layer.options else FP32
