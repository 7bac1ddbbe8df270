"""Which FP8 recipes a device runs, found by running each one against an FP64 reference.

Two comparisons, because FP8's own rounding is large (3-6 % in relative norm) and hides small
faults: the results against unrounded operands find wrong casts, scales and layouts; every GEMM
against the FP8 operands that it was given finds a kernel that is off by one percent. Of a compiled
layer only the first is to be had, for what a compiler generates has no operations to look at.
It costs milliseconds in eager mode: software is tested before a run, not by it.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from autoprec.common.text import first_line
from autoprec.device.random_state import random_state_kept
from autoprec.device.torchao import float8_config, import_torchao
from autoprec.device.tracing import OperationTracer
from autoprec.records import APPLICABLE_RECIPES, Check, Gemm, Recipe, fp8_option

RECIPE_TOLERANCE = 0.15  # relative error; FP8's own rounding gives 0.03-0.06 (torch 2.13.0, CPU)
KERNEL_TOLERANCE = 0.01  # the same of a GEMM alone: BF16's rounding of its output gives 0.002
GEMM_BY_INNER = {64: Gemm.OUTPUT, 48: Gemm.GRAD_INPUT, 32: Gemm.GRAD_WEIGHT}  # of the small layer
ONE_SCALE = "only supports per-tensor scaling for CPU"  # torch 2.11's kernel, in an assertion
TENSOR_SCALES = (
    f"torch {torch.__version__} multiplies FP8 on a CPU with one scale per tensor only; "
    "tensorwise runs here, and with torch 2.13 all do"
)
# Whether `_scaled_mm` on a CPU is FP32 arithmetic on FP8 values for now, which runs every recipe
emulates_gemms: ContextVar[bool] = ContextVar("emulates_gemms", default=False)
Compiler = Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Fp8Support:
    """The recipes whose three GEMMs really ran on a device, and why the others did not."""

    recipes: tuple[Recipe, ...]
    reason: str  # empty when every recipe of torchao runs


EVERY_RECIPE = Fp8Support(APPLICABLE_RECIPES, "")  # where no kernel of this machine is asked


def fp8_support(device: torch.device) -> Fp8Support:
    """Return the FP8 recipes that `device` runs, found by running each one once per process."""
    if device.type == "cpu" and emulates_gemms.get():
        return EVERY_RECIPE
    return tried_recipes(device)


@cache
def tried_recipes(device: torch.device) -> Fp8Support:
    """Return the FP8 recipes whose own kernels `device` runs."""
    if refusal := _capability_refusal(device):
        return Fp8Support((), refusal)
    failures = {recipe: _try_recipe(recipe, device) for recipe in APPLICABLE_RECIPES}
    works = tuple(recipe for recipe, problem in failures.items() if not problem)
    # One problem is said once, whatever number of recipes has it.
    named = {
        problem: ", ".join(recipe for recipe, other in failures.items() if other == problem)
        for problem in failures.values()
        if problem
    }
    problems = "; ".join(f"{recipes}: {problem}" for problem, recipes in named.items())
    return Fp8Support(works, problems and f"FP8 on {device} does not run as {problems}")


def _capability_refusal(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 9):
        return ""
    return f"FP8 GEMMs need compute capability 8.9 or more, and {device} has {major}.{minor}"


def _try_recipe(recipe: Recipe, device: torch.device) -> str:
    """Run one small layer forward and backward; return what went wrong, or an empty string."""
    try:
        return recipe_errors(recipe, device).problem
    except (RuntimeError, ValueError, TypeError, AssertionError) as problem:
        return TENSOR_SCALES if ONE_SCALE in str(problem) else first_line(problem)


def fp8_self_test(
    device: torch.device,
    *,
    recipes: Sequence[Recipe] = APPLICABLE_RECIPES,
    compiler: Compiler | None = None,
) -> list[Check]:
    """Return one check per FP8 recipe; a run that compiles its model gives its compiler."""
    return [_check(recipe, device, compiler) for recipe in recipes]


def _check(recipe: Recipe, device: torch.device, compiler: Compiler | None) -> Check:
    name = f"fp8 {recipe}" if compiler is None else f"compiled fp8 {recipe}"
    support = fp8_support(device)
    if recipe not in support.recipes:
        return Check(name=name, is_good=False, detail=support.reason)
    try:
        errors = recipe_errors(recipe, device, compiler=compiler)
    except RuntimeError as error:  # a compiler that is not there, or gives up
        return Check(name=name, is_good=False, detail=f"did not run: {first_line(error)}")
    results = ", ".join(f"{gemm} {error:.3f}" for gemm, error in errors.results.items())
    kernels = ", ".join(f"{gemm} {error:.4f}" for gemm, error in errors.kernels.items())
    detail = f"relative error against FP64: {results} (allowed: {RECIPE_TOLERANCE})"
    if kernels:
        detail += f"; of the kernels alone: {kernels} (allowed: {KERNEL_TOLERANCE})"
    problem = f"{errors.problem}; " if errors.problem else ""
    return Check(name=name, is_good=not problem, detail=f"{problem}{detail}")


@dataclass(frozen=True)
class RecipeErrors:
    """Relative errors of one small layer's three GEMMs in FP8 against FP64."""

    results: Mapping[Gemm, float]  # from unrounded operands, so FP8's rounding is in them
    kernels: Mapping[Gemm, float]  # from what `torch._scaled_mm` was given; empty where not seen

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
    A compiler, such as `torch.compile`, compiles the layer first.
    """
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randn(32, 64, generator=generator) * _octaves(32)[:, None]
    weight_NK = torch.randn(48, 64, generator=generator) / 8 * _octaves(48)[:, None]
    grad_MN = torch.randn(32, 48, generator=generator) * _octaves(48)
    linear = nn.utils.skip_init(nn.Linear, 64, 48, bias=False, device=device, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]  # torch's own
    with torch.no_grad():
        linear.weight.copy_(weight_NK)
    float8_linear = import_torchao().float8_linear
    layer = float8_linear.Float8Linear.from_float(linear, float8_config(fp8_option(recipe)))
    run = layer if compiler is None else compiler(layer)
    x = x_MK.to(device, torch.bfloat16).requires_grad_()
    kernels: dict[Gemm, float] = {}
    tracer = OperationTracer(partial(_run_compared, kernels))
    watched = contextlib.nullcontext() if compiler else tracer
    with torch.autocast(device.type, enabled=False), torch.enable_grad(), watched:
        y = run(x)
        y.backward(grad_MN.to(device, torch.bfloat16))
    x_64, w_64, g_64 = x_MK.double(), weight_NK.double(), grad_MN.double()
    results = {
        Gemm.OUTPUT: _relative_error(y, x_64 @ w_64.t()),  # [M, K] @ [K, N]
        Gemm.GRAD_INPUT: _relative_error(x.grad, g_64 @ w_64),  # [M, N] @ [N, K]
        Gemm.GRAD_WEIGHT: _relative_error(layer.weight.grad, g_64.t() @ x_64),  # [N, M] @ [M, K]
    }
    return RecipeErrors(results, kernels)


def _octaves(count: int) -> torch.Tensor:
    return 2.0 ** (torch.arange(count) % 5 - 2)


def _run_compared(
    found: dict[Gemm, float], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:  # Any: torch's
    """Run an operation; compare an FP8 GEMM with FP64: its inner dimension tells which it is."""
    result = func(*args, **kwargs)
    if func.overloadpacket is torch.ops.aten._scaled_mm:
        names = (argument.name for argument in func._schema.arguments)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found[GEMM_BY_INNER[args[0].shape[-1]]] = _kernel_error(result, given)
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
