"""The house keeps its shape: imports go one way, saved runs need no torch, names are complete."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoprec

PACKAGE = Path(autoprec.__file__).parent
TORCH_FREE = (
    "common",
    "records",
    "workload.hf_config",
    "model.roles",
    "model.gemms_hp",
    "model.options",
    "predict",
    "predict.transfer",
    "sensitivity.gap",
    "search",
    "report",
    "integrations.export",
    "tuning.settings",
    "tuning.stages",
    "cli.main",
)
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


@pytest.mark.parametrize("room", TORCH_FREE)
def test_a_saved_run_needs_no_torch(room: str) -> None:
    code = f"import sys, autoprec.{room}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_public_names_are_complete_and_there() -> None:
    assert sorted(autoprec.__all__) == sorted(set(autoprec.__all__))
    assert all(hasattr(autoprec, name) for name in autoprec.__all__)


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
