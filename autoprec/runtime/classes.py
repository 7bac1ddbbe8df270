"""Classes that make a module compute in a precision, made from the module's own class.

To install an option, a module's `__class__` becomes a subclass of what it was, as torch does for
parametrizations and `fully_shard`. The object, its parameters, hooks, name, `isinstance` and
`state_dict` stay; class name and signature too, for code that looks at these. All settings live in
the class, so copies, pickles and replicas work, and `torch.compile` guards on the type: a compiled
model compiles again after an installation without being told.

    layer      inputs -> the option's dtype, forward, outputs -> the activation dtype
    container  the activation mode on while forward runs (see activations.py)
    root       as container, and floating outputs -> FP32, unless the model came in BF16

Autocast around any of these is off inside, because the plan decides.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, Generic, NoReturn, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.device.torchao import float8_config, import_torchao
from autoprec.errors import PlanMismatchError
from autoprec.model.options import FP8_MULTIPLE
from autoprec.records import Option
from autoprec.runtime.activations import (
    ActivationMode,
    cast_floating,
    is_mode_active,
    join_recomputation,
    option_dtype,
    part_of_callers,
    without_mode,
)
from autoprec.runtime.masters import ON_MODEL
from autoprec.runtime.shards import refuse_mixed_storage
from autoprec.workload.written import AUTOCAST_DEVICES

ModuleClass = type[nn.Module]
Maker = TypeVar("Maker", bound=Callable[..., ModuleClass])


def _cached(maker: Maker) -> Maker:
    """Make one class for the same settings, so that types compare and caches hit."""
    return cast("Maker", functools.cache(maker))  # mypy takes no class to be hashable


@_cached
def layer_class(
    base: ModuleClass,
    option: Option,
    activation_dtype: torch.dtype,
    output_dtype: torch.dtype,
    alone_dtype: torch.dtype | None = None,
    keeps_weights: bool = False,
    is_transposed: bool = False,
) -> ModuleClass:
    """Return `base` as a layer with `option`, among activations of a dtype, outputs of another.

    Called outside of the model's forward it gives `alone_dtype`, unless that is None. One that
    `keeps_weights` has them in FP32, and runs under an autocast to the option's dtype. Weights that
    FP8 multiplies are [N, K], `is_transposed` ones [K, N].
    """
    dtypes = activation_dtype, output_dtype, alone_dtype
    settings = (base, option, *dtypes, keeps_weights, is_transposed)
    forward = _fp8_forward(base, is_transposed) if option.is_fp8 else base.forward
    cast_forward = _cast_forward(forward, base, option, *dtypes, keeps_weights)

    def extra_repr(self: nn.Module) -> str:
        return ", ".join(filter(None, (base.extra_repr(self), option.key)))

    # All that the class needs is in it: `type(...)` gets the settings as attributes.
    body: dict[str, Any] = {"forward": cast_forward, "extra_repr": extra_repr}
    body["autoprec_keeps_weights"] = keeps_weights
    bases: tuple[type, ...] = (base,)
    if option.is_fp8:
        # torchao makes instances, not classes: what its constructor sets is read off a template,
        # on meta so that nothing is drawn.
        torchao_linear = import_torchao().float8_linear.Float8Linear
        smallest = nn.Linear(1, 1, bias=False, device="meta")
        template = torchao_linear.from_float(smallest, float8_config(option))
        body |= {"config": template.config, "linear_mm_config": template.linear_mm_config}
        body["scaling_type_input"] = property(_refuse_fp8_styles)
        if issubclass(base, nn.Linear):  # what is none stays none, for adapters that ask
            bases = (torchao_linear,) if base is nn.Linear else (base, torchao_linear)
    return _subclass(layer_class, settings, bases, body)


def _cast_forward(
    forward: Callable[..., Any],
    base: ModuleClass,
    option: Option,
    activation_dtype: torch.dtype,
    output_dtype: torch.dtype,
    alone_dtype: torch.dtype | None,
    keeps_weights: bool,
) -> Callable[..., Any]:
    """Return a layer's forward: inputs cast, the base's own or torchao's, outputs cast."""
    dtype = option_dtype(option)
    forward, dtype = _under_autocast(forward, dtype) if keeps_weights else (forward, dtype)
    # torch.nn's own operands agree once inputs are cast; a parametrization is code of somebody's
    is_own = base.__module__.startswith("torch.nn.modules.")

    def run(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Written so that one right tensor costs two compares.
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].dtype != dtype:
            args, kwargs = cast_floating(args, dtype), cast_floating(kwargs, dtype)
        return cast_floating(forward(self, *args, **kwargs), output_dtype)

    @functools.wraps(base.forward)
    def cast_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            join_recomputation(activation_dtype)  # activation checkpointing: forward in backward
            if is_own:
                output, is_alone = without_mode(dtype, _without_autocast, run, self, args, kwargs)
                return cast_floating(output, alone_dtype) if is_alone and alone_dtype else output
        if is_own or is_mode_active():
            return _without_autocast(run, self, args, kwargs)
        with ActivationMode(dtype):  # somebody's code, run without the model around it
            output = _without_autocast(run, self, args, kwargs)
        return cast_floating(output, alone_dtype) if alone_dtype else output

    if option.is_fp8:  # worth a graph of its own behind a break: eagerly FP8 does not pay
        return cast_forward
    part_of_callers(run)
    return part_of_callers(cast_forward)


