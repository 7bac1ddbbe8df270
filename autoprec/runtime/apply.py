"""A plan and a model (and its optimizer) -> the same objects, running the plan. And back.

    model, optimizer = autoprec.apply("plan.json", model, optimizer)

Everything is checked before anything is changed, so that an error leaves model and optimizer as
they were. What differs between plan and model is an error that says what; what merely may matter
(other software, another device) is one logged warning. The plan's state lives on the model and in
the optimizer's hooks, nowhere else: copies and pickles of the model carry it along.
"""

import copy
import functools
import logging
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim import Optimizer

from autoprec.common.text import one_line
from autoprec.device.local import device_name
from autoprec.errors import AutoprecError, PlanMismatchError
from autoprec.model.layers import find_layers, layer_kind, model_layers, plain_name, unwrapped
from autoprec.records import APPLICABLE_RECIPES, Assignment, Plan
from autoprec.runtime.attach import (
    attach_optimizer,
    check_optimizer,
    detach_optimizer,
    watch_optimizers,
)
from autoprec.runtime.classes import is_made_here, own_class
from autoprec.runtime.gathers import install_gathers, remove_gathers
from autoprec.runtime.install import Installed, install_options, set_storage
from autoprec.runtime.masters import (
    ON_MODEL,
    Masters,
    added_later,
    exact_value,
    forget_loads,
    keep_exact_loads,
    masters_of,
)
from autoprec.runtime.ranks import agree

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
AnyOptimizer = TypeVar("AnyOptimizer", bound="Optimizer | None")
MOST_LISTED = 8  # differences that an error spells out
MATTERS = ("torch", "torchao")  # packages whose version can change what a plan is worth


def apply(
    plan: Plan | Path | str,
    model: Model,
    optimizer: AnyOptimizer = None,  # type: ignore[assignment]  # None is AnyOptimizer's default
    *,
    group: "dist.ProcessGroup | None" = None,
) -> tuple[Model, AnyOptimizer]:
    """Make `model` run as the plan says, and `optimizer` train FP32 masters; both in place.

    Call it before wrapping the model in DDP, FSDP or `fully_shard`, and before loading a checkpoint
    into the optimizer. An optimizer made later is attached with `attach_optimizer`. Frozen
    parameters that become BF16 keep no FP32 copy. Where `torch.distributed` runs, every rank calls
    it, and either all ranks apply the same plan or all of them raise the same error. A plan that
    says `fp8_all_gather` makes `fully_shard` gather FP8 weights, see gathers.py.

    Args:
        plan: a plan, or the path of a plan.json.
        model: what the training step calls; `torch.compile`d or not.
        optimizer: any `torch.optim` optimizer of the model.
        group: the ranks that hold this model, if not all do (the stages of a pipeline).

    Returns:
        The same two objects.

    Raises:
        RecordError: the file is no plan.
        PlanMismatchError: the plan does not fit, here or on another rank; model and optimizer are
            as they were.
    """
    inner = unwrapped(model)
    device = next((parameter.device for parameter in inner.parameters()), torch.device("cpu"))
    try:
        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        installed = _install(plan, inner, optimizer)
    except AutoprecError as error:
        agree(failure=str(error), device=device, group=group)  # raises if there are other ranks
        raise
    try:
        agree(plan=plan, device=device, group=group)
    except BaseException:
        _take_out(installed, optimizer)
        raise
    masters = masters_of(inner)
    _forget_frozen(masters)
    keep_exact_loads(inner, masters)
    watch_optimizers()
    _warn_of_differences(plan, inner)
    if plan.schedule:
        logger.warning("the plan has a precision schedule: call autoprec.Guard's step to run it")
    if plan.fp8_all_gather:
        install_gathers(inner, installed.options)
    return model, optimizer


def undo(
    model: Model,
    optimizer: AnyOptimizer = None,  # type: ignore[assignment]  # None is AnyOptimizer's default
) -> tuple[Model, AnyOptimizer]:
    """Make the model plain FP32 with its master weights, and the optimizer plain; both in place.

    The optimizer keeps its state (moments are FP32 already).

    Raises:
        PlanMismatchError: no plan is applied, or something changed the modules' classes since.
    """
    inner = unwrapped(model)
    masters = masters_of(inner)
    _check_classes(inner)
    for parameter in [*masters.values, *added_later(inner, masters)]:
        set_storage(parameter, exact_value(parameter, masters))
    masters.values.clear()
    remove_gathers(inner)
    for module in inner.modules():
        module.__class__ = own_class(module)
        vars(module).pop("fp8_active", None)
    forget_loads(inner)
    vars(inner).pop(ON_MODEL)
    if optimizer is not None:
        detach_optimizer(optimizer)
    return model, optimizer


