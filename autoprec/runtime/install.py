"""Options per layer -> a model that runs them, in place and reversibly.

What an option means is decided here and nowhere else. With `flow` the dtype of activations between
layers:

    fp32      parameters FP32; floating inputs cast to FP32, outputs to `flow`
    bf16_o2   parameters BF16; inputs cast to BF16, outputs to `flow`
    fp8_o1    as bf16_o2, and torchao runs the GEMMs as the recipe says

Batch and instance norms in `bf16_o2` take and give BF16 but keep FP32 parameters and statistics
(Apex's keep_batchnorm_fp32: torch refuses BF16 weights beside FP32 statistics on a CPU, and running
averages lose their tail in BF16). Buffers keep their dtype. The root gives FP32 back.

Module objects, Parameter objects, names and hooks stay as they are: only a parameter's storage is
exchanged (`param.data`). The originals are kept as the first FP32 masters.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoprec.capture import find_layers
from autoprec.errors import PlanMismatchError
from autoprec.precision import fp8_support, linear_refusal
from autoprec.records import Option, Precision
from autoprec.runtime.casting import CASTABLE, CastInputs, CastOutputs
from autoprec.runtime.flow import RootGuard, RootRelease
from autoprec.runtime.fp8 import make_fp8, unmake_fp8

KEEPS_FP32_PARAMETERS = (nn.modules.batchnorm._NormBase,)
GIVES_ITS_INPUT_DTYPE = (  # exact classes whose output has the dtype of input and parameters
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)


@dataclass
class Installed:
    """What `install_options` did to a model. A context manager: leaving it undoes."""

    model: nn.Module
    options: dict[str, Option]
    flow: torch.dtype
    originals: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # before the conversion
    handles: list[RemovableHandle] = field(default_factory=list)
    fp8_modules: list[nn.Linear] = field(default_factory=list)

    def undo(self) -> None:
        """Take everything out again; parameters that nobody changed get their exact values back."""
        for handle in self.handles:
            handle.remove()
        for module in self.fp8_modules:
            unmake_fp8(module)
        for parameter, original in self.originals.items():
            unchanged = torch.equal(parameter.data, original.to(parameter.dtype))
            set_storage(parameter, original if unchanged else parameter.data.to(original.dtype))
        self.handles, self.fp8_modules, self.originals = [], [], {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def install_options(
    model: nn.Module,
    options: Mapping[str, Option],
    *,
    flow: torch.dtype | None = None,
    root: bool = True,
    uncovered: Iterable[str] = (),
) -> Installed:
    """Make the named layers of `model` run as their options say, in place.

    Args:
        model: its layers that `options` does not name stay as they are.
        options: by exact layer name.
        flow: the dtype between layers; default BF16 if any option is 16-bit or FP8, else FP32.
        root: whether `model` is what the training step calls: its floating outputs become FP32 and
            autocast around it is switched off inside.
        uncovered: names of parameters outside of layers, to be stored in the flow dtype.

    Raises:
        PlanMismatchError: a name is no layer, tied layers disagree about their storage, or a layer
            or its device cannot run FP8. The model is then as it was.
    """
    layers = find_layers(model)
    _check_names(options, layers)
    if flow is None:
        flow = (
            torch.bfloat16 if any(_dtype(o) is torch.bfloat16 for o in options.values()) else None
        )
        flow = flow or torch.float32
    storage = _plan_storage(layers, options)
    for name in uncovered:
        storage[model.get_parameter(name)] = (name, flow)
    for name, option in options.items():
        if option.is_fp8:
            _check_fp8(name, layers[name], option)
    installed = Installed(model, dict(options), flow)
    _convert_storage(storage, installed)
    if root:
        _install_root(
            model, installed
        )  # first: a root that is a layer casts its output to FP32 last
    for name, option in options.items():
        _install_layer(layers[name], option, installed=installed)
    return installed


def set_storage(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter other data, of any dtype; the gradient follows the dtype."""
    gradient = parameter.grad
    parameter.grad = None
    parameter.data = data
    if gradient is not None:
        parameter.grad = gradient.to(data.dtype)


def _dtype(option: Option) -> torch.dtype:
    return torch.float32 if option.precision is Precision.FP32 else torch.bfloat16


def _check_names(options: Mapping[str, Option], layers: Mapping[str, nn.Module]) -> None:
    for name in options:
        if name not in layers:
            known = ", ".join(list(layers)[:5])
            raise PlanMismatchError(
                f"every layer given an option must exist in the model, but {name!r} does not "
                f"(its layers: {known}{', ...' if len(layers) > 5 else ''}); correct the name"
            )


def _check_fp8(name: str, layer: nn.Module, option: Option) -> None:
    reason = linear_refusal(layer)
    device = next(layer.parameters()).device
    if not reason and device.type != "meta":
        support = fp8_support(device)
        if option.recipe not in support.recipes:
            reason = support.reason
    if reason:
        raise PlanMismatchError(
            f"{name!r} cannot run {option.key}: {reason}; set it to bf16_o2, or tune again here"
        )


def _plan_storage(
    layers: Mapping[str, nn.Module], options: Mapping[str, Option]
) -> dict[nn.Parameter, tuple[str, torch.dtype]]:
    """Return each parameter's layer and storage dtype; tied layers must agree."""
    storage: dict[nn.Parameter, tuple[str, torch.dtype]] = {}
    for name, option in options.items():
        layer = layers[name]
        dtype = torch.float32 if isinstance(layer, KEEPS_FP32_PARAMETERS) else _dtype(option)
        for parameter in layer.parameters():
            first, other = storage.setdefault(parameter, (name, dtype))
            if other is not dtype:
                raise PlanMismatchError(
                    f"tied layers share one storage, but {first!r} is {options[first].key} and "
                    f"{name!r} is {option.key}; set both to fp32, or neither"
                )
    return storage


def _convert_storage(
    storage: Mapping[nn.Parameter, tuple[str, torch.dtype]], installed: Installed
) -> None:
    for parameter, (_, dtype) in storage.items():
        if parameter.dtype is not dtype and parameter.dtype in CASTABLE:
            installed.originals[parameter] = parameter.data
            set_storage(parameter, parameter.data.to(dtype))


def _install_layer(layer: nn.Module, option: Option, *, installed: Installed) -> None:
    dtype, flow = _dtype(option), installed.flow
    if dtype is torch.float32 and flow is torch.float32:
        return  # nothing to cast: an FP32 layer in an FP32 flow is left alone
    if type(layer) is not nn.Embedding:  # its only input is integer
        handle = layer.register_forward_pre_hook(CastInputs(dtype), with_kwargs=True)
        installed.handles.append(handle)
    if dtype is not flow or type(layer) not in GIVES_ITS_INPUT_DTYPE:
        installed.handles.append(layer.register_forward_hook(CastOutputs(flow), prepend=True))
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()
    if option.is_fp8 and isinstance(layer, nn.Linear):
        make_fp8(layer, option)
        installed.fp8_modules.append(layer)


def _install_root(model: nn.Module, installed: Installed) -> None:
    has_16_bit = any(_dtype(option) is torch.bfloat16 for option in installed.options.values())
    guard = RootGuard(dtype=installed.flow if has_16_bit else None, installed=installed)
    installed.handles.append(model.register_forward_pre_hook(guard, prepend=True))
    if has_16_bit:
        cast = CastOutputs(torch.float32)
        installed.handles.append(model.register_forward_hook(cast, prepend=True))
    release = model.register_forward_hook(RootRelease(guard), always_call=True)
    installed.handles.append(release)
