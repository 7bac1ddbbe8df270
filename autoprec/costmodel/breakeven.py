"""From how many tokens, or from which width on, FP8 pays for a linear on a device."""

from collections.abc import Callable

from autoprec.costmodel.linear import FP8_MULTIPLE, predict_linear
from autoprec.records.devices import DeviceProfile, PricedRecipe
from autoprec.records.model import Recipe

MOST_TOKENS = 1 << 22  # a layer that does not pay at four million tokens never does
MOST_WIDTH = 1 << 17  # the widest trained layers have half of it


def break_even_tokens(
    profile: DeviceProfile,
    K: int,
    N: int,
    *,
    recipe: PricedRecipe | Recipe | str = PricedRecipe.TENSORWISE,
    compiled: bool = True,
) -> int | None:
    """Return the fewest tokens (a multiple of 16) at which FP8 is no slower; None when it never is.

    Raises:
        DeviceError: a dimension is no positive integer, or the recipe is unknown.
    """

    def pays(M: int) -> bool:
        found = predict_linear(profile, M, K, N, recipe=recipe, compiled=compiled).speedup
        return found is not None and found.value >= 1

    return _least(pays, MOST_TOKENS)


def break_even_width(
    profile: DeviceProfile,
    M: int,
    *,
    recipe: PricedRecipe | Recipe | str = PricedRecipe.TENSORWISE,
    compiled: bool = True,
) -> int | None:
    """Return the least K = N (a multiple of 16) at which FP8 is no slower for M tokens, or None.

    Raises:
        DeviceError: M is no positive integer, or the recipe is unknown.
    """

    def pays(width: int) -> bool:
        found = predict_linear(profile, M, width, width, recipe=recipe, compiled=compiled).speedup
        return found is not None and found.value >= 1

    return _least(pays, MOST_WIDTH)


def _least(pays: Callable[[int], bool], most: int) -> int | None:
    """Return the least multiple of 16 that pays, given that all above it do too."""
    if not pays(most):
        return None
    low, high = 0, most  # pays at high, not known to at low
    while high - low > FP8_MULTIPLE:
        middle = (low + high) // 2 // FP8_MULTIPLE * FP8_MULTIPLE
        if pays(middle):
            high = middle
        else:
            low = middle
    return high
