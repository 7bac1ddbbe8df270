"""TF32: whether this process lets FP32 products lose 13 bits, and how a reference does not.

torch leaves cuDNN's convolutions in TF32 by default and matrix products in FP32. Which of them the
process allows belongs to its facts; a reference, against which errors are measured, allows neither.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CUDNN: Any = torch.backends.cudnn  # Any: the stubs do not know the newer settings
MATMUL: Any = torch.backends.cuda.matmul
MKLDNN: Any = torch.backends.mkldnn
CUDNN_PARTS = (CUDNN.conv, CUDNN.rnn)
SETTINGS = (MATMUL, *CUDNN_PARTS, MKLDNN.matmul)
UNSET, TF32, IEEE = "none", "tf32", "ieee"  # unset: as the setting above it says


def matmul_allows_tf32() -> bool:
    """Whether FP32 matrix products may run in TF32; read through torch's newer API alone."""
    return _chosen(MATMUL.fp32_precision) == TF32


def cudnn_allows_tf32() -> bool:
    """Whether FP32 convolutions may run in TF32."""
    return _chosen(CUDNN.conv.fp32_precision, CUDNN.fp32_precision) == TF32


def _chosen(*precisions: str) -> str:
    """Return the first setting that says something; the last one is that for all backends."""
    every: Any = torch.backends
    return next((p for p in (*precisions, every.fp32_precision) if p != UNSET), UNSET)


@contextmanager
def tf32_off() -> Iterator[None]:
    """Run FP32 products and convolutions in FP32, whatever the process allows, and put it back.

    Example:
        >>> from autoprec.device.tf32 import cudnn_allows_tf32, tf32_off
        >>> with tf32_off():
        ...     cudnn_allows_tf32()
        False
    """
    # torch has two interfaces, and reading the older one is an error once the newer one was set to
    # something else. User code inside may read it, so the older one is set where it still answers,
    # the newer one where that is not enough, and at the end both are as they were.
    older, newer = _older_settings(), [(own, own.fp32_precision) for own in SETTINGS]
    try:
        for switch in older:
            switch(False)
        if matmul_allows_tf32():
            MATMUL.fp32_precision = IEEE
        if TF32 in (_chosen(own.fp32_precision, CUDNN.fp32_precision) for own in CUDNN_PARTS):
            for own in CUDNN_PARTS:
                own.fp32_precision = IEEE
        yield
    finally:
        for switch in older:
            switch(True)
        for own, before in newer:
            own.fp32_precision = before


def _older_settings() -> list[Callable[[bool], None]]:
    """Return functions that switch the older settings off, and back to their value of now."""
    found: list[Callable[[bool], None]] = []
    with contextlib.suppress(RuntimeError):  # the newer interface was used: this one is closed
        precision = torch.get_float32_matmul_precision()
        found.append(
            lambda is_on: torch.set_float32_matmul_precision(precision if is_on else "highest")
        )
    with contextlib.suppress(RuntimeError):
        allowed = CUDNN.allow_tf32
        found.append(lambda is_on: setattr(CUDNN, "allow_tf32", allowed and is_on))
    return found
