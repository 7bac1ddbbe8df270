"""`--keep GLOB=PRECISION[:RECIPE]` -> which options each layer may still take.

A glob matches whole layer names (`*` also crosses dots), never a part of one, and means those of
them that can take the precision. `fp8_o1` without a recipe leaves every recipe open. Checked as
early as can be: `parse_keep` needs the text alone, `resolve_keep` the captured model; `match_keeps`
is the rule that both that and the search's problem apply.
"""

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from autoprec.common.grouping import grouped
from autoprec.common.text import first_and_more
from autoprec.errors import InfeasibleError, RecordError
from autoprec.records import LayerSpec, ModelSpec, Option, Precision
from autoprec.records.model import with_gemms_hp


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


@dataclass(frozen=True)
class Keeps:
    """The keep of every layer that has one, by name; `notes` say which layers could not."""

    of_layer: Mapping[str, Keep] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
        option = None if key == Precision.FP8_O1 else Option.parse(key)
    except ValueError as error:
        names = ", ".join(precision.value for precision in Precision)
        raise RecordError(
            f"--keep must name one of {names} (fp8_o1 may have a recipe, e.g. fp8_o1:rowwise), "
            f"but {text!r} names {key!r}"
        ) from error
    return Keep(text, glob, option.precision if option else Precision.FP8_O1, option)


def resolve_keep(
    texts: Sequence[str],
    spec: ModelSpec,
    *,
    options: Sequence[Option] | None = None,
    gemms_hp: bool = True,
) -> Keeps:
    """Return the layers of a captured model that are fixed, and the precision of each.

    Args:
        texts: each as given to `--keep`.
        spec: the model as captured on the target, or retargeted to it.
        options: the FP8 options that will be considered; None: all that the layers list.
        gemms_hp: whether those with some GEMMs kept in BF16 will be considered too.

    Raises:
        RecordError: a glob matches no layer, or a text cannot be read.
        InfeasibleError: no matched layer can take what is asked, or two texts contradict.
    """

    def refusal(keep: Keep, index: int) -> str:
        layer = spec.layers[index]
        recipes = None if options is None else {option.recipe for option in options}
        # FP8 only in what will be considered
        own = [o for o in layer.options if recipes is None or not o.is_fp8 or o.recipe in recipes]
        if any(keep.allows(option) for option in (with_gemms_hp(own) if gemms_hp else own)):
            return ""
        if found := layer.refusal(keep.precision):
            return found
        among = ", ".join(option.key for option in own if option.is_fp8) or "no FP8 option"
        return f"{keep.option or keep.precision} is not considered, only {among} (see --recipes)"

    return match_keeps(texts, spec.layers, refusal)


def match_keeps(
    texts: Sequence[str], layers: Sequence[LayerSpec], refusal: Callable[[Keep, int], str]
) -> Keeps:
    """Return the keep of each layer that has one and can take it.

    `refusal` says why the layer of an index cannot be kept so; "" where it can.

    Raises:
        RecordError, InfeasibleError: as `resolve_keep`.
    """
    found: dict[str, Keep] = {}
    notes: list[str] = []
    for keep in map(parse_keep, texts):
        refusals = {
            layer.name: refusal(keep, index)
            for index, layer in enumerate(layers)
            if keep.matches(layer.name)
        }
        if not refusals:
            raise RecordError(_no_match(keep, [layer.name for layer in layers]))
        refused = {name: reason for name, reason in refusals.items() if reason}
        # a glob means those of its layers that can take the precision; none is an error
        taking = [name for name in refusals if name not in refused]
        if not taking:
            raise InfeasibleError(
                f"--keep {keep.text!r} must match a layer that can take "
                f"{keep.option or keep.precision}, but {_reasons(refused)}; name another layer or "
                "precision"
            )
        if refused:
            notes.append(
                f"--keep {keep.text!r} fixes {len(taking)} of the {len(refusals)} layers that it "
                f"matches; {_reasons(refused)}"
            )
        for name in taking:
            first = found.setdefault(name, keep)
            if (first.precision, first.option) != (keep.precision, keep.option):
                raise InfeasibleError(
                    f"a layer is kept in one precision, but {name!r} is in both {first.text!r} and "
                    f"{keep.text!r}; drop one of them or narrow its glob"
                )
    return Keeps(found, tuple(notes))


def _reasons(refused: Mapping[str, str]) -> str:
    """Return the layers and why they cannot, those of one reason together."""
    names = grouped((reason, name) for name, reason in refused.items())
    said = [f"{first_and_more(same)} cannot ({reason})" for reason, same in names.items()]
    return first_and_more(said, most=2, separator="; ")


def _no_match(keep: Keep, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(keep.glob.strip("*?"), names, n=3, cutoff=0.3) or names[:3]
    return (
        f"--keep {keep.text!r} must match a layer by its whole name, but no layer of the model "
        f"does; the nearest are {', '.join(near)}"
    )
