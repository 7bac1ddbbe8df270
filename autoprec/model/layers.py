"""The layers of a model: names, kinds, ties, parameters outside of them, structure."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.utils import parametrize

from autoprec.common.text import first_and_more, short_digest

PARAMETER_LISTS = (nn.ParameterList, nn.ParameterDict)  # no layers, but parts of their module
WRAPPER_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")  # of torch.compile and checkpointing


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model, and which parameters they share or leave over."""

    modules: Mapping[str, nn.Module]  # as `find_layers` returns them
    uncovered: Mapping[str, nn.Parameter]  # those that no layer owns, by plain name
    ties: Mapping[str, str]  # layer -> the earlier one that it shares a parameter with

    @property
    def structure(self) -> str:
        """A hash of the layers' names, classes and shapes; dtypes and values play no part."""
        layers = [
            [name, type_name(layer), [[n, list(p.shape)] for n, p in layer.named_parameters()]]
            for name, layer in self.modules.items()
        ]
        bare = [[name, list(parameter.shape)] for name, parameter in self.uncovered.items()]
        return short_digest(layers, bare)


def model_layers(model: nn.Module) -> ModelLayers:
    """Return the layers of a model with what they share and leave over."""
    layers = find_layers(model)
    owners: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, layer in layers.items():
        for parameter in layer.parameters():
            first = owners.setdefault(id(parameter), name)
            if first != name:  # tied to a tied layer: to the first of them all
                ties[name] = ties.get(first, first)
    uncovered = {plain_name(name): p for name, p in model.named_parameters() if id(p) not in owners}
    return ModelLayers(layers, uncovered, ties)


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model by plain name, in module order; a shared module once."""
    layers: dict[str, nn.Module] = {}
    inside_opaque: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside_opaque or isinstance(module, PARAMETER_LISTS):
            continue
        is_opaque = isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)
        if is_opaque:  # what is in it only makes sense there
            inside_opaque.update(id(child) for child in module.modules())
        if is_opaque or _is_leaf(module):
            layers[plain_name(name)] = module
    return layers


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """Return the layer of a plain name; wrappers hand on what they do not have themselves."""
    found = model.get_submodule(name)
    while wrapper := next((own for own in WRAPPER_NAMES if own in found._modules), None):
        found = found.get_submodule(wrapper)
    return found


def wide_dims(parameter: Tensor) -> int:
    """Return how many dimensions are wider than 1; `squeeze` would gather some of a DTensor's.

    >>> wide_dims(torch.zeros(1, 3, 1, 4))
    2
    """
    return sum(size > 1 for size in parameter.shape)


def type_name(module: nn.Module) -> str:
    """Return the module's class with its Python module; its own where torch made another of it."""
    cls = own_type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def own_type(module: nn.Module) -> type[nn.Module]:
    """Return the module's class without what parametrization and `fully_shard` made of it."""
    cls = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    return cls.__bases__[1] if _is_of_sharding(cls) else cls


def _is_of_sharding(cls: type[nn.Module]) -> bool:
    return cls.__bases__[0].__name__ == "FSDPModule"  # fully_shard's: (FSDPModule, own)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class without what a plan made of it."""
    cls = type(module)
    while comes_from_plan(cls):
        cls = vars(cls)["autoprec_base"]
    return cls


def written_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class without what plans and `fully_shard` made of it, in any order."""
    cls = type(module)
    while _is_of_sharding(cls) or comes_from_plan(cls):
        cls = vars(cls).get("autoprec_base") or cls.__bases__[1]
    return cls


def comes_from_plan(cls: type[nn.Module]) -> bool:
    """Whether a class comes from a plan (`runtime/classes.py`)."""
    return "autoprec_base" in vars(cls)


def master_refusal(model: nn.Module) -> str:
    """Return why a model's parameters cannot have FP32 masters; "" if they can."""
    if lazy := [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]:
        known = "parameters must have a shape, but lazy ones have none yet"
        return f"{known}: {first_and_more(lazy)}; run a batch through the model first"
    wide = [name for name, p in model.named_parameters() if p.dtype is torch.float64]
    if not wide:
        return ""
    return (
        "parameters must be in FP32, BF16 or FP16, but in float64, of which a plan's FP32 "
        f"masters would be less, are {first_and_more(wide)}; make them FP32, or buffers"
    )


def unwrapped(model: nn.Module, *, parallel: bool = False) -> nn.Module:
    """Return the module inside `torch.compile`'s wrapper, or the model itself.

    `parallel` takes it out of `DistributedDataParallel` and `DataParallel` as well.
    """
    while True:
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif parallel and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def plain_name(name: str) -> str:
    """Return a layer's name without what wrappers of single blocks put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def _is_leaf(module: nn.Module) -> bool:
    """Whether it owns parameters, and no child does but as a list of its own."""
    children = (child for child in module.children() if not isinstance(child, PARAMETER_LISTS))
    own = any(parameter is not None for parameter in module._parameters.values())
    return own and all(next(child.parameters(), None) is None for child in children)
