"""A model that `fully_shard` has sharded, in a process that trains alone -> the same, whole.

A copy has the FP32 weights under the same names. FSDP's own precision, its `mp_policy`, is noted
beside it, so that the script's first step can be repeated without FSDP.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autoprec.model.local_copy import whole_copy
from autoprec.runtime.activations import cast_floating
from autoprec.runtime.shards import casts_of, fsdp_modules, gathers_of, whole_again
from autoprec.workload.written import LOW_PRECISION

Dtype = torch.dtype | None


@dataclass(frozen=True)
class Policy:
    """In which dtypes FSDP gathers parameters and casts inputs and outputs of modules, by name."""

    parameters: dict[str, torch.dtype] = field(default_factory=dict)
    casts: dict[str, tuple[Dtype, Dtype]] = field(default_factory=dict)

    @property
    def low_dtype(self) -> Dtype:
        """The 16-bit dtype that it computes in, if there is one."""
        return next((d for d in self.parameters.values() if d in LOW_PRECISION), None)

    def install(self, model: nn.Module) -> None:
        """Make a copy of the model compute as FSDP does, in place."""
        for name, dtype in self.parameters.items():
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
        for name, (inputs, outputs) in self.casts.items():
            module = model.get_submodule(name)
            if inputs is not None:
                cast = functools.partial(_cast_inputs, inputs)
                module.register_forward_pre_hook(cast, with_kwargs=True)
            if outputs is not None:
                module.register_forward_hook(functools.partial(_cast_outputs, outputs))


def copy_sharded(model: nn.Module) -> tuple[nn.Module, Policy]:
    """Return a whole copy on the CPU of a model that FSDP may have sharded, and its policy."""
    if not fsdp_modules(model):
        return whole_copy(model), Policy()
    whole_again(model)
    gathers = gathers_of(model)
    dtypes = {name: gathers[p] for name, p in model.named_parameters() if p in gathers}
    return whole_copy(model), Policy(dtypes, casts_of(model))


# Any: whatever modules take and give
def _cast_inputs(dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return cast_floating((args, kwargs), dtype)


def _cast_outputs(dtype: torch.dtype, _: nn.Module, __: Any, output: Any) -> Any:
    return cast_floating(output, dtype)
