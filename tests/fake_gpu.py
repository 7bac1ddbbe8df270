"""A GPU that computes nothing, for machines without one: what would a real one refuse or wait for?

`meta` stands for the GPU. A tensor made on the CPU by mistake meets meta tensors as it would meet
CUDA ones; asking a meta tensor for its value is an error where a GPU would wait; and torch puts FP8
GEMMs of meta tensors to CUDA's rules for shapes, layouts and scales. (Fake CUDA tensors cannot run
autograd on a build without CUDA: torch 2.13 aborts.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("meta")


class FakeGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Notes operations that mix devices, and the dtypes of FP8 GEMMs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.mixed: list[str] = []
        self.gemms: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Run the operation; subclasses are asked to take theirs apart first."""
        if any(kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            self.mixed.append(f"{func} on {', '.join(sorted(devices))}")
        if func.overloadpacket is torch.ops.aten._scaled_mm:
            self.gemms.append((args[0].dtype, args[1].dtype))
        return result
