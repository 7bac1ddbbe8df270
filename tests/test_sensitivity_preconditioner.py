"""P of every kind of optimizer, against what one of their steps really does."""

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoprec.integrations.launch.optimizers import copy_optimizer
from autoprec.sensitivity.preconditioner import FLOOR, Preconditioner, read_preconditioner
from tests.optimizer_zoo import ZOO, Kind, Together

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
UNREACHED = 5  # a row of the first matrix that no gradient reaches
KINDS = {kind.name: kind for kind in ZOO}


class Uneven(nn.Module):
    """Matrices and a vector whose gradients differ by 30, and by 10 between rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Parameter(torch.randn(48, 32) / 10)
        self.wide = nn.Parameter(torch.randn(24, 80) / 10)
        self.vector = nn.Parameter(torch.ones(64))
        self.square = nn.Parameter(torch.randn(64, 64) / 10)

    def gradients(self, generator: torch.Generator) -> dict[Tensor, Tensor]:
        found: dict[Tensor, Tensor] = {}
        for place, parameter in enumerate(self.parameters()):
            rows = torch.logspace(-0.5, 0.5, len(parameter)) * 10.0 ** (-place / 2)
            noise = torch.randn(parameter.shape, generator=generator)
            found[parameter] = noise * rows.reshape(-1, *[1] * (parameter.dim() - 1))
        found[self.tall][UNREACHED] = 0.0
        return found


def trained_model(kind: Kind) -> tuple[Uneven, torch.optim.Optimizer, dict[Tensor, Tensor]]:
    """Return a model after some steps, its optimizer, and the next gradients."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Uneven()
    optimizer = kind.make(model)
    for _ in range(20):
        for parameter, gradient in model.gradients(generator).items():
            parameter.grad = gradient
        optimizer.step()
    return model, optimizer, model.gradients(generator)


def after_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradients: dict[Tensor, Tensor]
) -> list[Tensor]:
    """Return the parameters after a step of copies along the gradients."""
    other = copy.deepcopy(model)
    stepping = copy_optimizer(optimizer, model, other)
    for parameter, own in zip(model.parameters(), other.parameters(), strict=True):
        own.grad = gradients[parameter].clone()
    stepping.step()
    return [own.detach() for own in other.parameters()]


# by how much a parameter's real response may differ from P's beside the others', and the rank
# correlation of both over single errors; a sign's response is a count of the signs that turn
MEASURED = {
    "Muon and AdamW": (1.5, 0.98),
    "MuonWithAdam": (2.2, 0.98),  # one part has momentum 0.95 with Nesterov, the other 0.9
    "Lion": (4.0, 0.9),
    "LARS": (1.3, 0.98),
    "LAMB": (1.6, 0.98),
    "AdaBelief": (2.0, 0.97),
    "Shampoo": (1.6, 0.97),
    "SOAP": (2.0, 0.97),
    "schedule-free": (1.6, 0.98),
}
KNOWN = (
    "SGD, Nesterov",
    "Adam",
    "NAdam",
    "RAdam",
    "Adamax",
    "Adagrad",
    "Adadelta",
    "Adafactor",
    "transformers Adafactor",
    "RMSprop, centered",
)


