"""Transformer Engine's debug config (nvidia-dlfw-inspect): which modules and GEMMs leave FP8.

Under `te.autocast` every TE module runs in FP8; a section of the file takes modules out by a
regular expression that is searched for in their names (nvdlfw-inspect 0.2). One section takes out
all modules but the plan's FP8 layers, so a module that the plan does not know stays in BF16.
Further sections take single GEMMs out. A name may carry the prefixes that the tool or a wrapper put
before it (`model.`, `module.`); two layers that only these would keep apart are an error.
"""

import re

from autoprec.errors import PlanMismatchError
from autoprec.integrations.export.text import ascii_line, fp8_choices
from autoprec.records import Gemm, Option, Plan, Recipe

TE_RECIPES = {
    Recipe.TENSORWISE: "Float8CurrentScaling()",  # hybrid format: e4m3 forward, e5m2 gradients
    Recipe.DELAYED: "DelayedScaling()",
}
GEMM_NAMES = {Gemm.OUTPUT: "fprop", Gemm.GRAD_INPUT: "dgrad", Gemm.GRAD_WEIGHT: "wgrad"}
PREFIX = r"(?:model\.)?(?:module\.)*"  # what infer_and_assign_layer_names and DDP put before a name


def engine_sections(plan: Plan) -> dict[str, object]:
    """Return the recipe, the pattern of all but the FP8 layers, and those of single GEMMs."""
    _require_distinct(plan)
    choices = fp8_choices(plan)
    return {
        "recipe": next(TE_RECIPES[option.recipe] for option in choices if option.recipe),
        "all_but_fp8": rf"\A(?!{_any_of([n for names in choices.values() for n in names])})",
        "gemms_hp": [
            ([GEMM_NAMES[gemm] for gemm in option.gemms_hp], rf"\A{_any_of(names)}")
            for option, names in choices.items()
            if option.gemms_hp
        ],
    }


def _any_of(names: list[str]) -> str:
    return rf"{PREFIX}(?:{'|'.join(re.escape(name) for name in names)})\Z"


def _require_distinct(plan: Plan) -> None:
    seen: dict[str, tuple[str, Option]] = {}
    for layer in plan.layers:
        bare = re.sub(rf"\A{PREFIX}", "", layer.name)
        other, option = seen.setdefault(bare, (layer.name, layer.option))
        if option != layer.option:
            raise PlanMismatchError(
                f"layers must differ by more than the prefixes model. and module., but "
                f"{ascii_line(other)!r} and {ascii_line(layer.name)!r} do not; rename one, or give "
                "both the same precision"
            )
