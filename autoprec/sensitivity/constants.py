"""What a pass makes under no_grad: gradients take it for a constant, and so does the reference's.

Moved weights would move it (a fixed point's steps, a target of the model's own), and show at layers
behind it a derivative that is none of their error's. So moved passes take what the reference made.

Activations that it is made of act on the loss by it, too, and their gradients do not tell how: of
layers in front of it the probes do not see all.

A custom function's forward (checkpointing's, a DTensor's collectives) is under no_grad as well, and
what it gives has a gradient all the same. So a constant is made outside of those, and is what
operations with a gradient take that has none itself.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from autoprec.model.recording import NO_BACKWARD, nodes_behind


class Constants:
    """Sees the operations of one pass below autograd; choices, which are integers, are no constant.

    `given` is what operations under no_grad made of what requires a gradient and others took, by
    their number in the pass; with that of another pass, `kept`, they give that instead.
    """

    def __init__(self, kept: Mapping[int, Tensor] | None = None) -> None:
        self.given: dict[int, Tensor] = {}
        self._kept, self._number = kept, 0
        # by tensor: what it is or was made of, as `given`; gone with it
        self._parts: Any = WeakTensorKeyDictionary()  # Any: torch's own has no types
        # by tensor: of which activations it was made, and what is a weight or one under other names
        self._made_of: Any = WeakTensorKeyDictionary()
        self._other_names: Any = WeakTensorKeyDictionary()
        self._used: set[Node] = set()

    def see(self, func: Any, args: object, result: object) -> None:  # Any: torch's own
        """See one operation."""
        if is_in_backward():
            return  # what is computed again there had its constants in forward
        taken, made = _floating(args), _floating(result)
        is_moved = any(x.requires_grad or x in self._other_names for x in taken)
        if torch.is_grad_enabled():
            for x in (x for x in taken if not x.requires_grad):
                self.given |= self._parts.get(x, {})
                self._used |= self._made_of.get(x, set())
        elif _is_in_function():
            self._other_names.update((y, True) for y in made if is_moved)
        else:
            self._see_nodes(taken, made)
            if is_moved:
                self._see_constants(func, made)
            elif parts := {n: part for x in taken for n, part in self._parts.get(x, {}).items()}:
                self._parts.update((y, parts) for y in made)

    def _see_nodes(self, taken: list[Tensor], made: list[Tensor]) -> None:
        behind = {x.grad_fn for x in taken if x.grad_fn is not None}
        behind |= {node for x in taken for node in self._made_of.get(x, ())}
        for y in made if behind else ():
            self._made_of[y] = behind

    def _see_constants(self, func: Any, made: list[Tensor]) -> None:
        if func.is_view or func.overloadpacket.__name__ == "_to_copy":
            self._other_names.update((y, True) for y in made)
            return
        # a weight that is changed in place (clipped, normalised) stays the moved one
        for y in (y for y in made if not y.requires_grad and y not in self._other_names):
            self._number += 1
            if self._kept is None:
                self._parts[y] = {self._number: y.clone()}
            elif (kept := self._kept.get(self._number)) is not None and kept.shape == y.shape:
                y.copy_(kept)

    def makers(self, layers: Mapping[str, nn.Module]) -> set[str]:
        """Return the layers in front of what was made under no_grad and used with a gradient."""
        nodes = (node for node in nodes_behind(self._used) if hasattr(node, "variable"))
        owned = {id(node.variable) for node in nodes}
        return {n for n, m in layers.items() if any(id(p) in owned for p in m.parameters())}


def is_in_backward() -> bool:
    """Whether a backward pass runs, or what checkpointing computes again within it."""
    return torch._C._current_graph_task_id() != NO_BACKWARD


def _is_in_function() -> bool:
    """Whether a custom function's forward runs: torch turns forward-mode gradients off there.

    So does inference mode; `no_grad` does not.
    """
    return not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


def _floating(values: object) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
