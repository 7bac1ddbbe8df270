"""The words in which a study shows a plan: what each role of layers is set to.

A role holds the layers that do the same thing in different blocks (one kind and shape, names that
differ in their numbers only): a few dozen names describe any depth.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprec.common.grouping import grouped
from autoprec.records import LayerSpec, Option

DIGITS = re.compile(r"\d+")
MIXED = "mixed"  # of a role whose layers differ


@dataclass(frozen=True)
class Role:
    """Layers, by index, and the keys of the options that they may have."""

    layers: tuple[int, ...]
    keys: tuple[str, ...]

    def value(self, options: Sequence[Option]) -> str:
        """Return what the layers of this role have in a plan."""
        found = {options[index].key for index in self.layers}
        return found.pop() if len(found) == 1 else MIXED


def make_roles(
    layers: Sequence[LayerSpec], allowed: Sequence[Sequence[Option]]
) -> Mapping[str, Role]:
    """Return the roles of all layers that have a choice, by name."""
    open_layers = (i for i, options in enumerate(allowed) if len(options) > 1)
    alike = grouped((alike_key(layers[index]), index) for index in open_layers)
    roles: dict[str, Role] = {}
    for indices in alike.values():
        own = DIGITS.sub("*", layers[indices[0]].name) or "(root)"
        keys = dict.fromkeys(option.key for index in indices for option in allowed[index])
        roles[own if own not in roles else f"{own} #{len(roles)}"] = Role(
            tuple(indices), (MIXED, *keys)
        )
    return roles


def alike_key(layer: LayerSpec) -> str:
    """Return what layers that do the same thing in different blocks have in common."""
    return f"{DIGITS.sub('*', layer.name)} {layer.kind} {layer.shape_key}"
