"""How a command ends that does not end well: the one line that it says, and on which signals."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress

from pydantic import ValidationError
from typer.exceptions import TyperException

from autoprec.common.files import NO_ROOM
from autoprec.common.text import shown_value
from autoprec.errors import AutoprecError
from autoprec.tuning.ranks import is_launched

CANNOT_WRITE = (*NO_ROOM, errno.EIO)
CANNOT_REACH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def told_of(error: Exception) -> str | None:
    """Return what a user is told of an error; None for one that is a fault of ours.

    Its traceback is kept then; a user's error, a device out of memory and a full disk are one line.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error)
    line = _line_of(error)
    return f"autoprec: error: {line}" if line else None


def _line_of(error: Exception) -> str | None:
    if isinstance(error, AutoprecError):
        return " ".join(str(error).split())
    if isinstance(error, TyperException):
        return _line_of_usage(error)
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return (
            f"output must have somewhere to go, but writing failed ({error.strerror}); make room "
            "on the disk, or write elsewhere"
        )
    if isinstance(error, OSError) and error.errno in CANNOT_REACH and error.filename:
        return (
            f"a file must be within reach, but {shown_value(str(error.filename))} is not "
            f"({error.strerror}); check the path and what it permits"
        )
    if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
        return None
    reason = " ".join(str(error).split())[:160]
    return (
        f"what is run must fit into the device's memory, but {reason}; "
        "use smaller batches or a smaller model, or a larger device"
    )


def _line_of_usage(error: TyperException) -> str:
    """Return typer's words on a command line as ours: how it is written, what came, the way out."""
    context, kind, cause = getattr(error, "ctx", None), type(error).__name__, error.__cause__
    command = context.command_path if context else "autoprec COMMAND"
    said, _, near = error.format_message().strip(" .").partition(" (Possible options: ")
    said, _, close = said.partition(". Did you mean ")
    near = (near or close).strip("?)").replace("'", "")
    way_out = f"{f'near to it: {near}; ' if near else ''}see `{command} --help`"
    if isinstance(cause, ValidationError):  # of one value
        option, _, rule = said.removeprefix("Invalid value for ").partition(": Input should ")
        came = shown_value(cause.errors()[0]["input"])
        return f"{option} must {rule.partition(',')[0]}, but it is {came}; {way_out}"
    if kind == "MissingParameter":
        said = f"{said.split(' ', 2)[2]} is missing"
    usage = " ".join(context.get_usage().split()[1:]) if context else f"{command} [OPTIONS] ..."
    usage = usage.replace("{", "").replace("}", "").replace("[[ARGS]...]...", "[ARGS]...")
    return f"a command is `{usage}`, but {said[:1].lower()}{said[1:]}; {way_out}"


def drop_output() -> None:
    """Send what stdout still holds nowhere: the interpreter would fail on it again at its end."""
    with suppress(OSError, ValueError):  # ValueError: a stdout that is no file of the system
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send to stderr what is printed meanwhile, by libraries and other processes as well."""
    with ExitStack() as stack, redirect_stdout(sys.stderr):
        if sys.__stdout__ and sys.__stderr__:  # None where it was closed: its number is another's
            kept = os.dup(1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            os.dup2(2, 1)
        yield


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """End by SIGTERM, a scheduler's, as by Ctrl-C: what is in flight is not taken for deadly."""
    process = os.getpid()

    def interrupt(number: int, frame: object) -> None:
        if os.getpid() == process:
            raise KeyboardInterrupt
        signal.signal(number, before)  # of what a script forks, as a pool that ends its workers
        signal.raise_signal(number)

    if is_launched():  # a rank may wait for others in a collective, and torchrun ends all at once
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
