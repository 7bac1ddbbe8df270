"""This project's dependencies -> a folder of packages for a GPU machine that reaches no registry.

What that machine has (`PROVIDED`) stays its own; everything else that pyproject.toml asks for, and
what that asks for in turn, is unpacked for Linux x86-64 and Python 3.12, whatever runs this. pip
reads the index as it is set up to. The folder then only has to be on PYTHONPATH, where it comes
before what is installed.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# torch and its own needs, and what is too large to carry beside it
PROVIDED = frozenset(
    (
        *("torch", "triton", "numpy", "pandas", "scipy", "transformers", "rich", "jinja2"),
        *("nvidia-ml-py", "pytest", "hypothesis"),
    )
)
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_BYTES = 64 * 2**20  # machines that are lent for minutes take little more
FOR_TARGET = (
    *("--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON),
    *(word for name in PLATFORMS for word in ("--platform", name)),
)
Report = Sequence[Mapping[str, Any]]  # Any: pip's "install" list; metadata of each package


class CollectError(Exception):
    """The folder could not be made; one line says why."""


def collect(folder: Path) -> dict[str, str]:
    """Fill an empty folder with what the GPU machine lacks; return the versions by name."""
    if folder.exists() and any(folder.iterdir()):
        raise CollectError(f"the folder must be new or empty, but {folder} is not; name another")
    direct = missing_requirements((ROOT / "pyproject.toml").read_text())
    versions = wanted_versions(resolve(direct), direct)
    pins = [f"{name}=={version}" for name, version in versions.items()]
    run_pip("install", "--no-deps", "--no-compile", "--target", str(folder), *FOR_TARGET, *pins)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise CollectError(
            f"the folder must stay under {MOST_BYTES >> 20} MiB, but {folder} has {size >> 20}; "
            "add what the machine has to PROVIDED in bench/gpu_wheels.py"
        )
    return versions


def missing_requirements(pyproject: str) -> list[Requirement]:
    """Return what the project and its tests require directly and the machine does not have."""
    project = tomllib.loads(pyproject)["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [one for one in map(Requirement, texts) if not is_provided(one.name)]


def resolve(requirements: Iterable[Requirement]) -> Report:
    """Let pip choose versions, of these and of all they need; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        nowhere = ("--dry-run", "--ignore-installed", "--target", folder, "--report", str(report))
        pinned = ("-c", str(ROOT / "constraints.txt"))
        run_pip("install", *nowhere, *pinned, *FOR_TARGET, *map(str, requirements))
        chosen: Report = json.loads(report.read_text())["install"]
    return chosen


def wanted_versions(report: Report, direct: Iterable[Requirement]) -> dict[str, str]:
    """Return the versions that are reached from `direct` without passing what is provided."""
    known = {canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in report}
    found: dict[str, str] = {}
    queue = [canonicalize_name(one.name) for one in direct]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found[name] = known[name]["version"]
        for text in known[name].get("requires_dist") or ():
            needed = Requirement(text)
            if not is_provided(needed.name) and applies(needed):
                queue.append(canonicalize_name(needed.name))
    return dict(sorted(found.items()))


def is_provided(name: str) -> bool:
    return canonicalize_name(name) in PROVIDED


def applies(requirement: Requirement) -> bool:
    """Whether a requirement holds on the machine, without extras."""
    target = {"extra": "", "python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
    target |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    target |= {"platform_machine": "x86_64", "implementation_name": "cpython"}
    target |= {"platform_python_implementation": "CPython"}
    return requirement.marker is None or requirement.marker.evaluate(target)


def run_pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise CollectError(f"pip found no wheels: {(errors or ['it did not say why'])[-1]}")
