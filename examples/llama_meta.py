"""Decoders too large for one machine, built from their public dimensions: no weights are loaded.

autoprec tune examples/llama_meta.py:llama2_7b --meta --target h100-sxm --parallel fsdp=8 \
    --proxy examples/llama_small.py

Without --proxy the plan is chosen by time alone: nothing is known of what FP8 does to the loss.
The others are `llama2_13b`, `llama3_8b`, `llama3_70b` and `command_r_35b`; without a name it is
`llama2_7b`. `build_model` would allocate the weights as usual: it is `--meta` that keeps them away.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

BATCH = 2  # sequences per device and step
SEQUENCE = 4096  # tokens


@dataclass(frozen=True)
class Decoder:
    """A workload: the functions of the user's file as methods."""

    config: LlamaConfig | CohereConfig

    def build_model(self) -> nn.Module:
        cohere = isinstance(self.config, CohereConfig)
        model: nn.Module = (CohereForCausalLM if cohere else LlamaForCausalLM)(self.config)
        return model

    def train_batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            shape = (BATCH, SEQUENCE)
            yield torch.randint(self.config.vocab_size, shape, generator=generator)

    def loss_fn(self, model: nn.Module, tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss


def llama(
    width: int, hidden: int, blocks: int, heads: int, kv_heads: int, vocabulary: int
) -> Decoder:
    return Decoder(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            use_cache=False,
        )
    )


llama2_7b = llama(4096, 11008, 32, 32, 32, 32000)
llama2_13b = llama(5120, 13824, 40, 40, 40, 32000)
llama3_8b = llama(4096, 14336, 32, 32, 8, 128256)
llama3_70b = llama(8192, 28672, 80, 64, 8, 128256)
command_r_35b = Decoder(
    CohereConfig(
        vocab_size=256000,
        hidden_size=8192,
        intermediate_size=22528,
        num_hidden_layers=40,
        num_attention_heads=64,
        num_key_value_heads=64,
        tie_word_embeddings=True,
        use_cache=False,
    )
)

build_model, train_batches, loss_fn = (
    llama2_7b.build_model,
    llama2_7b.train_batches,
    llama2_7b.loss_fn,
)
