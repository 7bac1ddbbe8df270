"""Messages of torchao's import that no user can act on: kept off the terminal, all others pass.

Seen with torchao 0.18.0 on torch 2.13.0, CPU build: CUDA extensions that fail to load, and enums
that it registers the old way. `transformers` imports torchao too.
"""

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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


def _lacks(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()
