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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autoprec.model.layers import own_class
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
SHAPES = ((3,), (2, 3))  # of the tokens that it is tried with
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
    return issubclass(own_class(module), nn.Linear) or bool(_axes(module))


def linear_refusal(module: nn.Module) -> str:
    """Return the reason that keeps a module out of FP8 whatever its shape, or an empty string.

    torchao computes what `nn.Linear.forward` does with a plain weight, and nothing else. Sizes are
    `options.py`'s matter.
    """
    cls = own_class(module)
    if not is_linear(module):
        return f"{cls.__name__} is no nn.Linear, and computes something else; FP8 is for nn.Linear"
    if parametrize.is_parametrized(module):
        return f"{NO_PLAIN_WEIGHT}parametrized, and torchao casts plain weights only"
    if "weight" not in module._parameters:
        return f"{NO_PLAIN_WEIGHT}made anew before each call (pruned, normed); FP8 takes plain ones"
    if cls.forward is not nn.Linear.forward and not _axes(module):
        return f"{cls.__name__}'s forward does more than nn.Linear's, which FP8 would replace"
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
    if issubclass(own_class(module), nn.Linear):
        linear = cast("nn.Linear", module)
        return linear.out_features, linear.in_features
    N, K = weight_matrix(module).shape
    return N, K


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a linear's bias, if it has one."""
    return module._parameters.get("bias")


def _axes(module: nn.Module) -> str:
    """Return the axes of the weight of a module that computes what `nn.Linear` does, else ""."""
    cls: Any = own_class(module)  # Any: mypy takes no class to be hashable
    if cls.forward is nn.Linear.forward:
        return "NK" if "weight" in module._parameters else ""
    dims = {name: p.dim() for name, p in module._parameters.items() if p is not None}
    others = [module._modules, *(b for b in module._buffers.values() if b is not None)]
    if others != [{}] or dims not in ({"weight": 2}, {"weight": 2, "bias": 1}):
        return ""  # as most layers
    sizes = tuple(weight_of(module).shape)
    own = {name: value for name, value in vars(module).items() if name not in EVERY_MODULES}
    small = {n: SIZE if type(v) is int and v in sizes else v for n, v in own.items()}
    parameters = tuple((name, dims.get(name, 0)) for name in module._parameters)
    try:
        return _axes_of(cls, tuple(small.items()), parameters)
    except TypeError:  # an attribute that has no hash
        return _axes_of.__wrapped__(cls, tuple(small.items()), parameters)


@functools.lru_cache(maxsize=1024)
def _axes_of(
    cls: type[nn.Module],
    attributes: Attributes,
    parameters: tuple[tuple[str, int], ...],
) -> str:
    """Return the axes of small modules of a class with these attributes, by trying."""
    try:
        with _undisturbed():
            return _tried(cls, attributes, parameters) if _takes_one(cls) else ""
    except Exception:  # noqa: BLE001  # a forward of somebody's, with sizes that it was not made for
        return ""


def _takes_one(cls: type[nn.Module]) -> bool:
    """Whether a class's forward takes one argument and no more."""
    _, *parameters = inspect.signature(cls.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 1 and parameters[0].kind in positional


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Compute plainly inside, whatever is on around it."""
    disabled: Any = torch._C.DisableTorchFunction  # Any: torch has no type for it
    with (
        torch.random.fork_rng(devices=[]),
        disabled(),
        torch.utils._python_dispatch._disable_current_modes(),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def _tried(
    cls: type[nn.Module], attributes: Attributes, parameters: tuple[tuple[str, int], ...]
) -> str:
    """Return the axes with which such a module computes what `F.linear` does, "" if with none.

    In BF16 too: what its author computes in FP32 stays so.
    """
    found = {"NK", "KN"}
    for dtype, is_training in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        small: nn.Module = cls.__new__(cls)
        nn.Module.__init__(small)
        vars(small).update(attributes)
        small.training = is_training
        for name, dim in parameters:
            tried = nn.Parameter(_values((SIZE,) * dim, dtype)) if dim else None
            small.register_parameter(name, tried)
        before = dict(vars(small))
        for tokens in SHAPES:
            x = _values((*tokens, SIZE), dtype)
            found &= _agreeing(functools.partial(cls.forward, small), small, x)
        if vars(small).keys() != before.keys() or any(
            vars(small)[name] is not value for name, value in before.items()
        ):
            return ""  # it counts its calls, or keeps what it saw
    return next(iter(found), "")


def _values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return numbers that tell rows from columns, and are never drawn."""
    values = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float32, device="cpu")
    return values.mul_(1.7).sin_().to(dtype).reshape(shape)


def _agreeing(forward: Callable[[Tensor], Tensor], small: nn.Module, x: Tensor) -> set[str]:
    """Return the axes with which a forward and its gradients are those of `F.linear`."""
    weight, bias = weight_of(small), bias_of(small)
    leaves = [x.requires_grad_(), weight, *([] if bias is None else [bias])]
    y = forward(x)
    found = [y, *torch.autograd.grad(y, leaves, _values(tuple(y.shape), y.dtype))]
    agreeing = set()
    for axes, matrix in (("NK", weight), ("KN", weight.t())):
        wanted = F.linear(x, matrix, bias)
        gradient = _values(tuple(wanted.shape), wanted.dtype)
        pairs = zip(found, [wanted, *torch.autograd.grad(wanted, leaves, gradient)], strict=True)
        if all(a.dtype is b.dtype and _are_close(a, b) for a, b in pairs):
            agreeing.add(axes)
    return agreeing


def _are_close(a: Tensor, b: Tensor) -> bool:
    error = (
        torch.finfo(b.dtype).eps * float(b.detach().abs().max()) * SIZE
    )  # of as many sums in any order
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= error
