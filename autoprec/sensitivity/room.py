"""How much memory measuring may take, and in how many groups of layers it goes then.

Each group costs a reference pass and its probes again, and holds fewer of the tensors that go
through the layers. So there are as few as fit: into --memory-limit where it is given, else into one
and a half times what training takes, or what is free.
"""

import logging
from functools import partial

from autoprec.common.text import shown_bytes
from autoprec.device.memory import free_bytes
from autoprec.device.ranks import largest_over_ranks
from autoprec.errors import DeviceError
from autoprec.model.context import Context
from autoprec.model.memory import sensitivity_bar, sensitivity_bytes
from autoprec.records import ModelSpec

log = logging.getLogger(__name__)

WORTH = 1.05  # how far above the least a peak may be where even that is too much
MARGIN = 1.1  # measured peaks were up to 7 % above predicted ones (docs/scale.md)


def plan_groups(context: Context, spec: ModelSpec, *, gradients: int) -> int:
    """Return the number of groups of layers; a line of the log says what it takes.

    `gradients` is how many reference gradients the device will hold.

    Raises:
        DeviceError: with any number of them it takes more than --memory-limit.
    """
    limit, free = context.memory_limit, free_bytes(context.device)
    bar = sensitivity_bar(spec)
    room = limit or min(bar, bar if free is None else free)
    counts = range(1, len(spec.layers) + 1)
    predicted = partial(sensitivity_bytes, spec, gradients=gradients)
    sizes = [predicted(groups=groups) for groups in counts]
    # where nothing fits, more groups than help are a waste
    most = max(room / MARGIN, WORTH * min(sizes))
    groups, size = next(pair for pair in zip(counts, sizes, strict=True) if pair[1] <= most)
    text = f"sensitivity takes about {shown_bytes(size)} on {context.device}"
    if limit and min(sizes) > limit:
        raise DeviceError(
            f"what tuning takes must keep within --memory-limit {shown_bytes(limit)}, but {text} "
            "even with few layers at a time; raise it, or make the batch smaller"
        )
    if free is not None and size > free:
        log.warning("%s, and %s are free: it may not fit", text, shown_bytes(free))
    groups = round(max(largest_over_ranks([float(groups)])))  # all ranks go the same way
    log.info("%s at its peak, with the layers in %d groups", text, groups)
    return groups
