"""A training step -> the torch functions that run right before and right behind a layer in it.

A compiler fuses a cast with what makes the tensor or takes it: the amax and the cast of a layer's
input with the norm or activation before it, those of its output's gradient with the backward of
what is behind it. So these functions are kept, with their arguments, as far as a compiler can fuse
them (elementwise ones and norms); attention, GEMMs and copies are no part of it.

    rms_norm(h, w) = x,  layer(x) = y,  silu(y) = z      before: rms_norm    behind: silu

Only a function that gives the whole of the layer's input, or takes the whole of its output, counts.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from autoprec.device.ranks import local_part
from autoprec.workload.functions import tensors_in

# By the names that torch functions and tensor methods have without underscores.
FUSED: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "tanh", "sigmoid")},
    **{name: getattr(torch, name) for name in ("square", "exp", "pow", "clamp")},
    **{name: getattr(F, name) for name in ("gelu", "silu", "relu", "relu6", "elu", "leaky_relu")},
    **{name: getattr(F, name) for name in ("mish", "hardswish", "softplus", "dropout")},
    **{name: getattr(F, name) for name in ("layer_norm", "rms_norm")},
    "radd": torch.add,
    "rmul": torch.mul,
    "truediv": torch.div,
}
VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze")  # nodes of autograd
CUSTOM = "GeneratedBackwardFor_"  # what torch calls the functions of its custom operators
MOST_RECENT = 16  # results that may yet become a layer's input: q, k and v share one norm


@dataclass
class Neighbour:
    """One call of a function beside a layer, to be run again."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]  # Any: whatever the function takes; tensors are detached
    kwargs: dict[str, Any]
    shape: tuple[int, ...]  # of the layer's input, or of its output as the function takes it
    place: int | None = None  # of the layer's output among `args`; None before a layer
    gradient: Tensor | None = None  # that came back to its result

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.function.__name__)


@dataclass
class Surroundings:
    """What is before and behind one call of a layer; None where nothing can be fused."""

    before: Neighbour | None = None
    behind: Neighbour | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the functions, the one before first."""
        return tuple(one.name for one in (self.before, self.behind) if one is not None)


class NeighbourWatch(TorchFunctionMode):
    """Watches the torch functions of a step; layers' calls are told to it as they happen."""

    def __init__(self) -> None:
        super().__init__()
        self._recent: OrderedDict[int, tuple[Tensor, Neighbour]] = OrderedDict()  # by storage
        self._waiting: dict[int, tuple[Tensor, Surroundings]] = {}  # outputs, by storage

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Run the function and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = tensors_in(result)
        own = {_storage(tensor) for tensor in tensors_in((args, kwargs))}
        if made and not any(_storage(tensor) in own for tensor in made):  # no view, no property
            self._note(func, args, kwargs, made[0] if made[0] is result else None)
        return result

    def surround(self, x: Tensor, output: Tensor) -> Surroundings:
        """Return the neighbour before a layer's call; the one behind it is added later."""
        found = Surroundings()
        made, neighbour = self._recent.get(_storage(x), (None, None))
        if made is not None and neighbour is not None and _is_whole(made, x):
            found.before = replace(neighbour, shape=tuple(x.shape))
        self._waiting[_storage(output)] = output, found
        return found

    def _note(self, func: Any, args: Any, kwargs: Any, result: Tensor | None) -> None:
        function = FUSED.get(getattr(func, "__name__", "").strip("_"))
        neighbour = None
        if function is not None and result is not None:
            shape = tuple(result.shape)
            kept = tree_map_only(Tensor, _apart, (args, kwargs))
            neighbour = Neighbour(function, kept[0], kept[1], shape)
            self._recent[_storage(result)] = result, neighbour
            while len(self._recent) > MOST_RECENT:
                self._recent.popitem(last=False)
        # The first function that takes a layer's output decides, whether it is one to fuse or not.
        for place, given in enumerate(args):
            if not isinstance(given, Tensor):
                continue
            output, found = self._waiting.pop(_storage(given), (None, None))
            if output is None or found is None or neighbour is None or result is None:
                continue
            if _is_whole(output, given):
                found.behind = replace(neighbour, shape=tuple(given.shape), place=place)
                if result.requires_grad:
                    result.register_hook(partial(_catch, found.behind))  # type: ignore[no-untyped-call]  # torch


def _catch(neighbour: Neighbour, gradient: Tensor | None) -> None:
    if gradient is not None:  # not of an autograd function that has none
        neighbour.gradient = gradient.detach()


def own_kernel(x: Any) -> str:  # Any: whatever a layer is called with
    """Return the autograd function, not torch's, that made a tensor as it is; "" for torch's.

    A fused norm or activation of a library is one: a compiler puts no cast into its kernel. What a
    view gives another last dimension (attention, whose heads are joined) is not taken as it is.
    """
    node: Any = x.grad_fn if isinstance(x, Tensor) else None
    while node is not None and node.name().startswith(VIEWS):
        node = node.next_functions[0][0]
    function = getattr(type(node), "_forward_cls", None)
    if function is None or list(node._input_metadata[0].shape)[-1:] != list(x.shape)[-1:]:
        return ""
    name = str(function.__name__)
    is_torchs = function.__module__.partition(".")[0] == "torch" and not name.startswith(CUSTOM)
    return "" if is_torchs else name.removeprefix(CUSTOM).removesuffix("_default")


def _is_whole(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage hold the same elements in the same order."""
    return one.numel() == other.numel() and one.is_contiguous() and other.is_contiguous()


def _storage(tensor: Tensor) -> int:
    """Return where a tensor's values are: of a DTensor this rank's."""
    own = local_part(tensor)
    return id(own) if is_traceable_wrapper_subclass(own) else own.untyped_storage().data_ptr()


def _apart(tensor: Tensor) -> Tensor:
    """Return a tensor to run a function on later; FSDP frees the weights that it has gathered."""
    own = tensor.detach().clone() if isinstance(tensor, nn.Parameter) else tensor.detach()
    return own.requires_grad_(tensor.requires_grad)
