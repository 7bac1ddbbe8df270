"""Whether a plan fits a model as it is, and whether a model can take a plan, or give it back, now.

Nothing is changed here: everything that can be known is checked before `apply` changes anything.
"""

import gc
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule

from autoprec.common.text import first_and_more, one_line
from autoprec.device.ranks import sharded_tensor
from autoprec.errors import PlanMismatchError, RecordError
from autoprec.model.kinds import layer_kind, linear_refusal, matrix_sizes
from autoprec.model.layers import (
    ModelLayers,
    comes_from_plan,
    master_refusal,
    model_layers,
)
from autoprec.model.options import shape_refusal
from autoprec.records import BF16_O2, Assignment, Basis, Constraint, Fingerprint, Option, Plan
from autoprec.runtime.masters import ON_MODEL, masters_of

MOST_LISTED = 8  # differences that an error spells out
# Where the functions come from that `autocast(forward)` and Accelerate's `prepare` wrap one in.
AUTOCAST_MODULES = ("torch.amp.autocast_mode", "accelerate.utils.operations")


def check_fit(plan: Plan, model: nn.Module, *, found: ModelLayers | None = None) -> None:
    """Check that a plan names every layer of a model, as it is; `found` if they are known."""
    found = found or model_layers(model)
    differences = list(_differences(plan, found))
    if differences:
        listed = first_and_more(differences, most=MOST_LISTED, separator="; ")
        other = _other_module([layer.name for layer in plan.layers], list(found.modules))
        raise PlanMismatchError(
            "a plan must name every layer of the model as it is, but "
            f"{other or listed + '; tune this model again, or correct the names in the plan'}"
        )


def check_untouched(model: nn.Module, found: ModelLayers) -> None:
    """Check that nothing else has changed or wrapped the model (PlanMismatchError)."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel, *_fsdp_classes()[:1])
    for module in (*_around(model), *model.modules()):
        if ON_MODEL in vars(module) or comes_from_plan(type(module)):
            raise PlanMismatchError(
                "a model takes one plan at a time, but one is applied to this model already; call "
                "autoprec.undo(model, optimizer) first"
            )
        if isinstance(module, parallel):
            raise PlanMismatchError(
                "a plan must be applied before the model is wrapped, but it already is by "
                f"{type(module).__name__}; call autoprec.apply first"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise PlanMismatchError(
                "a scripted module cannot be changed, and the model has one; "
                "call autoprec.apply before torch.jit.script"
            )
    if reason := master_refusal(model):
        raise PlanMismatchError(reason)
    # A forward set on a layer itself hides what its class computes; on the root, it is run.
    for name, module in {**found.modules, "": model}.items():
        forward, is_layer = vars(module).get("forward"), name in found.modules
        hides = is_layer or without_autocast(forward)[0] is not forward
        if forward is not None and hides and not isinstance(module, OptimizedModule):
            raise PlanMismatchError(
                "a plan changes what a module's class computes, but "
                f"{name or 'the model'!r} has a forward of its own on the object (Accelerate's "
                "prepare and its hooks set one); call autoprec.apply before what sets it"
            )


def without_autocast(forward: Any) -> tuple[Any, bool]:  # Any: None, or whatever can be called
    """Return what autocast is wrapped around, and whether that makes its outputs FP32.

    A forward that is not under autocast comes back itself.
    """
    owner, inside = getattr(forward, "__self__", None), getattr(forward, "__func__", forward)
    gives_fp32 = is_under = False
    while inside is not None:
        code = inside if hasattr(inside, "__globals__") else vars(type(inside)).get("__call__")
        if getattr(code, "__globals__", {}).get("__name__") not in AUTOCAST_MODULES:
            break
        is_under, gives_fp32 = True, gives_fp32 or type(inside).__name__ == "ConvertOutputsToFp32"
        inside = getattr(inside, "__wrapped__", None)
        owner = getattr(inside, "__self__", owner)
        inside = getattr(inside, "__func__", inside)
    if not is_under:
        return forward, False
    return inside if owner is None else types.MethodType(inside, owner), gives_fp32


def check_removable(model: nn.Module) -> None:
    """Check that a model is as `apply` left it, or raise PlanMismatchError."""
    was_split = masters_of(model).was_split
    for name, module in model.named_modules():
        cls = type(module)
        is_split = any(isinstance(p, sharded_tensor()) for p in module._parameters.values())
        if not was_split and (issubclass(cls, _fsdp_classes()) or is_split):
            raise PlanMismatchError(
                "a plan can be taken out while a model is as whole as when the plan came, but "
                f"{name or 'this model'!r} is sharded over ranks; save its state (the optimizer's "
                "has the FP32 masters) and load that into a model without a plan"
            )
        if not comes_from_plan(cls) and any(comes_from_plan(base) for base in cls.__mro__[1:]):
            raise PlanMismatchError(
                f"a module must keep the class that the plan gave it, but {name!r} is now a "
                f"{cls.__name__}; undo first what was applied after the plan"
            )


def _differences(plan: Plan, found: ModelLayers) -> Iterator[str]:
    """Yield every difference between a plan's layers and a model's; the plan's text is foreign."""
    layers = found.modules
    planned = {layer.name: layer for layer in plan.layers}
    yield from _one_sided("layer", planned, layers)
    for name in (name for name in layers if name in planned):
        kind, shapes = layer_kind(layers[name]), _shapes(layers[name])
        if kind is not planned[name].kind:
            yield f"layer {name!r} is {kind} in the model, {planned[name].kind} in the plan"
        if shapes != planned[name].shapes:
            there = f"{_listed(planned[name].shapes)} in the plan"
            yield f"layer {name!r} has shapes {_listed(shapes)} in the model, {there}"
    yield from _one_sided("parameter", dict.fromkeys(plan.uncovered), found.uncovered)


