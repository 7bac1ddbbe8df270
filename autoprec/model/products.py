"""A forward pass -> the floating operations of the matrix products that no layer runs.

Attention, einsum, weights that are used without a layer's call. What a linear's weight is used for
without a call of it (a head in a fused loss) is not counted: that has a price of its own. Nor are
products of complex numbers and sparse matrices, whose rate nobody knows.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from autoprec.device.ranks import local_part
from autoprec.device.tracing import PLAIN_TENSORS, OperationTracer
from autoprec.model.kinds import is_linear, weight_of
from autoprec.model.recording import NO_BACKWARD

BACKWARD = 2.0  # a product's gradients are two products
FUSED_BACKWARD = 2.5  # fused attention computes the scores again: five products against two


class Products(TorchFunctionMode):
    """Counts the products of what runs inside: `flops` of a training step, backward included."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.flops = 0.0
        weights = [weight_of(layer) for layer in layers.values() if is_linear(layer)]
        self._priced = {_storage(weight) for weight in weights}
        self._depth = 0  # above 0: in a layer, or in attention that is counted

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Count attention as it is called: what a device makes of it does not tell its mask."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.enter()
        try:
            output = func(*args, **(kwargs or {}))
        finally:
            self.leave()
        self._add(_attention_flops(*args, **(kwargs or {})), FUSED_BACKWARD)
        return output

    def run_operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of torch's dispatcher, and count it if it is a product."""
        output = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None and not self._depth:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if all(t.layout is torch.strided and not t.is_complex() for t in tensors) and (
                self._priced.isdisjoint(map(_storage, tensors))
            ):
                self._add(formula(*args, **kwargs, out_val=output), BACKWARD)
        return output

    def enter(self, *_: object) -> None:
        """Begin what is not counted."""
        self._depth += 1

    def leave(self, *_: object) -> None:
        """End what is not counted."""
        self._depth -= 1

    def _add(self, forward: float, backward: float) -> None:
        if not self._depth and torch._C._current_graph_task_id() == NO_BACKWARD:
            self.flops += forward * (1 + backward * torch.is_grad_enabled())


@contextmanager
def products_outside(layers: Mapping[str, nn.Module]) -> Iterator[Products]:
    """Count the products of forward passes that run inside, outside of these layers' calls."""
    products = Products(layers)
    plain = (*PLAIN_TENSORS, FakeTensor)
    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.register_forward_pre_hook(products.enter))
            stack.enter_context(layer.register_forward_hook(products.leave, always_call=True))
        stack.enter_context(products)
        stack.enter_context(OperationTracer(products.run_operation, plain=plain))
        yield products


def _attention_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,
) -> float:
    """Return the operations of two products, half of them if the mask is causal.

    On meta nobody can look at a mask, and transformers gives one where on a device it looks and
    says `is_causal`. So a square one is taken for causal there.
    """
    query, key, value = map(local_part, (query, key, value))
    scores = (query.shape[-2], key.shape[-2])
    is_causal |= isinstance(attn_mask, FakeTensor) and attn_mask.shape[-2:] == scores
    flops = 2 * _pairs(query, key) * (query.shape[-1] + value.shape[-1])
    return flops / (2 if is_causal else 1)


def _pairs(query: Tensor, key: Tensor) -> float:
    """Return how many products of a query and a key there are: of jagged ones, within sequences."""
    if not query.is_nested:
        return query.shape[:-1].numel() * key.shape[-2]
    of_query, of_key = (
        (t.offsets().diff() if t.lengths() is None else t.lengths()).double()  # type: ignore[attr-defined]  # torch's jagged
        for t in (query, key)
    )
    return query.shape[1] * float(of_query @ of_key)


def _storage(tensor: Tensor) -> int:
    storage: int = local_part(tensor).untyped_storage()._cdata
    return storage
