"""Casting whatever goes from layer to layer: tensors, and the containers that hold them."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

CASTABLE = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def cast_floating(value: Any, dtype: torch.dtype) -> Any:  # Any: whatever a module takes or gives
    """Return `value` with its floating tensors as `dtype`; `value` itself when nothing differs.

    Looks into tuples (named ones too), lists, mappings and dataclasses; other objects, such as a
    key-value cache, pass through. Containers are rebuilt, never changed in place.
    """
    if isinstance(value, Tensor):
        return value if value.dtype is dtype or value.dtype not in CASTABLE else value.to(dtype)
    if isinstance(value, PackedSequence):
        return value if value.data.dtype is dtype else value.to(dtype)
    if isinstance(value, tuple | list):
        return _cast_sequence(value, dtype)
    if isinstance(value, Mapping):
        return _cast_mapping(value, dtype)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _cast_dataclass(value, dtype)
    return value


def _cast_sequence(value: tuple[Any, ...] | list[Any], dtype: torch.dtype) -> Any:
    items = [cast_floating(item, dtype) for item in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(items)


def _cast_mapping(value: Mapping[Any, Any], dtype: torch.dtype) -> Any:
    changed = {key: cast_floating(item, dtype) for key, item in value.items()}
    if all(changed[key] is item for key, item in value.items()):
        return value
    result: Any = copy.copy(value)
    for key, item in changed.items():  # all: dynamo's copy of a dict's subclass has no items
        result[key] = item
    return result


def _cast_dataclass(value: Any, dtype: torch.dtype) -> Any:
    changed = {}
    for field in dataclasses.fields(value):
        old = getattr(value, field.name, None)
        new = cast_floating(old, dtype)
        if new is not old:
            changed[field.name] = new
    if not changed:
        return value
    result = copy.copy(value)
    for name, item in changed.items():
        object.__setattr__(result, name, item)  # frozen ones too: the copy is ours
    return result
