"""Small tensors made of numbers alone keep their values where everything else has only a shape.

Constructors ask for such values: the rates of stochastic depth are `torch.linspace(0, 0.2, 24)`,
read with `tolist()`, in most vision models with stages. So do losses, of the integers in a batch:
are all labels below the vocabulary, which tokens are masked? No parameter is known.
"""

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

MOST_ELEMENTS = 2**22  # of a tensor whose values are kept
aten = torch.ops.aten
READ = aten._local_scalar_dense.default
INDEXED = aten.index.Tensor, aten.index_put.default, aten.index_put_.default
CTC, CTC_BACKWARD = aten._ctc_loss.Tensor, aten._ctc_loss_backward.Tensor
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
        if func in INDEXED:
            args = (args[0], [i for index in args[1] for i in self._places(index)], *args[2:])
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_known = all(self._value(x) is not None for x in tensors)
        if func is READ and is_known:
            return self._computed(func, args, kwargs)
        if is_known and torch.Tag.dynamic_output_shape in func.tags:  # values decide, and are known
            out = pytree.tree_map_only(Tensor, _without_values, self._computed(func, args, kwargs))
        else:
            out = self._run(func, *args, **kwargs)
        if is_known and _can_repeat(func, out):
            values = pytree.tree_leaves(self._computed(func, args, kwargs))
            for tensor, value in zip(pytree.tree_leaves(out), values, strict=True):
                tensor.known = self._era, value
        elif func._schema.is_mutable:
            self._era += any(self._value(x) is not None for x in _written(func, args, kwargs))
        return out

    def keep(self, tensor: Tensor, own: Tensor) -> None:
        """Keep the numbers of `own` for its copy without storage, if those are few integers."""
        if own.numel() <= MOST_ELEMENTS and not (own.is_floating_point() or own.is_complex()):
            with fake_tensor.unset_fake_temporarily():
                values = own.detach().to(CPU, copy=True)
            tensor.known = self._era, values  # type: ignore[attr-defined]  # set as in dispatch

    def _run(self, func: Any, *args: Any, **kwargs: Any) -> Any:  # Any: torch's own protocol
        """Run an operation; give what has the shapes of a CTC loss, which torch lacks on meta."""
        if func is CTC:
            log_probs, targets, _, lengths = args[:4]
            known, longest = self._value(lengths), targets.shape[-1]
            if known is not None:
                with fake_tensor.unset_fake_temporarily():
                    longest = int(known.max())
            # of every step, the states of a target: its letters, blanks between them
            steps, batch = log_probs.shape[0], log_probs.shape[1:-1]
            return log_probs.new_empty(batch), log_probs.new_empty(*batch, steps, 2 * longest + 1)
        return torch.empty_like(args[1]) if func is CTC_BACKWARD else func(*args, **kwargs)

    def _value(self, tensor: Tensor) -> Tensor | None:
        era, value = getattr(tensor, "known", (-1, None))
        return value if era == self._era else None

    def _places(self, index: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return an index, or the places that a known mask chooses: how many is a shape then."""
        mask = None if index is None else self._value(index)
        if mask is None or mask.dtype is not torch.bool:
            return (index,)
        with fake_tensor.unset_fake_temporarily():
            chosen = mask.nonzero(as_tuple=True)
        places = tuple(map(_without_values, chosen))
        for place, values in zip(places, chosen, strict=True):
            self.keep(place, values)
        return places

    def _computed(self, func: Any, *inputs: Any) -> Any:  # Any: torch's own protocol
        inputs = pytree.tree_map_only(Tensor, self._value, inputs)
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: CPU, inputs)
        with fake_tensor.unset_fake_temporarily():
            return func(*args, **kwargs)


class KnownLists(TorchFunctionMode):
    """Keeps the numbers of `torch.tensor([...])`, which are gone once that is a meta tensor."""

    def __init__(self, values: KnownValues) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Make the tensor, and the same on the CPU for its numbers."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is not torch.tensor or not args or not out.is_meta or out.is_floating_point():
            return out
        if any(isinstance(x, Tensor) for x in pytree.tree_leaves(args[0])):
            return out
        with fake_tensor.unset_fake_temporarily():
            own = torch.tensor(args[0], dtype=out.dtype, device=CPU)
        out = _without_values(own)
        self.values.keep(out, own)
        return out


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    own = func._schema.arguments  # Any: torch's, as what it is given
    given = dict(zip((argument.name for argument in own), args, strict=False)) | kwargs
    changed = [given.get(a.name) for a in own if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in pytree.tree_leaves(changed) if isinstance(x, Tensor)]


def _without_values(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="meta")


def _can_repeat(func: Any, out: Any) -> bool:  # Any: torch's own
    if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func.name():
        return False
    leaves = pytree.tree_leaves(out)
    return all(isinstance(x, Tensor) and x.numel() <= MOST_ELEMENTS for x in leaves)
