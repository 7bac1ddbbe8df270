"""P: how the user's optimizer weighs the elements of a gradient.

A step along -P g lowers the loss by g'Pg to first order, and noise d in the gradient costs half of
d'PHPd. Where P is the diagonal that evens out the curvature H (what Adam's is for), PHP is P up to
a factor, so gradient error and gradient are compared in the norm x'Px = |P^(1/2) x|^2. The norm
|P x|^2 would take H for even already, and parameters that do not matter would outvote the rest:
the gradient of a key bias is nothing but rounding noise, its v is about 0 and its P is 1/eps.

With t steps behind it, Adam takes in this very gradient g and then divides by

    sqrt(v') + eps      v' = (beta2 v_raw + (1 - beta2) g^2) / (1 - beta2^(t + 1))

and so does P here: an element that the warm-up never touched (a rare token's row) is not 1/eps.
Besides, eps is at least FLOOR times the mean of sqrt(v): the gradient of elements below is rounding
noise (biases before a softmax or a batch norm), and what they can add to g'Pg is below FLOOR.

    Adam family      as above, from `exp_avg_sq` (amsgrad: its maximum)
    RMSprop          sqrt(alpha v + (1 - alpha) g^2) + eps, from `square_avg`
    Adagrad          sqrt(sum + g^2) + eps, from `sum`
    SGD, momentum    1
    any other        1, with a note that says so
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-3  # of the mean sqrt(v); without it one conv bias was 99 % of a small CNN's BF16 error
PLAIN = ("SGD", "ASGD")  # their update is proportional to the (averaged) gradient


@dataclass(frozen=True)
class ElementRule:
    """The second moment v' = keep * v + take * g^2 of one parameter; P = 1 / (sqrt(v') + eps)."""

    moment: Tensor
    keep: float
    take: float
    eps: float

    def weight(self, gradient: Tensor) -> Tensor:
        """Return P^(1/2) for this gradient, FP32, of its shape."""
        moment = self.moment.to(gradient.device, torch.float32)
        updated = (moment * self.keep).addcmul_(gradient, gradient, value=self.take)
        return updated.sqrt_().add_(self.eps).rsqrt_()


@dataclass(frozen=True)
class Preconditioner:
    """P by parameter. `name` goes into the record; `note` says when P is a stated fallback.

    Parameters that the optimizer does not update weigh nothing: they are not in `updated`.
    """

    name: str
    note: str
    updated: frozenset[int]  # id of the parameter
    rules: dict[int, ElementRule] = field(default_factory=dict)

    def covers(self, parameter: Tensor) -> bool:
        """Whether the optimizer updates this parameter at all."""
        return id(parameter) in self.updated

    def apply(self, parameter: Tensor, values: Tensor, *, at: Tensor) -> Tensor:
        """Return P^(1/2) times values of a parameter's shape, P at the reference gradient `at`."""
        rule = self.rules.get(id(parameter))
        return values if rule is None else values * rule.weight(at.to(values.device))

    def squared_norm(self, parameter: Tensor, values: Tensor, *, at: Tensor) -> float:
        """Return x'Px of such values x."""
        return float(self.apply(parameter, values, at=at).square().sum(dtype=torch.float64))


def read_preconditioner(optimizer: torch.optim.Optimizer) -> Preconditioner:
    """Read P from an optimizer that has taken a few steps."""
    rules: dict[int, ElementRule] = {}
    names: set[str] = set()
    updated = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            updated.add(id(parameter))
            found = _element_rule(optimizer.state.get(parameter, {}), group, parameter)
            if found is not None:
                names.add(found[0])
                rules[id(parameter)] = found[1]
    if rules:
        name = "+".join(sorted(names))
        return Preconditioner(name, "", frozenset(updated), _with_floor(rules))
    cls = type(optimizer).__name__
    note = (
        ""
        if cls in PLAIN
        else f"{cls} keeps no second moment that autoprec knows; errors are in plain norm"
    )
    return Preconditioner("identity", note, frozenset(updated))


def _with_floor(rules: dict[int, ElementRule]) -> dict[int, ElementRule]:
    # the mean of sqrt(v) over all elements of all parameters
    total = sum(float((r.moment.float() * r.keep).sqrt().sum()) for r in rules.values())
    floor = FLOOR * total / max(sum(r.moment.numel() for r in rules.values()), 1)
    return {key: replace(rule, eps=max(rule.eps, floor)) for key, rule in rules.items()}


def _element_rule(
    state: dict[str, Any], group: dict[str, Any], parameter: Tensor
) -> tuple[str, ElementRule] | None:
    """Return the family's name and rule of one parameter, or None when it has no second moment."""
    eps = _number(group.get("eps"), 1e-8)
    for key in ("max_exp_avg_sq", "exp_avg_sq"):
        if _fits(state.get(key), parameter):
            steps = _number(state.get("step"), 1.0)
            beta2 = _number(group.get("betas", (0.9, 0.999))[1], 0.999)
            # v' after this gradient, with the bias correction of step t + 1 folded in
            correction = 1.0 - beta2 ** (steps + 1.0)
            rule = ElementRule(state[key], beta2 / correction, (1.0 - beta2) / correction, eps)
            return "adam", rule
    if _fits(state.get("square_avg"), parameter):
        alpha = _number(group.get("alpha"), 0.99)
        return "rmsprop", ElementRule(state["square_avg"], alpha, 1.0 - alpha, eps)
    if _fits(state.get("sum"), parameter):
        return "adagrad", ElementRule(state["sum"], 1.0, 1.0, eps)
    return None


def _fits(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _number(value: Any, default: float) -> float:  # Any: optimizer state is untyped
    return default if value is None else float(value)
