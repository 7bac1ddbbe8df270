"""What strangers get: the wheel, run where no checkout is, the sdist, a citation, issue forms."""

import json
import os
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml  # type: ignore[import-untyped]  # ships no types
from packaging.requirements import Requirement

import autoprec

ROOT = Path(__file__).parent.parent
NAME = f"autoprec-{autoprec.__version__}"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = (".gitignore", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
EXTRAS = {f"autoprec.integrations.{name}" for name in ("accelerate", "lightning", "transformers")}
IMPORT_ALL = """
import importlib, pkgutil, autoprec
print(autoprec.__file__)
for module in pkgutil.walk_packages(autoprec.__path__, "autoprec."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError:
        print(module.name)
"""


def _out(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))  # those a CFF must have
    assert citation["version"] == autoprec.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]


def _forms() -> Iterator[dict[str, Any]]:
    for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")):
        yield yaml.safe_load(path.read_text())


def test_issue_forms_are_ones_that_github_takes() -> None:
    for form in _forms():
        assert form["name"]
        assert form["description"]
        assert {field["type"] for field in form["body"]} == {"textarea"}
        assert all(field["attributes"]["label"] for field in form["body"])
        assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_a_bug_report_comes_with_what_doctor_says() -> None:
    doctors = [
        field.get("validations", {}).get("required", False)
        for form in _forms()
        for field in form["body"]
        if "autoprec doctor --json" in field["attributes"]["label"]
    ]
    assert doctors == [True, False]  # a bug's, and an idea's: no need to have the device


def _tracked(*paths: str) -> set[str]:
    return set(_out("git", "ls-files", *paths, cwd=ROOT).splitlines())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an sdist and of the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    _out(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return folder


def _wheel(folder: Path) -> dict[str, bytes]:
    with ZipFile(next(folder.glob(f"{NAME}-*.whl"))) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


@pytest.mark.slow
def test_the_wheel_has_the_package_and_its_data_alone(built: Path) -> None:
    metadata = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    expected = _tracked("autoprec") | {f"autoprec/{name}" for name in _tracked("profiles")}
    expected |= {f"{NAME}.dist-info/{name}" for name in metadata}
    assert {"autoprec/py.typed", "autoprec/profiles/h100-sxm.json"} <= expected
    assert "autoprec/report/templates/report.html" in expected
    wheel = _wheel(built)
    assert set(wheel) == expected, "a file that git does not know, or that the build leaves out"
    assert f"\nVersion: {autoprec.__version__}\n" in wheel[f"{NAME}.dist-info/METADATA"].decode()


@pytest.mark.slow
def test_the_sdist_has_what_the_wheel_needs_and_builds_the_checkouts(
    built: Path, tmp_path: Path
) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        names = {member.name for member in sdist if member.isfile()}
    assert names == {
        f"{NAME}/{name}" for name in _tracked("autoprec", "profiles", *PAGES) | {"PKG-INFO"}
    }
    _out(sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", tmp_path, cwd=ROOT)
    assert _wheel(built) == _wheel(tmp_path)


def _declared(requirements: Iterable[str], found: set[str]) -> set[str]:
    """Return `found` with the distributions that these ask for, and all that those ask for."""
    for line in requirements:
        wanted = Requirement(line)
        extras = wanted.extras | {""}
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if wanted.name not in found:
            found.add(wanted.name)
            _declared(distribution(wanted.name).requires or [], found)
    return found


@pytest.fixture(scope="module")
def fresh(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a virtual environment of the wheel and links to what it declares: no download."""
    folder = tmp_path_factory.mktemp("fresh")
    _out(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet")
    _out(*pip, "--no-deps", "--no-index", next(built.glob("*.whl")), cwd=folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    for name in _declared(PROJECT["dependencies"], set()):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(distribution(name).locate_file(top)))
    return folder


@pytest.mark.slow
def test_the_wheel_imports_with_what_it_declares(fresh: Path, tmp_path: Path) -> None:
    home, *missing = _out(fresh / "bin/python", "-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    assert Path(home).is_relative_to(fresh)
    assert set(missing) == EXTRAS  # of frameworks that their users have


@pytest.mark.slow
def test_the_wheel_answers_away_from_the_checkout(fresh: Path, tmp_path: Path) -> None:
    command = fresh / "bin/autoprec"
    assert autoprec.__version__ in _out(command, "--version", cwd=tmp_path)
    assert "h100-sxm" in _out(command, "devices", "list", cwd=tmp_path)
    doctor = json.loads(_out(command, "doctor", "--json", cwd=tmp_path))
    assert doctor["device"]["software"]["autoprec"] == autoprec.__version__
    assert doctor["checks"]
    assert list(tmp_path.iterdir()) == []
