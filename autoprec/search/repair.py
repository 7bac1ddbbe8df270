"""A plan whose joint e is well above the sum of its parts -> the layers to blame.

By bisection: half of the suspects are made gentler and the whole plan is measured again; the half
that takes more of the excess away is searched on. When no half takes at least SHARE of it away, the
excess is not the doing of a few layers, and no one is blamed. Costs two measurements per halving.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

SHARE = 0.5
Suspect = TypeVar("Suspect")


def find_interacting(
    suspects: Sequence[Suspect], excess: float, excess_without: Callable[[Sequence[Suspect]], float]
) -> tuple[Suspect, ...]:
    """Return the few suspects that account for the excess; () when it is spread over many.

    Args:
        suspects: what may be made gentler, in an order that keeps neighbours together.
        excess: joint e minus the sum of the parts, of the plan as it is.
        excess_without: the same with these suspects made gentler.
    """
    interacting = tuple(suspects)
    while len(interacting) > 1:
        middle = len(interacting) // 2
        halves = (interacting[:middle], interacting[middle:])
        removed = [excess - excess_without(half) for half in halves]
        worst = max(range(2), key=lambda side: removed[side])
        if removed[worst] < SHARE * excess:
            break
        interacting = halves[worst]
    is_few = len(interacting) == 1 or len(interacting) <= len(suspects) // 4
    return interacting if is_few else ()
