"""Options per layer -> a model that runs them, in place and reversibly.

What an option means is decided here and nowhere else. The activation dtype is that of what flows
between layers:

    fp32      parameters FP32; floating inputs cast to FP32, outputs to it (or kept FP32 on request)
    bf16_o2   parameters BF16; inputs cast to BF16, outputs to it
    fp8_o1    as bf16_o2, and torchao runs the GEMMs as the recipe says

Batch and instance norms in `bf16_o2` take and give BF16 but keep FP32 parameters and statistics
(Apex's keep_batchnorm_fp32: torch refuses BF16 weights beside FP32 statistics on a CPU, and running
averages lose their tail in BF16). Buffers keep their dtype. The root gives FP32 back, or what its
forward gives where the model came in BF16: its loss may multiply that by BF16 tensors. So does any
part that is called on its own, by a method of the model or by a script.

Module objects, Parameter objects, names and hooks stay as they are: only a parameter's storage
(`param.data`) and a module's class are exchanged. The originals are kept as the first FP32 masters.
Shards of `fully_shard` keep their storage: FSDP gathers them in the option's dtype (shards.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.utils.parametrize import ParametrizationList

from autoprec.common.text import first_and_more
from autoprec.device.fp8 import fp8_support
from autoprec.device.ranks import local_part, sharded_tensor
from autoprec.errors import PlanMismatchError
from autoprec.model.kinds import is_transposed
from autoprec.model.layers import comes_from_plan, find_layers, own_class
from autoprec.model.local_copy import is_divided
from autoprec.model.state import put_back_dtypes
from autoprec.records import APPLICABLE_RECIPES, FP32, Option
from autoprec.runtime.activations import CASTABLE, option_dtype
from autoprec.runtime.classes import (
    container_class,
    layer_class,
    put_around_own_forward,
    take_off_own_forward,
)
from autoprec.runtime.fit import fp8_refusal
from autoprec.runtime.gathers import plain_gathers
from autoprec.runtime.masters import ON_MODEL, Masters
from autoprec.runtime.shards import gather_as, nothing_sharded, whole_again
from autoprec.runtime.state_dicts import forget_loads
from autoprec.workload.written import followers_of

# What may stand between the layers of a chain: torch.nn's own, of one tensor, at home in BF16.
BETWEEN = {
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d),
    *(nn.Dropout2d, nn.AlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softmax, nn.LogSoftmax, nn.MaxPool1d),
    *(nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
}
KEEPS_FP32_PARAMETERS = (nn.modules.batchnorm._NormBase,)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)  # refuse other dtypes before a function is asked
Storage = dict[nn.Parameter, tuple[str, torch.dtype]]  # each parameter's layer and storage dtype


@dataclass
class Installed(AbstractContextManager["Installed"]):
    """What `install_options` did to a model. A context manager: leaving it undoes."""

    model: nn.Module
    options: dict[str, Option]
    activation_dtype: torch.dtype
    fp32_outputs: frozenset[str] = frozenset()
    followers: frozenset[nn.Parameter] = frozenset()  # whose layers keep them in FP32
    came_in_bf16: bool = False
    originals: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # before the conversion
    classes: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)  # before ours
    masters: Masters | None = None  # made by the first installation in a model, None if nested
    gather_as_before: Callable[[], None] = nothing_sharded

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Give a module another class, and note the one it had."""
        before, module.__class__ = type(module), cls
        self.classes.append((module, before))

    def undo(self) -> None:
        """Take everything out again; parameters that nobody changed get their exact values back."""
        for module, _ in self.classes:
            if not comes_from_plan(type(module)):
                raise PlanMismatchError(
                    f"a module must keep the class that the plan gave it, but one is now a "
                    f"{type(module).__name__}; undo first what was applied after the plan"
                )
        self.gather_as_before()
        for module, cls in reversed(self.classes):
            module.__class__ = cls
            take_off_own_forward(module)
        if self.masters is None:  # nested in another installation, which keeps its own marks
            for module, cls in self.classes:
                if not comes_from_plan(cls):
                    vars(module).pop("fp8_active", None)
        else:
            self.masters.values.clear()
            remove_plan(self.model)
        for parameter, original in self.originals.items():
            kept = local_part(original).to(parameter.dtype)
            unchanged = torch.equal(local_part(parameter.data), kept)
            set_storage(parameter, original if unchanged else parameter.data.to(original.dtype))
        self.classes, self.originals, self.gather_as_before = [], {}, nothing_sharded

    def __exit__(self, *_: object) -> None:
        self.undo()


