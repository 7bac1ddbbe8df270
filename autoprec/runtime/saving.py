"""What a script saves and copies of models with a plan -> what it would be without one.

`torch.save` gets whole models, parameters, and state dicts; of weights that an optimizer trains the
latter have the FP32 masters already (state_dicts.py). Frozen weights are BF16 and have none, so
their FP32 values wait for files in host memory, up to a limit.
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.model.layers import comes_from_plan, unwrapped
from autoprec.runtime.apply import plain_view
from autoprec.runtime.masters import LIVE, masters_of
from autoprec.runtime.shards import fsdp_modules
from autoprec.runtime.state_dicts import exact_parameters

MOST_FROZEN = 2**32  # bytes of one model's frozen weights that are kept in FP32

Frozen = dict[nn.Parameter, Tensor]


class Files:
    """What goes into a script's files, once `keep_frozen` has seen its models."""

    def __init__(self) -> None:
        self._frozen: weakref.WeakKeyDictionary[nn.Module, Frozen] = weakref.WeakKeyDictionary()

    def keep_frozen(self, model: nn.Module) -> None:
        """Keep the FP32 values of weights that nobody trains, before a plan comes."""
        own = [p for p in model.parameters() if not p.requires_grad and p.dtype is torch.float32]
        is_small = sum(4 * p.numel() for p in own) <= MOST_FROZEN and not fsdp_modules(model)
        kept = own if is_small else []
        self._frozen[model] = {p: p.detach().to("cpu", copy=True) for p in kept}

    def hand_over(self, model: nn.Module) -> None:
        """Give a model's masters what was kept, now that it has the plan."""
        masters_of(model).frozen.update(self._frozen[model])

    def around_save(self, save: Callable[..., Any], obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what writes files (`torch.save`, `pickle.dump`) with a value as without a plan."""
        return save(self.as_saved(obj), *args, **kwargs)

    def around_deepcopy(self, call: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Copy a model (for an average, a teacher) as without a plan, which it gets to be trained.

        With a memo it is a part of what is copied.
        """
        is_model = isinstance(x, nn.Module) and not args and not kwargs
        return call(self.as_saved(x) if is_model else x, *args, **kwargs)

    def as_saved(self, value: Any) -> Any:  # Any: whatever torch.save is given
        """Return a value as the script without a plan has it, in dicts, lists and tuples too.

        A model with a plan is plain and FP32, unless it is sharded or wrapped in DDP; parameters,
        and what shares their storage, are their FP32 values.
        """
        places = {
            (parameter.data_ptr(), parameter.shape): parameter
            for model in self._frozen
            for parameter in exact_parameters(model)
            if type(parameter) is nn.Parameter and parameter.dtype is torch.bfloat16
        }
        return self._saved(value, places)

    def _saved(self, value: Any, places: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._saved_model(value)
        if isinstance(value, Tensor):
            is_low = type(value) in (Tensor, nn.Parameter) and value.dtype is torch.bfloat16
            found = places.get((value.data_ptr(), value.shape)) if is_low else None
            if found is None:
                return value
            exact = _exact(found)
            return nn.Parameter(exact, value.requires_grad) if type(value) is not Tensor else exact
        if isinstance(value, dict):
            items = {key: self._saved(held, places) for key, held in value.items()}
            if all(items[key] is held for key, held in value.items()):
                return value
            copied = copy.copy(value)  # a state dict has notes beside its items
            copied.update(items)
            return copied
        if type(value) in (list, tuple):
            return type(value)(self._saved(held, places) for held in value)
        return value

    def _saved_model(self, model: nn.Module) -> nn.Module:
        is_planned = any(comes_from_plan(type(module)) for module in model.modules())
        is_whole = unwrapped(model, parallel=True) is model and not fsdp_modules(model)
        if not is_planned or not is_whole:
            return model
        low = [p for p in model.parameters() if p.dtype is torch.bfloat16]
        return plain_view(model, {parameter: _exact(parameter) for parameter in low})


def _exact(parameter: nn.Parameter) -> Tensor:
    """Return the FP32 values that a BF16 parameter is rounded from, or else its own."""
    store = next((store for store in LIVE if parameter in store.values), None)
    return parameter.detach().float() if store is None else store.saved(parameter)
