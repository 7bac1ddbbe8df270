"""What a training step and each stage of tuning take of one device's memory: predicted, in bytes.

A step in FP32 with an optimizer of r states per parameter (2 for Adam), n parameters, s bytes that
autograd keeps from forward for backward:

    weights 4n + states 4rn + the larger of  s, and two tensors more   in backward
                                             gradients 4n              in the optimizer's step

Where backward comes to a tensor, what was kept until that one is there, and the gradients of an
output and of an input of its size: of logits, or of attention's scores. BF16 O2 keeps BF16 weights
and gradients beside FP32 masters and half of s. Everything comes from the captured model, so that
it is known before a stage starts; tests hold it against measured peaks (docs/scale.md).
"""

from dataclasses import dataclass
from typing import Self

from autoprec.records import LayerSpec, ModelSpec

FP32_BYTES = 4
BF16_BYTES = 2
PROBED_BYTES = 4.5  # per layer-I/O element of a group: 4 of the reference, and some of the probe
REPLAYED_BYTES = 8  # per layer-I/O element of the widest layer that is replayed whole
CHUNK_BYTES = 12  # of the rows that a linear takes at a time: six tensors of inputs or outputs
PRODUCT_BYTES = 12  # per element of the largest parameter: three tensors
CHUNKS = 64
SMALLEST_CHUNK = 1 << 13  # elements
SAVED_BYTES = 3.3  # per layer-I/O element, where the capture did not see what autograd keeps


@dataclass(frozen=True)
class ModelSize:
    """What decides the memory of a model's training, on one device."""

    trainable: int  # elements of the parameters that are trained
    frozen: int  # of the others
    largest: int  # of the largest parameter: what an operation makes beside it is of its size
    states: float  # optimizer state elements per trainable one
    elements: int  # the floating inputs and outputs of all layers in one step
    saved: int  # the bytes that autograd keeps from forward for backward in FP32
    backward: int  # the most of these, and of the gradients that are there with them

    @classmethod
    def of(cls, spec: ModelSpec) -> Self:
        """Return the size of a captured model on one rank, of those that divide its weights.

        A layer is whole while it runs, so the largest parameter is too.
        """
        held = {True: 0, False: 0}
        largest = 0
        for parameter in spec.parameters():
            held[parameter.is_trainable] += parameter.held_numel
            largest = max(largest, parameter.numel)
        of_layers = [io_elements(layer) for layer in spec.layers]
        elements, states = sum(of_layers), spec.optimizer_state_numel_ratio
        saved = round(SAVED_BYTES * elements) if spec.saved_bytes is None else spec.saved_bytes
        backward = spec.backward_bytes
        if backward is None:
            backward = saved + FP32_BYTES * max(of_layers, default=0) // 2
        backward = max(saved, backward)
        return cls(held[True], held[False], largest, states, elements, saved, backward)

    @property
    def parameters(self) -> int:
        """All parameters' elements."""
        return self.trainable + self.frozen


def io_elements(layer: LayerSpec) -> int:
    """Return the elements of a layer's floating inputs and outputs in one step, over all calls."""
    inputs, outputs = layer.input_elements, layer.output_elements
    return inputs + (inputs if outputs is None else outputs)


def step_bytes(spec: ModelSpec, *, is_16_bit: bool = False) -> int:
    """Return the peak of a training step: FP32, or BF16 O2 (FP8 O1 stores and saves the same)."""
    size = ModelSize.of(spec)
    weight = BF16_BYTES if is_16_bit else FP32_BYTES
    held = weight * size.parameters + FP32_BYTES * size.states * size.trainable
    if is_16_bit:  # FP32 masters, and the gradient of the master while it steps
        held += FP32_BYTES * size.trainable
    stepping = weight * size.trainable + FP32_BYTES * size.largest  # gradients, one on its way
    backward = size.backward * weight / FP32_BYTES
    return round(held + max(backward, stepping))


def sensitivity_bytes(
    spec: ModelSpec, *, groups: int = 1, batches: int = 1, is_parked: bool = False
) -> int:
    """Return the peak of measuring sensitivity with the layers in so many groups.

    It is that of the warm-up, a training step, or of probing; see `probing_bytes`.
    """
    size = ModelSize.of(spec)
    held = FP32_BYTES * (size.parameters + min(size.states, 1.0) * size.trainable)
    probing = probing_bytes(spec, groups=groups, batches=batches, is_parked=is_parked)
    return max(step_bytes(spec), round(held) + probing)


def probing_bytes(
    spec: ModelSpec, *, groups: int = 1, batches: int = 1, is_parked: bool = False
) -> int:
    """Return what probing takes beyond the weights and the optimizer's second moment.

    `batches` is how many of them, with their reference gradients, the device holds: the one in hand
    on a CPU, none where the host keeps them. Beside them the larger of two:

        probe     the weights before they moved, and x and g of a group (both elsewhere where they
                  are parked); what autograd keeps; and g again under the probe (elsewhere too)
        products  x and g of a group twice, and one layer's replays, of a linear some rows at a
                  time; where they are parked those of one layer, which is replayed beside x and g
    """
    size = ModelSize.of(spec)
    of_layer = {layer.name: io_elements(layer) for layer in spec.layers}
    held = batches * (FP32_BYTES * size.trainable + (spec.batch_bytes or 0))
    probe: float = size.backward
    chunk = min(chunk_elements(spec), max(of_layer.values(), default=0))
    linears = {layer.name for layer in spec.layers if layer.gemm is not None}
    most = max((of_layer[name] for name in linears), default=0)
    replayed = max((of_layer[name] for name in of_layer.keys() - linears), default=0)
    if is_parked:
        products = max(
            (REPLAYED_BYTES + FP32_BYTES) * replayed, 2 * FP32_BYTES * most + CHUNK_BYTES * chunk
        )
    else:
        group = max(sum(of_layer[name] for name in names) for names in layer_groups(spec, groups))
        probe += FP32_BYTES * size.trainable + PROBED_BYTES * group
        products = 2 * FP32_BYTES * group + max(REPLAYED_BYTES * replayed, CHUNK_BYTES * chunk)
    return round(held + max(probe, products + PRODUCT_BYTES * size.largest))


def sensitivity_bar(spec: ModelSpec) -> int:
    """Return the bytes that sensitivity takes at most where nothing else is asked for.

    One and a half times what training takes with AdamW in FP32: 24 bytes per parameter against 16,
    6 bytes per layer-I/O element against 3.3 to 4.
    """
    size = ModelSize.of(spec)
    return 24 * size.parameters + 6 * size.elements


def layer_groups(spec: ModelSpec, count: int) -> list[tuple[str, ...]]:
    """Return the layers' names in at most `count` groups of neighbours with alike layer I/O."""
    total = sum(map(io_elements, spec.layers))
    groups: dict[int, list[str]] = {}
    before = 0
    for layer in spec.layers:
        own = io_elements(layer)
        middle = (before + own / 2) / max(total, 1)
        groups.setdefault(min(int(middle * count), count - 1), []).append(layer.name)
        before += own
    return [tuple(names) for names in groups.values()]


def chunk_elements(spec: ModelSpec) -> int:
    """Return the elements of a layer's I/O to work on at a time: few beside all layers'."""
    return max(sum(map(io_elements, spec.layers)) // CHUNKS, SMALLEST_CHUNK)
