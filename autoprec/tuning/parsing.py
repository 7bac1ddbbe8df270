"""Texts and values of settings -> what they stand for, or a SettingsError that says what is wrong.

Texts of `--keep` are read by the search, and raise a RecordError.
"""

import importlib.util
import math
import operator
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from autoprec.common.recipes import APPLICABLE_RECIPES, Recipe
from autoprec.common.text import shown_value
from autoprec.errors import SettingsError
from autoprec.records.verification import MOST_SEEDS, MetricTolerance

CLUSTERS = ("slurm", "local")  # that submitit knows; local are processes of this machine
Launcher = tuple[str, tuple[tuple[str, str | int], ...]]
BYTES = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
BYTES |= {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}


def parse_recipes(given: str | Sequence[str]) -> tuple[Recipe, ...]:
    """Return the recipes of a comma-separated list or of a sequence of names.

    >>> parse_recipes("tensorwise, rowwise")
    (<Recipe.TENSORWISE: 'tensorwise'>, <Recipe.ROWWISE: 'rowwise'>)
    """
    words = given.split(",") if isinstance(given, str) else given
    names = [str(name).strip() for name in words if str(name).strip()]
    if not names or set(names) - {*APPLICABLE_RECIPES}:
        raise SettingsError(
            f"--recipes must be among {', '.join(APPLICABLE_RECIPES)}, but it is "
            f"{shown_value(given)}; separate several with commas"
        )
    return tuple(Recipe(name) for name in dict.fromkeys(names))


def parse_launcher(given: str | Launcher | None) -> Launcher | None:
    """Return the cluster and the parameters of its jobs; None where none was given.

    >>> parse_launcher("slurm:partition=gpu,timeout_min=60")
    ('slurm', (('partition', 'gpu'), ('timeout_min', 60)))
    """
    if not given or not isinstance(given, str):
        return given or None
    cluster, _, text = given.partition(":")
    pairs = [part.partition("=") for part in text.split(",") if part]
    if cluster not in CLUSTERS or not all(name and value for name, _, value in pairs):
        raise SettingsError(
            f"--launcher must be {' or '.join(CLUSTERS)}, with parameters as in "
            f"slurm:partition=gpu,timeout_min=60, but it is {shown_value(given)}; correct it"
        )
    # what it needs is looked for now: it is used an hour later
    if importlib.util.find_spec("submitit") is None:
        raise SettingsError(
            f"--launcher {given} needs the package submitit, which is not installed; "
            "pip install 'autoprec[slurm]', or leave it out"
        )
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise SettingsError(
            "--launcher slurm must run where jobs are submitted, but there is no sbatch here; log "
            "in to such a machine, or leave it out"
        )
    return cluster, tuple((n, int(v) if v.isdigit() else v) for n, _, v in pairs)


def parse_fraction(given: str | float) -> float:
    """Return the share that a text or number stands for.

    >>> parse_fraction("0.1%"), parse_fraction(0.002)
    (0.001, 0.002)
    """
    rule = "--loss-tolerance must be a share above 0 and below 1"
    return _quantity(given, {"": 1.0, "%": 0.01}, below=1.0, rule=rule, example="0.1% or 0.001")


def parse_seeds(given: str | int | tuple[int, int]) -> tuple[int, int]:
    """Return the least and the most seeds of a text LEAST:MOST, or of one number.

    >>> parse_seeds("5:20"), parse_seeds("8")
    ((5, 20), (8, 8))
    """
    text = ":".join(map(str, given)) if isinstance(given, tuple) else str(given)
    least, colon, most = text.partition(":")
    ends = (least, most if colon else least)
    numbers = [int(each) if each.isdecimal() else 0 for each in ends]
    if not 2 <= numbers[0] <= numbers[1] <= MOST_SEEDS:
        raise SettingsError(
            f"--seeds must be LEAST:MOST or one number, from 2 to {MOST_SEEDS}, but it is "
            f"{shown_value(given)}; one seed alone has no spread: write e.g. 3:10"
        )
    return numbers[0], numbers[1]


