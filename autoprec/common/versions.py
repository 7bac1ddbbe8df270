"""Which versions of the software are installed."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from autoprec import __version__

NOT_INSTALLED = "missing"


def software_versions(packages: Iterable[str] = ("torch", "torchao")) -> dict[str, str]:
    """Return autoprec's version and that of each package, or NOT_INSTALLED."""
    found = {"autoprec": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = NOT_INSTALLED
    return found
