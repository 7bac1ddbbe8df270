"""Small tensors made of numbers alone keep their values where everything else has only a shape.

Constructors ask for such values: the rates of stochastic depth are `torch.linspace(0, 0.2, 24)`,
read with `tolist()`, in most vision models with stages. No parameter and no batch is known.
"""

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses import fake_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

MOST_ELEMENTS = 4096  # of a tensor whose values are kept
READ = torch.ops.aten._local_scalar_dense.default
CPU = torch.device("cpu")


class KnownValues(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Computes beside tensors without storage, on the CPU, what comes of numbers and of its like.

    A value is the attribute `known` of a tensor, with the `era` that it holds for: a write
    of unknown numbers into a known tensor, of which others may be views, ends the era of all.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._era = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Run the operation, and on the values too if all are known."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_known = all(self._value(x) is not None for x in tensors)
        if func is READ and is_known:
            return self._computed(func, args, kwargs)
        out = func(*args, **kwargs)
        if is_known and _can_repeat(func, out):
            values = pytree.tree_leaves(self._computed(func, args, kwargs))
            for tensor, value in zip(pytree.tree_leaves(out), values, strict=True):
                tensor.known = self._era, value
        elif any(self._value(x) is not None for x in tensors) and func._schema.is_mutable:
            self._era += 1
        return out

    def _value(self, tensor: Tensor) -> Tensor | None:
        era, value = getattr(tensor, "known", (-1, None))
        return value if era == self._era else None

    def _computed(self, func: Any, *inputs: Any) -> Any:  # Any: torch's own protocol
        inputs = pytree.tree_map_only(Tensor, self._value, inputs)
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: CPU, inputs)
        with fake_tensor.unset_fake_temporarily():
            return func(*args, **kwargs)


def _can_repeat(func: Any, out: Any) -> bool:  # Any: torch's own
    if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.name():
        return False
    leaves = pytree.tree_leaves(out)
    return all(isinstance(x, Tensor) and x.numel() <= MOST_ELEMENTS for x in leaves)
