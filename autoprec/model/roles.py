"""What a linear layer does in a transformer, read from its name: tensor parallelism depends on it.

    column  q, k, v, gate, up, head   the weight's out-features are split; input gathered
    row     attention output, down    the weight's in-features are split; output summed

Names are those of the usual libraries; a layer with none of them is left whole on every device.

How many attention heads a projection is made of, the modules around it say, the nearest first:
their own attributes, then those of their `config` (transformers). Shapes tell no head size.
"""

import warnings
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

from autoprec.records.model import LayerKind, LayerSpec

if TYPE_CHECKING:
    from torch import nn

# transformers (its configs map their own names to the first), timm, torchtitan, nanoGPT, diffusers
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")

ADAPTED = ".base_layer"  # what PEFT names the linear that it adapts


class Role(StrEnum):
    """A linear's part in a block."""

    QUERY = "query"
    KEY_VALUE = "key_value"
    QKV = "qkv"
    ATTENTION_OUT = "attention_out"
    UP = "up"
    DOWN = "down"
    HEAD = "head"
    OTHER = "other"


_NAMES: Mapping[Role, frozenset[str]] = {
    role: frozenset(names.split())
    for role, names in {
        Role.QUERY: "q_proj wq query q to_q q_lin linear_q",
        Role.KEY_VALUE: "k_proj v_proj wk wv key value k v kv_proj wkv kv to_k to_v k_lin v_lin",
        Role.QKV: "qkv wqkv qkv_proj c_attn query_key_value in_proj attn_qkv to_qkv linear_qkv",
        Role.ATTENTION_OUT: "o_proj wo out_proj attn_out to_out o out_lin",
        Role.UP: (
            "gate_proj up_proj gate_up_proj w1 w3 w13 c_fc fc1 up gate fc_in lin1 "
            "dense_h_to_4h linear_fc1 wi wi_0 wi_1 up_project"
        ),
        Role.DOWN: "down_proj w2 fc2 down fc_out lin2 dense_4h_to_h linear_fc2 down_project",
        Role.HEAD: "lm_head output head embed_out unembed logits classifier",
    }.items()
}
_PROJECTIONS = frozenset(("c_proj", "proj", "dense"))  # attention's or the MLP's, by the parent
_MLP_PARENTS = ("mlp", "ffn", "feed", "fc")
COLUMN_ROLES = frozenset((Role.QUERY, Role.KEY_VALUE, Role.QKV, Role.UP, Role.HEAD))
KEY_VALUE_ROLES = frozenset((Role.KEY_VALUE, Role.QKV))  # split by the key/value heads
HEAD_ROLES = KEY_VALUE_ROLES | {Role.QUERY, Role.ATTENTION_OUT}  # split by attention heads
ROW_ROLES = frozenset((Role.ATTENTION_OUT, Role.DOWN))


def role_of(layer: LayerSpec) -> Role:
    """Return the part that a linear plays, by the last part of its name."""
    if layer.kind is not LayerKind.LINEAR:
        return Role.OTHER
    *path, last = own_name(layer).lower().split(".")
    if last.isdigit() and path and path[-1] in _NAMES[Role.ATTENTION_OUT]:
        return Role.ATTENTION_OUT  # diffusers: a projection and its dropout
    if last in _PROJECTIONS:
        parent = path[-1] if path else ""
        if parent.isdigit():  # of a `nn.Sequential`, whose names do not tell
            return Role.OTHER
        return Role.DOWN if any(word in parent for word in _MLP_PARENTS) else Role.ATTENTION_OUT
    return next((role for role, names in _NAMES.items() if last in names), Role.OTHER)


def own_name(layer: LayerSpec) -> str:
    """Return a layer's name where no adapter wraps it."""
    return layer.name.removesuffix(ADAPTED)


def attention_heads(model: "nn.Module", layer: LayerSpec) -> int | None:
    """Return the number of heads that split a projection; None where its model does not tell."""
    role = role_of(layer)
    counts = head_counts(model, layer.name) if role in HEAD_ROLES else None
    if counts is None or layer.gemm is None:
        return None
    heads, key_value_heads = counts
    count = key_value_heads if role in KEY_VALUE_ROLES else heads
    size = layer.gemm.K if role in ROW_ROLES else layer.gemm.N
    return None if size % count else count


def head_counts(model: "nn.Module", name: str) -> tuple[int, int] | None:
    """Return the heads of queries, and of keys and values, that hold for the layer of that name."""
    for source in _sources(model, name):
        if heads := _count(source, HEADS):
            return heads, _count(source, KEY_VALUE_HEADS) or heads
    return None


def _sources(model: "nn.Module", name: str) -> Iterator[object]:
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        module = model.get_submodule(parent)
        yield module
        yield getattr(module, "config", None)


def _count(source: object, names: tuple[str, ...]) -> int | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' models warn that their config has it
        found = [getattr(source, name, None) for name in names]
    return next((n for n in found if isinstance(n, int) and n > 0), None)
