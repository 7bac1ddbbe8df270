"""Files: written atomically, read within bounds."""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from autoprec.common.text import one_line
from autoprec.errors import RecordError

MAX_RECORD_BYTES = 64 * 1024 * 1024  # the largest seen (70B model, all options) is below 8 MB
PARTIAL = ".partial"  # ends the name of a file that is being written


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` to `path` so that readers see the old file or the new one, never a part.

    Raises:
        RecordError: the folder does not exist or cannot be written.
    """
    return replace_file(path, lambda file: file.write(text.encode()))


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Let `write` fill a new file beside `path`, and put it there in one step when it is complete.

    Raises:
        RecordError: the folder does not exist or cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(PARTIAL, prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # on the disk before it has the name
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RecordError(
            f"an output file must be writable, but {one_line(str(path))} is not "
            f"({error.strerror}); choose another folder with --out"
        ) from error
    return path


def read_text(path: Path, *, what: str) -> str:
    """Return the text of a record file, refusing one that is absent or larger than any record."""
    name = one_line(str(path))
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise RecordError(
                f"a {what} file must be a regular file, but {name} is a pipe or a device, which "
                "may never end; copy it to a file first"
            )
        if status.st_size > MAX_RECORD_BYTES:
            raise RecordError(
                f"a {what} file has at most {MAX_RECORD_BYTES:,} bytes, but {name} has "
                f"{status.st_size:,}; it is not one that autoprec wrote"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        reason = getattr(error, "strerror", "no file can have that name")
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8 text"
        raise RecordError(
            f"a {what} file must be readable, but {name} is not ({reason}); check the path"
        ) from error