@pytest.mark.parametrize("name", [*KNOWN, *MEASURED])
def test_errors_are_weighed_as_the_optimizers_own_step_weighs_them(name: str) -> None:
    """x'Px of random errors is x times the change of the real update, up to one factor for all."""
    model, optimizer, gradients = trained_model(KINDS[name])
    found = read_preconditioner(optimizer)
    assert found.note == ""
    generator = torch.Generator().manual_seed(2)
    parameters = list(model.parameters())
    real, expected = torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    for number in range(32):
        place = number % len(parameters)
        parameter = parameters[place]
        first = int(torch.randint(len(parameter) - 8, (), generator=generator))
        size = math.exp(float(torch.empty(()).uniform_(-3.0, -0.7, generator=generator)))
        error = torch.zeros_like(parameter.detach())
        rows = torch.randn(error[first : first + 8].shape, generator=generator)
        error[first : first + 8] = rows * gradients[parameter].square().mean().sqrt() * size
        error[gradients[parameter] == 0] = 0.0
        plus = after_step(model, optimizer, {**gradients, parameter: gradients[parameter] + error})
        minus = after_step(model, optimizer, {**gradients, parameter: gradients[parameter] - error})
        real[number] = float(((minus[place] - plus[place]) / 2 * error).sum())
        expected[number] = found.squared_norm(parameter, error, at=gradients[parameter])
    factor, least_rank = MEASURED.get(name, (1.3, 0.99))
    ranks = torch.stack([real.argsort().argsort(), expected.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > least_rank
    ratios = (real / expected).reshape(-1, len(parameters)).median(0).values
    assert float((ratios / ratios.median()).log().abs().max()) < math.log(factor)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_a_quantised_state_is_read_as_what_it_stands_for(name: str) -> None:
    """Its P is plain Adam's, as far as the bits go."""
    parameter = nn.Parameter(torch.zeros(64, 128))
    model = nn.ParameterList([parameter])
    model.append(nn.Parameter(torch.zeros(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised, plain = KINDS[name].make(model), torch.optim.AdamW(model.parameters())
    spread = torch.logspace(-0.5, 0.5, 64)[:, None]
    generator = torch.Generator().manual_seed(0)
    plain_state = {"step": torch.tensor(5.0), "exp_avg_sq": spread**2 * torch.ones(64, 128)}
    plain.state[parameter] = plain_state
    buffer = quantised._new_buffer(parameter, False)  # type: ignore[attr-defined]  # torchao's own
    buffer.copy_(plain_state["exp_avg_sq"])
    quantised.state[parameter] = {**plain_state, "exp_avg_sq": buffer}
    at = spread * torch.randn(64, 128, generator=generator)
    weights = [read_preconditioner(each).weight(parameter, at=at) for each in (quantised, plain)]
    assert (weights[0] / weights[1] - 1).abs().max() < (0.3 if "4bit" in name else 0.05)


def weights_of(kind: str) -> tuple[Uneven, Preconditioner, dict[Tensor, Tensor]]:
    model, optimizer, gradients = trained_model(KINDS[kind])
    return model, read_preconditioner(optimizer), gradients


@pytest.mark.parametrize("kind", ["Adam", "Adamax", "Adagrad", "Adafactor", "RMSprop", "LAMB"])
def test_what_no_gradient_reaches_weighs_nothing(kind: str) -> None:
    model, found, gradients = weights_of(kind)
    weight = found.weight(model.tall, at=gradients[model.tall])
    assert float(weight[UNREACHED].max()) == 0.0
    assert float(weight[UNREACHED + 1].min()) > 0.0
    # a gradient that reaches it at last is taken in by P, as the optimizer does
    gradients[model.tall][UNREACHED] = 0.1
    reached = found.weight(model.tall, at=gradients[model.tall])
    assert 0.0 < float(reached[UNREACHED].max()) < 30 * float(weight.max())


def test_each_groups_learning_rate_is_part_of_p() -> None:
    """An encoder at 1e-4 of the head's rate weighs 1e-4 as much; also where it is a tensor."""
    encoder, head, still = (nn.Parameter(torch.ones(8)) for _ in range(3))
    groups = [
        {"params": [encoder], "lr": torch.tensor(1e-7)},
        {"params": [head], "lr": 1e-3},
        {"params": [still], "lr": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    for parameter in (encoder, head, still):
        parameter.grad = torch.ones(8)
    optimizer.step()
    found, x = read_preconditioner(optimizer), torch.ones(8)
    norms = [found.squared_norm(p, x, at=x) for p in (encoder, head, still)]
    assert norms[0] / norms[1] == pytest.approx(1e-4, rel=1e-3)
    assert norms[2] == 0.0


def test_a_schedule_that_starts_at_zero_weighs_as_the_rate_that_it_scales() -> None:
    parameter = nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0.0
    found = read_preconditioner(optimizer)
    assert torch.equal(found.weight(parameter, at=torch.ones(8)), torch.ones(8))


@pytest.mark.parametrize("name", ["Muon and AdamW", "MuonWithAdam"])
def test_two_rules_in_one_optimizer_are_both_read(name: str) -> None:
    _, found, _ = weights_of(name)
    assert set(found.name.split("+")) == {"adam", "measured"}
    assert found.note == ""


def test_the_share_without_a_rule_is_said_and_weighs_as_the_mean_of_the_others() -> None:
    known, unknown = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(4))
    for parameter in (known, unknown):
        parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.Adam([known])
    adam.step()
    other = Together([unknown], lr=0.1)
    other.inner = adam  # type: ignore[attr-defined]  # as wrappers do
    found = read_preconditioner(other)
    assert found.name == "adam+identity"
    assert "Together: no rule for 25 % of the elements" in found.note
    at = torch.zeros(12)
    assert float(found.weight(unknown, at=at[:4])[0]) == pytest.approx(
        float(found.weight(known, at=at)[0]), rel=1e-3
    )


def test_what_no_gradient_has_come_to_is_not_told_as_a_rule_that_is_unknown() -> None:
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))  # as a last block's unused output
    optimizer = torch.optim.RMSprop(model.parameters())
    model[0](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    found = read_preconditioner(optimizer)
    assert found.name == "rmsprop"
    assert found.note == (
        "no gradient has come to 50 % of the elements yet, whose errors are taken in plain norm"
    )


def test_measuring_changes_nothing() -> None:
    model, optimizer, _ = trained_model(KINDS["Lion"])
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in model.parameters()]
    drawn = torch.get_rng_state()
    read_preconditioner(optimizer)
    assert torch.equal(drawn, torch.get_rng_state())
    for parameter, before, moment in zip(model.parameters(), parameters, moments, strict=True):
        assert torch.equal(parameter, before)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
        assert optimizer.state[parameter]["step"] == 20


def test_frozen_and_unlisted_parameters_are_not_covered() -> None:
    listed, frozen, unlisted = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    found = read_preconditioner(torch.optim.SGD([listed, frozen], lr=0.1))
    assert [p in found.rules for p in (listed, frozen, unlisted)] == [True, False, False]


def test_an_element_of_nothing_but_rounding_noise_is_held_down_by_the_floor() -> None:
    model, optimizer, gradients = trained_model(KINDS["Adam"])
    moment = optimizer.state[model.vector]["exp_avg_sq"]
    moment[0], gradients[model.vector][0] = 1e-16, 0.0
    found = read_preconditioner(optimizer)
    weight = found.weight(model.vector, at=gradients[model.vector])
    roots = torch.cat(
        [optimizer.state[p]["exp_avg_sq"].sqrt().flatten() for p in model.parameters()]
    )
    typical = float(roots[roots > 0].mean()) / math.sqrt(1 - 0.999**21)
    assert float(weight[0]) ** -2 == pytest.approx(FLOOR * typical, rel=0.01)


def test_an_optimizer_that_keeps_the_generator_it_was_handed_is_measured_and_copied() -> None:
    model, optimizer, _ = trained_model(KINDS["Lion"])
    optimizer.handed = model.parameters()  # type: ignore[attr-defined]  # as Adam-mini does
    assert read_preconditioner(optimizer).note == ""
    assert len(copy_optimizer(optimizer, model, Uneven()).state) == len(optimizer.state)
