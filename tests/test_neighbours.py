"""What is right before and behind a layer in a step: functions that a compiler fuses casts with."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.layers import find_layers
from autoprec.model.meta import capture_on_meta
from autoprec.model.neighbours import Neighbour
from autoprec.model.recording import Call
from autoprec.profiler.candidates import make_candidate, surround
from autoprec.profiler.groups import record_step
from autoprec.profiler.surrounded import surrounded_calls
from autoprec.records import FP32
from autoprec.workload.functions import take_batches, workload_from
from tests.constant_clock import CPU

WIDTH = 16


class Block(nn.Module):
    """A LLaMA block without heads: every kind of neighbour that decoders have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.gate, self.up = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32)
        self.down = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).view(2, 8, 2, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 8, WIDTH)
        x = x + self.out(mixed)
        h = self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True))
        y: Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h)).view(2, 8, WIDTH)
        return y


def recorded(model: nn.Module) -> dict[str, list[Call]]:
    def train_batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(2, 8, WIDTH, generator=generator)

    functions = {"build_model": lambda: model, "train_batches": train_batches}
    workload = workload_from({**functions, "loss_fn": lambda m, x: m(x).square().mean()})
    batch = take_batches(workload, seed=0, count=1)[0]
    layers = find_layers(model)
    return record_step(Context(workload, CPU), model, batch, layers, in_surroundings=True)


def name(neighbour: Neighbour | None) -> str:
    return "" if neighbour is None else neighbour.name


def test_neighbours_are_those_that_can_be_fused() -> None:
    found = {}
    for layer, (call,) in recorded(Block()).items():
        assert call.surroundings is not None
        found[layer] = (name(call.surroundings.before), name(call.surroundings.behind))
    assert found == {
        "norm": ("", ""),
        "q": ("rms_norm", ""),  # a view of it goes into the attention
        "k": ("rms_norm", ""),
        "v": ("rms_norm", ""),
        "out": ("", "add"),  # attention makes its input
        "gate": ("mul", "silu"),
        "up": ("mul", "mul"),
        "down": ("mul", "add"),
    }


def test_a_layer_between_its_neighbours_gives_the_gradients_of_the_whole_step() -> None:
    torch.manual_seed(0)
    model = Block()
    calls = recorded(model)
    x = take_batches_of(model)
    for layer in ("gate", "down", "q", "out"):
        between = surrounded_calls(calls[layer])
        assert between is not None
        own = model.get_submodule(layer)
        wide = surround(make_candidate(lambda own=own: own, calls[layer], FP32), between)  # type: ignore[misc]  # a default binds it now
        outputs, gradients = zip(*wide.forward(), strict=True)
        found = torch.autograd.grad(outputs, list(own.parameters()), gradients)
        model.zero_grad()
        model(x).square().mean().backward()
        for got, parameter in zip(found, own.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad)


def take_batches_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, WIDTH, generator=generator)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_keeps_its_neighbours_in_both_passes(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x.requires_grad_()
            y: Tensor = checkpoint(
                lambda z: F.gelu(self.last(F.relu(self.first(z)))), x, use_reentrant=reentrant
            )
            return y

    calls = recorded(Checkpointed())["last"]
    between = surrounded_calls(calls)
    assert between is not None
    assert [one.surroundings.names for one in between if one.surroundings] == [("relu", "gelu")] * 2
    assert sorted(any(g is not None for g in one.gradients) for one in between) == [False, True]


def test_a_layer_with_several_neighbours_or_none_is_timed_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(torch.relu(self.layer(x)))
            return y

    calls = recorded(Twice())["layer"]
    assert len(calls) == 2
    assert surrounded_calls(calls) is None
    alone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softmax(-1))
    assert surrounded_calls(recorded(alone)["0"]) is None


class FastNorm(torch.autograd.Function):
    """Stands for a kernel of a library: torch.compile cannot look into such a one."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum((0, 1))


@torch.library.custom_op("autoprec_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


double.register_fake(torch.empty_like)
double.register_autograd(lambda _, gradient: 2 * gradient)


class Behind(nn.Module):
    """Linears behind kernels of their own, behind torch's, and behind a kernel of many heads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.heads_weight = nn.Parameter(torch.ones(WIDTH // 2))
        names = ("first", "behind_norm", "behind_view", "behind_op", "behind_heads", "plain")
        self.layers = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = FastNorm.apply
        layer = self.layers
        x = layer["first"](x)
        x = layer["behind_norm"](norm(x, self.weight))
        x = layer["behind_view"](norm(x, self.weight).flatten(0, 1)).view(x.shape)
        x = layer["behind_op"](double(x))
        heads = norm(x.reshape(-1, 2, WIDTH // 2), self.heads_weight)
        x = layer["behind_heads"](heads.reshape(x.shape))
        y: Tensor = layer["plain"](F.layer_norm(x, (WIDTH,)))
        return y


def test_a_capture_names_the_kernels_that_no_cast_is_fused_into() -> None:
    workload = workload_from(
        {
            "build_model": Behind,
            "train_batches": lambda seed: iter([torch.ones(4, 4, WIDTH)] * 16),
            "loss_fn": lambda model, batch: model(batch).sum(),
        }
    )
    for spec in (capture_model(Context(workload, CPU)), capture_on_meta(workload)):
        found = {layer.name: layer.made_by for layer in spec.layers if layer.made_by}
        assert found == {
            "layers.behind_norm": "FastNorm",
            "layers.behind_view": "FastNorm",
            "layers.behind_op": "autoprec_tests_double",
        }


def test_neighbours_of_a_sharded_model_are_found_and_can_be_run_later() -> None:
    """FSDP's parameters have no storage of their own, and what it gathers is freed later."""
    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
    )
    try:
        model = Block()
        fully_shard(model)
        found = {layer: call for layer, (call,) in recorded(model).items()}
        for layer, before, behind in (("q", "rms_norm", ""), ("up", "mul", "mul")):
            around = found[layer].surroundings
            assert around is not None
            assert (name(around.before), name(around.behind)) == (before, behind)
            for neighbour in filter(None, (around.before, around.behind)):
                assert neighbour.function(*neighbour.args, **neighbour.kwargs).isfinite().all()
    finally:
        dist.destroy_process_group()
