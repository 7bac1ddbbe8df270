"""Which FP8 recipes a device runs, found by running each one against an FP64 reference."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoprec.device.random_state import random_state_kept
from autoprec.device.torchao import float8_config, import_torchao
from autoprec.device.tracing import OperationTracer
from autoprec.records import APPLICABLE_RECIPES, Gemm, Recipe, fp8_option

RECIPE_TOLERANCE = 0.15  # relative error; FP8's own rounding gives 0.03-0.06 (torch 2.13.0, CPU)
KERNEL_TOLERANCE = 0.01  # the same of a GEMM alone: BF16's rounding of its output gives 0.002
Compiler = Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Fp8Support:
    """The recipes whose three GEMMs really ran on a device, and why the others did not.

    `reason` is empty when every recipe of torchao runs.
    """

    recipes: tuple[Recipe, ...]
    reason: str


def fp8_support(device: torch.device) -> Fp8Support:
    """Return which FP8 recipes `device` runs, found by running each one; asked once per device."""
    return _try_recipes(str(torch.device(device)))


@functools.cache
def _try_recipes(device: str) -> Fp8Support:
    refusal = _capability_refusal(torch.device(device))
    if refusal:
        return Fp8Support((), refusal)
    failures = {recipe: _try_recipe(recipe, torch.device(device)) for recipe in APPLICABLE_RECIPES}
    works = tuple(recipe for recipe, problem in failures.items() if not problem)
    problems = [f"{recipe}: {problem}" for recipe, problem in failures.items() if problem]
    reason = f"FP8 on {device} does not run as {'; '.join(problems)}" if problems else ""
    return Fp8Support(works, reason)


def _capability_refusal(device: torch.device) -> str:
    if device.type == "meta":
        return "a meta device runs nothing"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "CUDA is not available here"
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return (
            f"FP8 GEMMs need compute capability 8.9 or more, and {device} has "
            f"{capability[0]}.{capability[1]}"
        )
    return ""


def _try_recipe(recipe: Recipe, device: torch.device) -> str:
    """Run one small layer forward and backward; return what went wrong, or an empty string."""
    try:
        return recipe_errors(recipe, device).problem
    except (RuntimeError, ValueError, TypeError, AssertionError) as problem:
        return str(problem).strip().splitlines()[0] if str(problem).strip() else repr(problem)


@dataclass(frozen=True)
class RecipeErrors:
    """Relative errors of one small layer's three GEMMs in FP8 against FP64.

    `results` are against unrounded operands, so FP8's rounding is in them; `kernels` against the
    FP8 operands and scales that `torch._scaled_mm` itself was given (none where it was not seen).
    """

    results: Mapping[Gemm, float]
    kernels: Mapping[Gemm, float]

    @property
    def problem(self) -> str:
        """Name the GEMM that is off, empty if none is; NaN is off."""
        for gemm, error in self.kernels.items():
            if not error <= KERNEL_TOLERANCE:
                return f"its {gemm} kernel is wrong: off by {error:.2g} from FP64 on its operands"
        for gemm, error in self.results.items():
            if not error <= RECIPE_TOLERANCE:
                return f"its {gemm} is wrong: off by {error:.2g} in relative norm from FP64"
        return ""


@random_state_kept()  # a compiler may draw
def recipe_errors(
    recipe: Recipe, device: torch.device, *, compiler: Compiler | None = None
) -> RecipeErrors:
    """Run one small layer forward and backward in FP8 and return how far it is from FP64.

    Rows and columns differ in size by powers of two, so that a scale in a wrong place shows.

    Args:
        recipe: one that torchao applies.
        device: where to run.
        compiler: what compiles the layer first, e.g. `torch.compile`.
    """
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randn(32, 64, generator=generator) * _octaves(32)[:, None]
    weight_NK = torch.randn(48, 64, generator=generator) / 8 * _octaves(48)[:, None]
    grad_MN = torch.randn(32, 48, generator=generator) * _octaves(48)
    linear = nn.Linear(64, 48, bias=False, device="meta", dtype=torch.bfloat16)  # draws nothing
    linear.to_empty(device=device)
    with torch.no_grad():
        linear.weight.copy_(weight_NK)
    float8_linear = import_torchao().float8_linear
    layer = float8_linear.Float8Linear.from_float(linear, float8_config(fp8_option(recipe)))
    run = layer if compiler is None else compiler(layer)
    x = x_MK.to(device, torch.bfloat16).requires_grad_()
    kernels = _KernelErrors({64: Gemm.OUTPUT, 48: Gemm.GRAD_INPUT, 32: Gemm.GRAD_WEIGHT})
    watched = OperationTracer(kernels.run) if compiler is None else contextlib.nullcontext()
    with torch.autocast(device.type, enabled=False), torch.enable_grad(), watched:
        y = run(x)
        y.backward(grad_MN.to(device, torch.bfloat16))
    x_64, w_64, g_64 = x_MK.double(), weight_NK.double(), grad_MN.double()
    results = {
        Gemm.OUTPUT: _relative_error(y, x_64 @ w_64.t()),  # [M, K] @ [K, N]
        Gemm.GRAD_INPUT: _relative_error(x.grad, g_64 @ w_64),  # [M, N] @ [N, K]
        Gemm.GRAD_WEIGHT: _relative_error(layer.weight.grad, g_64.t() @ x_64),  # [N, M] @ [M, K]
    }
    return RecipeErrors(results, kernels.found)


def _octaves(count: int) -> torch.Tensor:
    return 2.0 ** (torch.arange(count) % 5 - 2)


class _KernelErrors:
    """Compares every `_scaled_mm` with FP64; the inner dimension tells which GEMM it is."""

    def __init__(self, gemms: Mapping[int, Gemm]) -> None:
        self.gemms = gemms
        self.found: dict[Gemm, float] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: torch's
        """Run an operation, and measure it if it is an FP8 GEMM."""
        result = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten._scaled_mm:
            names = (argument.name for argument in func._schema.arguments)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self.found[self.gemms[args[0].shape[-1]]] = _kernel_error(result, given)
            result = result.to(given["out_dtype"])  # noted as wrong; the rest shall run
        return result


def _kernel_error(result: torch.Tensor, given: Mapping[str, Any]) -> float:  # Any: torch's
    if result.dtype is not given["out_dtype"]:
        return math.inf
    a, b, scale_a, scale_b = (
        given[name].cpu().float().double() for name in ("self", "mat2", "scale_a", "scale_b")
    )
    return _relative_error(result, (a @ b) * scale_a * scale_b)  # [M, K] @ [K, N]


def _relative_error(got: torch.Tensor | None, expected: torch.Tensor) -> float:
    if got is None:
        raise RuntimeError("a gradient is missing")
    return float((got.detach().cpu().double() - expected).norm() / expected.norm())
