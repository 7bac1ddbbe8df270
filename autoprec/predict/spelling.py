"""How people spell recipes and modes: published tables agree on neither."""

import re

from autoprec.common.recipes import Recipe
from autoprec.errors import DeviceError

_RECIPES = {  # the first that is found
    r"gw[ _-]?hp|grad[ _-]?weight[ _-]?hp": Recipe.ROWWISE_WITH_GW_HP,
    r"mx[ _-]?fp?8|mx8": Recipe.MXFP8,
    r"block|1x128|128x128|deepgemm|deepseek": Recipe.BLOCKWISE,
    r"row|axis|channel|token": Recipe.ROWWISE,
    r"delay": Recipe.DELAYED,
    r"tensor|current|dynamic|\b(e4m3|float8|fp8|f8)": Recipe.TENSORWISE,
}
_NOT_FP8 = re.compile(r"fp4|int8|nf4|^(te )?(bf16|fp16|fp32)\b")
_YES = frozenset(["yes", "y", "true", "t", "1", "compile", "compiled", "kernel"])
_NO = frozenset(["no", "n", "false", "f", "0", "eager", "none"])


def parse_recipe(recipe: Recipe | str) -> Recipe:
    """Return the recipe that a name or a published table's wording means."""
    text = str(recipe).strip().lower()
    if text in tuple(Recipe):
        return Recipe(text)
    if not _NOT_FP8.search(text):
        for pattern, priced in _RECIPES.items():
            if re.search(pattern, text):
                return priced
    raise DeviceError(
        f"a recipe must be one of {', '.join(Recipe)}, but it is {str(recipe)!r}; "
        "choose one of these"
    )


def parse_compiled(text: str, *, default: bool) -> bool:
    """Return whether a table's word means torch.compile; an empty one means `default`."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    if not words:
        return default
    if words[0] in _YES or words[0] in _NO:
        return words[0] in _YES
    raise DeviceError(f"compiled must be yes or no, but it is {text!r}; write yes or no")


def has_own_casts(recipe: str) -> bool:
    """Return whether a table's wording means kernels that fuse their casts without torch.compile.

    Transformer Engine's do, so its eager figures are not those of eager torchao.
    """
    return bool(re.match(r"te\b|transformer.?engine", recipe.strip().lower()))
