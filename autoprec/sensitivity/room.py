"""How much memory measuring may take, and in how many groups of layers it goes then.

Each group costs a reference pass and its probes again, and holds fewer of the tensors that go
through the layers. So there are as few as fit: into --memory-limit where it is given, else into one
and a half times what training takes, or what is free. Where a few layers hold most of what goes
through a model no number of groups may fit; what is recorded of all layers is then parked while the
model runs, and where that does not fit either too.
"""

import logging
from functools import partial

from autoprec.common.text import shown_bytes
from autoprec.device.memory import can_take, free_bytes
from autoprec.device.ranks import largest_over_ranks
from autoprec.errors import DeviceError
from autoprec.model.context import Context
from autoprec.model.memory import probing_bytes, sensitivity_bar, sensitivity_bytes
from autoprec.records import ModelSpec

log = logging.getLogger(__name__)

SMALL = 256 * 2**20  # bytes that no device lacks: fewer groups are faster
MARGIN = 1.1  # measured peaks were up to 7 % above predicted ones (docs/scale.md)


def plan_groups(context: Context, spec: ModelSpec) -> tuple[int, bool]:
    """Return the number of groups of layers, and whether what is recorded is parked between passes.

    A line of the log says what it takes.

    Raises:
        DeviceError: with any number of them it takes more than --memory-limit.
    """
    limit, free = context.memory_limit, free_bytes(context.device)
    bar = max(sensitivity_bar(spec), SMALL)
    room = limit or min(bar, bar if free is None else free)
    *ways, last = check_limit(context, spec)
    size, groups, is_parked = next((way for way in ways if way[0] <= room / MARGIN), last)
    text = f"sensitivity takes about {shown_bytes(size)} on {context.device}"
    if free is not None and size > free:
        log.warning("%s, and %s are free: it may not fit", text, shown_bytes(free))
    # all ranks go the same way
    most_groups, any_parked = largest_over_ranks([float(groups), float(is_parked)])
    groups, is_parked = round(most_groups), bool(any_parked)
    parked = ", parked while the model runs" if is_parked else ""
    log.info("%s at its peak, with the layers in %d groups%s", text, groups, parked)
    return groups, is_parked


def check_limit(context: Context, spec: ModelSpec) -> list[tuple[int, int, bool]]:
    """Return the ways to measure, each with its bytes, groups of layers and whether it parks.

    Raises:
        DeviceError: each of them takes more than --memory-limit.
    """
    predicted = partial(sensitivity_bytes, spec, batches=_held(context))
    ways = [(predicted(groups=n), n, False) for n in range(1, len(spec.layers) + 1)]
    ways.append((predicted(is_parked=True), 1, True))  # fewer layers would take as much then
    limit, least = context.memory_limit, min(size for size, _, _ in ways)
    if limit and least > limit:
        raise DeviceError(
            f"what tuning takes must keep within --memory-limit {shown_bytes(limit)}, but "
            f"sensitivity takes about {shown_bytes(least)} on {context.device} even with few "
            "layers at a time; raise it, or make the batch smaller"
        )
    return ways


def agreed_groups(context: Context, spec: ModelSpec, groups: int, *, is_parked: bool) -> int:
    """Return the number of groups, this one or more, for which every rank gets its memory now.

    A rank that runs out of it amid what all compute together leaves the others waiting there. So
    after the warm-up, before they begin, each asks for what probing is predicted to take. What one
    layer at a time takes is not asked for: it is tried.
    """
    most, planned = len(spec.layers), groups
    taken = partial(probing_bytes, spec, batches=_held(context), is_parked=is_parked)
    while groups < most:
        lacks = not can_take(context.device, round(MARGIN * taken(groups=groups)))
        if not any(largest_over_ranks([float(lacks)])):
            break
        groups = min(2 * groups, most)
    if groups > planned:
        log.warning("memory is short on a rank: the layers are probed in %d groups", groups)
    return groups


def _held(context: Context) -> int:
    """Return how many batches, with their reference gradients, the device holds: that in hand."""
    return int(context.device.type == "cpu")  # else the host has them
