"""Text for people: foreign text made safe for one line, long lists cut, digests."""

import hashlib
import json
import reprlib
from collections.abc import Iterable

SHOWN = 60  # characters of a foreign value in a message
MOST_NAMED = 4  # names in a sentence; the files have them all


def one_line(text: str, *, most: int = 4 * SHOWN) -> str:
    """Return foreign text as it may stand in a message: printable, and of at most `most` letters.

    A name may hold a newline, which would forge a second message, or codes that a terminal obeys.
    """
    head = text[: most + 1]
    printable = head if head.isprintable() else repr(head)[1:-1]
    return printable if len(printable) <= most else printable[: most - 3] + "..."


def error_line(error: BaseException, *, most: int = 4 * SHOWN) -> str:
    """Return an error's message as one line, its class where it has none."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, most=most)


def first_line(error: BaseException) -> str:
    """Return the line of an error that says what went wrong; a compiler's wraps it in others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    explained = [line.partition(": ")[2] for line in lines if line.startswith("Explanation: ")]
    telling = [line for line in lines if not line.startswith("backend=")]
    return (explained or telling or lines or [repr(error)])[0]


def shown_value(value: object) -> str:
    """Return the `repr` of a foreign value for a message, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN
    return one_line(short.repr(value))


def first_and_more(
    names: Iterable[object], *, most: int = MOST_NAMED, separator: str = ", "
) -> str:
    """Return the first names in words, and how many more there are; "" is the model's own.

    >>> first_and_more(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    every = [str(name) or "the model itself" for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return separator.join(every[:most]) + more


def percent(share: float) -> str:
    """Return a fraction as percent with two significant digits, e.g. `0.28 %`, `12 %`."""
    value = 100.0 * share
    return "any amount" if value >= 1e6 else f"{significant(value, 2)} %"


def significant(value: float, digits: int) -> str:
    """Return `value` with that many significant digits and no exponent while that is short."""
    if value == 0.0:
        return "0"
    scientific = f"{value:.{digits - 1}e}"
    magnitude = int(scientific.partition("e")[2])  # of the rounded value: 9.99 is 10
    if magnitude < -6:
        return scientific
    return f"{float(scientific):,.{max(digits - 1 - magnitude, 0)}f}"


def compared(ms: float, other_ms: float) -> str:
    """Return a time compared to another: `1.6x slower`, `1.42x faster`, `as fast`."""
    ratio = ms / other_ms if ms > 0.0 and other_ms > 0.0 else 1.0
    if 0.995 < ratio < 1.005:
        return "as fast"
    factor, word = (ratio, "slower") if ratio > 1.0 else (1.0 / ratio, "faster")
    return f"{factor:,.0f}x {word}" if factor >= 100.0 else f"{factor:.3g}x {word}"


def short_digest(*parts: object) -> str:
    """Return 16 hex digits of the SHA-256 of JSON values: equal parts, equal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def shown_bytes(size: float) -> str:
    """Return bytes in the largest unit that leaves a number of at least 1.

    >>> shown_bytes(3 * 2**30), shown_bytes(2_500_000)
    ('3.00 GiB', '2.38 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024.0 or unit == "TiB":
            break
        size /= 1024.0
    return f"{size:.0f} B" if unit == "B" else f"{significant(size, 3)} {unit}"
