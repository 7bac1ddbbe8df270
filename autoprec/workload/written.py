"""How the user's functions train, as written, and how the same step is run in plain FP32.

    as written   parameters in the dtype that build_model gives them, compiled where the user
                 compiles, under the autocast that loss_fn enters: a baseline of a plan's speed
    plain        FP32 parameters, run eagerly and without autocast: the ground of every measurement
                 of numerics, which looks into layers with hooks and exchanges them

An autocast that is switched on inside a forward which the user compiles is traced and not entered,
so a compiled step keeps it.
"""

import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils import checkpoint
from torch.utils._pytree import tree_map_only

from autoprec.errors import WorkloadError

MOVING = "_autoprec_moving"  # the root module's attribute that names what moves
LOW_PRECISION = (torch.bfloat16, torch.float16)
T = TypeVar("T")
AUTOCAST_DEVICES = ("cpu", "cuda")  # "cuda" is AMD's name too


@dataclass
class Written:
    """How the user's functions train, as far as they were seen to by now.

    `dtypes` are the 16-bit ones among the parameters that build_model gives, `gathered` is that in
    which FSDP's policy (`MixedPrecisionPolicy`) gathers them. A recorded script's
    `script_autocast` and `script_compiles` are around its functions, so they are no part of them.
    `moving` is what training writes into beside its trained weights and buffers, by name:
    parameters that nobody trains, attributes of modules. `multiplied` are the parameters, by name,
    with which a recorded script computes itself so that they must be FP32.
    """

    dtypes: set[torch.dtype] = field(default_factory=set)
    autocast: torch.dtype | None = None
    gathered: torch.dtype | None = None
    is_compiled: bool = False
    script_autocast: torch.dtype | None = None
    script_compiles: bool = False
    moving: set[str] = field(default_factory=set)
    multiplied: frozenset[str] = frozenset()

    @property
    def is_low(self) -> bool:
        """Whether the model itself computes in 16 bits, whatever is around it."""
        return bool(self.dtypes) or self.gathered is not None

    def around(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return the autocast that a recorded script runs its functions in."""
        if self.script_autocast is None:
            return nullcontext()
        return torch.autocast(next(model.parameters()).device.type, dtype=self.script_autocast)


def check_built(model: nn.Module) -> None:
    """Refuse what build_model() may not return, or leave behind."""
    if next(model.parameters(), None) is None:
        raise WorkloadError(
            f"build_model() must return a model with parameters, but {type(model).__name__} has "
            "none; there is nothing to train"
        )
    lazy = next((n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)), "")
    if lazy:
        raise WorkloadError(
            f"build_model() must return parameters that have a shape, but {lazy} is lazy; run "
            "a batch through the model before it is returned"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise WorkloadError(
            "build_model() must return modules that a plan can change, but torch.jit has scripted "
            "some; return them as they were before"
        )
    if (dtype := torch.get_default_dtype()) is not torch.float32:
        raise WorkloadError(
            "the workload must leave torch's default dtype at float32, from which all is measured, "
            f"but it is {dtype}; return e.g. model.bfloat16() and leave set_default_dtype out"
        )


def note_moving(model: nn.Module, names: Iterable[str]) -> None:
    """Note on a model what training writes into; its parameters among that stay FP32."""
    if found := frozenset(names):
        vars(model)[MOVING] = found


def noted_on(model: nn.Module) -> frozenset[str]:
    """Return what was noted on a model."""
    found: frozenset[str] = vars(model).get(MOVING, frozenset())
    return found


def followers_of(model: nn.Module) -> frozenset[nn.Parameter]:
    """Return the FP32 parameters among what was noted on a model."""
    noted = noted_on(model)
    own = model.named_parameters() if noted else ()
    return frozenset(p for n, p in own if n in noted and p.dtype is torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def is_compiled(model: nn.Module) -> bool:
    """Whether the user compiles a model: it, or a module within it."""
    return any(
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None
        or _compiled_forward(module) is not None
        for module in model.modules()
    )


def _compiled_forward(module: nn.Module) -> Any:  # Any: whatever can be compiled
    """Return what was compiled where `module.forward = torch.compile(module.forward)`, or None."""
    return getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)


def take_off_compiled_forwards(model: nn.Module) -> None:
    """Put what was compiled in the place of compiled forwards on module objects.

    In a copy too, where torch's function still is that of the original.
    """
    for module in model.modules():
        own = _compiled_forward(module)
        if own is None or isinstance(module, OptimizedModule):
            continue
        function = getattr(own, "__func__", None)
        vars(module)["forward"] = types.MethodType(function, module) if function else own
        if function is type(module).forward:
            del vars(module)["forward"]


def plain_model(model: nn.Module, *, in_fp32: bool = True) -> nn.Module:
    """Return a model as it was before it was compiled, and its 16-bit parameters in FP32.

    The model is changed in place; what its user casts to 16 bit for it is cast back.
    """
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    take_off_compiled_forwards(model)
    for module in list(model.modules()):
        module._compiled_call_impl = None
        for name, child in module.named_children():
            if isinstance(child, OptimizedModule):
                setattr(module, name, child._orig_mod)
    tensors = (*model.parameters(), *model.buffers()) if in_fp32 else ()
    low = [tensor for tensor in tensors if tensor.dtype in LOW_PRECISION]
    for tensor in low:
        tensor.data = tensor.data.float()
    if low:
        model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    return model


@contextmanager
def no_autocast(written: Written, *, besides: torch.autocast | None = None) -> Iterator[None]:
    """Keep off an autocast that the user's code switches on, and note its dtype; off stays off.

    `besides` is one that is not the user's and may be switched on inside; checkpointing switches
    it on again in backward.
    """
    passed: set[int] = set()  # contexts that changed nothing when they were entered
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def enter_noted(self: torch.autocast) -> Any:  # Any: torch's own
        if not self._enabled or self is besides or _is_forwards(sys._getframe(1)):
            return enter(self)  # type: ignore[no-untyped-call]  # torch's own
        written.autocast = self.fast_dtype
        passed.add(id(self))
        return self

    def leave_noted(self: torch.autocast, *error: Any) -> Any:  # Any: torch's own
        return None if id(self) in passed else leave(self, *error)

    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:  # switched on for the whole process, when the file imports
            if torch.is_autocast_enabled(device):
                written.autocast = torch.get_autocast_dtype(device)
                stack.enter_context(torch.autocast(device, enabled=False))
        # What the user's code enters from here on is noted by a class that is put back below.
        torch.autocast.__enter__, torch.autocast.__exit__ = enter_noted, leave_noted  # type: ignore[method-assign]  # for a while
        try:
            yield
        finally:
            torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]  # as it was


def _is_forwards(frame: types.FrameType) -> bool:
    """Whether torch itself enters an autocast, in a backward: the one that was on in forward."""
    again = frame.f_globals.get("__name__") == checkpoint.__name__
    return again or frame.f_code.co_name == "decorate_bwd"  # torch.amp.custom_bwd's


def in_fp32(values: T) -> T:
    """Return nested values with their 16-bit tensors in FP32."""
    found: T = tree_map_only(Tensor, _in_fp32, values)
    return found


def _cast_inputs(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # Any: whatever the model takes
    return in_fp32((args, kwargs))


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in LOW_PRECISION else tensor
