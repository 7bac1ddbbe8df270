"""A model -> how many attention heads its projections are made of, where the model says so.

Asked are the modules around a layer, the nearest first: their own attributes, then those of their
`config` (transformers). Nothing is guessed from shapes, since they tell no head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# transformers (its configs map their own names to the first), timm, torchtitan, nanoGPT, diffusers
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")


@dataclass(frozen=True)
class HeadCounts:
    """The heads of one attention; `key_value` are fewer where queries share them."""

    heads: int
    key_value: int


def head_counts(model: nn.Module, name: str) -> HeadCounts | None:
    """Return the head counts that hold for the layer of that name, or None."""
    for source in _sources(model, name):
        heads = _count(source, HEADS)
        if heads:
            return HeadCounts(heads, _count(source, KEY_VALUE_HEADS) or heads)
    return None


def _sources(model: nn.Module, name: str) -> Iterator[object]:
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        module = model.get_submodule(parent)
        yield module
        yield getattr(module, "config", None)


def _count(source: object, names: tuple[str, ...]) -> int | None:
    found = (getattr(source, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 0), None)