def _under_autocast(
    forward: Callable[..., Any], dtype: torch.dtype
) -> tuple[Callable[..., Any], torch.dtype]:
    """Return a forward whose products are in a dtype, of FP32 weights, and that of its inputs."""

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(self.parameters()).device.type, dtype=dtype):
            return forward(self, *args, **kwargs)

    return run, torch.float32


@part_of_callers
def _without_autocast(run: Callable[..., Any], *given: Any) -> Any:
    if any(torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES):
        with autocast_off():
            return run(*given)
    return run(*given)


@_cached
def container_class(
    base: ModuleClass,
    dtype: torch.dtype | None,
    is_root: bool,
    has_mode: bool = True,
    output_dtype: torch.dtype | None = None,
) -> ModuleClass:
    """Return `base` with the activation mode on while its forward runs, unless nothing needs it.

    With `dtype` None only autocast is off; without `output_dtype` outputs stay as they are, and so
    do those of what is no root and runs in another's forward, or again in backward.
    """
    # dynamo reads no attribute of a class that `allow_in_graph` was told of
    forward = _container_forward(base.forward, dtype, is_root, has_mode, output_dtype)
    body: dict[str, Any] = {"forward": forward}
    if dtype is not None and not is_root:
        body["_compiled_call_impl"] = _joining(dtype)
    settings = (base, dtype, is_root, has_mode, output_dtype)
    return _subclass(container_class, settings, (base,), body)


def _joining(dtype: torch.dtype) -> property:
    """Return a container's compiled call, asked for where it is about to be made.

    Compiled code cannot ask whether backward computes it again, so that is asked before it: with
    the mode on it is the graph of forward, whose operations selective checkpointing counts.
    """

    @part_of_callers  # by itself, behind a break, it would ask itself for ever (torch 2.11)
    def compiled(self: nn.Module) -> Any:  # Any: what `module.compile()` sets
        found = vars(self).get("_compiled_call_impl")
        if found is not None and not torch.compiler.is_compiling():
            join_recomputation(dtype)
        return found

    def compile_as(self: nn.Module, call: Any) -> None:
        vars(self)["_compiled_call_impl"] = call

    return property(compiled, compile_as)


def put_around_own_forward(module: nn.Module, *settings: Any) -> None:
    """Let a forward on the object, which hides that of its class, run as `container_class`'s.

    Libraries set one to fuse a head with its loss. `take_off_own_forward` undoes it.
    """
    own = vars(module)["forward"]
    is_method = getattr(own, "__self__", None) is module
    function = own.__func__ if is_method else own

    @functools.wraps(function)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) if is_method else function(*args, **kwargs)

    around = _container_forward(forward, *settings)
    vars(around)["autoprec_base"] = (around, function, is_method)
    vars(module)["forward"] = types.MethodType(around, module)  # of each copy its own


def take_off_own_forward(module: nn.Module) -> None:
    """Give a module back the forward that it had on the object, if it had one."""
    found = getattr(vars(module).get("forward"), "__func__", None)
    around, function, is_method = getattr(found, "autoprec_base", (None, None, False))
    if function is not None and around is found:  # what wraps it has its attributes too
        vars(module)["forward"] = types.MethodType(function, module) if is_method else function


def _container_forward(
    forward: Callable[..., Any],
    dtype: torch.dtype | None,
    is_root: bool,
    has_mode: bool,
    output_dtype: torch.dtype | None,
) -> Callable[..., Any]:
    """Return what `container_class` describes, around a forward of the module as an argument."""

    @functools.wraps(forward)
    def container_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:  # an FP32 model: nothing to make uniform
            with autocast_off():
                return forward(self, *args, **kwargs)
        if not is_root:
            if not torch.compiler.is_compiling():
                join_recomputation(dtype)
            if is_mode_active():
                return forward(self, *args, **kwargs)
        elif not torch.compiler.is_compiling() and ON_MODEL in vars(self):
            vars(self)[ON_MODEL].put_back()
        with autocast_off(), ActivationMode(dtype) if has_mode else contextlib.nullcontext():
            output = forward(self, *args, **kwargs)
        return output if output_dtype is None else cast_floating(output, output_dtype)

    return container_forward


