"""Classes that make a module compute in a precision, made from the module's own class.

To install an option, a module's `__class__` becomes a subclass of what it was, as torch does for
parametrizations and `fully_shard`. The object, its parameters, hooks, name, `isinstance` and
`state_dict` stay; class name and signature too, for code that looks at these. All settings live in
the class, so copies, pickles and replicas work, and `torch.compile` guards on the type: a compiled
model compiles again after an installation without being told.

    layer      inputs -> the option's dtype, forward, outputs -> the activation dtype
    container  the activation mode on while forward runs (see activations.py)
    root       as container, and floating outputs -> FP32

Autocast around any of these is off inside, because the plan decides.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.device.torchao import float8_config, import_torchao
from autoprec.errors import PlanMismatchError
from autoprec.model.options import FP8_MULTIPLE
from autoprec.records import Option, Precision
from autoprec.runtime.activations import ActivationMode, is_mode_active, join_recomputation
from autoprec.runtime.casting import CASTABLE, cast_floating

Forward = Callable[..., Any]
Settings = tuple[Any, ...]  # what a class was made from besides its base
Maker = Callable[..., type[nn.Module]]
AUTOCAST_DEVICES = ("cpu", "cuda")  # "cuda" is AMD's name too
_MADE: dict[tuple[Maker, type[nn.Module], Settings], type[nn.Module]] = {}


def layer_class(
    base: type[nn.Module], option: Option, activation_dtype: torch.dtype
) -> type[nn.Module]:
    """Return `base` as a layer with `option`, among activations of a dtype."""
    return _made(_make_layer_class, base, (option, activation_dtype))


def container_class(base: type[nn.Module], dtype: torch.dtype) -> type[nn.Module]:
    """Return `base` with the activation mode on while its forward runs."""
    return _made(_make_container_class, base, (dtype, False))


def root_class(base: type[nn.Module], dtype: torch.dtype | None) -> type[nn.Module]:
    """Return `base` as a root: mode on, outputs in FP32; `dtype` None: autocast off only."""
    return _made(_make_container_class, base, (dtype, True))


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class without what this module made of it."""
    cls = type(module)
    while "autoprec_base" in vars(cls):
        cls = vars(cls)["autoprec_base"]
    return cls


def is_made_here(cls: type[nn.Module]) -> bool:
    """Whether a class comes from this module."""
    return "autoprec_base" in vars(cls)


def option_dtype(option: Option) -> torch.dtype:
    """Return the dtype in which a layer with this option stores and takes tensors."""
    return torch.float32 if option.precision is Precision.FP32 else torch.bfloat16


def _made(maker: Maker, base: type[nn.Module], settings: Settings) -> type[nn.Module]:
    """Return the one class for these settings, so that types compare and caches hit."""
    key = (maker, base, settings)
    if key not in _MADE:
        _MADE[key] = maker(base, *settings)
    return _MADE[key]


def _make_layer_class(
    base: type[nn.Module], option: Option, activation_dtype: torch.dtype
) -> type[nn.Module]:
    forward = _fp8_forward() if option.is_fp8 else base.forward
    run = _cast_around(forward, option_dtype(option), activation_dtype)

    @functools.wraps(base.forward)
    def cast_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # activation checkpointing runs forward in backward
            join_recomputation(activation_dtype)
        if is_autocast_on():
            with autocast_off():
                return run(self, args, kwargs)
        return run(self, args, kwargs)

    def extra_repr(self: nn.Module) -> str:
        own = base.extra_repr(self)
        return f"{own}{', ' if own else ''}{option.key}"

    # All that the class needs is in it: `type(...)` below gets the settings as attributes.
    body: dict[str, Any] = {"forward": cast_forward, "extra_repr": extra_repr}
    bases: tuple[type, ...] = (base,)
    if option.is_fp8:
        # torchao makes instances, not classes: what its constructor sets is read off a template,
        # on meta so that nothing is drawn.
        torchao_linear = import_torchao().float8_linear.Float8Linear
        template = torchao_linear.from_float(
            nn.Linear(1, 1, bias=False, device="meta"), float8_config(option)
        )
        body |= {"config": template.config, "linear_mm_config": template.linear_mm_config}
        body["scaling_type_input"] = property(_refuse_fp8_styles)
        bases = (torchao_linear,) if base is nn.Linear else (base, torchao_linear)
    return _subclass(_make_layer_class, base, (option, activation_dtype), bases=bases, body=body)


