"""The device profiles that ship with autoprec, found by any usual spelling, and a user's own files.

They are package data in a wheel (`autoprec/profiles`) and the folder `profiles` in a checkout.
"""

import difflib
import hashlib
import logging
from functools import cache
from pathlib import Path

from autoprec.costmodel.spelling import device_readings, device_words
from autoprec.errors import DeviceError
from autoprec.records.devices import DeviceProfile

logger = logging.getLogger(__name__)
NEAREST_NAMES = 3
_PACKAGE = Path(__file__).parent.parent


def profiles_folder() -> Path:
    """Return the folder of the shipped profiles.

    Raises:
        DeviceError: the installation has none.
    """
    for folder in (_PACKAGE / "profiles", _PACKAGE.parent / "profiles"):
        if folder.is_dir():
            return folder
    raise DeviceError(
        f"device profiles must lie beside the package, but {_PACKAGE} has none; "
        "install autoprec again"
    )


def list_device_profiles() -> tuple[DeviceProfile, ...]:
    """Return the shipped profiles, by name.

    Raises:
        RecordError: one of the files is damaged.
    """
    return _load_all(profiles_folder())


def load_device_profile(name_or_path: str | Path) -> DeviceProfile:
    """Return a shipped profile by name or spelling, or a user's own by path.

    Raises:
        DeviceError: no profile has that name; the nearest names are in the message.
        RecordError: the file is missing or damaged, or a constant is missing or absurd.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".json"):
        return DeviceProfile.load(text)
    path = profiles_folder() / f"{text}.json"
    if text == Path(text).name and path.is_file():  # the usual case reads one file
        return DeviceProfile.load(path)
    return find_profile(text, list_device_profiles())


def profile_digest(profile: DeviceProfile) -> str:
    """Return a hash of all that a profile holds: its name alone does not tell it from a copy."""
    return hashlib.sha256(profile.to_json().encode()).hexdigest()[:16]


def find_profile(text: str, profiles: tuple[DeviceProfile, ...]) -> DeviceProfile:
    """Return the profile that a spelling means.

    Raises:
        DeviceError: none, or more than one that differ.
    """
    known = {words: p for p in profiles for words in _spellings(p)}
    for reading in device_readings(text):
        for profile in profiles:
            capacity = f"{profile.value('memory_capacity_gb'):.0f}gb"
            if known.get(reading) is profile or known.get(reading - {capacity}) is profile:
                others = (p.name for p in profiles if reading < device_words(p.name))
                _tell_variants(text, profile.name, tuple(n for n in others if n != profile.name))
                return profile
    raise DeviceError(
        f"a device must be a profile's name or a path that ends in .json, but it is {text!r}; "
        f"{_suggestion(text, profiles)}"
    )


@cache  # a table with a thousand rows says it once
def _tell_variants(text: str, chosen: str, others: tuple[str, ...]) -> None:
    """Log which other profiles a bare name like `H100` could have meant."""
    if others:
        logger.warning(
            "%r is read as %s; its variants have profiles of their own: %s",
            text,
            chosen,
            ", ".join(others),
        )


def _spellings(profile: DeviceProfile) -> set[frozenset[str]]:
    return {device_words(text) for text in (profile.name, profile.title, *profile.aliases)}


def _suggestion(text: str, profiles: tuple[DeviceProfile, ...]) -> str:
    spellings = {" ".join(sorted(s)): p.name for p in profiles for s in _spellings(p)}
    spellings |= {p.name: p.name for p in profiles}
    words = device_words(text)
    sharing = [key for key in spellings if words & set(key.split())]
    near = sorted(sharing, key=lambda key: -len(words & set(key.split())))
    near += difflib.get_close_matches(text.lower(), spellings, n=9, cutoff=0.4)
    names = list(dict.fromkeys(spellings[key] for key in near))[:NEAREST_NAMES]
    return f"nearest: {', '.join(names)}" if names else "`autoprec devices list` shows all names"


@cache
def _load_all(folder: Path) -> tuple[DeviceProfile, ...]:
    return tuple(DeviceProfile.load(path) for path in sorted(folder.glob("*.json")))