def install_options(
    model: nn.Module,
    options: Mapping[str, Option],
    *,
    activation_dtype: torch.dtype | None = None,
    root: bool = True,
    uncovered: Iterable[str] = (),
    layers: Mapping[str, nn.Module] | None = None,
    fp32_outputs: Iterable[str] = (),
) -> Installed:
    """Make the named layers of `model` run as their options say, in place.

    Installations nest: the last one in must be undone first, and decides for the layers it names.

    Args:
        model: its layers that `options` does not name stay as they are.
        options: by layer name.
        activation_dtype: between layers; default FP32 if all are or `fp32_outputs` has all of them.
        root: whether `model` is what the training step calls: its floating outputs become FP32,
            unless all its parameters are BF16 and no plan's.
        uncovered: parameters outside of layers, stored in that dtype, in FP32 by `fp32_outputs`.
        layers: what `find_layers(model)` returns, where it is known.
        fp32_outputs: layers whose outputs stay FP32 up to the next layer.

    Raises:
        PlanMismatchError: a name is no layer, tied layers disagree about their storage, or a layer
            or its device cannot run FP8. The model is then as it was.
    """
    whole_again(model)
    layers = find_layers(model) if layers is None else layers
    for name, option in options.items():
        _check_layer(name, layers, option)
    has_16_bit = any(option_dtype(option) is torch.bfloat16 for option in options.values())
    kept, came_in_bf16 = frozenset(fp32_outputs), is_all_bf16(model)
    is_low_between = has_16_bit and not kept.issuperset(options)
    activation_dtype = activation_dtype or (torch.bfloat16 if is_low_between else torch.float32)
    storage = _plan_storage(layers, options)
    for name in uncovered:
        dtype = torch.float32 if name in kept else activation_dtype
        storage[model.get_parameter(name)] = name, dtype
    own = (kept, followers_of(model), came_in_bf16)
    installed = Installed(model, dict(options), activation_dtype, *own)
    try:
        _convert_storage(storage, installed)
        _set_classes(layers, installed, has_16_bit=has_16_bit, root=root)
    except BaseException:  # out of memory, Ctrl-C: leave the model as it was
        installed.undo()
        raise
    _keep_masters(storage, installed)
    return installed


def remove_plan(model: nn.Module) -> None:
    """Take every trace of a plan out of a model's modules; its parameters stay as they are."""
    forget_loads(model)
    plain_gathers(model)
    if masters := vars(model).pop(ON_MODEL, None):
        put_back_dtypes(model, masters.buffer_dtypes)
    for module in model.modules():
        take_off_own_forward(module)
        module.__class__ = own_class(module)
        vars(module).pop("fp8_active", None)


def set_storage(parameter: nn.Parameter, data: Any) -> None:
    """Give a parameter other data (Any: a tensor or DTensor); the gradient follows the dtype."""
    gradient = parameter.grad
    parameter.grad = None
    parameter.data = data
    if parameter.grad_dtype is not data.dtype:  # one that was set stays otherwise
        parameter.grad_dtype = data.dtype
    if isinstance(parameter, sharded_tensor()):  # a DTensor's own part and dtype, beside torch's
        own: Any = parameter  # Any: mypy knows no change of class
        own._local_tensor, own._spec = data._local_tensor, data._spec
    if gradient is not None:
        parameter.grad = gradient.to(data.dtype)
    # the user's hooks at the gradient, made for the dtype that it had
    _put_around(parameter._backward_hooks, _cast_gradient)
    _put_around(parameter._post_accumulate_grad_hooks, _cast_held_gradient)


def _put_around(hooks: Any, cast: Callable[..., Any]) -> None:  # Any: dicts of many functions
    for key, hook in (hooks or {}).items():
        if getattr(hook, "func", None) is not cast:
            hooks[key] = partial(cast, hook)


def _cast_gradient(hook: Callable[[Tensor], Tensor | None], gradient: Tensor) -> Tensor | None:
    """Run a hook; an FP32 mask makes FP32 of a BF16 gradient, which autograd would refuse."""
    found = hook(gradient)
    return None if found is None else found.to(gradient.dtype)


