"""What kind of layer a module is, which compute what `nn.Linear` does, and what keeps FP8 out.

Users and libraries have linears of their own: subclasses whose forward casts the weight first,
modules that were written from scratch, transformers' Conv1D, which stores the weight transposed.
Code cannot be read for what it means, so a small copy of the module is tried: its weight 5 x 5,
its forward and gradients beside those of `F.linear`, in training and evaluation.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from autoprec.device.random_state import global_states, random_state_kept
from autoprec.device.tracing import OperationTracer
from autoprec.model.layers import written_class
from autoprec.model.options import NO_PLAIN_WEIGHT
from autoprec.records import LayerKind

KINDS: tuple[tuple[tuple[type[nn.Module], ...], LayerKind], ...] = (
    ((nn.MultiheadAttention,), LayerKind.ATTENTION),
    ((nn.modules.conv._ConvNd,), LayerKind.CONV),
    ((nn.Embedding, nn.EmbeddingBag), LayerKind.EMBEDDING),
    ((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase), LayerKind.NORM),
    ((nn.RNNBase, nn.RNNCellBase), LayerKind.RECURRENT),
)
SIZE = 5  # of the weight that is tried, each way: attributes of either size become this one
EXTREMES = {torch.float32: 1e-6, torch.bfloat16: 1e6}  # of the values, beside those around 1
PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device))
UNKNOWN = object()  # for an attribute of another class: a forward that uses it cannot
EVERY_MODULES = frozenset(vars(nn.Module()))  # attributes

Attributes = tuple[tuple[str, Any], ...]  # Any: whatever a user's module holds


def layer_kind(module: nn.Module) -> LayerKind:
    """Return the kind of a layer: by what it computes or its class, else by its class's name."""
    if is_linear(module):
        return LayerKind.LINEAR
    by_name = LayerKind.NORM if type(module).__name__.endswith("Norm") else LayerKind.OTHER
    return next((kind for types, kind in KINDS if isinstance(module, types)), by_name)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, or computes what that does.

    >>> class Casting(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(32, 16))
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return F.linear(x, self.weight.to(x.dtype))
    >>> is_linear(Casting())
    True
    """
    return issubclass(written_class(module), nn.Linear) or bool(_axes(module))


def linear_refusal(module: nn.Module) -> str:
    """Return the reason that keeps a module out of FP8 whatever its shape, or an empty string.

    torchao computes what `nn.Linear.forward` does with a plain weight, and nothing else. Sizes are
    `options.py`'s matter.
    """
    cls = written_class(module)
    if not is_linear(module):
        why = f"{cls.__name__} is no nn.Linear, and computes something else or cannot be tried"
        return f"{why}; FP8 is for nn.Linear"
    if parametrize.is_parametrized(module):
        return f"{NO_PLAIN_WEIGHT}parametrized, and torchao casts plain weights only"
    if "weight" not in module._parameters:
        return f"{NO_PLAIN_WEIGHT}made anew before each call (pruned, normed); FP8 takes plain ones"
    dtype: torch.dtype = weight_of(module).dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return f"{NO_PLAIN_WEIGHT}in {dtype}, and FP8 is for weights in FP32, BF16 or FP16"
    if cls.forward is not nn.Linear.forward and not _axes(module):
        why = f"{cls.__name__}'s forward does more than nn.Linear's or cannot be tried"
        return f"{why}; FP8 would replace it"
    return ""


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight as [K, N], as transformers' Conv1D does."""
    return _axes(module) == "KN"


def weight_of(module: nn.Module) -> Any:  # Any: a Parameter, or what a parametrization makes
    """Return a linear's weight as it is stored."""
    return module.weight


def weight_matrix(module: nn.Module) -> Tensor:
    """Return a linear's weight as [N, K]: itself, or a view of it."""
    weight: Tensor = weight_of(module)
    return weight.t() if is_transposed(module) else weight


def matrix_sizes(module: nn.Module) -> tuple[int, int]:
    """Return the outputs and inputs of a linear; a parametrized weight is not computed for it."""
    if issubclass(written_class(module), nn.Linear):
        linear = cast("nn.Linear", module)
        return linear.out_features, linear.in_features
    N, K = weight_matrix(module).shape
    return N, K


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a linear's bias, if it has one."""
    return module._parameters.get("bias")


def _axes(module: nn.Module) -> str:
    """Return the axes of the weight of a module that computes what `nn.Linear` does, else ""."""
    cls: Any = written_class(module)  # Any: mypy takes no class to be hashable
    if issubclass(cls, torch.jit.ScriptModule):
        return ""
    if cls.forward is nn.Linear.forward:
        return "NK" if "weight" in module._parameters else ""
    if any(p is not None and is_lazy(p) for p in module._parameters.values()):
        return ""
    dims = {name: p.dim() for name, p in module._parameters.items() if p is not None}
    others = [module._modules, *(b for b in module._buffers.values() if b is not None)]
    if others != [{}] or dims not in ({"weight": 2}, {"weight": 2, "bias": 1}):
        return ""  # as most layers
    sizes = tuple(weight_of(module).shape)
    own = {name: value for name, value in vars(module).items() if name not in EVERY_MODULES}
    small = {n: SIZE if type(v) is int and v in sizes else v for n, v in own.items()}
    known = ((n, v if type(v) in PLAIN else UNKNOWN) for n, v in small.items())
    parameters = tuple((name, dims.get(name, 0)) for name in module._parameters)
    return _axes_of(cls, tuple(known), parameters)


