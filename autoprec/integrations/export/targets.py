"""One entry to every export: a plan and a target's name -> the text to save or paste.

An export says exactly what the plan says about FP8, by exact names, or it is an error: an export
that is nearly right trains the wrong layers in FP8 and tells nobody (torchtitan#4008). What the
target leaves to the trainer (how BF16 and FP32 parameters are stored) is said in its first lines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from autoprec.errors import PlanMismatchError, RecordError
from autoprec.integrations.export.megatron import megatron_yaml
from autoprec.integrations.export.snippets import accelerate_snippet, torchao_snippet
from autoprec.integrations.export.text import fp8_choices, named
from autoprec.integrations.export.torchtitan import torchtitan_snippet
from autoprec.integrations.export.transformer_engine import TE_RECIPES, transformer_engine_yaml
from autoprec.records import APPLICABLE_RECIPES, LayerKind, Plan, Precision, Recipe

GEMM_KINDS = (LayerKind.LINEAR, LayerKind.CONV, LayerKind.ATTENTION, LayerKind.RECURRENT)


class ExportTarget(StrEnum):
    """What a plan can be exported to."""

    TORCHAO = "torchao"
    TORCHTITAN = "torchtitan"
    ACCELERATE = "accelerate"
    MEGATRON = "megatron"
    TRANSFORMER_ENGINE = "transformer-engine"


@dataclass(frozen=True)
class Format:
    """How a target's text is written, and which parts of a plan the target has words for.

    Attributes:
        write: makes the text of a plan that was checked against the rest of this record.
        recipes: the FP8 recipes that it knows.
        one_recipe: whether all FP8 layers must have the same one.
        gemms_hp: whether single GEMMs of an FP8 layer can stay in BF16.
        all_gather: whether FSDP can be told to gather FP8 weights.
        other_gemms: what it does with all other GEMMs, where that rules out FP32 layers.
    """

    write: Callable[[Plan], str]
    recipes: tuple[Recipe, ...] = APPLICABLE_RECIPES
    one_recipe: bool = False
    gemms_hp: bool = False
    all_gather: bool = False
    other_gemms: str = ""


FORMATS = {
    ExportTarget.TORCHAO: Format(torchao_snippet, gemms_hp=True, all_gather=True),
    ExportTarget.TORCHTITAN: Format(
        torchtitan_snippet, other_gemms="runs every other GEMM in one dtype"
    ),
    ExportTarget.ACCELERATE: Format(
        accelerate_snippet,
        one_recipe=True,
        all_gather=True,
        other_gemms="runs every other GEMM under BF16 autocast",
    ),
    ExportTarget.MEGATRON: Format(
        megatron_yaml,
        recipes=(Recipe.TENSORWISE,),
        other_gemms="chooses between FP8 and BF16",
    ),
    ExportTarget.TRANSFORMER_ENGINE: Format(
        transformer_engine_yaml,
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
    if to not in list(ExportTarget):
        raise RecordError(
            f"--to must be one of {', '.join(ExportTarget)}, but it is {to!r}; choose one of these"
        )
    target = FORMATS[ExportTarget(to)]
    _check_layers(plan, to)
    _check_options(plan, to, target)
    _check_rest(plan, to, target)
    return target.write(plan)


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


def _check_options(plan: Plan, to: str, target: Format) -> None:
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


def _check_rest(plan: Plan, to: str, target: Format) -> None:
    """Refuse FP8 all-gathers and FP32 layers with a GEMM where the target has neither."""
    if plan.fp8_all_gather and not target.all_gather:
        raise PlanMismatchError(
            f"{to} cannot be told to gather FP8 weights, but this plan says fp8_all_gather; "
            "export to torchao or accelerate, or set it to false in the plan"
        )
    fp32 = [x.name for x in plan.layers if x.precision is Precision.FP32 and x.kind in GEMM_KINDS]
    if fp32 and target.other_gemms:
        raise PlanMismatchError(
            f"{to} {target.other_gemms}, but the plan has {named(fp32)} in fp32; set "
            "these to bf16_o2 in the plan, or use autoprec.apply"
        )
