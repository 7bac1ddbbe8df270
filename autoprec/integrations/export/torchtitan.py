"""torchtitan's converter config: linears are FP8 unless a filter is part of their name.

`Float8LinearConverter` (torchtitan 0.3.0, components/quantization) converts every linear whose K
and N are multiples of 16 and whose name contains none of `filter_fqns` as a substring. So the
filters must name every other such linear, and none of them may be part of an FP8 layer's name:
"output" would also hit "layers.0.output", and nothing would say so. Where exact names cannot keep
the two apart, that is an error here. Several recipes are several converters, each of which filters
the others' layers, because a converted layer would be converted again.
"""

from autoprec.errors import PlanMismatchError
from autoprec.integrations.export.text import (
    ascii_line,
    fp8_choices,
    header,
    left_to_trainer,
    linears,
    quoted,
)
from autoprec.model.options import shape_refusal
from autoprec.records import Assignment, Option, Plan, Recipe

RESERVED = "auto_filter_small_kn"  # a word with a meaning of its own in filter_fqns


def torchtitan_snippet(plan: Plan) -> str:
    """Return the converter configs that convert exactly the plan's FP8 layers.

    Raises:
        PlanMismatchError: substring filters cannot tell the plan's layers apart.
    """
    blocks = []
    for option, names in fp8_choices(plan).items():
        filters = titan_filters(plan, option)
        blocks.append(
            "    Float8LinearConverter.Config(\n"
            f"        recipe_name={option.recipe.value if option.recipe else ''!r},\n"
            f"        # {len(names)} x {option}: all linears whose name has none of these in it\n"
            f"        filter_fqns=[\n{quoted(filters, indent=12)}        ],\n"
            "    ),\n"
        )
    return (
        header(
            plan,
            "In your torchtitan config: model_spec=model_registry(FLAVOR, converters=CONVERTERS).",
            "The names must be all the linears of the model: torchtitan passes over a filter that",
            "matches nothing, and converts a linear that no filter names.",
            *_recipe_notes(plan),
            left_to_trainer(plan),
        )
        + "from torchtitan.components.quantization import Float8LinearConverter\n"
        + f"\nCONVERTERS = [\n{''.join(blocks)}]\n"
    )


def titan_filters(plan: Plan, option: Option) -> list[str]:
    """Return `filter_fqns` with which exactly the layers of `option` are converted.

    Raises:
        PlanMismatchError: a name that must be filtered is part of one that must not.
    """
    wanted = fp8_choices(plan)[option]
    others = [
        layer.name for layer in linears(plan) if layer.option != option and _is_converted(layer)
    ]
    for name in others:
        hit = RESERVED if name == RESERVED else next((w for w in wanted if name in w), None)
        if hit is not None:
            raise PlanMismatchError(
                f"torchtitan filters by substring, but {ascii_line(name)!r} (not {option}) is part "
                f"of {ascii_line(hit)!r} (which is); rename a layer, export to torchao, or give "
                "both the same precision"
            )
    return others


def _is_converted(layer: Assignment) -> bool:
    """Whether torchtitan would convert the layer if nothing filtered it: its sizes fit FP8."""
    weight = layer.shapes[0] if layer.shapes else ()
    return len(weight) != 2 or not shape_refusal(K=weight[1], N=weight[0])


def _recipe_notes(plan: Plan) -> list[str]:
    if all(option.recipe is not Recipe.TENSORWISE for option in fp8_choices(plan)):
        return []
    return [
        "torchtitan 0.3.0 documents no tensorwise recipe (torchtitan#3127): check your version."
    ]