def _cast_held_gradient(hook: Callable[[nn.Parameter], None], parameter: nn.Parameter) -> None:
    """Run a hook that may set a gradient of any dtype."""
    parameter.grad_dtype = None  # any
    try:
        hook(parameter)
        if parameter.grad is not None:
            parameter.grad = parameter.grad.to(parameter.dtype)
    finally:
        parameter.grad_dtype = parameter.dtype


def _cast_gradients(
    hook: Callable[..., Any], module: nn.Module, gradients: tuple[Tensor | None, ...], *rest: Any
) -> Any:  # Any: torch's own
    """Run a hook at a module's backward, which may return gradients of any dtype."""
    found = hook(module, gradients, *rest)
    several = found if isinstance(found, tuple) else (found,)
    if found is None or len(several) != len(gradients):  # torch says so
        return found
    pairs = zip(several, gradients, strict=True)
    return tuple(new if new is None or old is None else new.to(old.dtype) for new, old in pairs)


def _check_layer(name: str, layers: Mapping[str, nn.Module], option: Option) -> None:
    if name not in layers:
        raise PlanMismatchError(
            f"every layer given an option must exist in the model, but {name!r} does not "
            f"(its layers: {first_and_more(layers)}); correct the name"
        )
    layer = layers[name]
    if "forward" in vars(layer):
        reason = "its forward was replaced on the object; apply the plan before what replaced it"
    else:
        reason = _option_refusal(layer, option) if option.is_fp8 else ""
    if reason:
        raise PlanMismatchError(f"{name!r} cannot run {option.key}: {reason}")


def _option_refusal(layer: nn.Module, option: Option) -> str:
    if option.recipe not in APPLICABLE_RECIPES:
        return (
            f"torchao applies {', '.join(APPLICABLE_RECIPES)}; choose one of these, or export the "
            "plan to a runtime that has it"
        )
    reason = fp8_refusal(layer)
    device = next(layer.parameters()).device
    if not reason and device.type != "meta":
        support = fp8_support(device)
        reason = "" if option.recipe in support.recipes else support.reason
    return reason and f"{reason}; set it to bf16_o2, or tune again here"


def _plan_storage(layers: Mapping[str, nn.Module], options: Mapping[str, Option]) -> Storage:
    """Return the storage of the layers' parameters; tied layers must agree."""
    storage: Storage = {}
    for name, option in options.items():
        layer = layers[name]
        keeps_fp32 = isinstance(layer, KEEPS_FP32_PARAMETERS)
        dtype = torch.float32 if keeps_fp32 else option_dtype(option)
        for parameter in layer.parameters():
            first, other = storage.setdefault(parameter, (name, dtype))
            if other is not dtype:
                raise PlanMismatchError(
                    f"tied layers share one storage, but {first!r} is {options[first].key} and "
                    f"{name!r} is {option.key}; set both to fp32, or neither"
                )
    return storage


def _convert_storage(storage: Storage, installed: Installed) -> None:
    dtypes = {parameter: dtype for parameter, (_, dtype) in storage.items()}
    sharded, installed.gather_as_before = gather_as(installed.model, dtypes)
    installed.followers -= sharded  # whose shards are FP32
    for parameter, dtype in dtypes.items():
        if parameter in sharded or parameter in installed.followers:
            continue
        if parameter.dtype is not dtype and parameter.dtype in CASTABLE:
            installed.originals[parameter] = parameter.data
            set_storage(parameter, parameter.data.to(dtype))


def _keep_masters(storage: Storage, installed: Installed) -> None:
    """Leave the FP32 originals on the model as the first masters, unless it has masters already."""
    model = installed.model
    if _has_masters(model):
        return
    low = [p for p, (_, dtype) in storage.items() if dtype is torch.bfloat16 is p.dtype]
    originals = {p: installed.originals.get(p) for p in low}
    installed.masters = Masters(
        options=installed.options,
        values={p: None if data is None else data.float() for p, data in originals.items()},
        names={name: p for name, p in model.named_parameters() if p in originals},
        was_split=is_divided(model),
        buffer_dtypes={name: buffer.dtype for name, buffer in model.named_buffers()},
        gather_as_before=installed.gather_as_before,
    )
    others = dict(vars(model))
    vars(model).clear()  # masters first: a copy of the model must copy them before their hooks
    vars(model).update({ON_MODEL: installed.masters, **others})


