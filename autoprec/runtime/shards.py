"""Options in a model that `fully_shard` has sharded already: its FP32 shards are the masters.

A shard stays the FP32 parameter that it was, and the user's optimizer trains it as it is. What a
plan changes is the dtype in which FSDP2 gathers each parameter (`param_dtype` of its
`MixedPrecisionPolicy`, here parameter by parameter), and with it the dtype of its gradient:

    shard   FP32                        what the optimizer and checkpoints see
    gather  bf16(shard), or the shard   what the layer computes with: 2 or 4 bytes per element
    reduce  gradients of one dtype      that in which they were reduced without the plan; FP32 where
                                        the group has FP32 layers

FSDP reduces the gradients of a group in one call, which takes one dtype: in a group of both kinds
each BF16 gradient is cast to FP32 first. `mixed_groups` names such groups.

A plan applied *before* `fully_shard` stores BF16 parameters, and a group of these and FP32 ones is
none that FSDP can reduce: `refuse_mixed_storage` says so before FSDP's own assertion does.

All that is read or changed of FSDP2's own objects is in this file; torch documents none of it.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autoprec.common.text import first_and_more
from autoprec.errors import PlanMismatchError
from autoprec.runtime.activations import CASTABLE
from autoprec.workload.written import LOW_PRECISION, dtype_name

FsdpParam = Any  # torch's FSDPParam: the shard and the gathered form of one parameter
Dtypes = Mapping[nn.Parameter, torch.dtype]


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called on, in module order; Any: FSDPModule."""
    module = sys.modules.get("torch.distributed.fsdp")  # if not imported, there are none
    return (
        [] if module is None else [m for m in model.modules() if isinstance(m, module.FSDPModule)]
    )


def nothing_sharded() -> None:
    """Undo what `gather_as` changes in a model that FSDP has not sharded."""


def whole_again(model: nn.Module) -> None:
    """Free what FSDP has gathered, so that the modules' parameters are the shards."""
    for module in fsdp_modules(model):
        module.reshard()


def gather_as(
    model: nn.Module, dtypes: Dtypes
) -> tuple[frozenset[nn.Parameter], Callable[[], None]]:
    """Make FSDP gather these parameters in these dtypes, now and after any number of steps.

    Parameters of the model that `dtypes` does not name are gathered as before.

    Returns:
        The parameters that FSDP has sharded, and a function that undoes the change.

    Raises:
        PlanMismatchError: a parameter is not sharded in a dtype that holds the one asked for.
    """
    # several modules may share one state (fully_shard of a list)
    states = {id(state): state for module in fsdp_modules(model) for state in [_state(module)]}
    sharded = {p.sharded_param: p for state in states.values() for p in _params(state)}
    low = [p for p in sharded if p.dtype is not torch.float32 and p.dtype in CASTABLE]
    if any(dtypes.get(parameter, parameter.dtype) is not parameter.dtype for parameter in low):
        names = (name for name, p in model.named_parameters() if p in set(low))
        raise PlanMismatchError(
            "a plan takes the FP32 shards of fully_shard for its masters, but these are "
            f"{dtype_name(low[0].dtype)}: {first_and_more(names)}; call fully_shard on an FP32 "
            "model (its mp_policy says what is gathered, and the plan replaces that)"
        )
    undo = [_changed(state, dtypes) for state in states.values()]

    def restore() -> None:
        whole_again(model)
        for step in reversed(undo):
            step()

    return frozenset(sharded), restore if undo else nothing_sharded


def gather_in_fp32(model: nn.Module) -> torch.dtype | None:
    """Make FSDP gather and reduce FP32 shards as they are, whatever its `mp_policy` says.

    Returns:
        The 16-bit dtype that the policy gathers them in; None where there is none.
    """
    policies = [_state(module)._mp_policy for module in fsdp_modules(model)]
    if not any(policy.param_dtype or policy.reduce_dtype for policy in policies):
        return None
    gathers = gathers_of(model)
    gather_as(model, dict.fromkeys(gathers, torch.float32))
    return next((dtype for dtype in gathers.values() if dtype in LOW_PRECISION), None)


