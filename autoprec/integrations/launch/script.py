"""A script or module with its arguments -> run in this process as `python` would run it.

`__main__`, `sys.argv` and `sys.path[0]` are what `python FILE ARGS` or `python -m MODULE ARGS`
makes them, and stay so afterwards: the process is the script's from then on. (`runpy` puts them
back, and what is compiled or pickled later looks the script's classes up in `__main__`.) An
exception is shown by `sys.excepthook` with the script's frames only.
"""

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from runpy import _get_module_details  # type: ignore[attr-defined]  # what `python -m` calls
from types import CodeType, ModuleType, TracebackType

from autoprec.errors import AutoprecError, WorkloadError

FAILED, INTERRUPTED = 1, 130  # Python's exit status of an uncaught exception, a shell's of Ctrl-C
HERE = str(Path(__file__).parent) + os.sep


@dataclass(frozen=True)
class Script:
    """A path (or with `is_module` a module's name) and its arguments."""

    name: str
    args: tuple[str, ...] = ()
    is_module: bool = False

    @classmethod
    def of(cls, first: str, rest: Sequence[str]) -> "Script":
        """Return the script of what stands behind `python`: `FILE ARGS` or `-m MODULE ARGS`.

        Raises:
            WorkloadError: -m without a module's name.
        """
        if first != "-m":
            return cls(first, tuple(rest))
        if not rest:
            raise WorkloadError("-m must be given a module that can be run, but nothing follows it")
        return cls(rest[0], tuple(rest[1:]), is_module=True)


class StopScript(SystemExit):
    """Ends a script from outside; its handlers let it pass, its processes end silently by it."""


def run_script(script: Script) -> int:
    """Run a script to its end and return its exit status; its errors are shown as Python does.

    Raises:
        WorkloadError: there is no such file or module.
        AutoprecError: what autoprec's own code raised inside of the script.
        StopScript: as it was raised.
    """
    with _own_logging():
        try:
            code, main = _load_module(script) if script.is_module else _load_file(script)
            sys.modules["__main__"] = main
            exec(code, vars(main))
        except (AutoprecError, StopScript, GeneratorExit):
            raise
        except SystemExit as leaving:
            if leaving.code is None or isinstance(leaving.code, int):
                return leaving.code or 0
            sys.stderr.write(f"{leaving.code}\n")  # as Python does with sys.exit("message")
            return FAILED
        except BaseException as error:  # noqa: BLE001 - the script's last one, as Python ends with
            error.__traceback__ = _script_frames(error.__traceback__)
            sys.excepthook(type(error), error, error.__traceback__)
            return INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
    return 0


def script_line() -> str:
    """Return the file and line of the script that runs, as seen from what it called."""
    file = vars(sys.modules["__main__"]).get("__file__")
    frame = sys._getframe()
    while frame.f_back is not None:
        if frame.f_code.co_filename == file:
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return Path(file or "the script").name


def _load_file(script: Script) -> tuple[CodeType, ModuleType]:
    path = Path(script.name)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise WorkloadError(
            f"the script must be a Python file, but {path} is none ({error.strerror}); give its "
            "path (of an installed command, $(which NAME)), or -m and a module's name"
        ) from error
    _enter(script.name, script.args, folder=str(path.resolve().parent))
    full = os.path.abspath(path)
    main, loader = ModuleType("__main__"), SourceFileLoader("__main__", full)
    vars(main).update(__file__=full, __cached__=None, __loader__=loader)
    return compile(text, full, "exec", dont_inherit=True), main


def _load_module(script: Script) -> tuple[CodeType, ModuleType]:
    _enter("-m", script.args, folder=os.getcwd())
    try:
        _, spec, code = _get_module_details(script.name, _NoModuleError)
    except _NoModuleError as error:
        raise WorkloadError(
            f"-m must be given a module that can be run, but {script.name!r} is none that Python "
            "finds; check the name and the folder it is run from"
        ) from error
    sys.argv[0] = spec.origin or script.name
    main = importlib.util.module_from_spec(spec)
    main.__name__ = "__main__"
    return code, main


class _NoModuleError(Exception):
    """There is no such module; what it or its package raises is another error."""


def _enter(name: str, args: tuple[str, ...], *, folder: str) -> None:
    sys.argv[:] = [name, *args]
    if not sys.flags.safe_path:
        sys.path[0] = folder


@contextmanager
def _own_logging() -> Iterator[None]:
    """Give the root logger to the script, which may configure it; keep ours for our messages."""
    root, own = logging.getLogger(), logging.getLogger("autoprec")
    handlers, level = root.handlers[:], root.level
    root.handlers[:], own.handlers[:], own.propagate = [], [*own.handlers, *handlers], False
    try:
        yield
    finally:
        own.handlers[:] = [handler for handler in own.handlers if handler not in handlers]
        root.handlers[:], own.propagate = handlers, True
        root.setLevel(level)


def _script_frames(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of this package and of Python's own import."""
    frames, shown = [], None
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    for frame in reversed(frames):
        if not frame.tb_frame.f_code.co_filename.startswith((HERE, "<frozen ")):
            frame.tb_next, shown = shown, frame
    return shown
