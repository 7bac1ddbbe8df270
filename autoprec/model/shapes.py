"""The shapes that layers are called with: in one step, in other batches, and on other ranks.

FP8 wants an M of every call that is a multiple of 16, and times are for the mix of batches that a
run has, so more is looked at than one step of one process.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprec.device.ranks import gathered, local_part
from autoprec.errors import CaptureError
from autoprec.model.kinds import is_linear
from autoprec.model.layers import ModelLayers
from autoprec.model.options import CONVERTED
from autoprec.model.recording import Call, Gradients, recorded_calls
from autoprec.records.model import BatchMix, TensorSpec
from autoprec.workload.functions import Batch, Workload, tensors_in
from autoprec.workload.written import dtype_name

SCANNED_BATCHES = 16  # batches looked at for other shapes, e.g. a short last one


@contextmanager
def recorded_shapes(layers: ModelLayers) -> Iterator[dict[str, list[Call]]]:
    """Record the shapes of every layer's calls while the context is open; no tensor is kept.

    On leaving, the calls of layers that were moved from BF16 to another dtype inside say so.
    """
    found = recorded_calls(layers.modules, keep=_tensor_spec, gradients=Gradients.NONE, merged=True)
    with found as calls, _conversions() as converted:
        yield calls
    for name, layer in layers.modules.items():
        if not converted.isdisjoint(layer.modules()):
            for call in calls[name]:
                call.obstacle = CONVERTED


@contextmanager
def _conversions() -> Iterator[set[nn.Module]]:
    """Collect the modules that are moved inside as one in BF16 would be to another dtype.

    `to`, `float`, `half` and the like end in `Module._apply`; in FP32 itself that changes nothing.
    """
    converted: set[nn.Module] = set()
    apply = nn.Module._apply

    def noted(module: nn.Module, function: Callable[[Tensor], Tensor], *more: bool) -> nn.Module:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                low = torch.empty(0, dtype=torch.bfloat16, device=parameter.device)
                if function(low).dtype is not torch.bfloat16:
                    converted.add(module)
        moved: nn.Module = apply(module, function, *more)  # type: ignore[no-untyped-call]  # torch
        return moved

    try:
        nn.Module._apply = noted  # type: ignore[method-assign]
        yield converted
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


def scan_shapes(
    layers: ModelLayers, forward: Callable[[Batch], object], batches: Sequence[Batch]
) -> tuple[tuple[BatchMix, ...], dict[str, list[Call]]]:
    """Run forward on batches whose shapes differ from the first's, such as a short last one.

    Where ranks have other shapes each runs it as often as the one that has most of them.

    Returns:
        How many of the batches have which largest M of a linear, the first's first, and the calls
        of each layer; none where all have the first's shapes.
    """
    shapes = [tuple(tuple(tensor.shape) for tensor in tensors_in(batch)) for batch in batches]
    counts = Counter(shapes)
    every = gathered(set(counts))  # of ranks with the same batches these are the same
    scanned: dict[str, list[Call]] = {name: [] for name in layers.modules}
    if len(set().union(*every)) == 1:
        return (), scanned
    mix: Counter[int] = Counter()
    for shape, count in counts.items():
        with recorded_shapes(layers) as calls:  # with gradients: a loss may take some
            forward(batches[shapes.index(shape)])
        for name, own in calls.items():
            scanned[name] += own
        linears = (c for name, c in calls.items() if is_linear(layers.modules[name]))
        mix[max((m for found in linears for m in all_tokens(found)), default=0)] += count
    for _ in range(max(map(len, every)) - len(counts)):
        forward(batches[0])
    return tuple(BatchMix(tokens=m, batches=count) for m, count in mix.items()), scanned


def joined_over_ranks(
    workload: Workload, mix: Sequence[BatchMix], calls: Mapping[str, Sequence[Call]]
) -> tuple[tuple[BatchMix, ...], dict[str, list[int]]]:
    """Return the mix of all ranks' own batches, and every M of a call on any rank.

    That is by layer, of those that are called here.

    Raises:
        CaptureError: a rank calls none of the layers that rank 0 calls.
    """
    tokens = {name: all_tokens(own) for name, own in calls.items()}
    every = gathered((workload.part.rank, mix, tokens))
    first, *others = ({name for name, own in of.items() if own} for *_, of in every)
    for number, own in enumerate(others, 1):
        if first.isdisjoint(own):
            raise CaptureError(
                "ranks must train one model on their own batches or divide its layers, but rank "
                f"{number} calls none of the layers that rank 0 calls; stages of a pipeline "
                "cannot be tuned so: tune the whole model on one rank, or shard it with FSDP2"
            )
    total: Counter[int] = Counter()
    for each in chain.from_iterable({part: own for part, own, _ in every}.values()):
        total[each.tokens] += each.batches
    joined = {n: sorted({m for *_, of in every for m in of[n]}) for n, own in tokens.items() if own}
    return tuple(BatchMix(tokens=m, batches=count) for m, count in total.items()), joined


def _tensor_spec(tensor: Tensor) -> TensorSpec:
    tensor = local_part(tensor)
    return TensorSpec(
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        dtype=dtype_name(tensor.dtype),
        requires_grad=tensor.requires_grad,
    )


def call_inputs(call: Call) -> tuple[TensorSpec, ...]:
    """Return the tensors that a layer was called with."""
    leaves = tree_leaves((call.args, call.kwargs))
    return tuple(leaf for leaf in leaves if isinstance(leaf, TensorSpec))


def all_tokens(calls: Sequence[Call]) -> list[int]:
    """Return every token count M that a linear was called with: the rows of its input."""
    shapes = [inputs[0].shape for inputs in map(call_inputs, calls) if inputs]
    return sorted({math.prod(shape) // max(shape[-1], 1) for shape in shapes} - {0})
