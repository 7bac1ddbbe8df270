"""FP8 on a device -> output and gradients of every recipe against an FP64 reference, as checks.

Two comparisons, because FP8's own rounding is large (3-6 % in relative norm) and hides small
faults: the results against unrounded operands find wrong casts, scales and layouts; every GEMM
against the FP8 operands that it was given finds a kernel that is off by one percent. Of a compiled
layer only the first is to be had, for what a compiler generates has no operations to look at.
It costs milliseconds in eager mode: software is tested before a run, not by it.
"""

from collections.abc import Sequence

import torch

from autoprec.device.fp8 import (
    KERNEL_TOLERANCE,
    RECIPE_TOLERANCE,
    Compiler,
    fp8_support,
    recipe_errors,
)
from autoprec.records import APPLICABLE_RECIPES, Check, Recipe


def fp8_self_test(
    device: torch.device,
    *,
    recipes: Sequence[Recipe] = APPLICABLE_RECIPES,
    compiler: Compiler | None = None,
) -> list[Check]:
    """Return one check per FP8 recipe.

    Args:
        device: where to run.
        recipes: of those that torchao applies.
        compiler: what the run compiles its model with, e.g. `torch.compile`; None: eager.
    """
    support = fp8_support(device)
    return [
        _check(recipe, device, compiler)
        if recipe in support.recipes
        else Check(name=_name(recipe, compiler), is_good=False, detail=support.reason)
        for recipe in recipes
    ]


def _check(recipe: Recipe, device: torch.device, compiler: Compiler | None) -> Check:
    try:
        errors = recipe_errors(recipe, device, compiler=compiler)
    except RuntimeError as error:  # a compiler that is not there, or gives up
        reason = str(error).strip().partition("\n")[0]
        return Check(name=_name(recipe, compiler), is_good=False, detail=f"did not run: {reason}")
    results = ", ".join(f"{gemm} {error:.3f}" for gemm, error in errors.results.items())
    kernels = ", ".join(f"{gemm} {error:.4f}" for gemm, error in errors.kernels.items())
    detail = f"relative error against FP64: {results} (allowed: {RECIPE_TOLERANCE})"
    if kernels:
        detail += f"; of the kernels alone: {kernels} (allowed: {KERNEL_TOLERANCE})"
    problem = f"{errors.problem}; " if errors.problem else ""
    return Check(name=_name(recipe, compiler), is_good=not problem, detail=f"{problem}{detail}")


def _name(recipe: Recipe, compiler: Compiler | None) -> str:
    return f"fp8 {recipe}" if compiler is None else f"compiled fp8 {recipe}"
