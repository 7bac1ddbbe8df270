"""What happens between layers: casts, and functions that cannot mix dtypes get one dtype.

Layers give and take the activation dtype, but user code also computes between them: FP32 rotary
tables meet BF16 queries, an FP32 mask meets BF16 attention, a loss inside `forward` meets BF16
logits. Under FP32 or autocast that code works, so it must work under a plan. A torch function
mode, on while the root's forward runs, looks at a fixed set of functions and leaves others alone:

    GEMMs, convolutions, attention, norms   operands of different dtypes -> the activation dtype
    index and scatter writes                the written values -> the target's dtype
    losses, and what has no BF16 kernel     16-bit among the floating arguments -> all FP32
    products with a sparse matrix           the same: of some layouts they have no BF16 kernel

Batch and instance norm are left alone: they take BF16 beside FP32 parameters, and they write their
running statistics into arguments, so that a cast would let them write into a copy.

Activation checkpointing runs forward again in backward, where no root is in its forward. A module
that is recomputed switches the mode on itself; a function is not ours, so the first layer that runs
in a node of backward switches it on until the node is done, when autograd restores the thread's
state (`join_recomputation`). Compiled, a checkpointed function is one operation, which dynamo asks
the mode about as about any other, and as a mode is off where it is asked, it goes on within
(`_under`).
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.eval_frame import skip_code
from torch._higher_order_ops.flex_attention import flex_attention
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.distributions import Distribution
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode, _push_mode

from autoprec.records import Option, Precision

Function = Callable[..., Any]
AnyFunction = TypeVar("AnyFunction", bound=Function)


def part_of_callers(function: AnyFunction) -> AnyFunction:
    """Let dynamo compile the function where what calls it is compiled, and not by itself.

    What dynamo runs eagerly (after a break) would else be a graph for every torch function, and one
    for every layer, where torch.nn's own run eagerly.
    """
    function.__code__ = function.__code__.replace()  # of its own: closures share theirs
    for code in (function.__code__, *function.__code__.co_consts):
        if isinstance(code, CodeType):  # and of its generators, which cannot be compiled at all
            skip_code(code)
    return function


def _functions(names: str, *namespaces: object) -> frozenset[Function]:
    """Return the functions of these names, wherever a namespace has one."""
    found = (getattr(space, name, None) for space in namespaces for name in names.split())
    return frozenset(function for function in found if function is not None)


UNIFORM = _functions(
    "linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "scaled_dot_product_attention multi_head_attention_forward layer_norm group_norm rms_norm "
    "prelu embedding_bag grid_sample",
    F,
) | _functions(
    "matmul mm bmm mv dot vdot inner addmm addmv addbmm baddbmm addr einsum chain_matmul "
    "tensordot conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "layer_norm group_norm rms_norm lerp cross __matmul__ __rmatmul__",
    torch,
    Tensor,
)
INTO_FIRST = _functions(
    "index_add index_copy index_put scatter scatter_add scatter_reduce masked_scatter "
    "index_add_ index_copy_ index_put_ scatter_ scatter_add_ scatter_reduce_ masked_scatter_ "
    "addmm_ addmv_ addbmm_ baddbmm_ addr_ lerp_ __setitem__",
    torch,
    Tensor,
)
IN_FP32 = (
    _functions(
        "cross_entropy nll_loss gaussian_nll_loss poisson_nll_loss kl_div mse_loss l1_loss "
        "smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits "
        "cosine_embedding_loss hinge_embedding_loss margin_ranking_loss multi_margin_loss "
        "multilabel_margin_loss multilabel_soft_margin_loss soft_margin_loss triplet_margin_loss "
        "triplet_margin_with_distance_loss ctc_loss avg_pool3d local_response_norm",
        F,
    )
    | _functions("cdist pdist complex polar view_as_complex ctc_loss", torch)
    | _functions(
        "quantile nanquantile stft istft matrix_exp logdet det slogdet inverse pinverse svd qr "
        "cholesky geqrf ormqr triangular_solve cholesky_inverse cholesky_solve lu_solve",
        torch,
        Tensor,
    )
    | _functions(
        "cholesky cholesky_ex cond det eig eigh eigvals eigvalsh householder_product inv inv_ex "
        "ldl_factor ldl_factor_ex ldl_solve lstsq lu lu_factor lu_factor_ex lu_solve matrix_exp "
        "matrix_rank pinv qr slogdet solve solve_ex solve_triangular svd svdvals tensorinv "
        "tensorsolve vander",
        torch.linalg,
    )
    | _functions(" ".join(torch.fft.__all__), torch.fft)
    | _functions("mm addmm sampled_addmm softmax log_softmax", torch.sparse)
    | _functions("numpy __array__", Tensor)  # of which scipy's assignments are made
)
FILLING = _functions("masked_fill masked_fill_", torch, Tensor)
CHECKPOINT = tag_activation_checkpoint  # as dynamo sees `torch.utils.checkpoint.checkpoint`
# in scripts that run with a plan others stand there, see averages.py
LERP, BLEND, CLONE = Tensor.lerp_, Tensor.lerp, Tensor.clone
LISTED = UNIFORM | INTO_FIRST | IN_FP32 | FILLING
# What `module.to()` calls: dynamo has stand-ins for them, which nothing can hash.
_PARSE, _COMPARE = torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type
LOW = frozenset({torch.bfloat16, torch.float16})
CASTABLE = frozenset({torch.float32, torch.float64}) | LOW


class ActivationMode(TorchFunctionMode):
    """Casts the floating arguments of the functions above, where they need it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    @part_of_callers
    def __torch_function__(
        self, func: Function, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Call `func`, with its arguments cast when it is one of the functions above."""
        kwargs = kwargs or {}
        if func is Tensor.lerp_:
            func = LERP
        elif func is Tensor.lerp:
            func = BLEND
        elif func is Tensor.clone:
            func = CLONE
        if func is CHECKPOINT or func is flex_attention:
            args = _operator_args(self, func, args)
        elif func is Tensor.unflatten and torch.compiler.is_compiling():
            func = torch.unflatten  # dynamo follows no `super()` of a method that a mode calls
        elif func is not _PARSE and func is not _COMPARE and func in LISTED:
            args, kwargs = _cast_arguments(self, func, args, kwargs)
        return func(*args, **kwargs)


@part_of_callers
def _cast_arguments(
    mode: ActivationMode, func: Function, args: Any, kwargs: Any
) -> tuple[Any, Any]:  # Any: as given
    """Return the arguments of one of the functions above, as it needs them."""
    if func in FILLING:
        return _with_value_in_range(*args), kwargs
    found: set[torch.dtype] = set()
    _collect_dtypes((*args, *kwargs.values()), found)
    if func in IN_FP32:
        dtype, is_needed = torch.float32, not found.isdisjoint(LOW)
    else:
        dtype = mode.dtype if func in UNIFORM else args[0].dtype
        is_needed = len(found) > 1
    if is_needed and func in UNIFORM and _has_sparse((*args, *kwargs.values())):
        dtype = torch.float32
    if not is_needed:
        return args, kwargs
    return cast_floating(args, dtype), cast_floating(kwargs, dtype)


@part_of_callers
def _with_value_in_range(x: Tensor, *args: Any) -> tuple[Any, ...]:  # Any: as given
    """Return a mask's arguments; the least of FP32 (`torch.finfo`) is too large for BF16 scores."""
    *mask, value = args
    if isinstance(value, float) and x.dtype in LOW and math.isfinite(value):
        most = torch.finfo(x.dtype).max
        value = min(max(value, -most), most)
    return x, *mask, value


@part_of_callers
def _operator_args(mode: ActivationMode, func: Function, args: Any) -> Any:  # Any: the operator's
    """Return the arguments of what is one operation to dynamo, which alone asks about these."""
    if func is CHECKPOINT:
        return _under(mode, args[0]), *args[1:]
    query, key, value, *others = args  # what the functions among the others read stays as it is
    if query.dtype is key.dtype and key.dtype is value.dtype:
        return args
    return *cast_floating((query, key, value), mode.dtype), *others


@part_of_callers
def _under(mode: ActivationMode, function: Function) -> Function:
    """Return a checkpointed function with the mode on, which is off where a mode is asked."""
    with mode:  # changed within the function alone, the stack of modes would be a side effect
        pass

    def under(*args: Any, **kwargs: Any) -> Any:  # Any: the function's own
        with mode:
            return function(*args, **kwargs)

    return under


@part_of_callers
def _collect_dtypes(values: Iterable[Any], found: set[torch.dtype]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            if value.dtype in CASTABLE:
                found.add(value.dtype)
        elif isinstance(value, tuple | list):
            _collect_dtypes(value, found)


@part_of_callers
def _has_sparse(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.layout is not torch.strided for value in values)


@part_of_callers
def cast_floating(value: Any, dtype: torch.dtype) -> Any:  # Any: whatever a module takes or gives
    """Return `value` with its floating tensors as `dtype`; `value` itself when nothing differs.

    Looks into tuples (named ones too), lists, mappings, dataclasses and distributions; other
    objects, such as a key-value cache, pass through. They are rebuilt, never changed in place.
    """
    if isinstance(value, Tensor):
        return value if value.dtype is dtype or value.dtype not in CASTABLE else value.to(dtype)
    if isinstance(value, PackedSequence):
        return value if value.data.dtype is dtype else value.to(dtype)
    if isinstance(value, tuple | list):
        items = [cast_floating(item, dtype) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if value is None or isinstance(value, int | float | str):
        return value  # dynamo of torch 2.11 cannot ask whether these are dataclasses
    return _cast_fields(value, dtype)


@part_of_callers
def _cast_fields(value: Any, dtype: torch.dtype) -> Any:
    old = _fields_of(value)
    new = {key: cast_floating(item, dtype) for key, item in old.items()}
    if all(new[key] is item for key, item in old.items()):
        return value
    if type(value) is dict:
        return new  # dynamo follows no copy of the keyword arguments that a mode is given
    result: Any = copy.copy(value)
    for key, item in new.items():
        if isinstance(value, Mapping):  # all items: dynamo's copy of a dict's subclass has none
            result[key] = item
        elif item is not old[key]:
            object.__setattr__(result, key, item)  # frozen ones too: the copy is ours
    return result


@part_of_callers
def _fields_of(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name, None) for each in dataclasses.fields(value)}
    return dict(vars(value)) if isinstance(value, Distribution) else {}


def option_dtype(option: Option) -> torch.dtype:
    """Return the dtype in which a layer with this option stores and takes tensors."""
    return torch.float32 if option.precision is Precision.FP32 else torch.bfloat16


def is_mode_active() -> bool:
    """Whether an activation mode is on in this thread (written for torch.compile to follow)."""
    return any(
        isinstance(torch._C._get_function_stack_at(position), ActivationMode)
        for position in range(torch._C._len_torch_function_stack())
    )


@part_of_callers
def without_mode(
    dtype: torch.dtype, function: Function, run: Function, *given: Any
) -> tuple[Any, bool]:
    """Call a layer's function without the mode, where it is the innermost of all.

    Not if the layer holds other parameters than of `dtype`: somebody converted it since. Returns
    what the function does, and whether no mode was on: the layer runs outside of the model.

    Costs 0.5 us, less than one call of torch, or question for a dtype, under the mode.
    """
    depth = torch._C._len_torch_function_stack()
    if not depth or type(torch._C._get_function_stack_at(depth - 1)) is not ActivationMode:
        return function(run, *given), not is_mode_active()
    layer, mode = given[0], torch._C._pop_torch_function_stack()
    try:
        held = layer._parameters.values()
        if not layer._modules and all(p is None or p.dtype is dtype for p in held):
            return function(run, *given), False
    finally:
        torch._C._push_on_torch_function_stack(mode)
    return function(run, *given), False


@part_of_callers
def join_recomputation(dtype: torch.dtype) -> None:
    """Switch the mode on for the rest of this node of backward, if forward runs again in it.

    Nothing switches it off but the end of the node: torch sets the thread's state, with the stack
    of function modes in it, around every node (`ThreadLocalStateGuard` in its engine.cpp).
    """
    is_in_backward = torch._C._current_graph_task_id() >= 0  # what runs forward runs it again
    if is_in_backward and not is_mode_active():
        _push_mode(ActivationMode(dtype))  # type: ignore[no-untyped-call]  # torch's own
