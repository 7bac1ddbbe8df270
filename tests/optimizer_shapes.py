"""Optimizers in shapes that torch's do not have: what they hold, and when and what they step."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Lookahead(Optimizer):
    """Slow weights beside another optimizer's (Zhang et al. 2019, arXiv 1907.08610)."""

    def __init__(self, fast: Optimizer, every: int = 2) -> None:
        super().__init__(fast.param_groups, {})
        self.fast, self.every, self.count = fast, every, 0
        self.param_groups = fast.param_groups
        self.slow = [[p.detach().clone() for p in g["params"]] for g in fast.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Step the fast weights, and pull them back now and then."""
        loss = self.fast.step(closure) if closure else self.fast.step()
        self.count += 1
        if self.count % self.every == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for parameter, own in zip(group["params"], slow, strict=True):
                    own.lerp_(parameter.detach(), 0.5)
                    parameter.detach().copy_(own)
        return loss


class OwnMomentum(Optimizer):
    """SGD whose momentum is made at once, in a dict of its own: by parameter, or by its id."""

    def __init__(self, params: Any, lr: float, *, by_id: bool = False) -> None:  # Any: as torch's
        super().__init__(params, {"lr": lr})
        every = [p for group in self.param_groups for p in group["params"]]
        self.by_id = by_id
        self.momentum = {id(p) if by_id else p: torch.zeros_like(p) for p in every}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Any: torch overloads it
        """Take a step along the momentum."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.momentum[id(p) if self.by_id else p].mul_(0.9).add_(p.grad)
                    p.add_(momentum, alpha=-group["lr"])


class OwnList(torch.optim.SGD):
    """SGD over a list of its own, with an average of the weights after each step."""

    def __init__(self, params: Any, lr: float) -> None:  # Any: as torch's
        self.own = list(params)
        super().__init__(self.own, lr)
        self.average = [p.detach().clone() for p in self.own]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Any: torch overloads it
        """Step what is in the list."""
        for p in self.own:
            if p.grad is not None:
                p.add_(p.grad, alpha=-self.param_groups[0]["lr"])
        torch._foreach_lerp_(self.average, [p.detach() for p in self.own], 0.1)


class FromHooks(Optimizer):
    """SGD along the gradients that hooks at the parameters kept, and not along `p.grad`."""

    def __init__(self, params: Any, lr: float) -> None:  # Any: as torch's
        super().__init__(params, {"lr": lr})
        self.seen: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                p.register_hook(functools.partial(self.seen.__setitem__, p))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Any: torch overloads it
        """Step along what was seen."""
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(self.seen[p], alpha=-group["lr"])
        self.seen.clear()


class InBackward(Optimizer):
    """An optimizer per parameter, stepped in a hook as soon as its gradient is there."""

    def __init__(self, params: Any, make: Callable[[Any], Optimizer]) -> None:  # Any: as torch's
        every = list(params)
        super().__init__(every, {"lr": 1e-3})
        self.inner = {p: make([p]) for p in every}
        for p in every:
            p.register_post_accumulate_grad_hook(self.step_one)

    def step_one(self, p: nn.Parameter) -> None:
        """Step the optimizer of one parameter."""
        self.inner[p].step()
        self.inner[p].zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Any: torch overloads it
        """Do nothing: it is done."""


class Sam(Optimizer):
    """A gradient at the worst place nearby (Foret et al. 2020, arXiv 2010.01412)."""

    def __init__(self, params: Any, lr: float, rho: float = 0.05) -> None:  # Any: as torch's
        super().__init__(params, {"lr": lr, "rho": rho})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Step along the second of two gradients."""
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        loss = torch.enable_grad()(closure)()  # type: ignore[misc,type-var]  # None fails
        before = [p.detach().clone() for p, _ in every]
        with torch.no_grad():
            for p, group in every:
                p.add_(p.grad, alpha=group["rho"])
        self.zero_grad()
        torch.enable_grad()(closure)()  # type: ignore[misc,type-var]  # too
        with torch.no_grad():
            for (p, group), own in zip(every, before, strict=True):
                p.copy_(own - group["lr"] * p.grad)
        return loss


class HoldsModel(Optimizer):
    """SGD over the parameters of a model that it holds."""

    def __init__(self, model: nn.Module, lr: float, *, hidden: bool = False) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        self.model = (lambda: model) if hidden else model  # in a function nobody can see it

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Any: torch overloads it
        """Step the model's parameters."""
        model = self.model if isinstance(self.model, nn.Module) else self.model()
        for p in model.parameters():
            if p.grad is not None:
                p.add_(p.grad, alpha=-self.param_groups[0]["lr"])
