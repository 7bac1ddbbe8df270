"""From how many tokens, or from which width on, FP8 pays for a linear on a device."""

from collections.abc import Callable, Iterable

from autoprec.predict.linear import fp8_multiple, predict_linear
from autoprec.predict.parallel import Parallel, shard_gemm
from autoprec.predict.spelling import parse_recipe
from autoprec.records.cost import BreakEven
from autoprec.records.devices import DeviceProfile, PricedRecipe
from autoprec.records.model import GemmShape, LayerKind, LayerSpec, Recipe

MOST_TOKENS = 1 << 22  # a layer that does not pay at four million tokens never does
MOST_WIDTH = 1 << 17  # the widest trained layers have half of it
WIDE = (4096, 8192, 16384)  # widths of large models: named where no size of a layer pays


def find_break_evens(
    profile: DeviceProfile, layers: Iterable[LayerSpec], parallel: Parallel, *, compiled: bool
) -> tuple[BreakEven, ...]:
    """Return where each GEMM and recipe that the layers can take in FP8 breaks even.

    Shapes are those of one device. A layer that takes a recipe with masked GEMMs only (its M is no
    multiple of 16) is asked for the whole recipe, since the answer's M is one.
    """
    asked = dict.fromkeys(
        (shard_gemm(layer, parallel), option.recipe)
        for layer in layers
        if layer.kind is LayerKind.LINEAR and layer.gemm and layer.calls
        for option in layer.options
        if option.recipe
    )
    return tuple(_break_even(profile, gemm, recipe, compiled) for gemm, recipe in asked if recipe)


def break_even_tokens(
    profile: DeviceProfile,
    K: int,
    N: int,
    *,
    recipe: PricedRecipe | Recipe | str = PricedRecipe.TENSORWISE,
    compiled: bool = True,
) -> int | None:
    """Return the fewest tokens at which FP8 is no slower; None when it never is.

    They are a multiple of 16, or of the recipe's block.

    Raises:
        DeviceError: a dimension is no positive integer, or the recipe is unknown.
    """

    def pays(M: int) -> bool:
        found = predict_linear(profile, M, K, N, recipe=recipe, compiled=compiled).speedup
        return found is not None and found.value >= 1

    return _least(pays, MOST_TOKENS, step=fp8_multiple(parse_recipe(recipe)))


def break_even_width(
    profile: DeviceProfile,
    M: int,
    *,
    recipe: PricedRecipe | Recipe | str = PricedRecipe.TENSORWISE,
    compiled: bool = True,
) -> int | None:
    """Return the least K = N at which FP8 is no slower for M tokens; None when it never is.

    It is a multiple of 16, or of the recipe's block.

    Raises:
        DeviceError: M is no positive integer, or the recipe is unknown.
    """

    def pays(width: int) -> bool:
        found = predict_linear(profile, M, width, width, recipe=recipe, compiled=compiled).speedup
        return found is not None and found.value >= 1

    return _least(pays, MOST_WIDTH, step=fp8_multiple(parse_recipe(recipe)))


def _break_even(
    profile: DeviceProfile, gemm: GemmShape, recipe: Recipe, compiled: bool
) -> BreakEven:
    found = BreakEven(gemm=gemm, recipe=recipe)
    tokens = break_even_tokens(profile, gemm.K, gemm.N, recipe=recipe, compiled=compiled)
    if tokens is not None:
        return found.model_copy(update={"tokens": tokens})
    width = break_even_width(profile, gemm.M, recipe=recipe, compiled=compiled)
    if width is not None:
        return found.model_copy(update={"width": width})
    for size in WIDE:
        tokens = break_even_tokens(profile, size, size, recipe=recipe, compiled=compiled)
        if tokens is not None:
            return found.model_copy(update={"wide": GemmShape(M=tokens, K=size, N=size)})
    return found


def _least(pays: Callable[[int], bool], most: int, *, step: int) -> int | None:
    """Return the least multiple of `step` that pays, given that all above it do too."""
    if not pays(most):
        return None
    low, high = 0, most  # pays at high, not known to at low
    while high - low > step:
        middle = (low + high) // 2 // step * step
        if pays(middle):
            high = middle
        else:
            low = middle
    return high
