"""An optimizer's state of one parameter -> the diagonal P of its update -P g.

Read from what the state holds (v: a second moment; t: the steps done; v' takes in the gradient g):

    exp_avg_sq, betas      1 / (sqrt(v') + eps)   Adam and its kin (arXiv 1412.6980), amsgrad's
                           v' = (beta2 v + (1 - beta2) g^2) / (1 - beta2^(t + 1))   from its maximum
    square_avg             1 / (sqrt(v') + eps)   RMSprop, v' = alpha v + (1 - alpha) g^2; v less
                                                  the mean's square where it is centered
    sum                    1 / (sqrt(v') + eps)   Adagrad, v' = v + g^2
    exp_inf                1 / max(beta2 u, |g|)  Adamax (1412.6980, section 7.1)
    square_avg, acc_delta  sqrt(w + eps) / sqrt(v' + eps)   Adadelta (1212.5701), w: its updates^2
    row and column         1 / sqrt(v')           Adafactor (1804.04235), v = r_i c_j / mean(r)

v is dequantised where it is kept in 8 or 4 bits. RAdam's first steps are plain; the run's are not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autoprec.device.ranks import local_part
from autoprec.sensitivity.real import real_view

Moment = Callable[[slice], Tensor]  # of a parameter's flat elements, FP32
State = Mapping[str, Any]  # Any: optimizer state and groups are untyped

EVERY = slice(None)
STILL = 1e-9  # of the mean root of v: what FP32 cannot tell from zero


@dataclass(frozen=True)
class Rule:
    """P = rate * gain / (root(v') + eps), with v' = keep * v + take * g^2; P = rate without a v.

    `holds_largest`: v' is the larger of the two terms. Elements whose root is not above `still`
    weigh nothing: neither this gradient nor any before it reached them.
    """

    family: str
    rate: float = 1.0
    moment: Moment | None = None
    keep: float = 1.0
    take: float = 0.0
    eps: float = 0.0
    inner_eps: float = 0.0  # added to v' itself
    power: float = 0.5  # of v'
    gain: Moment | None = None
    holds_largest: bool = False
    still: float = 0.0

    def weight(self, gradient: Tensor, *, part: slice = EVERY) -> Tensor:
        """Return P^(1/2) at a gradient, new, FP32, of its shape; `part`: of the flat elements."""
        root, rate = self.root(gradient, part=part), math.sqrt(self.rate)
        moves = root > self.still
        found = torch.where(moves, root.add_(self.eps).rsqrt_().mul_(rate), 0.0)
        if self.gain is not None:
            found *= self.gain(part).to(found.device, torch.float32).reshape(found.shape).sqrt()
        return found

    def root(self, gradient: Tensor, *, part: slice = EVERY) -> Tensor:
        """Return v'^power at a gradient, new; ones without a v."""
        if self.moment is None:
            return torch.ones_like(gradient, dtype=torch.float32)
        before = self.moment(part).to(gradient.device, torch.float32).reshape(gradient.shape)
        before = before * self.keep
        if self.holds_largest:
            updated = torch.maximum(before, gradient.float().square() * self.take)
        else:
            updated = before.addcmul_(gradient, gradient, value=self.take)
        updated += self.inner_eps
        return updated.sqrt_() if self.power == 0.5 else updated.pow_(self.power)


def moment_rule(state: State, group: State, parameter: Tensor) -> Rule | None:
    """Return the rule that a parameter's state holds; None where it holds no moment known here."""
    shape = real_view(local_part(parameter.detach())).shape
    steps, eps = number(state.get("step"), 1.0), group.get("eps")
    # transformers' and torch's Adafactor have two eps, and forget by t^(-0.8)
    is_factored_class = isinstance(eps, tuple | list)
    decay = group.get("beta2_decay", group.get("decay_rate"))
    eps = 0.0 if is_factored_class else number(eps, 1e-8)
    found = _moments_of(state, shape)
    rows = state.get("row_var", state.get("exp_avg_sq_row"))
    columns = state.get("col_var", state.get("exp_avg_sq_col"))
    if isinstance(rows, Tensor) and isinstance(columns, Tensor) and _fit(rows, columns, shape):
        take = (steps + 1.0) ** number(decay, -0.8)
        return Rule("adafactor", moment=_factored(rows, columns, shape), keep=1 - take, take=take)
    for name in ("variance", "exp_avg_sq"):
        if name in found and decay is not None:
            take = (steps + 1.0) ** number(decay, -0.8)
            return Rule("adafactor", moment=found[name], keep=1 - take, take=take)
    for name in ("max_exp_avg_sq", "exp_avg_sq"):
        if name in found:
            beta2 = number(group.get("betas", (0.9, 0.999))[1], 0.999)
            # v' after this gradient, with the bias correction of step t + 1 folded in
            scale = 1.0 / (1.0 - beta2 ** (steps + 1.0))
            keep, take = scale * beta2, scale * (1.0 - beta2)
            return Rule("adam", moment=found[name], keep=keep, take=take, eps=eps)
    return _other_rule(found, group, eps)


def _other_rule(found: Mapping[str, Moment], group: State, eps: float) -> Rule | None:
    """Return the rule of the optimizers that are not of Adam's family."""
    if "acc_delta" in found and "square_avg" in found:
        rho, updates = number(group.get("rho"), 0.9), found["acc_delta"]
        return Rule(
            "adadelta",
            moment=found["square_avg"],
            keep=rho,
            take=1.0 - rho,
            inner_eps=eps,
            gain=lambda part: (updates(part).float() + eps).sqrt(),
        )
    if "square_avg" in found:
        alpha, square = number(group.get("alpha"), 0.99), found["square_avg"]
        rule = Rule("rmsprop", moment=square, keep=alpha, take=1.0 - alpha, eps=eps)
        if (mean := found.get("grad_avg")) is None:
            return rule
        # centered: E g^2 - (E g)^2
        return replace(rule, moment=lambda p: (square(p) - mean(p).square()).clamp_min(0.0))
    if "sum" in found:
        return Rule("adagrad", moment=found["sum"], take=1.0, eps=eps)
    if "exp_inf" in found:
        largest, beta2 = found["exp_inf"], number(group.get("betas", (0.9, 0.999))[1], 0.999)
        return Rule(
            "adamax",
            # Adamax adds eps to every |g| that u is the largest of
            moment=lambda part: (largest(part).float() - eps).clamp_min(0.0).square(),
            keep=beta2**2,
            take=1.0,
            holds_largest=True,
        )
    return None


def shape_rules(state: State, parameter: Tensor) -> list[Rule]:
    """Return what may be P in a state whose names say nothing: 1 / sqrt(s) and 1 / s of its parts.

    Only of tensors of the parameter's shape without a negative value.
    """
    shape, rules = real_view(local_part(parameter.detach())).shape, []
    for name, moment in _moments_of(state, shape).items():
        if float(moment(EVERY).min()) >= 0.0:
            rules += [Rule(name, moment=moment, power=power) for power in (0.5, 1.0)]
    return rules


def number(value: Any, default: float) -> float:  # Any: optimizer state is untyped
    """Return a number of an optimizer's state or group."""
    return default if value is None else float(value)


def _moments_of(state: State, shape: torch.Size) -> dict[str, Moment]:
    """Return the tensors of a parameter's shape in its state, dequantised, by name."""
    found: dict[str, Moment] = {}
    for name, value in state.items():
        own = real_view(local_part(value.detach())) if isinstance(value, Tensor) else None
        if name == "step" or own is None or own.shape != shape or not own.is_floating_point():
            continue
        if type(own) is not Tensor and hasattr(own, "dequantize"):  # torchao's 8 and 4 bits, FP8
            own = own.dequantize()
        found[name] = own.reshape(-1).__getitem__
    return found


def _fit(rows: Tensor, columns: Tensor, shape: torch.Size) -> bool:
    """Whether factors are those of a whole tensor, and not of one that ranks hold parts of."""
    heights, widths = shape[:-1].numel(), shape[:-2].numel() * shape[-1]
    return (local_part(rows).numel(), local_part(columns).numel()) == (heights, widths)


def _factored(rows: Tensor, columns: Tensor, shape: torch.Size) -> Moment:
    """Return v = r_i c_j / mean(r) of the last two dimensions."""
    r = local_part(rows).reshape(-1, shape[-2]).float()
    scaled = r / r.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return outer(scaled, local_part(columns).reshape(-1, shape[-1]).float())


def outer(rows: Tensor, columns: Tensor) -> Moment:
    """Return the products of rows and columns, of each of a stack of matrices, by flat elements."""
    (stack, height), width = rows.shape, columns.shape[-1]
    flat_rows, flat_columns = rows.reshape(-1), columns.reshape(-1)

    def values(part: slice) -> Tensor:
        start, stop, _ = part.indices(stack * height * width)
        place = torch.arange(start, stop, device=rows.device)
        row = place.div(width, rounding_mode="floor")  # of all the stack's
        matrix = row.div(height, rounding_mode="floor")
        return flat_rows[row] * flat_columns[matrix * width + place % width]

    return values
