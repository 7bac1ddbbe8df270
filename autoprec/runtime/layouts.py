"""Distributed checkpoints (torch.distributed.checkpoint) between layouts of a model with a plan.

Where the FP32 values of a 16-bit layer's weight X lie differs:

    a whole model        model.X in BF16, and optimizer.state.X.master_weight
    shards of FSDP2      model.X in FP32, the shards are the masters
    no plan              model.X in FP32

A load asks for the keys of its own layout. So from the first model on that could ask for others,
torch's planner of loads is told where they lie: a master that was not saved is read from the
weight, and an FP32 weight that was saved in BF16 from its master. Files stay as torch writes them.
"""

import dataclasses
import functools
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from autoprec.common.text import first_and_more
from autoprec.errors import RecordError

logger = logging.getLogger(__name__)

MASTER = "master_weight"  # in an optimizer's state_dict()["state"][i], beside the moments
_MASTER_KEY = re.compile(rf"(?:.*\.)?state\.(.+)\.{MASTER}")  # of what X is the name
Keys = Mapping[str, Any]  # Any: what is asked for, or torch's metadata of what was saved


def read_from_any_layout(*, must_import: bool = False) -> None:
    """Let loads of distributed checkpoints find FP32 values under the keys of another layout.

    Without `must_import` only if they were imported: `apply` alone would take 0.1 s longer.
    """
    if must_import or "torch.distributed.checkpoint" in sys.modules:
        _follow_plans()


@functools.cache
def _follow_plans() -> None:
    from torch.distributed.checkpoint import default_planner as planner

    original = planner.create_default_local_load_plan

    @functools.wraps(original)
    def wrapper(state_dict: Keys, metadata: Any, strict: bool = True) -> Any:  # Any: torch's own
        held = metadata.state_dict_metadata
        sources = sources_of(state_dict, held, strict=strict)
        lent = {asked: held[source] for asked, source in sources.items()}
        known = dataclasses.replace(metadata, state_dict_metadata={**held, **lent})
        plan = original(state_dict, known, strict)  # type: ignore[arg-type]  # it changes none
        items = [_read_from(sources.get(item.storage_index.fqn), item) for item in plan.items]
        return dataclasses.replace(plan, items=items)

    planner.create_default_local_load_plan = wrapper


def sources_of(asked: Keys, held: Keys, *, strict: bool = True) -> dict[str, str]:
    """Return from which key of a checkpoint to read what is asked for, where it is another one.

    Args:
        asked: tensors by flat key, to be read into.
        held: torch's metadata of what was saved, by flat key.
        strict: whether a master that is nowhere is an error.

    Raises:
        RecordError: FP32 masters are asked for, and neither they nor the weights were saved.
    """
    wanted, saved = _masters(asked), _masters(held)
    where = _prefix({*wanted, *saved}, held)
    absent = {name: key for name, key in wanted.items() if key not in held}
    lost = [key for name, key in absent.items() if where is None or where + name not in held]
    if lost and strict:
        raise RecordError(
            "a model with a plan asks a checkpoint for FP32 masters or FP32 weights, but this one "
            f"has none that surely are these: {first_and_more(lost)}; load it before autoprec.apply"
        )
    if where is None:
        if saved.keys() - wanted.keys():
            logger.warning(
                "it is not clear which of a checkpoint's weights its FP32 masters belong to, so "
                "weights that it holds in BF16 are read as they are; call the model's part 'model'"
            )
        return {}
    sources = {key: where + name for name, key in absent.items() if where + name in held}
    low = [key for key, source in sources.items() if not _is_fp32(held[source])]
    if low:
        logger.warning(
            "a checkpoint holds no FP32 masters for %s: they start from its 16-bit weights",
            first_and_more(low),
        )
    weights = {where + name: key for name, key in saved.items()}
    for weight, master in weights.items():
        target = asked.get(weight)
        is_fp32 = isinstance(target, Tensor) and target.dtype is torch.float32
        if is_fp32 and not _is_fp32(held[weight]):
            sources[weight] = master
    return sources


def _masters(keys: Iterable[str]) -> dict[str, str]:
    """Return the keys of masters, by the names of their weights."""
    found = ((_MASTER_KEY.fullmatch(key), key) for key in keys if key.endswith(MASTER))
    return {match[1]: key for match, key in found if match}


def _prefix(names: Iterable[str], held: Keys) -> str | None:
    """Return what stands before the weights' names in their keys; None if that is not clear."""
    names = list(names)
    ends = [key for key in held if f".{key}".endswith(f".{names[0]}")] if names else []
    found = [key.removesuffix(names[0]) for key in ends]
    found = [prefix for prefix in found if all(prefix + name in held for name in names)]
    if len(found) > 1:  # an average of the weights beside them
        found = [prefix for prefix in found if f".{prefix}".endswith(".model.")]
    return found[0] if len(found) == 1 else None


def _is_fp32(saved: Any) -> bool:  # Any: torch's metadata of a tensor
    return saved.properties.dtype is torch.float32


def _read_from(source: str | None, item: Any) -> Any:  # Any: torch's ReadItem
    if source is None:
        return item
    place = dataclasses.replace(item.storage_index, fqn=source)
    return dataclasses.replace(item, storage_index=place)
