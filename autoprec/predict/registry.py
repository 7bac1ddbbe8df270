"""The device profiles that ship with autoprec, found by any usual spelling, and a user's own files.

They are package data in a wheel (`autoprec/profiles`) and the folder `profiles` in a checkout.

A device's words are compared as sets: `NVIDIA H100 80GB HBM3` is `h100` once the words that say
nothing more (maker, memory, form) are dropped. A word that is left over is a difference: `H100 NVL`
is no `h100`, since a wrong profile is worse than an error.
"""

import difflib
import logging
import re
from functools import cache
from pathlib import Path

from autoprec.common.text import short_digest, shown_value
from autoprec.errors import DeviceError
from autoprec.records.devices import NAME, DeviceProfile

logger = logging.getLogger(__name__)
LEAST_ALIKE = 0.4  # of the letters
LONGEST_NAME = 100  # letters; a longer text is no name, and may be no file name either
_PACKAGE = Path(__file__).parent.parent
_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|w|tb/s)\b")
_WORD = re.compile(r"\d+\.\d+tb/s|[a-z0-9]+(?:\.\d+)?")
_EMPTY_WORD = re.compile(
    "nvidia|geforce|amd|instinct|tesla|gpu|accelerator|tensor|core|the|of|x|devices?|card|hbm2|hbm2e"
    "|hbm3|hbm3e|gddr6|gddr7|blackwell|hopper|ada|lovelace|generation|server|workstation|edition"
    "|presumed|class|not|stated|power|limited|variant|derived"
)
_FORMS = {"sxm4": "sxm", "sxm5": "sxm", "sxm6": "sxm", "pcie4": "pcie", "pcie5": "pcie"}
_DETAIL = re.compile(r"\d+(\.\d+)?(gb|gib|w|tb/s)|sxm|pcie|oam")  # many devices share these


def profiles_folder() -> Path:
    """Return the folder of the shipped profiles."""
    for folder in (_PACKAGE / "profiles", _PACKAGE.parent / "profiles"):
        if folder.is_dir():
            return folder
    raise DeviceError(
        f"device profiles must lie beside the package, but {_PACKAGE} has none; "
        "install autoprec again"
    )


@cache
def list_device_profiles() -> tuple[DeviceProfile, ...]:
    """Return the shipped profiles, by name."""
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
    return find_profile(text)


def device_words(text: str) -> frozenset[str]:
    """Return the words of a device's name that tell it from other devices."""
    joined = _UNIT.sub(r"\1\2 ", text.lower().replace("_", " ").replace("-", " "))
    words = (_FORMS.get(word, word) for word in _WORD.findall(joined))
    return frozenset(word for word in words if not _EMPTY_WORD.fullmatch(word))


def profile_digest(profile: DeviceProfile) -> str:
    """Return a hash of all that a profile holds: its name alone does not tell it from a copy."""
    return short_digest(profile.to_json())


def find_profile(text: str) -> DeviceProfile:
    """Return the shipped profile that a spelling means."""
    profiles = list_device_profiles()
    for reading in (device_words(text), device_words(re.sub(r"\([^)]*\)", " ", text))):
        for profile in profiles:
            capacity = f"{profile.value('memory_capacity_gb'):.0f}gb"
            if _spellings(profile) & {reading, reading - {capacity}}:
                names = (p.name for p in profiles if reading < device_words(p.name))
                _tell_variants(text, profile.name, tuple(n for n in names if n != profile.name))
                return profile
    raise DeviceError(
        f"a device must be a profile's name or a path that ends in .json, but it is "
        f"{shown_value(text)}; {_suggestion(text)}"
    )


@cache  # a table with a thousand rows says it once
def _tell_variants(text: str, chosen: str, others: tuple[str, ...]) -> None:
    """Log which other profiles a bare name like `H100` could have meant."""
    if others:
        said = "%r is read as %s; its variants have profiles of their own: %s"
        logger.warning(said, text, chosen, ", ".join(others))


def _spellings(profile: DeviceProfile) -> set[frozenset[str]]:
    return {device_words(text) for text in (profile.name, profile.title, *profile.aliases)}


def _suggestion(text: str) -> str:
    scores = {profile.name: _likeness(text, profile) for profile in list_device_profiles()}
    near = [name for name, (shared, alike) in scores.items() if shared or alike >= LEAST_ALIKE]
    names = ", ".join(sorted(near, key=lambda name: scores[name], reverse=True)[:3])
    return f"nearest: {names}" if names else "`autoprec devices list` shows all names"


def _likeness(text: str, profile: DeviceProfile) -> tuple[float, float]:
    """Return the likeness of a text and a device's spellings: shares of words, then of letters.

    Words that differ count too, so that `H100 SXM 700W` is nearer to the plain card than to the
    variant of 500 W.
    """

    def weight(words: frozenset[str]) -> float:  # a size or a form says little of a device
        return sum(0.2 if _DETAIL.fullmatch(word) else 1.0 for word in words)

    words = device_words(text)
    spellings = _spellings(profile)
    shared = max(weight(words & s) / (weight(words | s) or 1) for s in spellings)
    written = [profile.name, *(" ".join(sorted(s)) for s in spellings)]
    lowered = text.lower()[:LONGEST_NAME]
    alike = max(difflib.SequenceMatcher(None, lowered, form).ratio() for form in written)
    return shared, alike
