"""What a plan needs of one device's memory -> a sentence where it does not fit.

A predicted need is a lower bound (`predict.predict.peak_bytes`): a plan that exceeds the memory
by it does not fit, while one that just keeps within it still may not.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from autoprec.predict.parallel import Parallel, parse_parallel
from autoprec.records import Basis, Option, Profile


def memory_note(profile: Profile, options: Mapping[str, Option], need: int) -> str:
    """Return a sentence where a plan of these options does not fit, or an empty string.

    `need` is the plan's peak in bytes on one device (`Costs.memory_bytes`).
    """
    device = profile.device
    if not 0 < device.memory_bytes < need:
        return ""
    is_predicted = profile.basis is Basis.PREDICTED
    saved = sum(
        row.activation_bytes * sum(options.get(name) == row.option for name in row.names)
        for row in profile.layers
    )
    here = "make the batch smaller, recompute activations or shard the model"
    advice = _sharding(profile, need - saved, saved) if is_predicted else here
    return (
        f"does not fit in memory: the plan needs {'at least' if is_predicted else 'about'} "
        f"{_gb(need)} GB a device, {device.name} has {_gb(device.memory_bytes)} GB: {advice}"
    )


def _sharding(profile: Profile, states: int, saved: int) -> str:
    """Return the `--parallel` under which the parts that are counted fit."""
    parallel = parse_parallel(profile.parallel)
    room, full = profile.device.memory_bytes, replace(parallel, recomputed=1.0)
    ways = (
        [f"shard further ({_sharded(parallel, states / (room - saved))})"] if saved < room else []
    )
    ways += [f"recompute (--parallel {full})"] if states < room else []
    return " or ".join(ways) or f"shard further and recompute ({_sharded(full, states / room)})"


def _sharded(parallel: Parallel, factor: float) -> str:
    """Return the option that shards by at least so much more."""
    degree = 1 << max(math.ceil(math.log2(parallel.fsdp * factor)), 1)
    return f"--parallel {replace(parallel, fsdp=degree)} or more"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.0f}" if size >= 10e9 else f"{size / 1e9:.2g}"
