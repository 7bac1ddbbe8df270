"""P measured from an optimizer's own steps, where its class is not one whose rule is known.

A copy of the optimizer steps a copy of one parameter alone, from its present state, with the last
gradient plus and minus a random d. With U the update, half the difference is, to first order,

    r = (U(g + d) - U(g - d)) / 2 = P d         so  d_i r_i  estimates  P_ii d_i^2

for any optimizer, whatever it couples (an orthogonalised momentum, a trust ratio) and even where U
has no derivative (a sign: d is as large as g's own scatter, so it is the share of signs that turn).
Two draws are made: what they do not have in common is noise. Of what the state may hold, v^(-1/2)
and the like, that which explains the products best is P's shape if it explains them well (FIT);
else P is the product of its rows' and its columns' means, shrunk to 1 by how far two draws agree.

Momentum hands out (1 - beta) of a gradient at once and the rest later: r is divided by 1 - beta.
"""

import copy
import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from autoprec.device.random_state import seeded
from autoprec.device.ranks import local_part
from autoprec.sensitivity.moments import Rule, State, moment_rule, number, outer, shape_rules
from autoprec.sensitivity.real import of_dtype, real_view
from autoprec.workload.optimizers import twin_of

SIZE = 0.5  # of d, in root mean squares of g
FIT = 0.8  # cosine; of a matrix Adam's own v reaches 0.9 and more, one of another basis 0.3 to 0.7
FIT_OF_VECTOR = 0.5  # of few elements, each of which is a row: their products are no better test
LEAST = 0.05  # of a row's mean P among all rows
FAILURES = (  # of foreign code that is run otherwise than it was written for
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def measured_rule(
    optimizer: Optimizer, group: State, parameter: Tensor, *, seed: int
) -> Rule | None:
    """Return P of a parameter from what the optimizer does; None where that cannot be told.

    It takes the gradient that the parameter has now, and changes nothing.
    """
    if parameter.grad is None:
        return None
    g = real_view(local_part(parameter.grad.detach().to_dense())).float()
    generator = torch.Generator(g.device).manual_seed(seed)
    products, squares = [], []
    for _ in range(2):
        d = torch.randn(g.shape, generator=generator, device=g.device) * _scatter(g) * SIZE
        try:
            ends = [_stepped(optimizer, group, parameter, g + sign * d) for sign in (1.0, -1.0)]
        except FAILURES:
            return None
        products.append((ends[1] - ends[0]).mul_(d).mul_(0.5))  # d r
        squares.append(d.square_())
    total = sum(float(product.sum()) for product in products)
    if not math.isfinite(total) or total == 0.0:
        return None
    rule = _fitting(optimizer.state.get(parameter, {}), group, parameter, g, products, squares)
    if rule is None:  # P as a mean over rows times a mean over columns
        rows, columns = (_profile(products, squares, dim=dim) for dim in (1, 0))
        rule = Rule("measured", gain=outer(rows[None], columns[None]))
    explained = sum(float((rule.weight(g).square_() * square).sum()) for square in squares)
    momentum = number(group.get("momentum", group.get("betas", (0.0,))[0]), 0.0)
    at_once = (1.0 - momentum) * (1.0 + momentum * bool(group.get("nesterov", False)))
    # the sign is of `maximize`
    return replace(rule, rate=abs(total) / max(explained, 1e-30) / max(at_once, 1e-3))


def _scatter(g: Tensor) -> Tensor:
    """Return the root mean square of g's rows times that of its columns; 0 where g is 0."""
    square = _matrix(g.square())
    rows, columns, mean = square.mean(1, keepdim=True), square.mean(0), square.mean()
    spread = (rows * columns / mean.clamp_min(1e-30)).sqrt_().reshape(g.shape)
    return spread * (g != 0)


def _stepped(optimizer: Optimizer, group: State, parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the parameter after one step of a copy of the optimizer, at a learning rate of 1."""
    own = local_part(parameter.detach()).clone().requires_grad_()
    own.grad = of_dtype(gradient, own)
    # other parameters, in attributes of the optimizer, stay themselves
    memo: dict[int, Any] = {
        id(p): own if p is parameter else p for g in optimizer.param_groups for p in g["params"]
    }
    state = tree_map_only(Tensor, local_part, dict(optimizer.state.get(parameter, {})))
    settings = {name: value for name, value in group.items() if name != "params"}
    if "lr" in settings:
        is_tensor = isinstance(settings["lr"], Tensor)
        settings["lr"] = torch.ones_like(settings["lr"]) if is_tensor else 1.0
    groups = [{**copy.deepcopy(settings, memo), "params": [own]}]
    states = defaultdict(dict, {own: copy.deepcopy(state, memo)} if state else {})
    other = twin_of(optimizer, memo, param_groups=groups, state=states)
    with seeded(0):  # stochastic rounding is the same in all copies
        other.step()
    return real_view(own.detach()).float()


def _fitting(
    state: State,
    group: State,
    parameter: Tensor,
    g: Tensor,
    products: list[Tensor],
    squares: list[Tensor],
) -> Rule | None:
    """Return the first shape of P, of those that the state may hold, that explains the products."""
    known = moment_rule(state, group, parameter)
    least = FIT if g.dim() > 1 else FIT_OF_VECTOR
    seen, square = torch.stack(products).reshape(-1), torch.stack(squares)
    for rule in [*([known] if known else []), *shape_rules(state, parameter)]:
        expected = (square * rule.weight(g).square_()).reshape(-1)
        if abs(float(torch.cosine_similarity(seen, expected, dim=0))) > least:
            return rule
    return None


def _profile(products: list[Tensor], squares: list[Tensor], *, dim: int) -> Tensor:
    """Return the mean P of every row (dim 1) or column (0) over that of all."""
    found, mean = [], sum(p.sum() for p in products) / sum(s.sum() for s in squares)
    for product, square in zip(map(_matrix, products), map(_matrix, squares), strict=True):
        totals = square.sum(dim)
        ratio = product.sum(dim) / totals.clamp_min(1e-30) / mean
        found.append(torch.where(totals > 0, ratio, 1.0) - 1.0)
    one, other = found
    # the correlation of two draws says which part of their mean is P, and which is noise
    common = float((one * other).mean() / ((one**2 + other**2).mean() / 2).clamp_min(1e-30))
    common = max(common, 0.0)
    shrunk = (one + other) / 2 * (2 * common / (1 + common)) + 1.0
    return shrunk.clamp_(LEAST, 1 / LEAST)


def _matrix(values: Tensor) -> Tensor:
    """Return a view of rows; of a vector every element is one."""
    return values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
