"""What the command line says of an error, and what it does with output that it cannot write.

A user's error, a device out of memory and a full disk are one line; all else is a fault of ours,
whose traceback is kept.
"""

import errno
import os
import sys
from contextlib import suppress

from typer.exceptions import TyperException

from autoprec.errors import AutoprecError

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def one_line_of(error: Exception) -> str | None:
    """Return the line that a user is told of an error; None for one that is a fault of ours."""
    if isinstance(error, AutoprecError):
        return " ".join(str(error).split())
    if isinstance(error, TyperException):
        return error.format_message()
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return (
            f"output must have somewhere to go, but writing failed ({error.strerror}); make room "
            "on the disk, or write elsewhere"
        )
    if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
        return None
    reason = " ".join(str(error).split())[:160]
    return (
        f"what is run must fit into the device's memory, but {reason}; "
        "use smaller batches or a smaller model, or a larger device"
    )


def drop_output() -> None:
    """Send what stdout still holds nowhere: the interpreter would fail on it again at its end."""
    with suppress(OSError, ValueError):  # ValueError: a stdout that is no file of the system
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
