"""Python to paste, for torchao and for Accelerate (which runs torchao).

Checked against torchao 0.18 and accelerate 1.15. Names are ASCII literals, layers are found by
exact name, and a name that is not a linear layer of the model stops the run instead of being passed
over. So does a layer that the model holds under two names: torchao would convert it under one.
"""

from autoprec.errors import PlanMismatchError
from autoprec.integrations.export.text import fp8_choices, header, left_to_trainer, quoted
from autoprec.records import Option, Plan, Recipe

IN_BF16 = '''
OPERANDS = {  # the casts that feed each GEMM
    "output": ("cast_config_input", "cast_config_weight"),
    "grad_input": ("cast_config_grad_output", "cast_config_weight_for_grad_input"),
    "grad_weight": (
        "cast_config_input_for_grad_weight",
        "cast_config_grad_output_for_grad_weight",
    ),
}


def in_bf16(config, *gemms):
    """Return the config with these GEMMs in BF16: neither of their operands is cast."""
    casts = {}
    for name in [name for gemm in gemms for name in OPERANDS[gemm]]:
        dtype = getattr(config, name).target_dtype
        casts[name] = CastConfig(scaling_type=ScalingType.DISABLED, target_dtype=dtype)
    return dataclasses.replace(config, **casts)

'''
CHECK_LAYERS = '''

def check_layers(model, names):
    """Stop where a name is no linear layer of the model, or the layer has a second name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    wrong = [name for name in names if not isinstance(modules.get(name), torch.nn.Linear)]
    if wrong:
        raise ValueError(f"the plan names {wrong[:4]}, which are no linear layers of this model")
    layers = {id(modules[name]) for name in names}
    shared = [name for name in modules if id(modules[name]) in layers and name not in names]
    if shared:
        raise ValueError(f"layers of the plan are {shared[:4]} too; torchao cannot convert both")
'''
CONVERT = '''

def convert_fp8_layers(model):
    """Run the layers of FP8_LAYERS in FP8, and no others; returns the model."""
    check_layers(model, {name for _, names in FP8_LAYERS for name in names})
    for config, names in FP8_LAYERS:
        model = convert_to_float8_training(
            model,
            module_filter_fn=lambda _, name, names=names: name in names,
            config=config,
        )
    return model
'''
RECIPE = '''

def fp8_recipe(model):
    """Return what makes Accelerate run the layers of FP8_LAYERS in FP8, and no others."""
    check_layers(model, FP8_LAYERS)
    return AORecipeKwargs(config=CONFIG, module_filter_func=lambda _, name: name in FP8_LAYERS)
'''


def torchao_snippet(plan: Plan) -> str:
    """Return Python that converts exactly the plan's FP8 layers with torchao."""
    choices = fp8_choices(plan)
    groups = "".join(
        f"    ({_config(plan, option)}, {{\n{quoted(names, indent=8)}    }}),\n"
        for option, names in choices.items()
    )
    with_gemms_hp = any(option.gemms_hp for option in choices)
    imports = "Float8LinearConfig, convert_to_float8_training"
    return (
        header(
            plan,
            "Call convert_fp8_layers(model) on the new model, before torch.compile and FSDP.",
            *_gather_notes(plan),
            left_to_trainer(plan),
        )
        + ("import dataclasses\n\n" if with_gemms_hp or plan.fp8_all_gather else "")
        + "import torch\n"
        + f"from torchao.float8 import {'CastConfig, ' if with_gemms_hp else ''}{imports}\n"
        + ("from torchao.float8.config import ScalingType\n" if with_gemms_hp else "")
        + (IN_BF16 if with_gemms_hp else "")
        + f"\nFP8_LAYERS = [  # configs and exact names\n{groups}]\n"
        + CHECK_LAYERS
        + CONVERT
    )


def accelerate_snippet(plan: Plan) -> str:
    """Return Python that makes the recipe with which Accelerate converts exactly the FP8 layers.

    Raises:
        PlanMismatchError: the plan is for a model that is one layer.
    """
    [(option, names)] = fp8_choices(plan).items()
    if "" in names:
        raise PlanMismatchError(
            "accelerate converts layers inside a model, but this plan's model is itself a linear "
            "layer; put it into a module, or export to torchao"
        )
    return (
        header(
            plan,
            "accelerator = Accelerator(mixed_precision='fp8', kwargs_handlers=[fp8_recipe(model)])",
            "model, optimizer = accelerator.prepare(model, optimizer)",
            *_gather_notes(plan),
            "Not in here: Accelerate keeps all parameters in FP32, and runs the other layers",
            "under BF16 autocast where the plan has bf16_o2 (BF16 parameters, FP32 masters).",
        )
        + ("import dataclasses\n\n" if plan.fp8_all_gather else "")
        + "import torch\n"
        + "from accelerate.utils import AORecipeKwargs\n"
        + "from torchao.float8 import Float8LinearConfig\n"
        + f"\nCONFIG = {_config(plan, option)}\n"
        + f"FP8_LAYERS = {{  # exact names\n{quoted(names, indent=4)}}}\n"
        + CHECK_LAYERS
        + RECIPE
    )


def _config(plan: Plan, option: Option) -> str:
    """Return the expression that makes torchao's config of an FP8 option."""
    recipe = option.recipe.value if option.recipe else ""
    config = f"Float8LinearConfig.from_recipe_name({recipe!r})"
    if option.gemms_hp:
        gemms = ", ".join(repr(gemm.value) for gemm in option.gemms_hp)
        return f"in_bf16({config}, {gemms})"
    if plan.fp8_all_gather and option.recipe is Recipe.TENSORWISE:
        return f"dataclasses.replace({config}, enable_fsdp_float8_all_gather=True)"
    return config


def _gather_notes(plan: Plan) -> list[str]:
    if not plan.fp8_all_gather:
        return []
    return ["FSDP gathers FP8 weights for tensorwise layers with all GEMMs in FP8, and no others."]
