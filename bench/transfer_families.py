"""Families of models at any width and depth, from `transformers` configs, for bench/transfer.py.

    llama      rotary positions, RMSNorm, gated MLP; bytes of the standard library's sources
    gpt2       GPT-2's block with nn.Linear (GPTBigCode without multi-query), fused q, k, v
    vit        a vision transformer on scikit-learn's handwritten digits
    bert       a post-norm encoder that fills in masked bytes

Heads are 16 wide (32 from width 256 on), the MLP 4 times as wide as the model (Llama's 8/3).

A member is built like its family in one of two ways. `plain`: with the library's initial standard
deviation of 0.02 and a learning rate of 1e-3 at every width. `matched`: linears begin with the gain
that they have at width FULL_WIDTH, std = 0.02 sqrt(FULL_WIDTH / width), and the learning rate is
1e-3 at width 128 and falls as 1 / width.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import char_gpt
import digits_cnn

BATCH, SEQUENCE = 8, 64  # of text
IMAGES = 64
MASK, MASKED_SHARE = 1, 0.15  # byte 1 is in no source file
VOCABULARY = 256
FULL_WIDTH = 512

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Member:
    """One model of a family, as a workload."""

    family: str
    width: int
    depth: int
    is_matched: bool = True

    def build_model(self) -> nn.Module:
        model: nn.Module = BUILDERS[self.family](self.width, self.depth)
        gain = (FULL_WIDTH / self.width) ** 0.5 if self.is_matched else 1.0
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(gain)
        return model

    def train_batches(self, seed: int) -> Iterator[Batch]:
        source = images if self.family == "vit" else text
        return source(seed, self.family == "bert", held_out=False)

    def eval_batches(self) -> list[Batch]:
        source = images if self.family == "vit" else text
        stream = source(0, self.family == "bert", held_out=True)
        return [next(stream) for _ in range(8)]

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        logits: Tensor = model(inputs).logits
        if self.family in ("llama", "gpt2"):  # the next byte
            logits, targets = logits[:, :-1], targets[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        rate = 1e-3 * (128 / self.width if self.is_matched else 1.0)
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def text(seed: int, is_masked: bool, *, held_out: bool) -> Iterator[Batch]:
    """Yield bytes and what is to be predicted: themselves, or those that are masked."""
    whole, generator = char_gpt.text(), torch.Generator().manual_seed(seed)
    cut = int(0.9 * len(whole))
    part = whole[cut:] if held_out else whole[:cut]
    while True:
        starts = torch.randint(len(part) - SEQUENCE, (BATCH,), generator=generator)
        tokens = torch.stack([part[start : start + SEQUENCE] for start in starts])
        if is_masked:
            masked = torch.rand(tokens.shape, generator=generator) < MASKED_SHARE
            yield tokens.masked_fill(masked, MASK), tokens.masked_fill(~masked, -100)
        else:
            yield tokens, tokens


def images(seed: int, _: bool, *, held_out: bool) -> Iterator[Batch]:
    """Yield images [n, 1, 8, 8] with noise, and labels."""
    pixels, labels = digits_cnn.digits()
    generator = torch.Generator().manual_seed(seed)
    first, count = (len(labels) - 512, 512) if held_out else (0, len(labels) - 512)
    while True:
        chosen = first + torch.randint(count, (IMAGES,), generator=generator)
        noise = torch.randn(pixels[chosen].shape, generator=generator)
        yield pixels[chosen] + 0.3 * noise, labels[chosen]


def heads(width: int) -> int:
    return width // (32 if width >= 256 else 16)


def llama(width: int, depth: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=(width * 8 // 3 + 31) // 32 * 32,
            num_hidden_layers=depth,
            num_attention_heads=heads(width),
            num_key_value_heads=heads(width),
            use_cache=False,
        )
    )


def gpt2(width: int, depth: int) -> Any:
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=VOCABULARY,
            n_positions=SEQUENCE,
            n_embd=width,
            n_layer=depth,
            n_head=heads(width),
            multi_query=False,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )


def vit(width: int, depth: int) -> Any:
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=16,  # ten digits; FP8 takes multiples of 16
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads(width),
        )
    )


def bert(width: int, depth: int) -> Any:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads(width),
            max_position_embeddings=SEQUENCE,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


BUILDERS: dict[str, Callable[[int, int], Any]] = {  # Any: transformers' classes
    "llama": llama,
    "gpt2": gpt2,
    "vit": vit,
    "bert": bert,
}
