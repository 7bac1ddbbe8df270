"""torchtitan's converter config: linears are FP8 unless a filter is part of their name.

`Float8LinearConverter` (torchtitan 0.3.0, components/quantization) converts every linear whose K
and N are multiples of 16 and whose name contains none of `filter_fqns` as a substring. So the
filters must name every other such linear, and none of them may be part of an FP8 layer's name:
"output" would also hit "layers.0.output", and nothing would say so. Where exact names cannot keep
the two apart, that is an error here. Several recipes are several converters, each of which filters
the others' layers, because a converted layer would be converted again.
"""

from autoprec.errors import PlanMismatchError
from autoprec.integrations.export.text import ascii_line, fp8_choices
from autoprec.model.options import shape_refusal
from autoprec.records import Assignment, LayerKind, Option, Plan

RESERVED = "auto_filter_small_kn"  # a word with a meaning of its own in filter_fqns


def titan_filters(plan: Plan) -> dict[Option, list[str]]:
    """Return for each FP8 option the `filter_fqns` with which exactly its layers are converted."""
    converted = [layer for layer in plan.layers if _is_converted(layer)]
    filters: dict[Option, list[str]] = {}
    for option, wanted in fp8_choices(plan).items():
        filters[option] = [layer.name for layer in converted if layer.option != option]
        for name in filters[option]:
            hit = RESERVED if name == RESERVED else next((w for w in wanted if name in w), None)
            if hit is not None:
                raise PlanMismatchError(
                    f"torchtitan filters by substring, but {ascii_line(name)!r} (not {option}) is "
                    f"part of {ascii_line(hit)!r} (which is); rename a layer, export to torchao, "
                    "or give both the same precision"
                )
    return filters


def _is_converted(layer: Assignment) -> bool:
    """Whether torchtitan would convert the layer if nothing filtered it: its sizes fit FP8."""
    weight = layer.shapes[0] if layer.shapes else ()
    fits = len(weight) != 2 or not shape_refusal(K=weight[1], N=weight[0])
    return layer.kind is LayerKind.LINEAR and fits
