"""A small Llama that stands for LLaMA2-7B where a plan is proven, on Python's own sources.

autoprec tune examples/llama_meta.py:llama2_7b --meta --target h100-sxm --parallel fsdp=8 \
    --proxy examples/llama_small.py

It is the large model's code, 16 times narrower and 8 times less deep. For its layers to weigh in
the gradient as the large ones do, each linear begins with the gain that it has there (its weights'
standard deviation times the root of the width), and Adam's learning rate times the width is that of
the large run; docs/transfer.md has what happens without.
"""

from collections.abc import Iterator

import char_gpt
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, DEPTH = 256, 4
BATCH, SEQUENCE = 8, 64
LARGE_WIDTH = 4096
LARGE_LR = 3e-4  # LLaMA2-7B's largest (arXiv 2307.09288, section 2.2)


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
    rate = LARGE_LR * LARGE_WIDTH / WIDTH
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
