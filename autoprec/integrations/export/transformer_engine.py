"""Transformer Engine's debug config (nvidia-dlfw-inspect): which modules and GEMMs leave FP8.

Under `te.autocast` every TE module runs in FP8; a section of the file takes modules out by a
regular expression that is searched for in their names (nvdlfw-inspect 0.2). One section takes out
all modules but the plan's FP8 layers, so a module that the plan does not know stays in BF16.
Further sections take single GEMMs out. A name may carry the prefixes that the tool or a wrapper put
before it (`model.`, `module.`); two layers that only these would keep apart are an error.
"""

import re
from collections.abc import Iterable

from autoprec.errors import PlanMismatchError
from autoprec.integrations.export.text import (
    ascii_line,
    fp8_choices,
    header,
    left_to_trainer,
    yaml_string,
)
from autoprec.records import Gemm, Option, Plan, Recipe

TE_RECIPES = {
    Recipe.TENSORWISE: "Float8CurrentScaling()",  # hybrid format: e4m3 forward, e5m2 gradients
    Recipe.DELAYED: "DelayedScaling()",
}
GEMM_NAMES = {Gemm.OUTPUT: "fprop", Gemm.GRAD_INPUT: "dgrad", Gemm.GRAD_WEIGHT: "wgrad"}
PREFIX = r"(?:model\.)?(?:module\.)*"  # what infer_and_assign_layer_names and DDP put before a name


def transformer_engine_yaml(plan: Plan) -> str:
    """Return the YAML file that leaves exactly the plan's FP8 layers and GEMMs in FP8.

    Raises:
        PlanMismatchError: two names cannot be told apart.
    """
    _require_distinct(plan)
    choices = fp8_choices(plan)
    fp8 = [name for names in choices.values() for name in names]
    recipe = next(TE_RECIPES[option.recipe] for option in choices if option.recipe)
    return (
        header(
            plan,
            f"Train under te.autocast(enabled=True, recipe={recipe}), with",
            "nvdlfw_inspect.api.initialize(config_file=THIS_FILE, feature_dirs=[TE's features]).",
            "The names must be those of the TE modules (their `name`, or what the tool infers,",
            "which counts modules of a list by their layer_number). Older releases of Transformer",
            "Engine call the features DisableFP8Layer and DisableFP8GEMM.",
            left_to_trainer(plan),
        )
        + _section("all_but_the_fp8_layers", all_but(fp8), "DisableQuantizationLayer", [])
        + "".join(
            _section(_title(option), only(names), "DisableQuantizationGEMM", option.gemms_hp)
            for option, names in choices.items()
            if option.gemms_hp
        )
    )


def only(names: Iterable[str]) -> str:
    r"""Return the pattern that is found in these names only."""
    return rf"\A{PREFIX}(?:{'|'.join(re.escape(name) for name in names)})\Z"


def all_but(names: Iterable[str]) -> str:
    r"""Return the pattern that is found in every name but these."""
    return rf"\A(?!{PREFIX}(?:{'|'.join(re.escape(name) for name in names)})\Z)"


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


def _title(option: Option) -> str:
    return "_".join(["bf16", *(GEMM_NAMES[gemm] for gemm in option.gemms_hp)])


def _section(title: str, pattern: str, feature: str, gemms: Iterable[Gemm]) -> str:
    listed = ", ".join(GEMM_NAMES[gemm] for gemm in gemms)
    return (
        f"{title}:\n"
        "  enabled: true\n"
        "  layers:\n"
        f"    layer_name_regex_pattern: {yaml_string(pattern)}\n"
        "  transformer_engine:\n"
        f"    {feature}:\n"
        "      enabled: true\n" + (f"      gemms: [{listed}]\n" if listed else "")
    )
