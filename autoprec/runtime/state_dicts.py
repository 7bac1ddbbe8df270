"""The state dicts of a model with a plan: the FP32 values that its script had go out, and come in.

Checkpoints are not all that state dicts are for: averages of weights write into their tensors, step
after step. What no optimizer trains therefore gets its master itself there, and its module rounds
what was written when it runs next (`Masters.lend`, `Masters.hear`).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.errors import PlanMismatchError
from autoprec.runtime.masters import CLOSE_LOOKS, LIVE, Masters


def keep_exact_loads(model: nn.Module, masters: Masters) -> None:
    """Make `load_state_dict` on any module of the model hand FP32 values to the masters."""
    forget_loads(model)
    for module in model.modules():
        if any(parameter in masters.values for parameter in module._parameters.values()):
            hook = ExactLoads(masters)
            module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]  # torch


def forget_loads(model: nn.Module) -> None:
    """Take the hooks of `keep_exact_loads` out."""
    for module in model.modules():
        for key, wrapper in list(module._load_state_dict_pre_hooks.items()):
            if isinstance(getattr(wrapper, "hook", None), ExactLoads):
                del module._load_state_dict_pre_hooks[key]


class ExactLoads:
    """A hook of one module that hands the FP32 values of a state dict to the masters."""

    def __init__(self, masters: Masters) -> None:
        self.masters = masters

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExactLoads":  # Any: copy's own
        """Copy with the model: its copied masters. With a module alone: masters of its own only."""
        if id(self.masters) in memo:
            return ExactLoads(memo[id(self.masters)])
        own = {memo[id(p)]: value for p, value in self.masters.values.items() if id(p) in memo}
        copies = {p: None if value is None else value.clone() for p, value in own.items()}
        return ExactLoads(Masters(options={}, values=copies, names={}))

    def __call__(
        self, module: nn.Module, state: Any, prefix: str, metadata: Any, *_: object
    ) -> None:  # Any: a state dict may hold anything
        """Take what is about to be loaded into the module's parameters."""
        if 0 < self.masters.steps < CLOSE_LOOKS:  # what changes no bit now is no lost write
            self.masters._lost.append([])
        for name, parameter in module._parameters.items():
            value = state.get(prefix + name)
            if parameter not in self.masters.values or not isinstance(value, Tensor):
                continue
            if metadata.get("assign_to_params_buffers", False):
                raise PlanMismatchError(
                    "a model with a plan keeps its parameters, but load_state_dict(assign=True) "
                    "replaces them; load with assign=False, or before autoprec.apply"
                )
            is_exact = value.shape == parameter.shape and value.dtype is not parameter.dtype
            if is_exact and parameter.requires_grad:  # nobody trains the others: they stay BF16
                exact = value.detach().to(torch.float32, copy=True)
                self.masters.loaded[parameter] = exact, parameter._version + 1  # torch copies next


def save_exactly(modules: Iterable[nn.Module]) -> None:
    """Make `state_dict` have FP32 masters in the place of these modules' BF16 parameters."""
    for module in modules:
        module.register_state_dict_post_hook(_give_masters)  # type: ignore[no-untyped-call]  # torch


def exact_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters whose masters a model's state dict has."""
    modules = [m for m in model.modules() if _give_masters in m._state_dict_hooks.values()]
    return {p for module in modules for p in module._parameters.values() if p is not None}


def _give_masters(module: nn.Module, state: Any, prefix: str, _: object) -> None:  # Any: see above
    for name, parameter in module._parameters.items():
        held = state.get(prefix + name)
        if parameter is None or held is None or held is parameter:
            continue  # not there, or asked for as the parameter that it is
        store = next((store for store in LIVE if parameter in store.values), None)  # of BF16 ones
        values = store.lend(parameter) if store is not None else None
        if values is not None:
            state[prefix + name] = values
        if store is not None and parameter in store.lent:
            hooks = module._forward_pre_hooks.values()
            if _hear_once not in hooks:
                module.register_forward_pre_hook(_hear_once)


def _hear_once(module: nn.Module, _: object) -> None:
    """Let a module run with what was written into its state dict; the hook is gone then."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _hear_once:
            del module._forward_pre_hooks[key]
    for store in LIVE:
        for parameter in module._parameters.values():
            if parameter is not None and parameter in store.lent:
                store.hear(parameter)