def _subclass(
    maker: Callable[..., ModuleClass], settings: Any, bases: tuple[type, ...], body: dict[str, Any]
) -> ModuleClass:
    base = settings[0]  # what the maker (and pickle) made it from, its base first

    def reduce(self: nn.Module, protocol: Any) -> Any:
        state = self.__getstate__()  # type: ignore[no-untyped-call]  # recurrent layers have their own
        return _new_module, (maker, settings), state

    kept = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}

    def register_forward_pre_hook(self: nn.Module, hook: Any, **kwargs: Any) -> Any:
        """Check the groups of `fully_shard`, which registers such a hook, before its hook runs."""
        handle = base.register_forward_pre_hook(self, hook, **kwargs)
        if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
            base.register_forward_pre_hook(self, _before_fsdp, prepend=True)
        return handle

    own = {
        "autoprec_base": base,
        "__reduce_ex__": reduce,
        "register_forward_pre_hook": register_forward_pre_hook,
    }
    hooks = (cls for cls in base.__mro__ if "__init_subclass__" in vars(cls))
    if next(hooks) not in (object, Generic, _Unregistered):
        bases = (_Unregistered, *bases)
    return type(base.__name__, bases, {**kept, **own, **body})


class _Unregistered:
    """Keeps a class of ours from a library's registry of subclasses, which may ask for a name.

    Without slots, or the layout of instances would not be a module's.
    """

    def __init_subclass__(cls) -> None:
        pass


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
def _before_fsdp(module: nn.Module, _: object) -> None:
    """Check the groups of a module and those in it, at the first forward of all."""
    for part in module.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if hook is _before_fsdp:
                del part._forward_pre_hooks[key]
    refuse_mixed_storage(module)


def _new_module(maker: Callable[..., ModuleClass], settings: tuple[Any, ...]) -> nn.Module:
    """Unpickle: an empty module of the class made by `maker`, its state to be set by pickle."""
    cls = maker(*settings)
    module: nn.Module = cls.__new__(cls)
    return module


def _fp8_forward(base: ModuleClass, is_transposed: bool) -> Callable[..., Any]:
    """Return torchao's forward, with the base's where FP8 is switched off or has nothing to do.

    A last batch whose M is no multiple of 16 gets rows of zeros, which change no scale and no
    gradient, because grad_weight's inner dimension is M. An input that is not contiguous (a
    transposed image) is made a matrix first: torchao cannot reshape an FP8 one that has row scales.
    """
    multiply = import_torchao().float8_linear.matmul_with_hp_or_float8_args.apply

    def scaled(module: Any, matrix: Tensor) -> Tensor:
        bias = getattr(module, "bias", None)
        # The mode off: operands agree, and torchao calls torch often. dynamo follows it at no cost.
        off = torch._C.DisableTorchFunction
        with contextlib.nullcontext() if torch.compiler.is_compiling() else off():
            weight_KN = module.weight if is_transposed else module.weight.t()
            output: Tensor = multiply(matrix, weight_KN, module.linear_mm_config, module.config)
            output = output if bias is None else output + bias.to(output.dtype)
        if bias is None:  # a view that torch lets nobody change in place, so no view
            output = torch.ops.aten._unsafe_view(output, output.shape)
        return output

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        (input,) = (*args, *kwargs.values())  # noqa: A001  # whatever its name is
        if input.is_nested:  # jagged: the rows of all sequences are one matrix
            output = forward(module, input.values())
            lengths = input._maybe_min_seqlen, input._maybe_max_seqlen  # or they are computed again
            where = input.offsets(), input.lengths(), input._ragged_idx
            return torch.nested.nested_tensor_from_jagged(output, *where, *lengths)
        if not module.fp8_active or input.numel() == 0:
            return base.forward(module, input)
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # there torchao cannot reshape row scales at all, and dynamo cannot follow the question
            with torch.inference_mode(False), torch.no_grad():
                return forward(module, input)
        rows = input.numel() // input.shape[-1]
        missing = -rows % FP8_MULTIPLE if torch.is_grad_enabled() else 0
        if not missing and input.is_contiguous():
            return scaled(module, input)
        matrix = input.reshape(rows, -1)
        output = scaled(module, F.pad(matrix, (0, 0, 0, missing)) if missing else matrix)
        return output[:rows].reshape(*input.shape[:-1], -1)

    return forward


def _refuse_fp8_styles(_module: nn.Module) -> NoReturn:
    """Answer what torchao's Float8ColwiseParallel, and no other code, asks of a layer."""
    raise PlanMismatchError(
        "a plan's layers cast their own inputs, so that a guard can switch FP8 off, but torchao's "
        "Float8ColwiseParallel and Float8RowwiseParallel cast before the layer; use torch's "
        "ColwiseParallel and RowwiseParallel"
    )


@contextlib.contextmanager
def autocast_off() -> Iterator[None]:
    """Switch autocast off, everywhere, while the context is open."""
    with contextlib.ExitStack() as contexts:
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                contexts.enter_context(torch.autocast(device, enabled=False))
        yield


def keeps_weights(module: nn.Module) -> bool:
    """Whether a layer has FP32 weights, which other code writes into, and 16-bit products."""
    return bool(getattr(type(module), "autoprec_keeps_weights", False))
