"""FP8 on a device -> output and gradients of every recipe against an FP64 reference, as checks.

Right kernels are 2-7 % off in relative norm, which is FP8's own rounding; a wrong kernel, compiler
or scale is off by about 1. It costs milliseconds: software is tested before a run, not by it.
"""

import torch

from autoprec.precision import APPLICABLE_RECIPES, SELF_TEST_TOLERANCE, fp8_support, recipe_errors
from autoprec.records import Check, Recipe


def fp8_self_test(device: torch.device) -> list[Check]:
    """Return one check per FP8 recipe that torchao applies."""
    support = fp8_support(device)
    return [
        _check(recipe, device)
        if recipe in support.recipes
        else Check(name=f"fp8 {recipe}", is_good=False, detail=support.reason)
        for recipe in APPLICABLE_RECIPES
    ]


def _check(recipe: Recipe, device: torch.device) -> Check:
    errors = recipe_errors(recipe, device)
    measured = ", ".join(f"{gemm} {error:.3f}" for gemm, error in errors.items())
    return Check(
        name=f"fp8 {recipe}",
        is_good=max(errors.values()) <= SELF_TEST_TOLERANCE,
        detail=f"relative error against FP64: {measured} (allowed: {SELF_TEST_TOLERANCE})",
    )
