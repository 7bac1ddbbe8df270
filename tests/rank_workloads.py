"""A small decoder-like workload for tests on several ranks, and the same on one process."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from autoprec.device.ranks import world_size
from autoprec.workload.functions import Workload, workload_from

WIDTH, TOKENS, ROWS, CUT = 32, 16, 4, 8


class Block(nn.Module):
    """A normed two-layer MLP around which the residual runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + down


class Decoder(nn.Module):
    """Embedding, two blocks or as many as given, and a head."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def shallow() -> Decoder:
    """Return a decoder of one block, for where depth changes nothing."""
    return Decoder(depth=1)


def train_batches(seed: int) -> Iterator[Tensor]:
    """Yield batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(TOKENS, (ROWS, CUT), generator=generator)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the cross entropy of a fixed function of each token."""
    return F.cross_entropy(model(batch).flatten(0, 1), (batch.flatten() * 3 + 1) % TOKENS)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW at a rate that moves the loss in a few steps."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def shard_blocks(
    model: nn.Module, mesh: Any, **settings: Any
) -> nn.Module:  # Any: a DeviceMesh, FSDP2's settings
    """Shard a decoder block by block with FSDP2, and then what is left."""
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)
    return model


def split_and_shard(model: nn.Module, mesh: Any) -> nn.Module:  # Any: as above
    """Divide each block's linears over `tp`, then shard what is left over `dp`."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.get_submodule("blocks").children():
        parallelize_module(block, mesh["tp"], plan)
    return shard_blocks(model, mesh["dp"])


def split_tokens(model: nn.Module, mesh: Any) -> nn.Module:  # Any: as above
    """Divide linears and vocabulary, and between the linears the tokens: sequence parallelism."""
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "blocks.*.norm": SequenceParallel(),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def all_tp(device_type: str) -> Any:  # Any: as above
    """Return a mesh of all ranks for tensor parallelism."""
    return init_device_mesh(device_type, (world_size(),), mesh_dim_names=("tp",))


def two_by_two(device_type: str) -> Any:  # Any: as above
    """Return a mesh of four ranks: two parts of the data, each on two ranks."""
    return init_device_mesh(device_type, (2, 2), mesh_dim_names=("dp", "tp"))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "build_model": Decoder,
    "train_batches": train_batches,
    "loss_fn": loss_fn,
    "build_optimizer": build_optimizer,
}


def workload(**more: Callable[..., Any]) -> Workload:
    """Return the workload with further functions."""
    return workload_from({**FUNCTIONS, **more}, name="the decoder")


def workload_of(ranks: int, **more: Callable[..., Any]) -> Workload:
    """Return the workload of one process whose batch is those of `ranks` ranks, joined."""

    def joined(seed: int) -> Iterator[Tensor]:
        stream = train_batches(seed)
        while True:
            yield torch.cat(list(islice(stream, ranks)))

    return workload(train_batches=joined, **more)
