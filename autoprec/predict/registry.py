"""The device profiles that ship with autoprec, found by any usual spelling, and a user's own files.

They are package data in a wheel (`autoprec/profiles`) and the folder `profiles` in a checkout.
"""

import difflib
import logging
import re
from functools import cache
from pathlib import Path

from autoprec.common.text import short_digest, shown_value
from autoprec.errors import DeviceError
from autoprec.predict.spelling import device_readings, device_words, words_weight
from autoprec.records.devices import NAME, DeviceProfile

logger = logging.getLogger(__name__)
NEAREST_NAMES = 3
LEAST_ALIKE = 0.4  # of the letters
LONGEST_NAME = 100  # letters; a longer text is no name, and may be no file name either
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


@cache
def list_device_profiles() -> tuple[DeviceProfile, ...]:
    """Return the shipped profiles, by name.

    Raises:
        RecordError: one of the files is damaged.
    """
    return tuple(DeviceProfile.load(path) for path in sorted(profiles_folder().glob("*.json")))


def load_device_profile(name_or_path: str | Path) -> DeviceProfile:
    """Return a shipped profile by name or spelling, or a user's own by path.

    Raises:
        DeviceError: no profile has that name; the nearest names are in the message.
        RecordError: the file is missing or damaged, or a constant is missing or absurd.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".json"):
        return DeviceProfile.load(text)
    path = profiles_folder() / f"{text[:LONGEST_NAME]}.json"
    if re.fullmatch(NAME, text) and path.is_file():  # the usual case reads one file
        return DeviceProfile.load(path)
    return find_profile(text, list_device_profiles())


def profile_digest(profile: DeviceProfile) -> str:
    """Return a hash of all that a profile holds: its name alone does not tell it from a copy."""
    return short_digest(profile.to_json())


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
        f"a device must be a profile's name or a path that ends in .json, but it is "
        f"{shown_value(text)}; {_suggestion(text, profiles)}"
    )


@cache  # a table with a thousand rows says it once
def _tell_variants(text: str, chosen: str, others: tuple[str, ...]) -> None:
    """Log which other profiles a bare name like `H100` could have meant."""
    if others:
        said = "%r is read as %s; its variants have profiles of their own: %s"
        logger.warning(said, text, chosen, ", ".join(others))


def _spellings(profile: DeviceProfile) -> set[frozenset[str]]:
    return {device_words(text) for text in (profile.name, profile.title, *profile.aliases)}


def _suggestion(text: str, profiles: tuple[DeviceProfile, ...]) -> str:
    scores = {profile.name: _likeness(text, profile) for profile in profiles}
    near = [name for name, (shared, alike) in scores.items() if shared or alike >= LEAST_ALIKE]
    near.sort(key=lambda name: scores[name], reverse=True)
    names = ", ".join(near[:NEAREST_NAMES])
    return f"nearest: {names}" if names else "`autoprec devices list` shows all names"


def _likeness(text: str, profile: DeviceProfile) -> tuple[float, float]:
    """Return how like a device's spellings a text is: the share of common words, then of letters.

    Words that differ count too, so that `H100 SXM 700W` is nearer to the plain card than to the
    variant of 500 W.
    """
    words = device_words(text)
    spellings = _spellings(profile)
    shared = max(words_weight(words & s) / (words_weight(words | s) or 1) for s in spellings)
    written = [profile.name, *(" ".join(sorted(s)) for s in spellings)]
    lowered = text.lower()[:LONGEST_NAME]
    alike = max(difflib.SequenceMatcher(None, lowered, form).ratio() for form in written)
    return shared, alike
