"""What would make the host wait for a GPU: found on a CPU, where the same operations run.

Operations that hand a value to Python are seen by a dispatch mode (`item`, `bool(tensor)`, indexing
with a mask, `torch.equal`); `tolist`, which is none, by a function mode.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
WAITING = frozenset(
    {
        ATEN._local_scalar_dense,  # item, bool, int, float, a tensor as an index
        ATEN.is_nonzero,
        ATEN.nonzero,
        ATEN.masked_select,
        ATEN.equal,
        ATEN.allclose,
        ATEN.unique_consecutive,
        ATEN._unique2,
    }
)


class _Lists(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class HostWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Notes in `found` what waits for values while it is on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.found: list[str] = []
        self._lists = _Lists(self.found)

    def __enter__(self) -> "HostWaits":
        self._lists.__enter__()  # type: ignore[no-untyped-call]  # as above
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own
        return self

    def __exit__(self, *error: Any) -> None:  # Any: as torch's
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's own
        self._lists.__exit__(*error)  # type: ignore[no-untyped-call]  # as above

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Run the operation, and note it if it hands a value to Python."""
        is_mask = func.overloadpacket is ATEN.index and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        if is_mask or func.overloadpacket in WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))
