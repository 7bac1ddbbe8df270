"""A plan and a model (and its optimizer) -> the same objects, running the plan. And back.

Everything is checked before anything is changed, so that an error leaves model and optimizer as
they were. What differs between plan and model is an error that says what; what merely may matter
(other software, another device) is one logged warning. The plan's state lives on the model and in
the optimizer's hooks, nowhere else: copies and pickles of the model carry it along.
"""

import contextlib
import copy
import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import TypeVar  # with a default

from autoprec.common.text import first_and_more, one_line
from autoprec.common.versions import software_versions
from autoprec.device.local import device_name
from autoprec.device.random_state import random_state_kept
from autoprec.errors import AutoprecError, PlanMismatchError
from autoprec.model.layers import model_layers, unwrapped
from autoprec.records import Plan
from autoprec.runtime.attach import attach, check_optimizer, detach_optimizer, watch_optimizers
from autoprec.runtime.averages import follow_averages
from autoprec.runtime.finite import leave_first_step, watch_first_step
from autoprec.runtime.fit import check_fit, check_removable, check_untouched
from autoprec.runtime.gathers import install_gathers
from autoprec.runtime.install import Installed, install_options, remove_plan, set_storage
from autoprec.runtime.layouts import read_from_any_layout
from autoprec.runtime.masters import LIVE, ON_MODEL, exact_values, masters_of
from autoprec.runtime.ranks import agree
from autoprec.runtime.shards import fsdp_modules, mixed_groups, whole_again
from autoprec.runtime.state_dicts import keep_exact_loads
from autoprec.workload.written import note_moving

logger = logging.getLogger(__name__)
_software = functools.cache(software_versions)  # read once: a plan opens no folder

Model = TypeVar("Model", bound=nn.Module)
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer | None, default=None)


@random_state_kept()
def apply(
    plan: Plan | Path | str,
    model: Model,
    optimizer: AnyOptimizer = None,  # type: ignore[assignment]  # the variable's default
    *,
    group: "dist.ProcessGroup | None" = None,
) -> tuple[Model, AnyOptimizer]:
    """Make `model` run as the plan says and `optimizer` train FP32 masters, in place; return both.

    Call it before wrapping the model in DDP, and before loading a checkpoint into the optimizer.
    With `fully_shard`, call it after: the FP32 shards are the masters then, and FSDP gathers BF16
    (shards.py). Before works where each group gets one dtype. An optimizer made later is attached
    with `attach_optimizer`. Frozen BF16 parameters keep no FP32 copy. Where `torch.distributed`
    runs, every rank calls it: all apply the same plan or all raise the same error. A plan with
    `fp8_all_gather` makes FSDP gather FP8 weights. A first step whose gradients are not finite
    raises an error that names the layers where it begins, before anything is trained.

    Args:
        plan: a plan, or a plan.json's path.
        model: what the training step calls; `torch.compile`d or not.
        optimizer: any `torch.optim` optimizer of the model.
        group: the ranks that hold this model, if not all do (the stages of a pipeline).

    Raises:
        RecordError: the file is no plan.
        PlanMismatchError: the plan does not fit, here or on another rank; nothing was changed.

    Example:
        >>> import torch, autoprec
        >>> from autoprec.runtime import uniform_plan
        >>> model = torch.nn.Linear(16, 16)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> plan = uniform_plan(model, "bf16_o2")  # or the path of a plan.json
        >>> model, optimizer = autoprec.apply(plan, model, optimizer)
        >>> model.weight.dtype, model(torch.ones(2, 16)).dtype
        (torch.bfloat16, torch.float32)
    """
    _check_module(model)
    whole_again(inner := unwrapped(model))
    device = next((parameter.device for parameter in inner.parameters()), torch.device("cpu"))
    plan, installed = _install_on_all_ranks(plan, inner, optimizer, device, group)
    _start_masters(inner)
    if plan.fp8_all_gather:
        install_gathers(inner, installed.options)
    if plan.schedule:
        logger.warning("the plan has a precision schedule: call autoprec.Guard's step to run it")
    _warn_of_differences(plan, device)
    _warn_of_mixed_groups(inner)
    watch_first_step(model, group=group)
    return model, optimizer


def undo(
    model: Model,
    optimizer: AnyOptimizer = None,  # type: ignore[assignment]  # the variable's default
) -> tuple[Model, AnyOptimizer]:
    """Make the model plain FP32 with its master weights, and the optimizer plain; both in place.

    The optimizer keeps its state (moments are FP32 already).

    Raises:
        PlanMismatchError: no plan is applied, or something changed the modules' classes since.

    Example:
        >>> import torch, autoprec
        >>> from autoprec.runtime import uniform_plan
        >>> model = torch.nn.Linear(16, 16)
        >>> model, _ = autoprec.apply(uniform_plan(model, "bf16_o2"), model)
        >>> model, _ = autoprec.undo(model)
        >>> model.weight.dtype
        torch.float32
    """
    inner = unwrapped(model)
    masters = masters_of(inner)
    check_removable(inner)
    leave_first_step(inner)
    masters.gather_as_before()
    # The FP32 masters are the weights from here on; then the classes of the plan go.
    for parameter, exact in exact_values(inner, masters).items():
        set_storage(parameter, exact)
    masters.values.clear()
    remove_plan(inner)
    if optimizer is not None:
        detach_optimizer(optimizer)
    return model, optimizer


