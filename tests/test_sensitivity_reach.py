"""Which layers' outputs reach which others, by the graph of a pass."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoprec.sensitivity.reach import Reach, recorded_reach


class Branches(nn.Module):
    """Two branches behind a trunk, and a head; a module is named in another order than called."""

    def __init__(self, *, is_reentrant: bool = False) -> None:
        super().__init__()
        self.head, self.trunk = nn.Linear(4, 2), nn.Linear(4, 4)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.is_reentrant = is_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x) * self.scale
        if self.is_reentrant:
            left: Tensor = checkpoint(self.left, x, use_reentrant=True)
        else:
            left = self.left(x).relu()
        found: Tensor = self.head(left + self.right(x))
        return found


def reach_of(model: nn.Module, x: Tensor) -> Reach:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    with recorded_reach(layers) as found:
        model(x).sum().backward()
    return found


def test_branches_are_not_in_front_of_each_other() -> None:
    found = reach_of(Branches(), torch.ones(2, 4))
    assert list(found.in_front) == ["trunk", "left", "right", "head"]
    assert found.in_front == {
        "trunk": set(),
        "left": {"trunk"},
        "right": {"trunk"},
        "head": {"trunk", "left", "right"},
    }


def test_a_layer_without_a_history_is_in_front_of_all_that_is_called_later() -> None:
    found = reach_of(Branches(is_reentrant=True), torch.ones(2, 4))
    assert found.in_front["left"] == {"trunk"}
    assert found.in_front["right"] == {"trunk", "left"}


def test_a_layer_that_is_called_again_is_in_front_of_what_comes_between_and_behind_it() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.between = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3000):  # deeper than recursion goes
                x = self.between(self.cell(x))
            return x

    found = reach_of(Loop(), torch.ones(2, 4))
    assert found.in_front == {"cell": {"between"}, "between": {"cell"}}


def test_parameters_go_by_their_layers_and_what_is_no_layers_by_the_one_before_it() -> None:
    model = Branches()
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.trunk.weight  # and is not called
    names = ["head", "trunk", "left", "right", "tied"]
    found = reach_of(model, torch.ones(2, 4)).related(model, names)
    numbers = {name: k for k, (name, _) in enumerate(model.named_parameters())}

    def of(*names: str) -> list[int]:
        return sorted(numbers[name] for name in names)

    trunk = "trunk.weight", "trunk.bias", "scale"  # the first parameter, with nothing before it
    left, right = ("left.weight", "left.bias"), ("right.weight", "right.bias", "tied.bias")
    head = "head.weight", "head.bias"
    assert found["trunk"] == (of(*trunk, *left, *right, *head), [])
    assert found["left"] == (of(*left, *head), of(*trunk))
    assert found["right"] == (of(*right, *head), of(*trunk))
    assert found["head"] == (of(*head), of(*trunk, *left, *right))
    assert found["tied"] == found["trunk"]
