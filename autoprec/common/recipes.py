"""The closed choices of a plan: precisions, FP8 recipes, and the GEMMs they are about.

Needs no pydantic, so that the command line knows them before it reads a record.
"""

from enum import StrEnum


class Precision(StrEnum):
    """The choice per layer. O1/O2 in Apex's sense; MS-AMP uses the same names for other things."""

    FP8_O1 = "fp8_o1"
    BF16_O2 = "bf16_o2"
    FP32 = "fp32"


class Gemm(StrEnum):
    """The three GEMMs of a linear layer (fprop, dgrad, wgrad in Transformer Engine's words)."""

    OUTPUT = "output"
    GRAD_INPUT = "grad_input"
    GRAD_WEIGHT = "grad_weight"


class Recipe(StrEnum):
    """FP8 scaling settings: torchao's by its names, then three that no plan here applies.

    All are priced for other devices; `delayed` takes scales from earlier steps.
    """

    TENSORWISE = "tensorwise"
    ROWWISE = "rowwise"
    ROWWISE_WITH_GW_HP = "rowwise_with_gw_hp"
    DELAYED = "delayed"
    BLOCKWISE = "blockwise"
    MXFP8 = "mxfp8"


APPLICABLE_RECIPES = (Recipe.TENSORWISE, Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP)  # torchao's
# The GEMMs that a recipe keeps in BF16 by itself (torchao's float8/config.py).
RECIPE_GEMMS_HP: dict[Recipe, tuple[Gemm, ...]] = {Recipe.ROWWISE_WITH_GW_HP: (Gemm.GRAD_WEIGHT,)}
