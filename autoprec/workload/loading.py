"""A file -> the workload that it defines, or that an object in it is."""

import ast
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from autoprec.common.files import text_digest
from autoprec.common.text import short_digest
from autoprec.errors import WorkloadError
from autoprec.workload.functions import REQUIRED, UserCode, Workload, workload_from
from autoprec.workload.hf_config import META_ALONE, config_file


def load_workload(reference: str) -> Workload:
    """Load `model.py` or `model.py:name`.

    Raises:
        WorkloadError: the file is missing, does not import, lacks a required function, or is a
            transformers config, which only `--meta` takes.
    """
    if config_file(reference):
        raise WorkloadError(META_ALONE.format(config=reference))
    path_text, _, name = reference.partition(".py:")
    path = Path(path_text + ".py" if name else reference)
    if not path.is_file():
        raise WorkloadError(
            f"the workload must be a Python file, but {path} is not there; "
            "give a path such as model.py or model.py:name (or, with --meta, a config.json)"
        )
    if path.stem in sys.stdlib_module_names:
        raise WorkloadError(
            "the workload's file must not be named as one of Python's own modules, which it would "
            f"hide, but it is {path}; rename it"
        )
    _check_text(path, () if name else tuple(REQUIRED))
    # before its code may change the directory
    elsewhere, digest = str(Path.cwd() / reference), short_digest(text_digest(path), name)
    holder: object = _import_file(path)
    if name:
        if not hasattr(holder, name):
            raise WorkloadError(f"{path} must define {name!r}, but it does not; check the name")
        holder = getattr(holder, name)
    return replace(workload_from(holder, name=reference, digest=digest), reference=elsewhere)


def _check_text(path: Path, names: Sequence[str]) -> None:
    """Refuse a file whose text lacks a function's name: a script would train when imported."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError):
        return  # importing it says what is wrong
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            words.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)  # globals()["loss_fn"] = ...
    missing = [name for name in names if name not in words]
    if missing and "*" not in words:
        raise WorkloadError(
            f"{path} must define {REQUIRED[missing[0]]}, but it does not; see the README for the "
            f"functions of a workload, or, if it is a training script: --script {path}"
        )


def _import_file(path: Path) -> ModuleType:
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # the file's own imports work as when it is run as a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise WorkloadError(f"the workload must be a Python file, but {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look classes up there
    with UserCode(str(path), "a file that imports"):
        spec.loader.exec_module(module)
    return module
