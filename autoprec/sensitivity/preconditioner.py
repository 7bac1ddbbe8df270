"""P: how the user's optimizer weighs the elements of a gradient.

A step along -P g lowers the loss by g'Pg to first order, and noise d in the gradient costs half of
d'PHPd. Where P is the diagonal that evens out the curvature H (what Adam's is for), PHP is P up to
a factor, so gradient error and gradient are compared in the norm x'Px = |P^(1/2) x|^2. The norm
|P x|^2 would take H for even already, and parameters that do not matter would outvote the rest:
the gradient of a key bias is nothing but rounding noise, its v is about 0 and its P is 1/eps.

P is read from the optimizer's state (moments.py) where its class is one whose update rule is known;
any other optimizer is asked, by stepping a copy of it (response.py). Where both fail P is constant,
the mean of the others, and the record's note says for which share of the elements.

P takes in the very gradient that it weighs, as the optimizer does: an element that the warm-up
never touched (a rare token's row) is not 1/eps. One that this gradient does not reach either weighs
nothing: the optimizer will not move it. Besides, eps is at least FLOOR times the mean of sqrt(v) of
its family: gradients below are rounding noise (biases before a softmax or a batch norm), and what
they can add to g'Pg is below FLOOR.

Each group's learning rate is part of its P, that of an optimizer's momentum too: it hands out a
gradient 1 / (1 - momentum) times (arXiv 1212.0901), but for moving averages, which sum to one.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoprec.device.ranks import local_part, share, sum_over_ranks
from autoprec.sensitivity.moments import STILL, Rule, State, moment_rule, number
from autoprec.sensitivity.real import real_view
from autoprec.sensitivity.response import measured_rule
from autoprec.workload.optimizers import name_of, optimizers_in

FLOOR = 1e-3  # of the mean sqrt(v); without it one conv bias was 99 % of a small CNN's BF16 error
PARTS = 64  # of all parameters; what is made of one on its way is four times its size
SMALLEST_PART = 1 << 12  # elements
# where the updates are that moments.py knows; a subclass's own `step` lies elsewhere
KNOWN = ("torch.optim.", "torchao.optim.", "transformers.optimization")
PLAIN = ("torch.optim.sgd", "torch.optim.asgd")  # proportional to the (averaged) gradient


@dataclass(frozen=True)
class Preconditioner:
    """P by parameter. `name` goes into the record; `note` says when P is a stated fallback.

    `rules` has the parameters that the optimizer updates; all others weigh nothing.
    """

    name: str
    note: str
    rules: dict[Tensor, Rule]

    @cached_property
    def part(self) -> int:
        """How many elements are weighed at a time."""
        return _part_of(self.rules)

    def weight(self, parameter: Tensor, *, at: Tensor) -> Tensor:
        """Return P^(1/2) of this rank's part of a parameter, new and FP32, at the gradient `at`."""
        return self.rules[parameter].weight(at.to(parameter.device))

    def weights(self, parameter: Tensor, *, at: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield P^(1/2) of this rank's part of a parameter, some rows at a time."""
        rule, at = self.rules[parameter], at_least_1d(at)
        for rows, flat in _rows_of(at, self.part):
            yield rows, rule.weight(at[rows].to(parameter.device), part=flat)

    def total_weight(self, parameter: Tensor, *, at: Tensor) -> float:
        """Return this rank's share of the sum of P^(1/2) over a parameter's elements."""
        parts = (weight for _, weight in self.weights(parameter, at=at))
        return share(parameter) * sum(float(part.sum(dtype=torch.float64)) for part in parts)

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
            x = x * rule.weight(flat_at[part].to(x.device), part=part)
            total += x.square().sum(dtype=torch.float64)
        return share(parameter) * float(total)

    def products(
        self, parameter: Tensor, values: Tensor, less: Tensor, by: Sequence[Tensor]
    ) -> list[float]:
        """Return this rank's share of the product of values - less with each, in parts as well."""
        totals, values, less = [0.0] * len(by), values.reshape(-1), less.reshape(-1)
        flat = [each.reshape(-1) for each in by]
        for start in range(0, len(values), self.part):
            part = slice(start, start + self.part)
            x = (values[part] - less[part].to(values.device)).float()
            totals = [
                t + float(x @ f[part].to(x.device)) for t, f in zip(totals, flat, strict=True)
            ]
        return [share(parameter) * total for total in totals]


def read_preconditioner(optimizer: Optimizer, *, scale: float = 1.0) -> Preconditioner:
    """Read P from an optimizer that has taken a few steps, and whose last gradients are there.

    `scale` is what clipping makes of a gradient before the optimizer sees it.
    """
    found: dict[Tensor, tuple[Rule | None, float]] = {}  # and the rate where there is no rule
    for owner, group, parameter in _trained(optimizer):
        found[parameter] = _rule_of(owner, group, parameter, seed=len(found)), _rate(group)
    rules = {parameter: rule for parameter, (rule, _) in found.items() if rule is not None}
    without = [parameter for parameter in found if parameter not in rules]
    rules = _floored(rules)
    # those without a rule get the mean P of the others; their own learning rate if all are without
    mean = _mean_weight(rules)
    rules |= {p: Rule("identity", rate=mean or found[p][1]) for p in without}
    largest = max((rule.rate for rule in rules.values()), default=0.0) or 1.0
    rules = {
        p: replace(rules[p], rate=rules[p].rate / largest, take=rules[p].take * scale**2)
        for p in found
    }
    still = {p for p in without if p.grad is None}
    name = "+".join(sorted({rules[p].family for p in found if p not in still})) or "identity"
    return Preconditioner(name, _note(optimizer, rules, without), rules)


def _trained(optimizer: Optimizer) -> Iterator[tuple[Optimizer, State, Tensor]]:
    """Yield every parameter once, with the optimizer that has its state, and its group there.

    An optimizer of optimizers lets the inner ones do the work.
    """
    seen: set[Tensor] = set()
    for owner in optimizers_in(optimizer):
        for group in owner.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    yield owner, group, parameter


def _rule_of(optimizer: Optimizer, group: State, parameter: Tensor, *, seed: int) -> Rule | None:
    """Return the rule of one parameter with its rate, or None where none is known."""
    step = type(optimizer).step
    module = getattr(step, "__wrapped__", step).__module__
    state = optimizer.state.get(parameter, {})
    rule = moment_rule(state, group, parameter) if module.startswith(KNOWN) else None
    if rule is not None:
        return replace(rule, rate=_rate(group) * _own_rate(rule, state, group, parameter))
    if module.startswith(PLAIN):
        return Rule("identity", rate=_rate(group) * _momentum(group))
    measured = measured_rule(optimizer, group, parameter, seed=seed)
    return measured and replace(measured, rate=measured.rate * _rate(group))


def _rate(group: State) -> float:
    """Return a group's learning rate, that which a schedule scales if there is one."""
    return number(group.get("initial_lr", group.get("lr")), 1.0)


def _momentum(group: State) -> float:
    """Return how often a gradient is handed out by a buffer that is a sum of gradients."""
    momentum = number(group.get("momentum"), 0.0)
    damping = 1.0 - number(group.get("dampening"), 0.0) if momentum else 1.0
    return damping / max(1.0 - momentum, 1e-3)


def _own_rate(rule: Rule, state: State, group: State, parameter: Tensor) -> float:
    """Return what an optimizer multiplies a parameter's learning rate by."""
    steps = number(state.get("step"), 1.0)
    if rule.family == "rmsprop":
        return _momentum(group)
    if rule.family == "adagrad":
        return 1.0 / (1.0 + steps * number(group.get("lr_decay"), 0.0))
    if rule.family != "adafactor":
        return 1.0
    # torch's takes the smaller of lr and 1/sqrt(t), transformers' in place of lr, or lr itself
    rate, relative = _rate(group), 1.0 / math.sqrt(steps + 1.0)
    if group.get("relative_step", False):
        least = 1e-6 * (steps + 1.0) if group.get("warmup_init", False) else 1e-2
        rate = min(least, relative) / rate
    else:
        rate = min(relative / rate, 1.0) if "beta2_decay" in group and rate else 1.0
    if group.get("scale_parameter", True):
        rate *= max(number(group["eps"][1], 1e-3), float(parameter.detach().square().mean().sqrt()))
    return rate


def _floored(rules: dict[Tensor, Rule]) -> dict[Tensor, Rule]:
    """Return the rules with FLOOR under their eps: a part of their family's mean sqrt(v)."""
    families = sorted({rule.family for rule in rules.values() if rule.moment is not None})
    sums = dict.fromkeys([(f, what) for f in families for what in ("root", "count")], 0.0)
    for parameter, rule, zero, flat in _at_zero(rules):
        if rule.moment is not None:
            root = rule.root(zero, part=flat)
            sums[rule.family, "root"] += share(parameter) * float(root.sum(dtype=torch.float64))
            sums[rule.family, "count"] += share(parameter) * float((root > 0).sum())
    totals = dict(zip(sums, sum_over_ranks(list(sums.values())), strict=True))
    for parameter, rule in rules.items():
        if rule.moment is not None:
            mean = totals[rule.family, "root"] / max(totals[rule.family, "count"], 1.0)
            floor = max(rule.eps, FLOOR * mean)
            rules[parameter] = replace(rule, eps=floor, still=STILL * mean)
    return rules


def _at_zero(rules: dict[Tensor, Rule]) -> Iterator[tuple[Tensor, Rule, Tensor, slice]]:
    """Yield a gradient of zeros for some rows of this rank's part of each parameter, and where."""
    most = _part_of(rules)
    for parameter, rule in rules.items():
        part = at_least_1d(real_view(local_part(parameter.detach())))
        zero = part.new_zeros(()).expand(part.shape)  # in no memory of its size
        for rows, flat in _rows_of(zero, most):
            yield parameter, rule, zero[rows], flat


def at_least_1d(values: Tensor) -> Tensor:
    """Return a view that has rows."""
    return values if values.dim() else values[None]


def _part_of(parameters: Collection[Tensor]) -> int:
    """Return how many elements to take at a time: few beside those of all parameters."""
    return max(sum(parameter.numel() for parameter in parameters) // PARTS, SMALLEST_PART)


def _rows_of(values: Tensor, most: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows with about so many elements, and where these are among the flat ones."""
    width = max(values[0].numel() if len(values) else 0, 1)
    step = max(most // width, 1)
    for start in range(0, len(values), step):
        stop = min(start + step, len(values))
        yield slice(start, stop), slice(start * width, stop * width)


def _mean_weight(rules: dict[Tensor, Rule]) -> float:
    """Return the mean P of all elements that have a rule, as they are now; 0 without any."""
    total = 0.0
    for parameter, rule, zero, flat in _at_zero(rules):
        weight = rule.weight(zero, part=flat)
        total += share(parameter) * float(weight.square_().sum(dtype=torch.float64))
    (total,) = sum_over_ranks([total])
    return total / max(sum(real_view(parameter.detach()).numel() for parameter in rules), 1)


def _note(optimizer: Optimizer, rules: dict[Tensor, Rule], without: list[Tensor]) -> str:
    """Return what is not said by P's name: where it was measured, and where nothing is known."""
    every = max(sum(parameter.numel() for parameter in rules), 1)

    def share_of(*, has_gradient: bool) -> float:
        own = (p.numel() for p in without if (p.grad is not None) == has_gradient)
        return 100 * sum(own) / every

    lacking, still = share_of(has_gradient=True), share_of(has_gradient=False)
    name, said = name_of(optimizer), []
    if lacking:
        said.append(f"{name}: no rule for {lacking:.3g} % of the elements")
    if still:
        said.append(f"no gradient has come to {still:.3g} % of the elements yet")
    return f"{'; '.join(said)}, whose errors are taken in plain norm" if said else ""