def mixed_groups(model: nn.Module) -> dict[str, list[str]]:
    """Return the FP32 parameters' names in each group that gathers BF16 ones too, by group."""
    return {
        group: dtypes[torch.float32]
        for group, dtypes in _names_by_dtype(model, gathered_as)
        if len(dtypes) > 1
    }


def refuse_mixed_storage(model: nn.Module) -> None:
    """Check that each FSDP group of a model, to which a plan was applied first, has one dtype."""
    for group, dtypes in _names_by_dtype(model, lambda param: param.sharded_param.dtype):
        if len(dtypes) > 1:
            listed = ", ".join(
                f"{dtype_name(dtype)} ({first_and_more(names)})" for dtype, names in dtypes.items()
            )
            raise PlanMismatchError(
                "fully_shard takes parameters of one dtype in a group, but the plan was applied "
                f"before it and that of {group} has {listed}; call fully_shard first and "
                "autoprec.apply after it, or fully_shard the fp32 layers by themselves first"
            )


def change_shard(model: nn.Module, parameter: Any, change: Callable[[Any], Any]) -> None:
    """Put `change` of its local tensor in that one's place; Any: a parameter that is a DTensor."""
    param = next(p for p in _all_params(model) if p.sharded_param is parameter)
    parameter._local_tensor = change(parameter._local_tensor)
    param._sharded_param_data = change(param._sharded_param_data)  # the same memory, with padding
    param._init_extensions()
    _forget_gathers(param)


def plain_shards(model: nn.Module) -> frozenset[nn.Parameter]:
    """Return the shards that FSDP gathers to whole parameters, not to a rank's part of a split."""
    return frozenset(p.sharded_param for p in _all_params(model) if not p.is_dtensor)


def gathered_as(param: FsdpParam) -> torch.dtype:
    """Return the dtype in which FSDP gathers a parameter."""
    own: torch.dtype = param.sharded_param.dtype
    planned = vars(param).get("gathered_as")
    return planned or (param.mp_policy.param_dtype if own in CASTABLE else None) or own


