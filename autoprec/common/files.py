"""Files: written atomically, read within bounds."""

import ast
import errno
import functools
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from autoprec.common.text import one_line, short_digest, shown_bytes
from autoprec.errors import NoRoomError, RecordError

MAX_RECORD_BYTES = 64 * 1024 * 1024  # the largest seen (70B model, all options) is below 8 MB
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PARTIAL = ".partial"  # ends the name of a file that is being written


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` to `path` so that readers see the old file or the new one, never a part."""
    data = text.encode()
    return replace_file(path, lambda file: file.write(data), size=len(data))


def replace_file(path: Path, write: Callable[[IO[bytes]], object], *, size: int = 0) -> Path:
    """Let `write` fill a new file beside `path`, and put it there in one step when it is complete.

    `size` is of what is written, as far as it is known: a full disk is told with it.

    Raises:
        RecordError: the folder does not exist or cannot be written.
        NoRoomError: the disk is full.
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
        except BaseException as error:
            os.unlink(temporary)
            # torch.save tells its own error of what could not be written, with ours as the context
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(error, RuntimeError) and isinstance(cause, OSError):
                raise cause from error
            raise
    except OSError as error:
        raise refusal_to_write(path, error, size) from error
    return path


def refusal_to_write(path: Path, error: OSError, size: int = 0) -> RecordError:
    """Return what to tell of a file that cannot be written: a full disk is another's fault."""
    name = one_line(str(path))
    if error.errno not in NO_ROOM:
        return RecordError(
            f"an output file must be writable, but {name} is not "
            f"({error.strerror}); choose another folder with --out"
        )
    free = ""  # beside a quota the disk's own says nothing
    if error.errno == errno.ENOSPC:
        free = f" and {shown_bytes(shutil.disk_usage(path.parent).free)} are free"
    return NoRoomError(
        f"an output file must find room, but {name} takes {shown_bytes(size)}{free} "
        f"({error.strerror}); make room, then start again (tune: with --resume)"
    )


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


def file_digest(path: Path) -> str:
    """Return a hash of a file's bytes, or "" where it is not there."""
    if not path.is_file():
        return ""
    state = path.stat()
    return _digest_of(path.absolute(), state.st_mtime_ns, state.st_size)


@functools.cache  # a checkpoint of a large model takes a minute, and decides several stages
def _digest_of(path: Path, _written_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def text_digest(file: Path, *, root: Path | None = None) -> str:
    """Return a hash of a Python file's text and of what it imports from `root` and below.

    The root is the file's folder by default. What these import counts too. "" where the file is
    not there.
    """
    own, texts = file.resolve(), dict[Path, bytes]()
    root = root.resolve() if root else own.parent
    waiting = [own]
    while waiting:
        path = waiting.pop()
        if path not in texts and path.is_relative_to(root) and path.is_file():
            texts[path] = path.read_bytes()
            waiting += _imported(texts[path], path.parent, root)
    beside = sorted((f.relative_to(root).as_posix(), texts[f].hex()) for f in texts if f != own)
    return short_digest(texts[own].hex(), beside) if own in texts else ""


def _imported(text: bytes, folder: Path, root: Path) -> Iterator[Path]:
    """Yield where the modules that a file of a folder imports would be, below the root."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):  # importing it says what is wrong; a config is no Python
        return
    for node in nodes:
        base, names = root, list[str]()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
            base = [root, folder, *folder.parents][min(node.level, len(folder.parents))]
        for parts in (name.split(".") for name in names):
            for stem in (base.joinpath(*parts[: n + 1]) for n in range(len(parts))):
                yield from (stem.with_suffix(".py"), stem / "__init__.py")
