"""A small Llama that stands for LLaMA2-7B where a plan is proven, on Python's own sources.

autoprec tune examples/llama_meta.py:llama2_7b --meta --target h100-sxm --parallel fsdp=8 \
    --proxy examples/llama_small.py

It is the large model's code, 16 times narrower and 8 times less deep. For its layers to weigh in
the gradient as the large ones do, each linear begins with the gain that it has there (its weights'
standard deviation times the root of the width); docs/transfer.md has what happens without. The
learning rate is a fifth of the large run's times the ratio of widths, 4.8e-3: that one is reached
after 2,000 steps only, and in the first 75, which are what a proof trains, it left a loss gap of
0.2 % between FP32 and BF16 alone.
"""

from collections.abc import Iterator

import char_gpt
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, DEPTH = 256, 4
BATCH, SEQUENCE = 8, 64
LARGE_WIDTH = 4096
LEARNING_RATE = 1e-3


def build_model() -> nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=688,  # 11008 / 16
        num_hidden_layers=DEPTH,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_((LARGE_WIDTH / WIDTH) ** 0.5)
    return model


def train_batches(seed: int) -> Iterator[Tensor]:
    for tokens, _ in char_gpt.train_batches(seed):
        yield tokens[:BATCH, :SEQUENCE]


def eval_batches() -> list[Tensor]:
    return [tokens[:, :SEQUENCE] for tokens, _ in char_gpt.eval_batches()]


def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss  # the model shifts the labels itself
    return loss


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
