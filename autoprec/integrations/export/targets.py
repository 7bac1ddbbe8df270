"""One entry to every export: a plan and a target's name -> the text to save or paste.

An export says exactly what the plan says about FP8, by exact names, or it is an error: an export
that is nearly right trains the wrong layers in FP8 and tells nobody (torchtitan#4008). What the
target leaves to the trainer (how BF16 and FP32 parameters are stored) is said in its first lines.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autoprec.errors import PlanMismatchError, RecordError
from autoprec.integrations.export.text import fp8_choices, named, render
from autoprec.integrations.export.torchtitan import titan_filters
from autoprec.integrations.export.transformer_engine import TE_RECIPES, engine_sections
from autoprec.records import APPLICABLE_RECIPES, LayerKind, Plan, Precision, Recipe

GEMM_KINDS = (LayerKind.LINEAR, LayerKind.CONV, LayerKind.ATTENTION, LayerKind.RECURRENT)


@dataclass(frozen=True)
class Target:
    """How the text for a framework is written, and which parts of a plan it has words for."""

    template: str  # its file in templates/
    words: Callable[[Plan], Mapping[str, object]] = lambda _: {}  # what it needs beside the plan
    recipes: tuple[Recipe, ...] = APPLICABLE_RECIPES  # those that it knows
    one_recipe: bool = False  # whether all FP8 layers must have the same one
    gemms_hp: bool = False  # whether single GEMMs of an FP8 layer can stay in BF16
    all_gather: bool = False  # whether FSDP can be told to gather FP8 weights
    other_gemms: str = ""  # what it does with all other GEMMs, where that rules out FP32 layers
    has_root: bool = True  # whether it converts a model that is itself one linear layer


TARGETS = {
    "torchao": Target("torchao.py.j2", gemms_hp=True, all_gather=True),
    "torchtitan": Target(
        "torchtitan.py.j2",
        words=lambda plan: {"filters": titan_filters(plan)},
        other_gemms="runs every other GEMM in one dtype",
    ),
    "accelerate": Target(
        "accelerate.py.j2",
        one_recipe=True,
        all_gather=True,
        other_gemms="runs every other GEMM under BF16 autocast",
        has_root=False,
    ),
    "megatron": Target(
        "megatron.yaml.j2", recipes=(Recipe.TENSORWISE,), other_gemms="chooses between FP8 and BF16"
    ),
    "transformer-engine": Target(
        "transformer_engine.yaml.j2",
        words=engine_sections,
        recipes=tuple(TE_RECIPES),
        one_recipe=True,
        gemms_hp=True,
        other_gemms="chooses between FP8 and BF16",
    ),
}


def export_plan(plan: Plan, to: str) -> str:
    """Return the plan as `to` reads it: Python to paste, or a YAML file.

    Raises:
        RecordError: there is no such target.
        PlanMismatchError: the target cannot say what the plan says.
    """
    if to not in TARGETS:
        raise RecordError(
            f"--to must be one of {', '.join(TARGETS)}, but it is {to!r}; choose one of these"
        )
    target = TARGETS[to]
    _check_layers(plan, to)
    _check_options(plan, to, target)
    _check_rest(plan, to, target)
    return render(target.template, plan, **target.words(plan))


def _check_layers(plan: Plan, to: str) -> None:
    """Refuse what no target can say: no FP8 at all, FP8 of other kinds, FP8 that comes and goes."""
    if not plan.count(Precision.FP8_O1):
        raise PlanMismatchError(
            f"an export to {to} says which layers run in FP8, but this plan has none; "
            "there is nothing to export: train with BF16 as you would without FP8"
        )
    others = [x.name for x in plan.layers if x.option.is_fp8 and x.kind is not LayerKind.LINEAR]
    if others:
        raise PlanMismatchError(
            f"only linear layers run in FP8, but the plan has {named(others)} in fp8_o1; set "
            "these to bf16_o2 in the plan"
        )
    if plan.schedule:
        raise PlanMismatchError(
            f"an export to {to} holds for a whole run, but this plan switches FP8 on and off at "
            f"{len(plan.schedule)} steps; use autoprec.Guard, or remove `schedule` from the plan"
        )


def _check_options(plan: Plan, to: str, target: Target) -> None:
    """Refuse recipes and GEMMs in BF16 that the target has no word for."""
    choices = fp8_choices(plan)
    for option, names in choices.items():
        if option.recipe not in target.recipes:
            raise PlanMismatchError(
                f"{to} has the FP8 recipes {', '.join(target.recipes)}, but {named(names)} "
                f"{'has' if len(names) == 1 else 'have'} {option.recipe}; tune again with "
                f"--recipes {','.join(target.recipes)}, or export to torchao"
            )
        if option.gemms_hp and not target.gemms_hp:
            raise PlanMismatchError(
                f"{to} switches a layer's three GEMMs together, but {named(names)} "
                f"{'keeps' if len(names) == 1 else 'keep'} {', '.join(option.gemms_hp)} in BF16; "
                "export to torchao or transformer-engine"
            )
    if target.one_recipe and len({option.recipe for option in choices}) > 1:
        counts = ", ".join(f"{option} on {len(names)}" for option, names in choices.items())
        raise PlanMismatchError(
            f"{to} runs one FP8 recipe, but this plan has several ({counts}); tune again with one "
            "recipe in --recipes, or export to torchao"
        )


def _check_rest(plan: Plan, to: str, target: Target) -> None:
    """Refuse FP8 all-gathers, FP32 layers with a GEMM and a root where the target has them not."""
    if plan.fp8_all_gather and not target.all_gather:
        raise PlanMismatchError(
            f"{to} cannot be told to gather FP8 weights, but this plan says fp8_all_gather; "
            "export to torchao or accelerate, or set it to false in the plan"
        )
    fp32 = [x.name for x in plan.layers if x.precision is Precision.FP32 and x.kind in GEMM_KINDS]
    fp32 += [name for name in plan.fp32_outputs if name not in fp32]
    if fp32 and target.other_gemms:
        raise PlanMismatchError(
            f"{to} {target.other_gemms}, but the plan has {named(fp32)} in fp32; set "
            "these to bf16_o2 in the plan, or use autoprec.apply"
        )
    if plan.layers[0].name == "" and not target.has_root:
        raise PlanMismatchError(
            f"{to} converts layers inside a model, but this plan's model is itself a linear "
            "layer; put it into a module, or export to torchao"
        )
