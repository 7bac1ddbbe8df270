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

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autoprec.device.ranks import local_part, share, sum_over_ranks

FLOOR = 1e-3  # of the mean sqrt(v); without it one conv bias was 99 % of a small CNN's BF16 error
PARTS = 64  # of all parameters; what is made of one on its way is four times its size
SMALLEST_PART = 1 << 12  # elements
PLAIN = ("SGD", "ASGD")  # their update is proportional to the (averaged) gradient


@dataclass(frozen=True)
class ElementRule:
    """The second moment v' = keep * v + take * g^2 of one parameter; P = 1 / (sqrt(v') + eps)."""

    family: str
    moment: Tensor
    keep: float
    take: float
    eps: float

    def weight(self, gradient: Tensor, *, part: slice | None = None) -> Tensor:
        """Return P^(1/2) for this gradient, FP32, of its shape; `part`: of the flat moment."""
        moment = self.moment if part is None else self.moment.reshape(-1)[part]
        moment = moment.to(gradient.device, torch.float32)
        updated = (moment * self.keep).addcmul_(gradient, gradient, value=self.take)
        return updated.sqrt_().add_(self.eps).rsqrt_()


@dataclass(frozen=True)
class Preconditioner:
    """P by parameter. `name` goes into the record; `note` says when P is a stated fallback.

    `rules` has the parameters that the optimizer updates; all others weigh nothing. None is P = 1.
    """

    name: str
    note: str
    rules: dict[Tensor, ElementRule | None]

    @cached_property
    def part(self) -> int:
        """How many elements are weighed at a time: few beside those of all parameters."""
        return max(sum(parameter.numel() for parameter in self.rules) // PARTS, SMALLEST_PART)

    def covers(self, parameter: Tensor) -> bool:
        """Whether the optimizer updates this parameter at all."""
        return parameter in self.rules

    def apply(self, parameter: Tensor, values: Tensor, *, at: Tensor) -> Tensor:
        """Return P^(1/2) times values of a parameter's shape, P at the reference gradient `at`."""
        rule = self.rules[parameter]
        return values if rule is None else values * rule.weight(at.to(values.device))

    def weight(self, parameter: Tensor, *, at: Tensor) -> Tensor:
        """Return P^(1/2) of this rank's part of a parameter, new and FP32, at the gradient `at`."""
        rule = self.rules[parameter]
        if rule is None:
            return torch.ones_like(local_part(parameter.detach()), dtype=torch.float32)
        return rule.weight(at.to(parameter.device))

    def total_weight(self, parameter: Tensor, *, at: Tensor) -> float:
        """Return this rank's share of the sum of P^(1/2) over a parameter's elements."""
        rule = self.rules[parameter]
        if rule is None:
            return share(parameter) * local_part(parameter).numel()
        flat, total = at.reshape(-1), 0.0
        for start in range(0, len(flat), self.part):
            part = slice(start, start + self.part)
            weight = rule.weight(flat[part].to(parameter.device), part=part)
            total += float(weight.sum(dtype=torch.float64))
        return share(parameter) * total

    def squared_norm(
        self, parameter: Tensor, values: Tensor, *, at: Tensor, less: Tensor | None = None
    ) -> float:
        """Return this rank's share of x'Px of such values x, or of x = values - less.

        They are taken in parts, so that nothing of the parameter's size is made; `at` and `less`
        may be on another device.
        """
        rule, total = self.rules[parameter], torch.zeros((), dtype=torch.float64)
        flat, flat_at = values.reshape(-1), at.reshape(-1)
        total = total.to(flat.device)
        for start in range(0, len(flat), self.part):
            part = slice(start, start + self.part)
            x = flat[part].float()
            if less is not None:
                x = x - less.reshape(-1)[part].to(x.device)
            if rule is not None:
                x = x * rule.weight(flat_at[part].to(x.device), part=part)
            total += x.square().sum(dtype=torch.float64)
        return share(parameter) * float(total)


def read_preconditioner(optimizer: torch.optim.Optimizer) -> Preconditioner:
    """Read P from an optimizer that has taken a few steps."""
    rules = {
        parameter: _rule_of(optimizer.state.get(parameter, {}), group, parameter.shape)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    found = [rule for rule in rules.values() if rule is not None]
    if found:
        # the floor under eps: a part of the mean of sqrt(v) over all elements of all parameters
        known = {parameter: rule for parameter, rule in rules.items() if rule is not None}
        roots = ((p, (r.moment.float() * r.keep).sqrt().sum()) for p, r in known.items())
        (total,) = sum_over_ranks([sum(share(p) * float(root) for p, root in roots)])
        floor = FLOOR * total / max(sum(parameter.numel() for parameter in known), 1)
        floored = {p: r and replace(r, eps=max(r.eps, floor)) for p, r in rules.items()}
        return Preconditioner("+".join(sorted({r.family for r in found})), "", floored)
    cls = type(optimizer).__name__
    note = f"{cls} keeps no second moment that autoprec knows; errors are in plain norm"
    return Preconditioner("identity", "" if cls in PLAIN else note, rules)


def _rule_of(state: dict[str, Any], group: dict[str, Any], shape: torch.Size) -> ElementRule | None:
    """Return the rule of one parameter, or None when it has no second moment of its shape."""
    eps = _number(group.get("eps"), 1e-8)
    moments = {
        name: local_part(value)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == shape
    }
    for key in ("max_exp_avg_sq", "exp_avg_sq"):
        if key in moments:
            steps = _number(state.get("step"), 1.0)
            beta2 = _number(group.get("betas", (0.9, 0.999))[1], 0.999)
            # v' after this gradient, with the bias correction of step t + 1 folded in
            correction = 1.0 - beta2 ** (steps + 1.0)
            keep, take = beta2 / correction, (1.0 - beta2) / correction
            return ElementRule("adam", moments[key], keep, take, eps)
    if "square_avg" in moments:
        alpha = _number(group.get("alpha"), 0.99)
        return ElementRule("rmsprop", moments["square_avg"], alpha, 1.0 - alpha, eps)
    if "sum" in moments:
        return ElementRule("adagrad", moments["sum"], 1.0, 1.0, eps)
    return None


def _number(value: Any, default: float) -> float:  # Any: optimizer state is untyped
    return default if value is None else float(value)
