"""Foreign text, made fit to stand in a message."""

import reprlib

SHOWN = 60  # characters of a foreign value in an error


def one_line(text: str, *, most: int = 4 * SHOWN) -> str:
    """Return foreign text as it may stand in a message: printable, and of at most `most` letters.

    A name may hold a newline, which would forge a second message, or codes that a terminal obeys.
    """
    head = text[: most + 1]
    printable = head if head.isprintable() else repr(head)[1:-1]
    return printable if len(printable) <= most else printable[: most - 3] + "..."


def shown_value(value: object) -> str:
    """Return the `repr` of a foreign value for a message, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = SHOWN
    return one_line(short.repr(value))