def master_view(model: nn.Module) -> nn.Module:
    """Return a plain FP32 model whose parameters *are* the master weights of an applied model.

    The view shares storage with the masters, buffers and FP32 parameters of `model`, so it follows
    the training. Use it for an FP32 checkpoint (`view.state_dict()`), for evaluation in FP32, or
    for an average in FP32: `AveragedModel(view)`, then `ema.update_parameters(view)` after every
    step. Write into the model, not into the view.

    Raises:
        PlanMismatchError: no plan is applied to the model, or FSDP2 has sharded it.

    Example:
        >>> import torch, autoprec
        >>> from autoprec.runtime import uniform_plan
        >>> model = torch.nn.Linear(16, 16)
        >>> model, _ = autoprec.apply(uniform_plan(model, "bf16_o2"), model)
        >>> view = autoprec.master_view(model)
        >>> torch.equal(view.weight.bfloat16(), model.weight)
        True
    """
    inner = unwrapped(model)
    masters = masters_of(inner)
    if fsdp_modules(inner):
        raise PlanMismatchError(
            "a view shares FP32 masters with a whole model, but this one is sharded; where apply "
            "came after fully_shard its state_dict is FP32, else the optimizer's has the masters"
        )
    return plain_view(inner, exact_values(inner, masters))


@random_state_kept()
def plain_view(model: nn.Module, exact: Mapping[nn.Parameter, Tensor]) -> nn.Module:
    """Return a plain model of FP32 masters, which share storage with those of `model`.

    `exact` has values for parameters without a master.
    """
    # Whatever `deepcopy` finds in its memo it shares instead of copying.
    memo: dict[int, object] = {id(b): b for b in model.buffers()}
    memo |= dict.fromkeys(map(id, [*(vars(m).get(ON_MODEL) for m in model.modules()), *LIVE]))
    for value in (value for module in model.modules() for value in vars(module).values()):
        if isinstance(value, Tensor) and not value.is_leaf:  # torch copies nothing computed
            memo[id(value)] = value.detach()
    exact = {**exact_values(model), **exact}
    for parameter in model.parameters():
        data = exact.get(parameter, parameter.detach())
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    view = copy.deepcopy(model, memo)
    remove_plan(view)
    for module in view.modules():  # those of a state dict, of the first step, of a guard
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._state_dict_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__module__", "").startswith("autoprec."):
                    del hooks[key]
    return view


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise PlanMismatchError(
            f"a plan is for a torch.nn.Module, but this is a {type(model).__name__}; call "
            "autoprec.apply(plan, model, optimizer) with the module that is trained"
        )


def _install_on_all_ranks(
    plan: Plan | Path | str,
    model: nn.Module,
    optimizer: Optimizer | None,
    device: torch.device,
    group: "dist.ProcessGroup | None",
) -> tuple[Plan, Installed]:
    """Read and install the plan, or undo it where one rank of the group could not."""
    with contextlib.ExitStack() as on_error:
        try:
            plan = Plan.load(plan)
            installed = _install(plan, model, optimizer)
            on_error.callback(installed.undo)
            if optimizer is not None:
                on_error.callback(detach_optimizer, optimizer)
                attach(masters_of(model), optimizer)
        except AutoprecError as error:
            agree(str(error), device=device, group=group)  # raises if there are other ranks
            raise
        agree(plan, device=device, group=group)
        on_error.pop_all()  # every rank has the plan: it stays
    return plan, installed


def _install(plan: Plan, model: nn.Module, optimizer: Optimizer | None) -> Installed:
    """Check everything, then make the model run the plan."""
    found = model_layers(model)
    check_untouched(model, found)
    check_fit(plan, model, found=found)
    if optimizer is not None:
        check_optimizer(model, optimizer)
    options = {layer.name: layer.option for layer in plan.layers}
    note_moving(model, plan.followers)
    return install_options(
        model,
        options,
        uncovered=found.uncovered,
        layers=found.modules,
        fp32_outputs=plan.fp32_outputs,
    )


def _start_masters(model: nn.Module) -> None:
    """Let masters follow what will train, load and average the parameters of an applied model."""
    masters = masters_of(model)
    masters.values |= {p: None for p in masters.values if not p.requires_grad}  # nobody trains them
    keep_exact_loads(model, masters)
    watch_optimizers()
    follow_averages()
    read_from_any_layout(must_import=bool(fsdp_modules(model)))


def _warn_of_mixed_groups(model: nn.Module) -> None:
    """Log one warning that names the FSDP groups of two dtypes, and what they cost."""
    groups = mixed_groups(model)
    if groups:
        listed = (f"{group} ({first_and_more(names, most=2)})" for group, names in groups.items())
        logger.warning(
            "%d of FSDP's groups hold FP32 layers beside 16-bit ones: %s; their BF16 gradients are "
            "cast to FP32 before they are reduced, about 8 bytes per parameter and step of memory "
            "traffic; set these layers to bf16_o2, or fully_shard them by themselves, to save that",
            len(groups),
            first_and_more(listed, most=4),
        )


def _warn_of_differences(plan: Plan, device: torch.device) -> None:
    """Log one warning that names all differences of software and device to the plan's."""
    if device.type == "meta":
        return
    made, name, here = plan.fingerprint, device_name(device), _software()
    found = [] if made.device in ("", name) else [f"device {name} (the plan: {made.device})"]
    found += [
        f"{package} {here[package]} (the plan: {made.software[package]})"
        for package in ("torch", "torchao")
        if made.software.get(package, here[package]) != here[package]
    ]
    if found:
        logger.warning(
            "the plan was made elsewhere: %s; it will run, but its times and its verification are "
            "of the other; tune again here to be sure",
            ", ".join(map(one_line, found)),
        )