def gathers_of(model: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """Return the dtype in which FSDP gathers each parameter that it has sharded."""
    return {param.sharded_param: gathered_as(param) for param in _all_params(model)}


def casts_of(model: nn.Module) -> dict[str, tuple[torch.dtype | None, torch.dtype | None]]:
    """Return the dtypes that FSDP casts inputs and outputs of modules to, by the modules' names."""
    names = {module: name for name, module in model.named_modules()}
    policies = {names[module]: _state(module)._mp_policy for module in fsdp_modules(model)}
    return {
        name: (policy.param_dtype if policy.cast_forward_inputs else None, policy.output_dtype)
        for name, policy in policies.items()
    }


def kept_gradients(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the whole gradients that FSDP has not reduced yet (set_requires_gradient_sync)."""
    for param in _all_params(model):
        whole = vars(param).get("_unsharded_param")
        found = param.unsharded_accumulated_grad
        if found is None and whole is not None:
            found = whole.grad
        if found is not None:
            yield found


def _all_params(model: nn.Module) -> Iterator[FsdpParam]:
    for module in fsdp_modules(model):
        yield from _params(_state(module))


def _names_by_dtype(
    model: nn.Module, dtype_of: Callable[[FsdpParam], torch.dtype]
) -> Iterator[tuple[str, dict[torch.dtype, list[str]]]]:
    """Yield each FSDP group's name with those of its trained parameters, by a dtype of each."""
    names = {module: name for name, module in model.named_modules()}
    for module in fsdp_modules(model):
        for group in _groups(_state(module)):
            found: dict[torch.dtype, list[str]] = {}
            for param in (p for p in group.fsdp_params if p.sharded_param.requires_grad):
                info = param._module_info
                name = f"{names[info.module]}.{info.param_name}".removeprefix(".")
                found.setdefault(dtype_of(param), []).append(name)
            yield repr(names[module]) if names[module] else "the root", found


def _state(module: Any) -> Any:  # Any: torch's FSDPModule and FSDPState
    return module._get_fsdp_state()


def _groups(state: Any) -> list[Any]:  # Any: torch's FSDPState and FSDPParamGroup
    several = getattr(state, "_fsdp_param_groups", None)  # torch 2.12 and later
    groups = [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]


def _params(state: Any) -> Iterator[FsdpParam]:  # Any: torch's FSDPState
    for group in _groups(state):
        yield from group.fsdp_params


@functools.cache
def _planned_class() -> type:
    """Return FSDP's class of one parameter with a dtype of its own, whatever its group's policy."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    class PlannedParam(FSDPParam):
        gathered_as: torch.dtype
        is_mixed: bool  # its group gathers parameters of both dtypes

        def init_dtype_attrs(self, mp_policy: Any) -> None:  # Any: a MixedPrecisionPolicy
            """Set what the group's policy would set: FSDP asks when it first runs."""
            dtype, own = self.gathered_as, self.sharded_param.dtype
            reduce = mp_policy.reduce_dtype or mp_policy.param_dtype or own  # as without a plan
            if self.is_mixed or dtype is torch.float32:
                reduce = torch.float32
            policy = dataclasses.replace(mp_policy, param_dtype=dtype, reduce_dtype=reduce)
            super().init_dtype_attrs(policy)
            if self.is_mixed:  # of one dtype over the group, so never "no cast needed"
                self.reduce_dtype = reduce

        @property
        def unsharded_grad_data(self) -> torch.Tensor:
            """The gradient that FSDP is about to reduce."""
            gradient: torch.Tensor = super().unsharded_grad_data
            return gradient.float() if self.is_mixed else gradient

    return PlannedParam


def _changed(state: Any, dtypes: Dtypes) -> Callable[[], None]:  # Any: torch's FSDPState
    """Change what the groups of one module gather; return what changes it back."""
    policy = state._mp_policy
    # The plan's layers cast their own inputs and its root the outputs.
    state._mp_policy = dataclasses.replace(policy, cast_forward_inputs=False, output_dtype=None)
    before = []
    for group in _groups(state):
        params = group.fsdp_params
        before.append({p: (type(p), gathered_as(p), vars(p).get("is_mixed")) for p in params})
        wanted = {p: dtypes.get(p.sharded_param, gathered_as(p)) for p in group.fsdp_params}
        trained = {dtype for p, dtype in wanted.items() if p.sharded_param.requires_grad}
        for param, dtype in wanted.items():
            _set(param, _planned_class(), dtype, len(trained) > 1)
        group._init_mp_dtypes()

    def restore() -> None:
        state._mp_policy = policy
        for group, settings in zip(_groups(state), before, strict=True):
            for param, (cls, dtype, is_mixed) in settings.items():
                _set(param, cls, dtype, is_mixed)
            group._init_mp_dtypes()

    return restore


def _set(param: FsdpParam, cls: type, dtype: torch.dtype, is_mixed: bool | None) -> None:
    """Give a parameter its class and settings, and drop what was made for the last ones."""
    param.__class__ = cls
    own: dict[str, Any] = param.__dict__
    if cls is _planned_class():
        own.update(gathered_as=dtype, is_mixed=is_mixed)
    else:
        own.pop("gathered_as", None)
        own.pop("is_mixed", None)
    _forget_gathers(param)


def _forget_gathers(param: FsdpParam) -> None:
    """Drop the buffers and the Parameter of FSDP's first gather, whose dtype is theirs for ever."""
    param.all_gather_outputs = []
    param._unsharded_inner_tensors = []
    param.__dict__.pop("_unsharded_param", None)