def master_view(model: nn.Module) -> nn.Module:
    """Return a plain FP32 model whose parameters *are* the master weights of an applied model.

    The view shares storage with the masters, buffers and FP32 parameters of `model`, so it follows
    the training. Use it for an FP32 checkpoint (`view.state_dict()`), for evaluation in FP32, or
    for averages: `AveragedModel(view)`, then `ema.update_parameters(view)` after every step,
    because an average kept in BF16 does not move. Write into the model, not into the view.

    Raises:
        PlanMismatchError: no plan is applied to the model.
    """
    inner = unwrapped(model)
    masters = masters_of(inner)
    memo: dict[int, object] = {id(masters): None, **{id(b): b for b in inner.buffers()}}
    memo |= {id(result): result.detach() for result in _kept_results(inner)}
    low = {*masters.values, *added_later(inner, masters)}
    for parameter in inner.parameters():
        data = exact_value(parameter, masters) if parameter in low else parameter.detach()
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    view = copy.deepcopy(inner, memo)
    forget_loads(view)
    vars(view).pop(ON_MODEL)
    remove_gathers(view)
    for module in view.modules():
        module.__class__ = own_class(module)
        vars(module).pop("fp8_active", None)
    return view


def check_fit(plan: Plan, model: nn.Module) -> None:
    """Check that a plan names every layer of a model, as it is.

    Raises:
        PlanMismatchError: it does not; the message names what differs.
    """
    differences = list(_differences(plan, model))
    if not differences:
        return
    more = len(differences) - MOST_LISTED
    listed = "; ".join(differences[:MOST_LISTED]) + (f"; and {more} more" if more > 0 else "")
    raise PlanMismatchError(
        f"a plan must name every layer of the model as it is, but {listed}; "
        "tune this model again, or correct the plan's names"
    )


def _install(plan: Plan, model: nn.Module, optimizer: Optimizer | None) -> Installed:
    """Check everything, then make model and optimizer run the plan; on an error undo that."""
    _check_wrappers(model)
    _check_own_forwards(model)
    layers = {plain_name(name): name for name in find_layers(model)}
    check_fit(plan, model)
    _check_recipes(plan)
    if optimizer is not None:
        check_optimizer(model, optimizer)
    installed = install_options(
        model,
        {layers[layer.name]: layer.option for layer in plan.layers},
        uncovered=model_layers(model).uncovered,
    )
    try:
        if optimizer is not None:
            attach_optimizer(model, optimizer)
    except BaseException:
        _take_out(installed, optimizer)
        raise
    return installed


def _check_recipes(plan: Plan) -> None:
    for layer in plan.layers:
        if layer.recipe is not None and layer.recipe not in APPLICABLE_RECIPES:
            raise PlanMismatchError(
                f"{layer.name!r} cannot run {layer.option.key}: torchao applies "
                f"{', '.join(APPLICABLE_RECIPES)}; choose one of these, or export the plan to a "
                "runtime that has it"
            )


def _take_out(installed: Installed, optimizer: Optimizer | None) -> None:
    """Leave no trace of an installation that was not trained with."""
    if optimizer is not None:
        detach_optimizer(optimizer)
    forget_loads(installed.model)
    installed.undo()


def _differences(plan: Plan, model: nn.Module) -> Iterator[str]:
    layers = {plain_name(name): module for name, module in find_layers(model).items()}
    planned = {layer.name: layer for layer in plan.layers}
    absent = (one_line(repr(name)) for name in planned if name not in layers)
    yield from (f"layer {name} is in the plan only" for name in absent)
    yield from (f"layer {n!r} is in the model only" for n in layers if n not in planned)
    for name, module in layers.items():
        if name in planned:
            yield from _layer_differences(planned[name], module)
    bare, listed = (
        {plain_name(name): None for name in model_layers(model).uncovered},
        set(plan.uncovered),
    )
    foreign = (one_line(repr(name)) for name in plan.uncovered if name not in bare)
    yield from (f"parameter {name} is in the plan only" for name in foreign)
    yield from (f"parameter {n!r} is in the model only" for n in bare if n not in listed)


