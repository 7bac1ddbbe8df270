"""`--keep GLOB=PRECISION[:RECIPE]` -> which options each layer may still take.

A glob matches whole layer names (`*` also crosses dots), never a part of one. `fp8_o1` without a
recipe leaves every recipe open.
"""

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from autoprec.errors import InfeasibleError, RecordError
from autoprec.records import LayerSpec, Option, Precision
from autoprec.search.costs import Costs


@dataclass(frozen=True)
class Keep:
    """One `--keep`, as given and as read; `option` is None where any recipe will do."""

    text: str
    glob: str
    precision: Precision
    option: Option | None

    def matches(self, name: str) -> bool:
        """Whether the layer of that name is meant."""
        return name == self.glob or fnmatch.fnmatchcase(name, self.glob)

    def allows(self, option: Option) -> bool:
        """Whether an option is what was asked for."""
        return option == self.option if self.option else option.precision is self.precision


def parse_keep(text: str) -> Keep:
    """Return the keep that a text like `lm_head=bf16_o2` stands for.

    Raises:
        RecordError: it has no `=`, or names no precision or recipe.
    """
    glob, separator, key = text.rpartition("=")
    if not separator or not glob:
        raise RecordError(
            f"--keep must be GLOB=PRECISION[:RECIPE], but it is {text!r}; "
            "write e.g. 'lm_head=bf16_o2'"
        )
    try:
        if key == Precision.FP8_O1:
            return Keep(text, glob, Precision.FP8_O1, None)
        option = Option.parse(key)
    except ValueError as error:
        names = ", ".join(precision.value for precision in Precision)
        raise RecordError(
            f"--keep must name one of {names} (fp8_o1 may have a recipe, e.g. fp8_o1:rowwise), "
            f"but {text!r} names {key!r}"
        ) from error
    return Keep(text, glob, option.precision, option)


def keep_of_layers(texts: Sequence[str], costs: Costs) -> dict[str, Keep]:
    """Return the keep of every layer that has one, checked against what the layer can take.

    Raises:
        RecordError: a glob matches no layer, or a text cannot be read.
        InfeasibleError: two keeps contradict each other, or a layer cannot take what is asked.
    """
    found: dict[str, Keep] = {}
    for keep in (parse_keep(text) for text in texts):
        indices = [i for i, layer in enumerate(costs.layers) if keep.matches(layer.name)]
        if not indices:
            raise RecordError(_no_match(keep, [layer.name for layer in costs.layers]))
        for index in indices:
            layer = costs.layers[index]
            other = found.get(layer.name)
            if other is not None and (other.precision, other.option) != (
                keep.precision,
                keep.option,
            ):
                raise InfeasibleError(
                    f"a layer is kept in one precision, but {layer.name!r} is in both "
                    f"{other.text!r} and {keep.text!r}; drop one of them or narrow its glob"
                )
            _check_possible(keep, index, costs)
            found[layer.name] = keep
    return found


def _check_possible(keep: Keep, index: int, costs: Costs) -> None:
    if any(keep.allows(option) for option in costs.prices[index]):
        return
    layer = costs.layers[index]
    raise InfeasibleError(
        f"a kept layer must be able to take its precision, but {layer.name!r} of {keep.text!r} "
        f"cannot: {_why_not(keep, layer, costs, index)}; keep it in one of "
        f"{', '.join(option.key for option in costs.prices[index])}"
    )


def _why_not(keep: Keep, layer: LayerSpec, costs: Costs, index: int) -> str:
    missing = next((w for option, w in costs.missing[index].items() if keep.allows(option)), "")
    return missing or layer.refusal(keep.precision) or "it was neither timed nor measured in it"


def _no_match(keep: Keep, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(keep.glob.strip("*?"), names, n=3, cutoff=0.3) or names[:3]
    return (
        f"--keep {keep.text!r} must match a layer by its whole name, but no layer of the model "
        f"does; the nearest are {', '.join(near)}"
    )
