"""Optimizers of many kinds: torch's, transformers', torchao's, and published ones in a few lines.

Those written here follow their papers' update rules, one trait each: a sign, an orthogonal matrix,
a trust ratio, a rotated basis, two rules in one class, an optimizer of optimizers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.optimizer_shapes import (
    FromHooks,
    HoldsModel,
    InBackward,
    Lookahead,
    OwnList,
    OwnMomentum,
    Sam,
)

Make = Callable[[nn.Module], Optimizer]


class _Simple(Optimizer):
    """An optimizer whose update of one parameter is a function of its gradient, state and group."""

    def __init__(self, params: Any, **defaults: Any) -> None:  # Any: torch's own
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Take a step along every parameter's update."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    update = self.update(parameter, parameter.grad.to_dense(), state, group)
                    parameter.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))
                    parameter.add_(update, alpha=-group["lr"])
        return loss

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the update of a parameter, before the learning rate."""
        raise NotImplementedError


def _moment(state: dict[str, Any], name: str, value: Tensor, beta: float) -> Tensor:
    """Return the moving average of that name after taking in a value."""
    moment: Tensor = state.setdefault(name, torch.zeros_like(value))
    return moment.lerp_(value, 1 - beta)


def _adam(g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    (beta1, beta2), step = group["betas"], state["step"]
    m = _moment(state, "exp_avg", g, beta1) / (1 - beta1**step)
    v = _moment(state, "exp_avg_sq", g * g, beta2) / (1 - beta2**step)
    found: Tensor = m / (v.sqrt() + 1e-8)
    return found


class Lion(_Simple):
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return sign(beta1 m + (1 - beta1) g)."""
        beta1, beta2 = group["betas"]
        m = state.setdefault("exp_avg", torch.zeros_like(g))
        update = torch.lerp(m, g, 1 - beta1).sign()
        m.lerp_(g, 1 - beta2)
        return update


class SignSGD(_Simple):
    """The sign of the gradient (Bernstein et al. 2018, arXiv 1802.04434)."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return sign(g)."""
        return g.sign()


class Lars(_Simple):
    """Momentum at a rate per tensor (You et al. 2017, arXiv 1708.03888)."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the momentum of g |p| / |g|."""
        ratio = p.norm() / (g.norm() + 1e-12) if p.dim() > 1 else torch.ones(())
        buffer: Tensor = state.setdefault("momentum_buffer", torch.zeros_like(g))
        return buffer.mul_(group["momentum"]).add_(g * ratio)


class Lamb(_Simple):
    """Adam at a rate per tensor (You et al. 2019, arXiv 1904.00962, algorithm 2)."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return Adam's update u times |p| / |u|."""
        update = _adam(g, state, group)
        found: Tensor = update * (p.norm() / update.norm()).clamp(0.01, 10.0)
        return found


class AdaBelief(_Simple):
    """Adam by the variance around the mean (Zhuang et al. 2020, arXiv 2010.07468)."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return m over the root of the moving average of (g - m)^2."""
        (beta1, beta2), step = group["betas"], state["step"]
        m = _moment(state, "exp_avg", g, beta1)
        s = _moment(state, "exp_avg_var", (g - m).square(), beta2)
        found: Tensor = m / (1 - beta1**step) / ((s / (1 - beta2**step)).sqrt() + 1e-8)
        return found


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return U V' of a matrix, by Newton-Schulz steps (kellerjordan.github.io/posts/muon)."""
    x = matrix / (matrix.norm() + 1e-7)
    is_tall = x.size(0) > x.size(1)
    x = x.T if is_tall else x
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    found: Tensor = x.T if is_tall else x
    return found


class MuonWithAdam(_Simple):
    """Muon for the groups with `use_muon`, Adam for the rest, in one class."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return an orthogonalised momentum, or Adam's update."""
        if not group["use_muon"]:
            return _adam(g, state, group)
        buffer = _moment(state, "momentum_buffer", g, group["momentum"])
        update = orthogonal(g.lerp(buffer, group["momentum"]))
        return update * math.sqrt(max(1.0, p.size(0) / p.size(1)))


class Shampoo(_Simple):
    """L^(-1/4) G R^(-1/4) (Gupta et al. 2018, arXiv 1802.09568), Adagrad on vectors."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the preconditioned gradient."""
        if g.dim() != 2:
            total = state.setdefault("sum", torch.full_like(g, 1e-8))
            found: Tensor = g / total.addcmul_(g, g).sqrt()
            return found
        sides = state.setdefault("sides", [1e-6 * torch.eye(size) for size in g.shape])
        sides[0] += g @ g.T
        sides[1] += g.T @ g
        return _root(sides[0]) @ g @ _root(sides[1])


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = vectors @ (values.clamp_min(1e-12) ** -0.25).diag() @ vectors.T
    return found


class Soap(_Simple):
    """Adam in Shampoo's basis (Vyas et al. 2024, arXiv 2409.11321); Adam for vectors."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return Adam's update of the rotated gradient, rotated back."""
        if g.dim() != 2:
            return _adam(g, state, group)
        sides = state.setdefault("GG", [torch.zeros(size, size) for size in g.shape])
        sides[0].lerp_(g @ g.T, 0.05)
        sides[1].lerp_(g.T @ g, 0.05)
        if "Q" not in state:
            state["Q"] = [torch.linalg.eigh(side)[1] for side in sides]
        left, right = state["Q"]
        found: Tensor = left @ _adam(left.T @ g @ right, state, group) @ right.T
        return found


class ScheduleFree(_Simple):
    """Averaged steps of RMS-scaled SGD (Defazio et al. 2024, arXiv 2405.15682)."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return what moves y, with z the fast and x the averaged sequence."""
        (beta1, beta2), step = group["betas"], state["step"]
        z: Tensor = state.setdefault("z", p.clone())
        v = _moment(state, "exp_avg_sq", g * g, beta2) / (1 - beta2**step)
        x = (p - (1 - beta1) * z) / beta1
        z.sub_(group["lr"] * g / (v.sqrt() + 1e-8))
        y = (1 - beta1) * z + beta1 * x.lerp(z, 1 / step)
        found: Tensor = (p - y) / group["lr"]
        return found


class TwoOptimizers(Optimizer):
    """An optimizer of optimizers, as scripts write it: one `step` for both."""

    def __init__(self, *inner: Optimizer) -> None:
        super().__init__([g for each in inner for g in each.param_groups], {})
        self.inner = inner

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all."""
        for each in self.inner:
            each.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Step each of them."""
        for each in self.inner:
            each.step()
        return None


class Together(torch.optim.SGD):
    """Steps only with all of its parameters at once: nothing can be said of one of them."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Any: torch overloads it
        """Take SGD's step."""
        if sum(len(group["params"]) for group in self.param_groups) < 2:
            raise RuntimeError("not alone")
        super().step(closure)


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices of a model, and all else."""
    every = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in every if p.dim() == 2], [p for p in every if p.dim() != 2]


def _muon_and(other: Callable[[Any], Optimizer]) -> Make:
    def make(model: nn.Module) -> Optimizer:
        matrices, rest = split(model)
        muon = torch.optim.Muon(matrices, lr=2e-2)
        return TwoOptimizers(muon, other(rest)) if rest else muon

    return make


def _in_backward(model: nn.Module) -> Optimizer:
    return InBackward(model.parameters(), torch.optim.Adam)


def _sparse_and_dense(model: nn.Module) -> Optimizer:
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse]
    known = set(tables)
    rest = [p for p in model.parameters() if p not in known]
    return TwoOptimizers(torch.optim.SparseAdam(tables), torch.optim.AdamW(rest))


def _muon_with_adam(model: nn.Module) -> Optimizer:
    matrices, rest = split(model)
    groups = [
        {"params": matrices, "use_muon": True, "lr": 2e-2, "momentum": 0.95},
        {"params": rest, "use_muon": False, "lr": 1e-3, "betas": (0.9, 0.999)},
    ]
    return MuonWithAdam(groups)


def _plain(cls: type[Optimizer], **settings: Any) -> Make:  # Any: as torch's
    return lambda model: cls((p for p in model.parameters() if p.requires_grad), **settings)


def _torchao(name: str) -> Make:
    def make(model: nn.Module) -> Optimizer:
        from autoprec.device.torchao import import_torchao

        import_torchao()
        import torchao.optim

        found: Optimizer = getattr(torchao.optim, name)(model.parameters(), lr=1e-3)
        return found

    return make


def _transformers_adafactor(model: nn.Module) -> Optimizer:
    from transformers.optimization import Adafactor

    found: Optimizer = Adafactor(model.parameters())
    return found


@dataclass(frozen=True)
class Kind:
    """An optimizer by name.

    `refusal`: a part of what both `tune` and `apply` say where they refuse it.
    """

    name: str
    make: Make
    refusal: str = ""
    is_sparse: bool = False  # made for embeddings with sparse gradients


_O = torch.optim
_BETAS = {"betas": (0.9, 0.99)}
ZOO = (
    Kind("SGD", _plain(_O.SGD, lr=1e-2)),
    Kind("SGD, Nesterov", _plain(_O.SGD, lr=1e-2, momentum=0.9, nesterov=True)),
    Kind("ASGD", _plain(_O.ASGD, lr=1e-2)),
    Kind("Adam", _plain(_O.Adam)),
    Kind("AdamW", _plain(_O.AdamW)),
    Kind("NAdam", _plain(_O.NAdam)),
    Kind("RAdam", _plain(_O.RAdam)),
    Kind("Adamax", _plain(_O.Adamax)),
    Kind("Adagrad", _plain(_O.Adagrad)),
    Kind("Adadelta", _plain(_O.Adadelta)),
    Kind("Adafactor", _plain(_O.Adafactor)),
    Kind("RMSprop", _plain(_O.RMSprop, lr=1e-3)),
    Kind("RMSprop, centered", _plain(_O.RMSprop, lr=1e-3, centered=True, momentum=0.9)),
    Kind("Rprop", _plain(_O.Rprop, lr=1e-3)),
    Kind("LBFGS", _plain(_O.LBFGS, lr=1e-2), "again and again"),
    Kind("SparseAdam and AdamW", _sparse_and_dense, is_sparse=True),
    Kind("Muon and AdamW", _muon_and(lambda rest: _O.AdamW(rest, lr=1e-3))),
    Kind("Muon and Lion", _muon_and(lambda rest: Lion(rest, lr=1e-4, **_BETAS))),
    Kind("MuonWithAdam", _muon_with_adam),
    Kind("transformers Adafactor", _transformers_adafactor),
    Kind("AdamW8bit", _torchao("AdamW8bit")),
    Kind("AdamW4bit", _torchao("AdamW4bit")),
    Kind("AdamWFp8", _torchao("AdamWFp8")),
    Kind("Lion", _plain(Lion, lr=1e-4, **_BETAS)),
    Kind("SignSGD", _plain(SignSGD, lr=1e-4)),
    Kind("LARS", _plain(Lars, lr=1e-2, momentum=0.9)),
    Kind("LAMB", _plain(Lamb, lr=1e-2, **_BETAS)),
    Kind("AdaBelief", _plain(AdaBelief, lr=1e-3, **_BETAS)),
    Kind("Shampoo", _plain(Shampoo, lr=1e-2)),
    Kind("SOAP", _plain(Soap, lr=1e-3, **_BETAS)),
    Kind("schedule-free", _plain(ScheduleFree, lr=1e-3, **_BETAS)),
    Kind("Lookahead around AdamW", lambda model: Lookahead(_O.AdamW(model.parameters(), lr=1e-2))),
    Kind("momentum in a dict of its own", _plain(OwnMomentum, lr=1e-2)),
    Kind("momentum by ids", _plain(OwnMomentum, lr=1e-2, by_id=True)),
    Kind("a list of its own, an EMA", _plain(OwnList, lr=1e-1)),
    Kind("gradients from hooks", _plain(FromHooks, lr=1e-1)),
    Kind("steps within backward", _in_backward, "after backward"),
    Kind("SAM", _plain(Sam, lr=1e-1), "closure"),
    Kind("holds the model", lambda model: HoldsModel(model, 1e-1), "holds the model"),
    Kind("differentiable Adam", _plain(_O.Adam, differentiable=True), "differentiable"),
)
