"""Matrix products outside of layers are counted, whoever calls them; those of layers are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from autoprec.model.layers import find_layers
from autoprec.model.products import products_outside

B, H, S, D = 2, 4, 16, 8
BMM = 2 * B * H * S * S * D  # one product of all heads


class Attention(nn.Module):
    """Attention by `way`, between two projections."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.odd_name, self.out = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)
        self.table = nn.Parameter(torch.randn(H * D, 5))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.odd_name(x).view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
        mixed = self.attend(*heads.unbind())
        found: Tensor = self.out(mixed.transpose(1, 2).reshape(B, S, H * D))
        return found

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.way == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.way == "full":
            return F.scaled_dot_product_attention(query=q, key=k, value=v)
        if self.way == "einsum":
            return torch.einsum("bhst,bhtd->bhsd", torch.einsum("bhsd,bhtd->bhst", q, k), v)
        if self.way == "teacher":
            with torch.no_grad():
                return _product(q, k, v)
        if self.way == "checkpoint":
            result: Tensor = checkpoint(_product, q, k, v, use_reentrant=False)
            return result
        if self.way == "complex":
            return (torch.complex(q, k) @ torch.complex(k, v).mT).abs() @ v
        return q + k + v


def _product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ k.mT @ v


def count(model: nn.Module, *, backward: bool = True) -> float:
    x = torch.randn(B, S, H * D)
    with products_outside(find_layers(model)) as products:
        loss = model(x).sum()
        if backward:
            loss.backward()
    return products.flops


@pytest.mark.parametrize(
    ("way", "forward", "factor"),
    [
        ("causal", BMM, 3.5),  # two products, half of each
        ("full", 2 * BMM, 3.5),
        ("einsum", 2 * BMM, 3.0),
        ("teacher", 2 * BMM, 1.0),
        ("checkpoint", 2 * BMM, 3.0),
        ("complex", BMM, 3.0),  # the other one has no known rate
        ("none", 0, 1.0),
    ],
)
def test_products_are_counted_by_what_runs_and_not_by_names(
    way: str, forward: float, factor: float
) -> None:
    assert count(Attention(way)) == pytest.approx(forward * factor)


def test_products_are_the_same_without_storage() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        counted = [count(Attention(way), backward=False) for way in ("causal", "full", "einsum")]
    assert counted == [3.5 * BMM, 7 * BMM, 6 * BMM]


def test_a_linear_whose_weight_is_used_without_a_call_is_left_to_its_own_price() -> None:
    model = Attention("none")
    x = torch.randn(4, H * D)
    with products_outside(find_layers(model)) as products:
        F.linear(x, model.out.weight)
        (x @ model.table).sum()
    assert products.flops == pytest.approx(3 * 2 * 4 * H * D * 5)


def test_what_a_layer_does_that_raises_leaves_the_count_on() -> None:
    model = Attention("full")
    with products_outside(find_layers(model)) as products:
        with pytest.raises(RuntimeError):
            model.out(torch.randn(3, 3))
        model(torch.randn(B, S, H * D))
    assert products.flops == pytest.approx(7 * BMM)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attention_of_jagged_tensors_is_counted_within_sequences() -> None:
    lengths, rows = (3, 9), torch.randn(12, H * D)

    class Jagged(Attention):
        def forward(self, x: Tensor) -> Tensor:
            ragged = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 3, 12]))
            heads = ragged.view(2, -1, H, D).transpose(1, 2)
            return self.attend(heads, heads, heads).values()

    with torch.no_grad(), products_outside({}) as products:
        Jagged("full")(rows)
    assert products.flops == 2 * 2 * H * D * sum(n * n for n in lengths)


def test_operators_of_functions_run() -> None:
    x = torch.randn(3, 3)
    with products_outside({}) as products:
        doubled = torch.cond(x.sum() > -1e9, lambda x: x + x, lambda x: x - x, (x,))
    assert torch.equal(doubled, x + x)
    assert products.flops == 0
