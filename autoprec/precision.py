"""What an option means in torch: which ones a layer can take here, and torchao's config for each.

FP8 has three GEMMs per linear layer, with M tokens, K in- and N out-features:

    output      [M, K] @ [K, N] -> [M, N]      inner dimension K
    grad_input  [M, N] @ [N, K] -> [M, K]      inner dimension N
    grad_weight [N, M] @ [M, K] -> [N, K]      inner dimension M

`torch._scaled_mm` wants the inner dimension and the second operand's outer one to be multiples of
16 (cuBLASLt's 16-byte rows at one byte per element). So K and N must always be, and M must be where
grad_weight runs in FP8: a layer called with any other M can keep that GEMM in BF16 instead.
The CPU kernel is not so strict, but a plan made on a CPU must mean the same on a GPU.
"""

import contextlib
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from autoprec.errors import PlanMismatchError
from autoprec.noise import import_noise_dropped
from autoprec.records import (
    BF16_O2,
    FP32,
    Gemm,
    GemmShape,
    LayerKind,
    Option,
    Precision,
    Recipe,
    Refusal,
    fp8_option,
)

FP8_MULTIPLE = 16  # elements; cuBLASLt and torch._scaled_mm, see the module's docstring
APPLICABLE_RECIPES = (Recipe.TENSORWISE, Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP)
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


def import_torchao() -> Any:  # Any: torchao ships no types
    """Return the module `torchao.float8`, imported without torchao's noise about CUDA extensions.

    The first import takes about two seconds on a CPU.
    """
    with import_noise_dropped():
        module = importlib.import_module("torchao.float8")
        if torch.cuda.is_available():
            _mend_compiled_casts()
        return module


@functools.cache
def _mend_compiled_casts() -> None:
    """Do what torchao's own conversion does first: keep NaN out of FP8 casts that Triton compiles.

    From torch 2.14 on, Triton can store garbage beside a `min` or `max` that hands NaN on (its
    issue 11111). torchao 0.18 has the workaround, 0.17 has none.
    """
    name = "torchao.float8._inductor_patch"
    if importlib.util.find_spec(name) is not None:
        mend = getattr(importlib.import_module(name), "_patch_inductor_min_max_codegen", None)
        if mend is not None:
            mend()


def fp8_support(device: torch.device) -> Fp8Support:
    """Return which FP8 recipes `device` runs, found by running each one; asked once per device."""
    return _try_recipes(str(torch.device(device)))


def layer_options(
    *,
    kind: LayerKind,
    gemm: GemmShape | None,
    all_m: Sequence[int],
    support: Fp8Support,
    fp8_options: Sequence[Option] | None = None,
) -> tuple[tuple[Option, ...], tuple[Refusal, ...]]:
    """Return what a layer can take on a device, and why not the rest.

    Args:
        kind: what the layer computes.
        gemm: its output GEMM; None where it is no linear or was never called.
        all_m: every token count M that it is called with.
        support: what the device runs, see `fp8_support`.
        fp8_options: the FP8 options to consider; default: every supported recipe, unmasked, and
            where M rules all of these out, `tensorwise` and `rowwise` with grad_weight in BF16.
    """
    reason = _shape_refusal(kind=kind, gemm=gemm, support=support)
    if reason:
        return (FP32, BF16_O2), (Refusal(precision=Precision.FP8_O1, reason=reason),)
    uneven = sorted(m for m in set(all_m) if m % FP8_MULTIPLE)
    if fp8_options is None:
        masks = (Gemm.GRAD_WEIGHT,) if uneven else ()
        fp8_options = [
            fp8_option(recipe, *(() if recipe is Recipe.ROWWISE_WITH_GW_HP else masks))
            for recipe in support.recipes
        ]
    fitting = tuple(
        option
        for option in fp8_options
        if option.recipe in support.recipes and not (uneven and _has_fp8_grad_weight(option))
    )
    if fitting:
        return (FP32, BF16_O2, *fitting), ()
    reason = (
        f"called with M={uneven[0]}, not a multiple of {FP8_MULTIPLE} as FP8 grad_weight needs"
        if uneven
        else "none of the FP8 options asked for runs on this device"
    )
    return (FP32, BF16_O2), (Refusal(precision=Precision.FP8_O1, reason=reason),)


def float8_config(option: Option) -> Any:  # Any: torchao ships no types
    """Return the torchao `Float8LinearConfig` of an FP8 option.

    GEMMs in `gemms_hp` get both operands disabled; the other GEMMs keep the recipe's casts.

    Raises:
        PlanMismatchError: the option is not FP8, or its recipe is one torchao does not have.
    """
    if option.recipe not in APPLICABLE_RECIPES:
        names = ", ".join(APPLICABLE_RECIPES)
        raise PlanMismatchError(
            f"torchao applies the FP8 recipes {names}, but the option is {option.key}; "
            "choose one of these, or export the plan to a runtime that has it"
        )
    config = import_torchao().config
    base = config.Float8LinearConfig.from_recipe_name(option.recipe.value)
    if not option.gemms_hp:
        return base
    casts = {
        name: _disabled(config, getattr(base, name)) if gemm in option.gemms_hp else own
        for gemm, names in _OPERANDS.items()
        for name in names
        for own in (getattr(base, name),)
    }
    return config.Float8LinearConfig(
        **casts, round_scales_to_power_of_2=base.round_scales_to_power_of_2
    )


