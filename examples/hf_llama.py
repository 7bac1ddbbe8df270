"""A small Llama from `transformers`, built from a config, on Python's own sources.

autoprec tune examples/hf_llama.py
"""

from collections.abc import Iterator

import char_gpt
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def build_model() -> nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return char_gpt.train_batches(seed)


def eval_batches() -> list[tuple[Tensor, Tensor]]:
    return char_gpt.eval_batches()


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, _ = batch
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss  # the model shifts the labels itself
    return loss


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
