"""What a model's weights and gradients are, in a process that trains alone."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from autoprec.device.ranks import local_part
from autoprec.runtime.shards import kept_gradients
from autoprec.sensitivity.real import real_view

SCALE_RTOL = 1e-2  # BF16 gradients that are scaled are rounded again


def sum_of_weights(model: nn.Module) -> float:
    """Return the sum of all parameters, in a process that trains alone."""
    return sum(float(_numbers(p).sum()) for p in model.parameters())


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of all gradients together, in a process that trains alone."""
    own = (p.grad for p in model.parameters() if p.grad is not None)
    gradients = {id(g): g for g in (*own, *kept_gradients(model))}
    return math.sqrt(sum(float(_numbers(g).square().sum()) for g in gradients.values()))


def gradient_norms(model: nn.Module) -> dict[nn.Parameter, float]:
    """Return the norm of each parameter's gradient, where there is one."""
    own = {p: p.grad for p in model.parameters() if p.grad is not None}
    return {p: float(_numbers(g).square().sum()) ** 0.5 for p, g in own.items()}


def _numbers(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor in float64."""
    return real_view(local_part(tensor.detach())).double()


def norm_taken(
    before: Mapping[nn.Parameter, float], after: Mapping[nn.Parameter, float]
) -> float | None:
    """Return the norm after over that before.

    None where gradients are those before times one factor, as clipping their norm makes them.
    """
    ratios = [after.get(p, 0.0) / norm for p, norm in before.items() if norm > 0.0]
    if not ratios or max(ratios) - min(ratios) <= SCALE_RTOL * max(ratios):
        return None
    return math.hypot(*after.values()) / math.hypot(*before.values())
