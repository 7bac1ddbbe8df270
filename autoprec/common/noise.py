"""Messages that tell a user nothing (more): kept off the terminal, all others pass.

Of torchao's import, seen with torchao 0.18.0 on torch 2.13.0, CPU build: CUDA extensions that fail
to load, and enums that it registers the old way. `transformers` imports torchao too.
"""

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

IMPORT_NOISE = (
    ("torchao", "Failed to load"),
    ("torch.utils._pytree", "register_constant"),
    ("torchao.kernel.intmm", "Detected no triton"),
)


@contextmanager
def import_noise_dropped() -> Iterator[None]:
    """Drop the messages of IMPORT_NOISE while the context is open."""
    with ExitStack() as stack:
        for name, text in IMPORT_NOISE:
            logger, drop = logging.getLogger(name), functools.partial(_lacks, text)
            logger.addFilter(drop)
            stack.callback(logger.removeFilter, drop)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*register_constant.*")
        # its docstrings, where it is imported for the first time from a folder of sources
        warnings.filterwarnings("ignore", "invalid escape sequence", SyntaxWarning)
        yield


@contextmanager
def warned_once() -> Iterator[None]:
    """Show a warning once, as Python does where nothing makes it forget what it has shown.

    A model that warns when it is made would warn for every arm and branch, as torch forgets often.
    """
    show, shown = warnings.showwarning, set[tuple[Any, ...]]()  # Any: text, file and line

    def show_new(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if (key := (str(message), *where[:2])) not in shown:
            shown.add(key)
            show(message, category, *where)

    warnings.showwarning = show_new  # type: ignore[assignment]  # file and line are `where`
    try:
        yield
    finally:
        warnings.showwarning = show


def _lacks(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()
