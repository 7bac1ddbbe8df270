"""What a pass makes under no_grad: gradients take it for a constant, and so does the reference's.

Moved weights would move it (a fixed point's steps, a target of the model's own), and show at layers
behind it a derivative that is none of their error's. So moved passes take what the reference made.

Activations that it is made of act on the loss by it, too, and their gradients do not tell how: of
layers in front of it the probes do not see all.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakTensorKeyDictionary

from autoprec.model.recording import NO_BACKWARD, nodes_behind


class Constants:
    """Sees the operations of one pass below autograd; choices, which are integers, are no constant.

    `given` is what operations under no_grad made of what requires a gradient, in order; with that
    of another pass, `kept`, they give that instead.
    """

    def __init__(self, kept: Iterable[Tensor] | None = None) -> None:
        self.given: list[Tensor] = []
        self._left = None if kept is None else iter(kept)
        # by tensor: of which activations it was made, and what is a weight or one under other names
        self._made_of: Any = WeakTensorKeyDictionary()  # Any: torch's own has no types
        self._other_names: Any = WeakTensorKeyDictionary()
        self._used: set[Node] = set()

    def see(self, func: Any, args: object, result: object) -> None:  # Any: torch's own
        """See one operation."""
        with_grad = torch.is_grad_enabled()
        if torch._C._current_graph_task_id() != NO_BACKWARD:
            if with_grad:  # a part of the model is computed again there
                self.given.clear()
        elif not with_grad:
            self._see_constant(func, _floating(args), _floating(result))
        elif self._made_of:
            # what checkpointing made has a gradient again
            used = (self._made_of.get(x) for x in _floating(args) if not x.requires_grad)
            self._used.update(*filter(None, used))

    def _see_constant(self, func: Any, args: list[Tensor], made: list[Tensor]) -> None:
        behind = {x.grad_fn for x in args if x.grad_fn is not None}
        behind.update(*(self._made_of.get(x, ()) for x in args))
        for y in made if behind else ():
            self._made_of[y] = behind
        if not any(x.requires_grad or x in self._other_names for x in args):
            return
        if func.is_view or func.overloadpacket.__name__ == "_to_copy":
            for y in made:
                self._other_names[y] = True
            return
        # a weight that is changed in place (clipped, normalised) stays the moved one
        made = [y for y in made if not y.requires_grad and y not in self._other_names]
        if self._left is not None:
            for y in made:
                kept = next(self._left, y)
                y.copy_(kept if kept.shape == y.shape else y)
        elif not _is_checkpointed():
            self.given += [y.clone() for y in made]

    def makers(self, layers: Mapping[str, nn.Module]) -> set[str]:
        """Return the layers in front of what was made under no_grad and used with a gradient."""
        nodes = (node for node in nodes_behind(self._used) if hasattr(node, "variable"))
        owned = {id(node.variable) for node in nodes}
        return {n for n, m in layers.items() if any(id(p) in owned for p in m.parameters())}


def _is_checkpointed() -> bool:
    """Whether checkpointing will run what runs now again, with a gradient."""
    frame, inner = sys._getframe(), CheckpointFunction.forward.__code__
    while frame.f_back is not None and frame.f_code is not inner:
        frame = frame.f_back
    return frame.f_code is inner


def _floating(values: object) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