def _layer_differences(planned: Assignment, module: nn.Module) -> Iterator[str]:
    kind = layer_kind(module)
    if kind is not planned.kind:
        yield f"layer {planned.name!r} is {kind} in the model, {planned.kind} in the plan"
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    if shapes != planned.shapes:
        yield (
            f"layer {planned.name!r} has shapes {_listed(shapes)} in the model, "
            f"{_listed(planned.shapes)} in the plan"
        )


def _listed(shapes: tuple[tuple[int, ...], ...]) -> str:
    sizes = ("x".join(map(str, shape[:MOST_LISTED])) or "scalar" for shape in shapes[:MOST_LISTED])
    return one_line(", ".join(sizes)) or "none"


def _check_wrappers(model: nn.Module) -> None:
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel, *_fsdp_classes())
    for module in model.modules():
        if ON_MODEL in vars(module) or is_made_here(type(module)):
            raise PlanMismatchError(
                "a model takes one plan at a time, but one is applied to this model already; call "
                "autoprec.undo(model, optimizer) first"
            )
        if isinstance(module, parallel) or _is_split(module):
            by = type(module).__name__ if isinstance(module, parallel) else "parallelize_module"
            raise PlanMismatchError(
                "a plan must be applied before the model is wrapped or split, but it already is by "
                f"{by}; call autoprec.apply first"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise PlanMismatchError(
                "a scripted module cannot be changed, and the model has one; "
                "call autoprec.apply before torch.jit.script"
            )


def _check_own_forwards(model: nn.Module) -> None:
    """Refuse forwards set on the root or on a layer itself: they hide what its class computes."""
    for name, module in {"": model, **find_layers(model)}.items():
        if "forward" in vars(module) and not isinstance(module, OptimizedModule):
            raise PlanMismatchError(
                "a plan changes what a module's class computes, but "
                f"{name or 'the model'!r} has a forward of its own on the object (Accelerate's "
                "prepare and its hooks set one); call autoprec.apply before what sets it"
            )


def _fsdp_classes() -> tuple[type, ...]:
    if "torch.distributed.fsdp" not in sys.modules:  # then nothing can be an instance
        return ()
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return FullyShardedDataParallel, FSDPModule


def _is_split(module: nn.Module) -> bool:
    """Whether tensor parallelism gave the module parts of its parameters."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module._parameters.values())


def _check_classes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        cls = type(module)
        if issubclass(cls, _fsdp_classes()) or _is_split(module):
            raise PlanMismatchError(
                f"a plan can be taken out of a whole model only, but {name or 'this model'!r} is "
                "sharded over ranks; save its state (the optimizer's has the FP32 masters) and "
                "load that into a model without a plan"
            )
        if not is_made_here(cls) and any(is_made_here(base) for base in cls.__mro__[1:]):
            raise PlanMismatchError(
                f"a module must keep the class that the plan gave it, but {name!r} is now a "
                f"{cls.__name__}; undo first what was applied after the plan"
            )


def _forget_frozen(masters: Masters) -> None:
    """Drop the FP32 copies of frozen parameters, which nobody trains."""
    for parameter in masters.values:
        if not parameter.requires_grad:
            masters.values[parameter] = None


def _warn_of_differences(plan: Plan, model: nn.Module) -> None:
    """Log one warning that names all differences of software and device to the plan's."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    made, name = plan.fingerprint, device_name(device)
    found = _software_differences(made.software)
    if made.device and name != made.device:
        found.insert(0, f"device {name} (the plan: {one_line(made.device)})")
    if found:
        logger.warning(
            "the plan was made elsewhere: %s; it will run, but its times and its verification are "
            "of the other; tune again here to be sure",
            ", ".join(found),
        )


def _kept_results(model: nn.Module) -> Iterator[Tensor]:
    """Yield computed tensors that modules keep as attributes: torch refuses to copy these."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _software_differences(made: Mapping[str, str]) -> list[str]:
    return [
        f"{package} {here} (the plan: {one_line(made[package])})"
        for package, here in _installed().items()
        if package in made and made[package] != here
    ]


@functools.cache
def _installed() -> dict[str, str]:
    return {package: version(package) for package in MATTERS}
