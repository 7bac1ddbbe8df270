"""The package keeps its shape: imports go one way, and saved runs need no torch."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import autoprec

PACKAGE = Path(autoprec.__file__).parent
TORCH_FREE = (  # whole rooms, and modules of the others
    "cli",
    "common",
    "device.nvml",
    "errors",
    "integrations.export",
    "model.options",
    "model.roles",
    "predict",
    "records",
    "report",
    "search",
    "sensitivity.causes",
    "sensitivity.gap",
    "tuning",
    "workload.hf_config",
)
NEED_TORCH = ("predict.measure", "tuning.doctor", "tuning.plan_check")
ORDER = (  # bottom up: a room imports itself and rooms of earlier lines
    ("errors",),
    ("common",),
    ("records", "workload"),
    ("device",),
    ("model",),
    ("runtime",),
    ("guard", "profiler"),
    ("predict",),
    ("sensitivity",),
    ("search", "verification", "report"),
    ("integrations",),
    ("tuning",),
    ("cli",),
)
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def _rooms() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if first not in ("__init__", "__main__"):
            yield first, path


def _imported_rooms(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module.split(".")
            if module[0] == "autoprec":
                yield from module[1:2] or (alias.name for alias in node.names)


def test_imports_go_one_way() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for room, path in _rooms()
        for imported in _imported_rooms(path)
        if imported != room and RANKS.get(imported, -1) >= RANKS[room]
    ]
    assert wrong == []


def _is_in(module: str, homes: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"autoprec.{home}.") for home in homes)


def test_a_saved_run_needs_no_torch() -> None:
    paths = (path.relative_to(PACKAGE.parent).with_suffix("") for _, path in _rooms())
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    free = [m for m in modules if _is_in(m, TORCH_FREE) and not _is_in(m, NEED_TORCH)]
    root = PACKAGE.parent
    command = [sys.executable, str(root / "tests" / "torch_watch.py"), "autoprec", *free]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    assert json.loads(done.stdout) == {}
    assert [home for home in TORCH_FREE if not any(_is_in(m, (home,)) for m in free)] == []


def test_files_and_functions_stay_short() -> None:
    long = list[str]()
    for _, path in _rooms():
        text = path.read_text()
        long += [f"{path.name} has over 450 lines"] * (len(text.splitlines()) > 450)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{path.name}: {node.name} has over 50 lines"] * (lines > 50)
    assert long == []


def test_the_repository_speaks_of_the_project_alone() -> None:
    root = PACKAGE.parent
    words = ("/".join(("..", "shared")), "/".join(("", "work", "")), "/".join(("", "root", "")))
    files = [p for p in root.rglob("*") if p.suffix in (".py", ".md", ".toml", ".json", ".csv")]
    skipped = {".venv", ".venv-export", ".git", "runs", "build", "dist"}
    found = [
        str(path.relative_to(root))
        for path in files
        if not skipped & set(path.relative_to(root).parts)
        and any(word in path.read_text(encoding="utf-8") for word in words)
    ]
    assert found == []
