"""The amax history of delayed scaling: what each linear's operands reached in the warm-up."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.records import Operand


class AmaxHistory:
    """The largest magnitudes so far, per linear and operand.

    The warm-up is far shorter than the 1024 steps that Transformer Engine looks back on, so its
    "max over the history" is the maximum of all of it.
    """

    def __init__(self) -> None:
        self._largest: dict[tuple[str, Operand], Tensor] = {}

    def amax(self, name: str, operand: Operand) -> float | None:
        """Return the largest magnitude seen, or None for a layer that was not watched."""
        found = self._largest.get((name, operand))
        return None if found is None else float(found)

    def see(self, name: str, operand: Operand, tensor: Tensor) -> None:
        """Take a tensor in."""
        amax = tensor.detach().abs().amax()
        before = self._largest.get((name, operand))
        self._largest[name, operand] = amax if before is None else torch.maximum(before, amax)

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Take in the operands of every linear among `layers` that runs inside."""
        handles = [
            layer.register_forward_hook(self._watcher(name))
            for name, layer in layers.items()
            if isinstance(layer, nn.Linear)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watcher(self, name: str):  # type: ignore[no-untyped-def]  # a forward hook
        def watch(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(layer, nn.Linear) or not args or not isinstance(output, Tensor):
                return
            self.see(name, Operand.INPUT, args[0])
            self.see(name, Operand.WEIGHT, layer.weight)
            if output.requires_grad:
                output.register_hook(lambda g: self.see(name, Operand.GRAD_OUTPUT, g))  # type: ignore[no-untyped-call]

        return watch
