"""From how many tokens on FP8 pays for a linear on a device."""

from autoprec.costmodel.linear import FP8_MULTIPLE, predict_linear
from autoprec.records.devices import DeviceProfile, PricedRecipe
from autoprec.records.model import Recipe

MOST_TOKENS = 1 << 22  # a layer that does not pay at four million tokens never does


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

    if not pays(MOST_TOKENS):
        return None
    low, high = 0, MOST_TOKENS  # pays at high, not known to at low
    while high - low > FP8_MULTIPLE:
        middle = (low + high) // 2 // FP8_MULTIPLE * FP8_MULTIPLE
        if pays(middle):
            high = middle
        else:
            low = middle
    return high
