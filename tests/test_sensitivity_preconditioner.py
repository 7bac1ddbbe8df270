"""P read from every family of optimizers, against what one of their steps really does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoprec.sensitivity.preconditioner import FLOOR, Preconditioner, read_preconditioner

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def trained(make: MakeOptimizer) -> tuple[nn.Parameter, torch.optim.Optimizer, Tensor]:
    """Return a parameter after a few steps, its optimizer, and the next gradient."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(40, generator=generator))
    optimizer = make([parameter])
    scale = torch.logspace(-0.3, 0.3, 40)
    for _ in range(5):
        parameter.grad = scale * torch.randn(40, generator=generator)
        optimizer.step()
    return parameter, optimizer, scale * torch.randn(40, generator=generator)


def weights(found: Preconditioner, parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return P^(1/2) at a gradient."""
    return found.apply(parameter, torch.ones_like(gradient), at=gradient)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adam", lambda p: torch.optim.Adam(p, betas=(0.0, 0.99))),
        ("adam", lambda p: torch.optim.AdamW(p, betas=(0.0, 0.99), weight_decay=0.0)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=1e-3)),
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=1e-3)),
    ],
)
def test_p_times_the_gradient_is_the_next_step(name: str, make: MakeOptimizer) -> None:
    """Without momentum, a step is -lr P g: the elements' ratios must agree."""
    parameter, optimizer, gradient = trained(make)
    found = read_preconditioner(optimizer)
    weight = weights(found, parameter, gradient)
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    optimizer.step()
    step = before - parameter.detach()
    assert found.name == name
    assert found.note == ""
    ratio = step / (weight.square() * gradient)  # lr, up to the floor under sqrt(v)
    assert torch.allclose(ratio, ratio.median().expand(40), rtol=1e-2)


def test_amsgrad_is_read_from_its_maximum() -> None:
    parameter, optimizer, gradient = trained(lambda p: torch.optim.Adam(p, amsgrad=True))
    optimizer.state[parameter]["max_exp_avg_sq"].mul_(100.0)
    weight = weights(read_preconditioner(optimizer), parameter, torch.zeros_like(gradient))
    optimizer.state[parameter]["max_exp_avg_sq"].div_(100.0)
    plain = weights(read_preconditioner(optimizer), parameter, torch.zeros_like(gradient))
    assert torch.allclose((plain / weight).square(), torch.full((40,), 10.0), rtol=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_weighs_all_alike_and_needs_no_note(momentum: float) -> None:
    parameter, optimizer, gradient = trained(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum)
    )
    found = read_preconditioner(optimizer)
    assert (found.name, found.note) == ("identity", "")
    assert torch.equal(weights(found, parameter, gradient), torch.ones(40))
    assert found.covers(parameter)


def test_an_unknown_optimizer_falls_back_and_says_so() -> None:
    parameter, optimizer, gradient = trained(lambda p: torch.optim.Rprop(p))
    found = read_preconditioner(optimizer)
    assert found.name == "identity"
    assert "Rprop keeps no second moment" in found.note
    assert torch.equal(weights(found, parameter, gradient), torch.ones(40))


def test_frozen_and_unlisted_parameters_are_not_covered() -> None:
    listed, frozen, unlisted = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    found = read_preconditioner(torch.optim.SGD([listed, frozen], lr=0.1))
    assert [found.covers(p) for p in (listed, frozen, unlisted)] == [True, False, False]


def test_an_element_without_gradients_is_held_down_by_the_floor() -> None:
    parameter, optimizer, gradient = trained(lambda p: torch.optim.Adam(p))
    optimizer.state[parameter]["exp_avg_sq"][0] = 0.0
    gradient[0] = 0.0
    weight = weights(read_preconditioner(optimizer), parameter, gradient)
    moment = optimizer.state[parameter]["exp_avg_sq"]
    typical = float((moment / (1 - 0.999**6)).sqrt().mean())
    assert float(weight[0]) ** -2 == pytest.approx(FLOOR * typical, rel=0.01)