@functools.lru_cache(maxsize=2**14)
def _axes_of(
    cls: type[nn.Module],
    attributes: Attributes,
    parameters: tuple[tuple[str, int], ...],
) -> str:
    """Return the axes of small modules of a class with these attributes, by trying."""
    with _undisturbed(), random_state_kept():
        states = global_states()
        try:
            found = _tried(cls, attributes, parameters) if _takes_one(cls) else ""
        except Exception:  # noqa: BLE001  # a forward of somebody's, with sizes that it was not made for
            return ""
        return found if global_states() == states else ""  # what it drew may decide, one day


def _takes_one(cls: type[nn.Module]) -> bool:
    """Whether a class's forward takes one argument and no more."""
    _, *parameters = inspect.signature(cls.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 1 and parameters[0].kind in positional


def _alone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: any operation
    """Stop what asks other ranks: they may try no such module, and would be waited for."""
    if "c10d" in func.namespace:
        raise NotImplementedError(func.name())
    return func(*args, **kwargs)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Compute plainly inside, whatever is on around it, and compile nothing."""
    disabled: Any = torch._C.DisableTorchFunction  # Any: torch has no type for it
    with (
        disabled(),
        torch.utils._python_dispatch._disable_current_modes(),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def _tried(
    cls: type[nn.Module], attributes: Attributes, parameters: tuple[tuple[str, int], ...]
) -> str:
    """Return the axes with which such a module computes what `F.linear` does, "" if with none.

    In BF16 too: what its author computes in FP32 stays so. Tiny and huge values tell where numbers
    are cut off.
    """
    found = {"NK", "KN"}
    for (dtype, extreme), is_training in itertools.product(EXTREMES.items(), (True, False)):
        for tokens, scale in (((3,), 1.0), ((2, 3), extreme)):
            # a bias as large as the products
            leaves = {n: _values((SIZE,) * d, dtype, scale ** (3 - d)) for n, d in parameters if d}
            small: nn.Module = cls.__new__(cls)
            nn.Module.__init__(small)
            vars(small).update(attributes)
            small.training = is_training
            for name, _ in parameters:
                own = leaves.get(name)
                small.register_parameter(name, None if own is None else nn.Parameter(own.clone()))
            before = _held(small)
            found &= _agreeing(small, leaves, _values((*tokens, SIZE), dtype, scale))
            after = _held(small)
            if after.keys() != before.keys() or any(after[n] is not v for n, v in before.items()):
                return ""  # it counts its calls, or keeps what it saw
    return next(iter(found), "")


def _held(small: nn.Module) -> dict[str, Any]:  # Any: whatever a user's module holds
    """Return all that a module and its parameters have, by name."""
    parts = small._parameters, small._buffers, small._modules
    return {
        name: value
        for holder in (vars(small), *parts, *map(vars, small.parameters()))
        for name, value in holder.items()
    }


def _values(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
    """Return numbers that tell rows from columns, and are never drawn."""
    values = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float32, device="cpu")
    return values.mul_(1.7).sin_().mul_(scale).to(dtype).reshape(shape)


def _agreeing(small: nn.Module, leaves: dict[str, Tensor], x: Tensor) -> set[str]:
    """Return the axes with which a forward and its gradients are those of `F.linear`.

    The leaves are what the module's parameters were: a forward may change its own.
    """
    scale = float(x.detach().abs().max())

    def results(y: Tensor, parameters: Mapping[str, Any]) -> list[Tensor]:
        gradient = _values(tuple(y.shape), y.dtype, scale)
        return [y, *torch.autograd.grad(y, [x, *(parameters[n] for n in leaves)], gradient)]

    x.requires_grad_()
    with OperationTracer(_alone):
        found = results(type(small).forward(small, x), small._parameters)
    agreeing = set()
    for leaf in leaves.values():
        leaf.requires_grad_()
    weight, bias = leaves["weight"], leaves.get("bias")
    for axes, matrix in (("NK", weight), ("KN", weight.t())):
        wanted = results(F.linear(x, matrix, bias), leaves)
        if all(a.dtype is b.dtype and _are_close(a, b) for a, b in zip(found, wanted, strict=True)):
            agreeing.add(axes)
    return agreeing


def _are_close(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    error = torch.finfo(b.dtype).eps * float(b.abs().max()) * SIZE  # of sums in any order
    return a.shape == b.shape and float((a - b).abs().max()) <= error