def _around(model: nn.Module) -> list[nn.Module]:
    """Return each DDP that holds a model: its hooks are on the parameters as they were, in FP32."""
    ddp, own = nn.parallel.DistributedDataParallel, {*model.parameters()}
    if not (dist.is_available() and dist.is_initialized()):
        return []
    gc.collect()  # one that is not used any more
    found = [each for each in gc.get_objects() if issubclass(type(each), ddp)]
    inner = [(each, vars(each).get("_modules", {}).get("module")) for each in found]  # or to come
    return [
        each for each, held in inner if held is not None and not own.isdisjoint(held.parameters())
    ]


def _other_module(planned: Sequence[str], own: Sequence[str]) -> str:
    """Say which other module a plan is of, if it is of what holds the model or of a part of it."""
    holder, part = "this plan is of a module that holds this one as", "this plan is of its part"
    several = " (an nn.ModuleDict, where a script trains several)"
    for longer, shorter, whose, way in (
        (planned, own, holder, several),
        (own, planned, part, ""),
    ):
        first = f".{shorter[0]}" if shorter else ""
        for prefix in (name.removesuffix(first) for name in longer if name.endswith(first)):
            inside = [name for name in longer if name.startswith(f"{prefix}.")]
            if inside and inside == [f"{prefix}.{name}" for name in shorter]:
                return f"{whose} {one_line(repr(prefix))}: apply it to that module{way}"
    return ""


def _one_sided(
    what: str, planned: Mapping[str, object], own: Mapping[str, object]
) -> Iterator[str]:
    """Yield the names that only the plan has, then those that only the model has."""
    absent = (one_line(repr(name)) for name in planned if name not in own)
    yield from (f"{what} {name} is in the plan only" for name in absent)
    yield from (f"{what} {name!r} is in the model only" for name in own if name not in planned)


def _shapes(layer: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(parameter.shape) for parameter in layer.parameters())


def _listed(shapes: tuple[tuple[int, ...], ...]) -> str:
    sizes = ("x".join(map(str, shape[:MOST_LISTED])) or "scalar" for shape in shapes[:MOST_LISTED])
    return one_line(", ".join(sizes)) or "none"


def _fsdp_classes() -> tuple[type, ...]:
    """Return the classes of FSDP1 and FSDP2; none while nobody imported them."""
    module = sys.modules.get("torch.distributed.fsdp")
    return () if module is None else (module.FullyShardedDataParallel, module.FSDPModule)


def fp8_refusal(layer: nn.Module) -> str:
    """Return the reason that no device can run a layer in FP8, or an empty string."""
    if reason := linear_refusal(layer):
        return reason
    N, K = matrix_sizes(layer)
    return shape_refusal(K, N)


def uniform_plan(
    model: nn.Module, option: Option | str, others: Mapping[str, Option] | None = None
) -> Plan:
    """Return a plan without a search: `option` in every layer that can take it, else `bf16_o2`.

    An option may be given by its key, e.g. `fp8_o1:rowwise`; `others` are those of layers by name.

    Raises:
        RecordError: a key names no option, or `others` a layer that the model does not have.
    """
    try:
        wanted = Option.parse(option) if isinstance(option, str) else option
    except ValueError as error:
        raise RecordError(
            "an option must be fp32, bf16_o2 or fp8_o1 with a recipe, e.g. fp8_o1:rowwise, but it "
            f"is {option!r}"
        ) from error
    found = model_layers(model)
    if missing := [name for name in others or {} if name not in found.modules]:
        raise RecordError(
            f"others must name layers of the model, but {first_and_more(missing)} is none"
        )
    layers = []
    for name, layer in found.modules.items():
        # By the rule of what a layer can take; whether the device runs it, `apply` finds out.
        can_take = not wanted.is_fp8 or not fp8_refusal(layer)
        chosen = (others or {}).get(name, wanted if can_take else BF16_O2)
        kind, shapes = layer_kind(layer), _shapes(layer)
        layers.append(Assignment(name=name, kind=kind, shapes=shapes, **dict(chosen)))
    # Nothing was measured, so nothing is claimed: no evidence, no device.
    return Plan(
        layers=tuple(layers),
        uncovered=tuple(found.uncovered),
        constraint=Constraint(loss_tolerance=0.001, grad_error_budget=None),
        fingerprint=Fingerprint(
            structure=found.structure,
            device="",
            capability="",
            software={},
            compile_mode="eager",
            tokens_per_step=0,
        ),
        grad_error=None,
        grad_error_basis=Basis.UNKNOWN,
        predicted=None,
    )
