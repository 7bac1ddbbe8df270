"""How people spell devices, recipes and modes: published tables and drivers agree on none of them.

A device's words are compared as sets: `NVIDIA H100 80GB HBM3` is `h100` once the words that say
nothing more (maker, memory, form) are dropped. A word that is left over is a difference: `H100 NVL`
is no `h100`, since a wrong profile is worse than an error.
"""

import re

from autoprec.common.recipes import Recipe
from autoprec.errors import DeviceError

_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib|w|tb/s)\b")
_WORD = re.compile(r"\d+\.\d+tb/s|[a-z0-9]+(?:\.\d+)?")
_PARENTHESES = re.compile(r"\([^)]*\)")
_EMPTY_WORD = re.compile(
    "nvidia|geforce|amd|instinct|tesla|gpu|accelerator|tensor|core|the|of|x|devices?|card|hbm2|hbm2e"
    "|hbm3|hbm3e|gddr6|gddr7|blackwell|hopper|ada|lovelace|generation|server|workstation|edition"
    "|presumed|class|not|stated|power|limited|variant|derived"
)
_FORMS = {"sxm4": "sxm", "sxm5": "sxm", "sxm6": "sxm", "pcie4": "pcie", "pcie5": "pcie"}
# Many different devices share these.
_DETAIL = re.compile(r"\d+(\.\d+)?(gb|gib|w|tb/s)|sxm|pcie|oam")
_DETAIL_WEIGHT = 0.2
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


def device_words(text: str) -> frozenset[str]:
    """Return the words of a device's name that tell it from other devices."""
    joined = _UNIT.sub(r"\1\2 ", text.lower().replace("_", " ").replace("-", " "))
    words = (_FORMS.get(word, word) for word in _WORD.findall(joined))
    return frozenset(word for word in words if not _EMPTY_WORD.fullmatch(word))


def words_weight(words: frozenset[str]) -> float:
    """Return how much words say about which device is meant: a size or a form says little."""
    return sum(_DETAIL_WEIGHT if _DETAIL.fullmatch(word) else 1.0 for word in words)


def device_readings(text: str) -> tuple[frozenset[str], ...]:
    """Return the word sets that a spelling can mean: with its parentheses first, then without."""
    return device_words(text), device_words(_PARENTHESES.sub(" ", text))


def parse_recipe(recipe: Recipe | str) -> Recipe:
    """Return the recipe that a name or a published table's wording means.

    Raises:
        DeviceError: the cost model does not price it.
    """
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
    """Return whether a table's word means torch.compile; an empty one means `default`.

    Raises:
        DeviceError: the word says neither.
    """
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