def parse_horizons(given: str | Sequence[int] | None) -> tuple[int, ...]:
    """Return lengths in steps, shortest first, of a text such as `75,150,300`."""
    parts = given.split(",") if isinstance(given, str) else list(given or ())
    texts = [str(part).strip() for part in parts if str(part).strip()]
    if not all(text.isdecimal() and int(text) >= 4 for text in texts):
        raise SettingsError(
            "--horizons must be whole numbers of steps, from 4 and separated by commas, but it is "
            f"{shown_value(given)}; write e.g. 75,150,300"
        )
    return tuple(sorted({int(text) for text in texts}))


def parse_duration(given: str | float | None, *, option: str = "--time-budget") -> float | None:
    """Return the seconds of a text such as `20m`, `90s` or `1h`; None where none was given.

    >>> parse_duration("20m")
    1200.0
    """
    if given is None or given == "":
        return None
    units = {"s": 1.0, "m": 60.0, "h": 3600.0} | ({} if isinstance(given, str) else {"": 1.0})
    rule = f"{option} must be a number with s, m or h"
    return _quantity(given, units, below=1e9, rule=rule, example="20m")


def parse_memory(given: str | float | None, *, option: str = "--memory") -> int | None:
    """Return the bytes of a text such as `40GiB` or `80GB`; None where none was given.

    >>> parse_memory("1.5GiB")
    1610612736
    """
    if given is None or given == "":
        return None
    rule = f"{option} must be a number of bytes with a unit"
    return int(_quantity(given, BYTES, below=1e18, rule=rule, example="40GiB or 80GB"))


def _quantity(
    given: str | float, units: Mapping[str, float], *, below: float, rule: str, example: str
) -> float:
    """Return a number with a unit as one number above 0 and below `below`."""
    found = re.fullmatch(r"\s*(\d*\.?\d+(?:e-?\d+)?)\s*([a-z%]*)\s*", str(given), re.IGNORECASE)
    known = {unit.lower(): factor for unit, factor in units.items()}
    value = float(found[1]) * known.get(found[2].lower(), 0.0) if found else 0.0
    if not 0.0 < value < below:
        raise SettingsError(f"{rule}, but it is {shown_value(given)}; write e.g. {example}")
    return value


def parse_keeps(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the texts of `--keep`, each of which says GLOB=PRECISION[:RECIPE]."""
    from autoprec.search.keep import parse_keep

    texts = (given,) if isinstance(given, str) else tuple(given or ())
    for text in texts:
        parse_keep(text)
    return texts


def parse_metrics(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the texts of `--metric-tolerance`, each of another metric."""
    texts = (given,) if isinstance(given, str) else tuple(given or ())
    names = [parse_metric(text).name for text in texts]
    if len(set(names)) < len(names):
        raise SettingsError(
            f"--metric-tolerance must name a metric once, but it got {', '.join(texts)}; give one "
            "for each"
        )
    return texts


def parse_metric(text: str) -> MetricTolerance:
    """Return the tolerance of a metric from a text.

    >>> parse_metric("accuracy>=-0.2").at_least, parse_metric("fid=0.5").at_most
    (-0.2, 0.5)
    """
    found = re.fullmatch(r"\s*(.*[^\s<>=])\s*(>=|<=|=)\s*([+-]?\d*\.?\d+(?:e[+-]?\d+)?)\s*", text)
    size = float(found[3]) * (-1.0 if found[2] == ">=" else 1.0) if found else 0.0
    if not found or not 0.0 < size < math.inf:
        raise SettingsError(
            "--metric-tolerance must be the difference from FP32 that is allowed, NAME>=-X where "
            f"more is better, NAME<=X where less is, or NAME=X, but it is {shown_value(text)}; "
            "write e.g. 'accuracy>=-0.2'"
        )
    return MetricTolerance(
        name=found[1],
        at_least=None if found[2] == "<=" else -size,
        at_most=None if found[2] == ">=" else size,
    )


def parse_path(given: str | Path | None) -> Path | None:
    """Return the path of a text, or None."""
    return Path(given) if given else None


def parse_type(given: Any, kind: Any) -> bool | int | str | None:  # Any: of any type, a type
    """Return a value of a type: a switch, a whole number (numpy's too), a text, or None.

    >>> parse_type("3", int), parse_type(None, int | None)
    (3, None)
    """
    kinds = get_args(kind) or (kind,)
    if given is None and NoneType in kinds:
        return None
    if int in kinds:
        return int(given) if isinstance(given, str) else operator.index(given)
    if not isinstance(given, bool if bool in kinds else str | Path):
        raise TypeError
    return given if bool in kinds else str(given)
