"""Optimizers for the Mlp under a plan, steps of training, and exact comparisons."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprec
from tests.models import Mlp, mlp_workload
from tests.plans import plan_for

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05),
    "sgd-momentum": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, foreach=True),
    "adam-amsgrad": functools.partial(torch.optim.Adam, lr=1e-3, amsgrad=True),
    "adamw-foreach": functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True),
    "adamw-fused": functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "adam-fused": functools.partial(torch.optim.Adam, lr=1e-3, amsgrad=True, fused=True),
    "sgd-fused": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, fused=True),
    "adagrad-fused": functools.partial(torch.optim.Adagrad, lr=1e-2, fused=True),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "adafactor": torch.optim.Adafactor,
    "asgd": torch.optim.ASGD,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
}
FOREACH: tuple[Any, ...] = (  # Any: optimizers' classes, of which each takes other arguments
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
OPTIMIZERS |= {
    f"{make.__name__.lower()}-foreach": functools.partial(make, foreach=True) for make in FOREACH
}


def applied(
    make: MakeOptimizer = OPTIMIZERS["adamw-foreach"], model: nn.Module | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = model or Mlp()
    return autoprec.apply(plan_for(model), model, make(model.parameters()))


def batches(seed: int = 0) -> Iterator[Any]:
    return mlp_workload().train_batches(seed)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, first: int = 0
) -> list[float]:
    losses = []
    for x, y in itertools.islice(batches(), first, first + steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x).float(), y)  # torch 2.11 differentiates none of BF16 and FP32
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def exact(model: nn.Module) -> list[Tensor]:
    return weights(autoprec.master_view(model))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