def linear_refusal(module: nn.Module, cls: type[nn.Module] | None = None) -> str:
    """Return why this module cannot run in FP8 whatever its shape, or an empty string.

    torchao computes what `nn.Linear.forward` does with a plain weight, and nothing else. `cls` is
    the class to judge by when it is not the module's present one.
    """
    cls = cls or type(module)
    if not issubclass(cls, nn.Linear):
        return f"{cls.__name__} is no nn.Linear, and FP8 is for nn.Linear"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized, and torchao casts plain weights only"
    if cls.forward is not nn.Linear.forward:
        return f"{cls.__name__} has its own forward, which FP8 would replace"
    return ""


_NOT_LINEAR = {
    LayerKind.CONV: "convolution",
    LayerKind.ATTENTION: "fused attention",
    LayerKind.OTHER: "kernel for a layer of this class",
}
_OPERANDS: dict[Gemm, tuple[str, str]] = {  # the casts of torchao's config that feed each GEMM
    Gemm.OUTPUT: ("cast_config_input", "cast_config_weight"),
    Gemm.GRAD_INPUT: ("cast_config_grad_output", "cast_config_weight_for_grad_input"),
    Gemm.GRAD_WEIGHT: (
        "cast_config_input_for_grad_weight",
        "cast_config_grad_output_for_grad_weight",
    ),
}


def _disabled(config: Any, cast: Any) -> Any:  # Any: torchao ships no types
    return config.CastConfig(
        scaling_type=config.ScalingType.DISABLED,
        target_dtype=cast.target_dtype,  # torchao wants one dtype per operand, used or not
    )


def _has_fp8_grad_weight(option: Option) -> bool:
    in_bf16 = Gemm.GRAD_WEIGHT in option.gemms_hp
    return option.is_fp8 and not in_bf16 and option.recipe is not Recipe.ROWWISE_WITH_GW_HP


def _shape_refusal(*, kind: LayerKind, gemm: GemmShape | None, support: Fp8Support) -> str:
    if kind is not LayerKind.LINEAR:
        what = _NOT_LINEAR.get(kind, f"{kind.value} layer")
        return f"PyTorch has no FP8 {what}; FP8 is for nn.Linear"
    if gemm is None:
        return "the step did not call it, so the shape of its GEMMs is not known"
    for axis, size in (("K", gemm.K), ("N", gemm.N)):
        if size % FP8_MULTIPLE:
            return f"{axis}={size} is not a multiple of {FP8_MULTIPLE}, which FP8 GEMMs need"
    if not support.recipes:
        return support.reason
    return ""


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
    linear = nn.Linear(64, 48, bias=False, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight_NK)
    float8_linear = import_torchao().float8_linear
    layer = float8_linear.Float8Linear.from_float(linear, float8_config(fp8_option(recipe)))
    run = layer if compiler is None else compiler(layer)
    x = x_MK.to(device, torch.bfloat16).requires_grad_()
    watch = _KernelWatch({64: Gemm.OUTPUT, 48: Gemm.GRAD_INPUT, 32: Gemm.GRAD_WEIGHT})
    watched = watch if compiler is None else contextlib.nullcontext()
    with torch.autocast(device.type, enabled=False), torch.enable_grad(), watched:
        y = run(x)
        y.backward(grad_MN.to(device, torch.bfloat16))
    x_64, w_64, g_64 = x_MK.double(), weight_NK.double(), grad_MN.double()
    results = {
        Gemm.OUTPUT: _relative_error(y, x_64 @ w_64.t()),  # [M, K] @ [K, N]
        Gemm.GRAD_INPUT: _relative_error(x.grad, g_64 @ w_64),  # [M, N] @ [N, K]
        Gemm.GRAD_WEIGHT: _relative_error(layer.weight.grad, g_64.t() @ x_64),  # [N, M] @ [M, K]
    }
    return RecipeErrors(results, watch.errors)


def _octaves(count: int) -> torch.Tensor:
    return 2.0 ** (torch.arange(count) % 5 - 2)


class _KernelWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Compares every `_scaled_mm` with FP64; the inner dimension tells which GEMM it is."""

    def __init__(self, gemms: Mapping[int, Gemm]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.gemms = gemms
        self.errors: dict[Gemm, float] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Call `func`; subclasses are asked to take theirs apart first."""
        if any(kind not in (torch.Tensor, nn.Parameter) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._scaled_mm:
            names = (argument.name for argument in func._schema.arguments)
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            self.errors[self.gemms[args[0].shape[-1]]] = _kernel_error(result, given)
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