def _cast_around(
    forward: Forward, dtype: torch.dtype, activation_dtype: torch.dtype
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    """Return `forward` between two casts, written so that one right tensor costs two compares."""

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].dtype != dtype:
            args, kwargs = cast_floating(args, dtype), cast_floating(kwargs, dtype)
        output = forward(module, *args, **kwargs)
        if isinstance(output, Tensor):
            dtype_out = output.dtype
            return (
                output
                if dtype_out == activation_dtype or dtype_out not in CASTABLE
                else output.to(activation_dtype)
            )
        return cast_floating(output, activation_dtype)

    return run


def _fp8_forward() -> Forward:
    """Return torchao's forward, with BF16 where FP8 is switched off or has nothing to do.

    A last batch whose M is no multiple of 16 gets rows of zeros, which change no scale and no
    gradient, because grad_weight's inner dimension is M. An input that is not contiguous (a
    transposed image) is made a matrix first: torchao cannot reshape an FP8 one that has row scales.
    """
    torchao_forward = _without_mode(import_torchao().float8_linear.Float8Linear.forward)

    def forward(module: Any, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's own name
        if not module.fp8_active or input.numel() == 0:
            return F.linear(input, module.weight, module.bias)
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # there torchao cannot reshape row scales at all, and dynamo cannot follow the question
            with torch.inference_mode(False), torch.no_grad():
                return forward(module, input)
        rows = input.numel() // input.shape[-1]
        missing = -rows % FP8_MULTIPLE if torch.is_grad_enabled() else 0
        if not missing and input.is_contiguous():
            output: Tensor = torchao_forward(module, input)
            return output
        matrix = input.reshape(rows, -1)
        output = torchao_forward(module, F.pad(matrix, (0, 0, 0, missing)) if missing else matrix)
        return output[:rows].reshape(*input.shape[:-1], -1)

    return forward


def _without_mode(forward: Forward) -> Forward:
    """Return `forward` with the mode off: its operands agree, and it calls torch often."""

    def run(module: Any, input: Tensor) -> Any:  # noqa: A002  # nn.Linear's own name
        if torch.compiler.is_compiling():  # dynamo follows the mode at no cost
            return forward(module, input)
        with torch._C.DisableTorchFunction():
            return forward(module, input)

    return run


def _refuse_fp8_styles(_module: nn.Module) -> NoReturn:
    """Answer what torchao's Float8ColwiseParallel, and no other code, asks of a layer."""
    raise PlanMismatchError(
        "a plan's layers cast their own inputs, so that a guard can switch FP8 off, but torchao's "
        "Float8ColwiseParallel and Float8RowwiseParallel cast before the layer; use torch's "
        "ColwiseParallel and RowwiseParallel"
    )


def _make_container_class(
    base: type[nn.Module], dtype: torch.dtype | None, is_root: bool
) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def container_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:  # an FP32 model: nothing to make uniform
            with autocast_off():
                return base.forward(self, *args, **kwargs)
        if not is_root and is_mode_active():
            return base.forward(self, *args, **kwargs)
        with autocast_off(), ActivationMode(dtype):
            output = base.forward(self, *args, **kwargs)
        return cast_floating(output, torch.float32) if is_root else output

    body = {"forward": container_forward}
    return _subclass(_make_container_class, base, (dtype, is_root), body=body)


def _subclass(
    maker: Maker,
    base: type[nn.Module],
    settings: Settings,
    *,
    body: dict[str, Any],
    bases: tuple[type, ...] = (),
) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _new_module, (maker.__name__, base, settings), vars(self)

    kept = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"autoprec_base": base, "__reduce_ex__": reduce}
    return type(base.__name__, bases or (base,), {**kept, **own, **body})


def _new_module(maker: str, base: type[nn.Module], settings: Settings) -> nn.Module:
    """Unpickle: an empty module of the class made by `maker`, its state to be set by pickle."""
    makers = {known.__name__: known for known in (_make_layer_class, _make_container_class)}
    cls = _made(makers[maker], base, settings)
    module: nn.Module = cls.__new__(cls)
    return module


def is_autocast_on() -> bool:
    """Whether autocast is on for the CPU or the GPU."""
    return any(torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES)


@contextlib.contextmanager
def autocast_off() -> Iterator[None]:
    """Switch autocast off, everywhere, while the context is open."""
    with contextlib.ExitStack() as contexts:
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                contexts.enter_context(torch.autocast(device, enabled=False))
        yield
