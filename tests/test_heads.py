"""How many attention heads a projection is made of, by what the modules around it say."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.roles import head_counts
from autoprec.records import ModelSpec
from autoprec.workload.functions import workload_from

WIDTH = 64


class Attention(nn.Module):
    """Projections of grouped-query attention; the attributes are what a test gives."""

    def __init__(self, key_value_width: int = WIDTH, **attributes: object) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, key_value_width)
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o_proj(self.q_proj(x)) + self.k_proj(x).sum()
        return out


class Block(nn.Module):
    """An attention and an MLP, under a config that may say how many heads there are."""

    def __init__(self, attention: nn.Module, config: object = None) -> None:
        super().__init__()
        self.attn = attention
        self.up_proj = nn.Linear(WIDTH, WIDTH)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up_proj(self.attn(x))
        return out


def captured(model: nn.Module) -> ModelSpec:
    functions = {
        "build_model": lambda: model,
        "train_batches": lambda seed: iter([torch.ones(16, WIDTH)] * 64),
        "loss_fn": lambda m, x: m(x).square().mean(),
    }
    return capture_model(
        Context(workload_from(SimpleNamespace(**functions), name="toy"), torch.device("cpu"))
    )


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"num_heads": 8}, (8, 8)),
        ({"n_heads": 8, "n_kv_heads": 2}, (8, 2)),
        ({"n_head": 4, "n_kv_head": 1}, (4, 1)),
        ({"config": SimpleNamespace(num_attention_heads=4, num_key_value_heads=None)}, (4, 4)),
        ({"num_heads": [4, 8]}, None),
        ({}, None),
    ],
)
def test_attributes_of_the_usual_libraries_are_read(
    attributes: dict[str, object], expected: tuple[int, int] | None
) -> None:
    found = head_counts(Block(Attention(**attributes)), "attn.q_proj")  # type: ignore[arg-type]
    assert found == expected


def test_the_nearest_module_that_says_it_counts() -> None:
    config = SimpleNamespace(num_attention_heads=2)
    assert head_counts(Block(Attention(num_heads=4), config), "attn.q_proj") == (4, 4)
    assert head_counts(Block(Attention(), config), "attn.q_proj") == (2, 2)


def test_a_deprecated_attribute_is_read_in_silence() -> None:
    class OfDiffusers(Attention):
        @property
        def num_heads(self) -> int:
            warnings.warn("use the config", FutureWarning, stacklevel=2)
            return 4

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert head_counts(Block(OfDiffusers()), "attn.q_proj") == (4, 4)


def test_projections_alone_have_heads() -> None:
    config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2)
    spec = captured(Block(Attention(key_value_width=16), config))
    heads = {layer.name: layer.heads for layer in spec.layers}
    assert heads == {"attn.q_proj": 8, "attn.k_proj": 2, "attn.o_proj": 8, "up_proj": None}


def test_a_count_that_does_not_fit_the_width_is_none_of_this_layer() -> None:
    spec = captured(Block(Attention(num_heads=7)))
    assert {layer.heads for layer in spec.layers} == {None}
