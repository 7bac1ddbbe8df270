"""Python to paste, for torchao and for Accelerate (which runs torchao).

Checked against torchao 0.18 and accelerate 1.15. Names are ASCII literals, layers are found by exact
name, and a name that is not a linear layer of the model stops the run instead of being passed over.
"""

from autoprec.export.choices import (
    fp8_choices,
    header,
    left_to_trainer,
    quoted,
    require_no_fp32_gemm,
    require_one_option,
    require_recipes,
)
from autoprec.records import Option, Plan, Recipe

TORCHAO_RECIPES = (
    Recipe.TENSORWISE.value,
    Recipe.ROWWISE.value,
    Recipe.ROWWISE_WITH_GW_HP.value,
)
CONFIG_FUNCTION = '''

def float8_config(recipe, gemms_in_bf16):
    """Return torchao's config of a recipe with some of the three GEMMs in BF16."""
    base = Float8LinearConfig.from_recipe_name(recipe)
    operands = {
        "output": ("cast_config_input", "cast_config_weight"),
        "grad_input": ("cast_config_grad_output", "cast_config_weight_for_grad_input"),
        "grad_weight": (
            "cast_config_input_for_grad_weight",
            "cast_config_grad_output_for_grad_weight",
        ),
    }
    if not gemms_in_bf16:
        return base
    casts = {name: getattr(base, name) for names in operands.values() for name in names}
    for gemm in gemms_in_bf16:
        for name in operands[gemm]:
            dtype = casts[name].target_dtype
            casts[name] = CastConfig(scaling_type=ScalingType.DISABLED, target_dtype=dtype)
    rounded = base.round_scales_to_power_of_2
    return Float8LinearConfig(**casts, round_scales_to_power_of_2=rounded)
'''
CHECK = """
    modules = dict(model.named_modules())
    wrong = [name for name in {names} if not isinstance(modules.get(name), torch.nn.Linear)]
    if wrong:
        raise ValueError(f"the plan names {{wrong[:4]}}, which are no linear layers of this model")
"""


def torchao_snippet(plan: Plan) -> str:
    """Return Python that converts exactly the plan's FP8 layers with torchao.

    Raises:
        PlanMismatchError: a layer has a recipe that torchao does not.
    """
    require_recipes(plan, "torchao", TORCHAO_RECIPES, with_masks=True)
    choices = fp8_choices(plan)
    has_masks = any(option.gemms_hp for option in choices)
    groups = "".join(_group(option, names) for option, names in choices.items())
    names = "[name for _, _, names in FP8_LAYERS for name in names]"
    config = "float8_config(recipe, gemms)" if has_masks else _from_name("recipe")
    return (
        header(
            plan,
            "Call convert_fp8_layers(model) once the model is built, before torch.compile and FSDP.",
            left_to_trainer(plan),
        )
        + ("import dataclasses\n\n" if plan.fp8_all_gather else "")
        + "import torch\n"
        + f"from torchao.float8 import {_imports(has_masks)}\n"
        + ("from torchao.float8.config import ScalingType\n" if has_masks else "")
        + f"\nFP8_LAYERS = [  # recipe, GEMMs that stay in BF16, exact names\n{groups}]\n"
        + (CONFIG_FUNCTION if has_masks else "")
        + "\n\ndef convert_fp8_layers(model):\n"
        + '    """Run the layers of FP8_LAYERS in FP8, and no others; returns the model."""'
        + CHECK.format(names=names)
        + "    chosen = [{id(modules[name]) for name in names} for _, _, names in FP8_LAYERS]\n"
        + "    for (recipe, gemms, _), ids in zip(FP8_LAYERS, chosen):\n"
        + f"        config = {config}\n"
        + (_all_gather("recipe", "not gemms") if plan.fp8_all_gather else "")
        + "        model = convert_to_float8_training(\n"
        + "            model,\n"
        + "            module_filter_fn=lambda module, _, ids=ids: id(module) in ids,\n"
        + "            config=config,\n"
        + "        )\n"
        + "    return model\n"
    )


def accelerate_snippet(plan: Plan) -> str:
    """Return Python that makes an `Accelerator` which converts exactly the plan's FP8 layers.

    Raises:
        PlanMismatchError: the plan has several options, GEMM masks, or FP32 layers with a GEMM.
    """
    require_recipes(plan, "accelerate", TORCHAO_RECIPES, with_masks=False)
    option = require_one_option(plan, "accelerate")
    require_no_fp32_gemm(plan, "accelerate", "runs every other GEMM under BF16 autocast")
    names = fp8_choices(plan)[option]
    gather = ", enable_fsdp_float8_all_gather=True" if plan.fp8_all_gather else ""
    config = _from_name(repr(option.recipe.value if option.recipe else ""))
    if gather:
        config = f"dataclasses.replace(\n        {config}{gather}\n    )"
    return (
        header(
            plan,
            "Call check_fp8_layers(model) before accelerator.prepare(model).",
            "Not in here: Accelerate keeps the parameters of all layers in FP32 and runs the others",
            "under BF16 autocast, where the plan has bf16_o2 (BF16 parameters, FP32 masters).",
        )
        + ("import dataclasses\n\n" if gather else "")
        + "import torch\n"
        + "from accelerate import Accelerator\n"
        + "from accelerate.utils import AORecipeKwargs\n"
        + "from torchao.float8 import Float8LinearConfig\n"
        + f"\nFP8_LAYERS = {{  # exact names\n{quoted(names, indent=4)}}}\n"
        + "\n\ndef check_fp8_layers(model):\n"
        + '    """Stop where a name of the plan is no linear layer of the model."""'
        + CHECK.format(names="FP8_LAYERS")
        + "\n\ndef is_fp8_layer(module, name):\n"
        + '    """Say whether torchao is to convert this module."""\n'
        + "    return name in FP8_LAYERS\n"
        + "\n\nrecipe = AORecipeKwargs(\n"
        + f"    config={config},\n"
        + "    module_filter_func=is_fp8_layer,\n"
        + ")\n"
        + 'accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe])\n'
    )


def _group(option: Option, names: list[str]) -> str:
    recipe = option.recipe.value if option.recipe else ""
    gemms = ", ".join(repr(gemm.value) for gemm in option.gemms_hp)
    mask = f"({gemms},)" if gemms else "()"
    return f"    ({recipe!r}, {mask}, [\n{quoted(names, indent=8)}    ]),\n"


def _imports(has_masks: bool) -> str:
    cast = "CastConfig, " if has_masks else ""
    return f"{cast}Float8LinearConfig, convert_to_float8_training"


def _from_name(recipe: str) -> str:
    return f"Float8LinearConfig.from_recipe_name({recipe})"


def _all_gather(recipe: str, unmasked: str) -> str:
    return (
        f'        if {recipe} == "tensorwise" and {unmasked}:\n'
        "            config = dataclasses.replace(config, enable_fsdp_float8_all_gather=True)\n"
    )
