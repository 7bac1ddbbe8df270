"""The bridge to torchao: its module, and its config of an FP8 option."""

import functools
import importlib
import importlib.util
from dataclasses import replace
from typing import Any

import torch

from autoprec.common.noise import import_noise_dropped
from autoprec.errors import PlanMismatchError
from autoprec.records import APPLICABLE_RECIPES, Gemm, Option


def import_torchao() -> Any:  # Any: torchao ships no types
    """Return the module `torchao.float8`, imported without torchao's noise about CUDA extensions.

    The first import takes about two seconds on a CPU.
    """
    with import_noise_dropped():
        module = importlib.import_module("torchao.float8")
        if torch.cuda.is_available():
            _fix_compiled_casts()
        return module


@functools.cache
def _fix_compiled_casts() -> None:
    """Do what torchao's own conversion does first: keep NaN out of FP8 casts that Triton compiles.

    From torch 2.14 on, Triton can store garbage beside a `min` or `max` that hands NaN on (its
    issue 11111). torchao 0.18 has the workaround, 0.17 has none.
    """
    name = "torchao.float8._inductor_patch"
    if importlib.util.find_spec(name) is not None:
        fix = getattr(importlib.import_module(name), "_patch_inductor_min_max_codegen", None)
        if fix is not None:
            fix()


def float8_config(option: Option) -> Any:  # Any: torchao ships no types
    """Return the torchao `Float8LinearConfig` of an FP8 option.

    GEMMs in `gemms_hp` get both operands disabled; the other GEMMs keep the recipe's casts.
    """
    if option.recipe not in APPLICABLE_RECIPES:
        raise PlanMismatchError(
            f"torchao applies the FP8 recipes {', '.join(APPLICABLE_RECIPES)}, but the option "
            f"is {option.key}; choose one of these, or export the plan to a runtime that has it"
        )
    config = import_torchao().config
    base = config.Float8LinearConfig.from_recipe_name(option.recipe.value)
    casts = {
        name: config.CastConfig(
            scaling_type=config.ScalingType.DISABLED,
            target_dtype=getattr(base, name).target_dtype,  # one per operand, used or not
        )
        for gemm in option.gemms_hp
        for name in _OPERANDS[gemm]
    }
    return replace(base, **casts)


_OPERANDS: dict[Gemm, tuple[str, str]] = {  # the casts of torchao's config that feed each GEMM
    Gemm.OUTPUT: ("cast_config_input", "cast_config_weight"),
    Gemm.GRAD_INPUT: ("cast_config_grad_output", "cast_config_weight_for_grad_input"),
    Gemm.GRAD_WEIGHT: (
        "cast_config_input_for_grad_weight",
        "cast_config_grad_output_for_grad_weight",
    ),
}