def is_all_bf16(model: nn.Module) -> bool:
    """Whether a model came in BF16: not by a plan."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return dtypes == {torch.bfloat16} and not _has_masters(model)


def _has_masters(model: nn.Module) -> bool:
    return any(ON_MODEL in vars(module) for module in model.modules())


def _set_classes(
    layers: Mapping[str, nn.Module], installed: Installed, *, has_16_bit: bool, root: bool
) -> None:
    """Give the layers, the modules between them and the root the classes that run the options."""
    model, dtype = installed.model, installed.activation_dtype
    # a model that came in BF16 has BF16 inputs and buffers, which meet the layers of an FP32 plan
    mixes = has_16_bit or installed.came_in_bf16
    has_mode = mixes and not is_chain(model, layers)
    given = None if installed.came_in_bf16 or not has_16_bit else torch.float32
    alone = given if root and has_mode else None  # without the mode no part knows where it is
    for name, option in installed.options.items():
        _install_layer(name, layers[name], option, installed=installed, alone=alone)
    if has_16_bit and dtype is torch.float32:  # a weight that user code reads itself gives BF16
        for layer in layers.values():
            if _is_plain_recurrent(layer):
                installed.set_class(layer, layer_class(type(layer), FP32, dtype, dtype, alone))
    for module in _containers(model, layers) if has_mode else ():
        its = None if isinstance(module, ParametrizationList) else alone
        _install_container(module, installed, dtype, False, True, its)
    for module in model.modules():  # hooks of the user's, made for gradients in FP32
        _put_around(module._backward_hooks, _cast_gradients)
        _put_around(module._backward_pre_hooks, _cast_gradients)
    if root:
        _install_container(model, installed, dtype if mixes else None, True, has_mode, given)


def _install_container(module: nn.Module, installed: Installed, *settings: Any) -> None:
    installed.set_class(module, container_class(type(module), *settings))
    if "forward" in vars(module):
        put_around_own_forward(module, *settings)


def _install_layer(
    name: str,
    layer: nn.Module,
    option: Option,
    *,
    installed: Installed,
    alone: torch.dtype | None,
) -> None:
    own, dtype = option_dtype(option), installed.activation_dtype
    is_plain = not (installed.came_in_bf16 or comes_from_plan(type(layer)))
    if own is torch.float32 is dtype and is_plain:
        return  # nothing to cast: an FP32 layer among FP32 activations is left alone
    output_dtype = torch.float32 if name in installed.fp32_outputs else dtype
    follows = own is not torch.float32 and not installed.followers.isdisjoint(layer.parameters())
    turned = option.is_fp8 and is_transposed(layer)
    cls = layer_class(own_class(layer), option, dtype, output_dtype, alone, follows, turned)
    installed.set_class(layer, cls)
    if option.is_fp8:
        vars(layer)["fp8_active"] = True  # on the instance: torch.compile guards on it there
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()


def _is_plain_recurrent(layer: nn.Module) -> bool:
    is_plain = isinstance(layer, RECURRENT) and not comes_from_plan(type(layer))
    return is_plain and all(p.dtype is torch.float32 for p in layer.parameters())


def is_chain(model: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a model is torch.nn's own modules in a row, so that no call can mix dtypes.

    Each layer casts its one input and has parameters of one dtype. Hooks are user code.
    """
    inside = {module for layer in layers.values() for module in layer.modules()}
    for module in model.modules():
        own = own_class(module)
        is_own = own in BETWEEN or (module in inside and own.__module__.startswith("torch.nn."))
        if not is_own or module._forward_hooks or module._forward_pre_hooks:
            return False
        if "forward" in vars(module) or (module in inside and any(module.children())):
            return False  # a replaced forward, or a parametrization
    return True


def _containers(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules that run user code between layers, the root left out.

    And the parametrizations of layers: reading `layer.weight` runs them, inside the root or not.
    An activation that holds nothing is left alone: a library's one object may serve many models.
    """
    inside = {module for layer in layers.values() for module in layer.modules()}
    for module in model.modules():
        has_forward = type(module).forward is not nn.Module.forward
        # the module that a compiled one is around has a class of its own
        runs_code = has_forward and not isinstance(module, OptimizedModule)
        is_torchs = type(module).__module__.startswith("torch.nn.")
        holds_nothing = is_torchs or not (module._parameters or module._buffers)
        is_plain = holds_nothing and not module._modules
        is_between = module not in inside or isinstance(module, ParametrizationList)
        if is_between and module is not model and runs_code and not is_plain:
            yield module
