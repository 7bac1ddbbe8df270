"""Every layer x option of a model on a device: time per GEMM, casts, memory.

Linears are three GEMMs and FP8 casts (`linear`). The rest is memory traffic, or the GEMM that it
amounts to:

    norm          reads and writes its input, and reads twice, writes once in the backward
    embedding     gathers rows; its gradient is dense, so the whole table is written
    conv          the GEMM [positions, in * kernel] @ [in * kernel, out]
    attention     its projections (nn.MultiheadAttention)
    other         the GEMM of its one matrix, or memory traffic where it has none or adds it

Of recurrent layers and of others (experts of a mixture, several matrices) no time is known.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autoprec.common.recipes import Gemm, Precision
from autoprec.predict.gemm import Kernel
from autoprec.predict.linear import LinearTimes, linear_times
from autoprec.predict.parallel import Parallel, gathers_fp8, parameter_share, shard_gemm, split_axis
from autoprec.records.cost import LayerTiming, Timing
from autoprec.records.devices import Machine
from autoprec.records.model import (
    Basis,
    CallSpec,
    LayerKind,
    LayerSpec,
    Option,
    ParameterSpec,
    floating_elements,
)

UNFUSED_BYTES = 2  # of a BF16 element that is read once more
MASTER_BYTES = 4  # an FP32 copy per 16-bit parameter
_STRIDE = re.compile(r"stride=\(?(\d+)")


@dataclass(frozen=True)
class Setting:
    """The device, parallelism and mode that layers are priced for."""

    machine: Machine
    parallel: Parallel
    compiled: bool
    state_ratio: float
    allow_tf32: bool = False  # of FP32 products outside of convolutions
    allow_tf32_conv: bool | None = False  # None: not known, or no cuDNN

    def fp32_kernel(self, kind: LayerKind | None = None) -> Kernel:
        """Return what a layer's FP32 GEMMs run in, or other products in FP32."""
        allowed = self.allow_tf32_conv if kind is LayerKind.CONV else self.allow_tf32
        return Kernel.TF32 if allowed else Kernel.FP32


def time_layers(
    layers: Iterable[LayerSpec], setting: Setting, savings: Mapping[str, float]
) -> tuple[LayerTiming, ...]:
    """Return one timing per option for each group of layers that cost the same.

    `savings` are the microseconds that FP8 gathers save a layer (`step.gather_savings_us`): the
    totals of its options that are not gathered in FP8 have them on top.
    """
    groups: dict[tuple[object, ...], list[LayerSpec]] = {}
    for layer in layers:
        if layer.calls:
            axis, saving = split_axis(layer, setting.parallel), savings.get(layer.name)
            key = (
                *(layer.shape_key, layer.made_by, axis, layer.options),
                *(layer.tied_to is None, saving),
            )
            groups.setdefault(key, []).append(layer)
    return tuple(
        _layer_timing(group, option, setting, saving=savings.get(group[0].name, 0.0))
        for group in groups.values()
        for option in group[0].options
    )


def unknown_time(layer: LayerSpec) -> str:
    """Return why the model knows no time of a layer, or an empty string."""
    if layer.kind is LayerKind.RECURRENT:
        return "the cost model knows no recurrent kernels"
    if layer.kind is not LayerKind.OTHER or not _matrices(layer) or _one_matrix(layer):
        return ""
    if any(len(shape) > 2 for shape in _matrices(layer)):
        return "the cost model knows no products of stacked matrices, as experts have"
    return "the cost model does not know what its matrices do"


def layer_times(layer: LayerSpec, option: Option, setting: Setting) -> LinearTimes:
    """Return a layer's times per step in microseconds, recomputed forwards included.

    All are 0 where no time is known.
    """
    summed = vars(LinearTimes()).copy()
    if unknown_time(layer):
        return LinearTimes()
    for call in layer.calls:
        for part, us in vars(_call_times(layer, call, option, setting)).items():
            summed[part] += call.count * us
    summed["output"] *= 1 + setting.parallel.recomputed
    summed["cast"] += unfused_us(layer, option, setting)
    return LinearTimes(**summed)


def unfused_us(layer: LayerSpec, option: Option, setting: Setting) -> float:
    """Return what casts of an input cost more that a kernel of its own makes, such as a fused norm.

    Published linears are compiled with a norm before them, which computes the scale as it goes; a
    kernel that a compiler cannot change leaves that to another, which reads its result once more.
    No published pair shows it, and those linears' casts are not cheaper than their weights': it may
    be nothing, and intervals reach down to that.
    """
    if not layer.made_by or not option.is_fp8 or not setting.compiled:
        return 0.0
    shapes = [(call.count, _gemm_shape(layer, call, setting.parallel)) for call in layer.calls]
    return sum(count * _traffic_us(UNFUSED_BYTES * M * K, setting) for count, (M, K, _) in shapes)


def element_bytes(option: Option) -> int:
    """Return the size of a parameter or activation of a layer with that option."""
    return 4 if option.precision is Precision.FP32 else 2


def predicted(us: float, machine: Machine, *, unsure: float = 0.0) -> Timing:
    """Return microseconds as a predicted timing with its interval; `unsure` ones may be none."""
    ms, spread = us / 1e3, math.exp(machine.time_error)
    ends = {"p20_ms": (us - unsure) / 1e3 / spread, "p80_ms": ms * spread}
    return Timing(median_ms=ms, **ends, samples=0, basis=Basis.PREDICTED)


def _layer_timing(
    group: Sequence[LayerSpec], option: Option, setting: Setting, *, saving: float
) -> LayerTiming:
    layer, machine, parallel = group[0], setting.machine, setting.parallel
    times = layer_times(layer, option, setting)
    unsure = unfused_us(layer, option, setting)
    total = times.total + (0.0 if gathers_fp8(option, parallel) else saving)
    own = layer.own_parameters
    share = parameter_share(layer, parallel) / parallel.fsdp
    size, trained = element_bytes(option), _numel(p for p in own if p.is_trainable)
    states = 4 * setting.state_ratio + (MASTER_BYTES if size == 2 else 0)
    unknown = unknown_time(layer)
    return LayerTiming(
        names=tuple(item.name for item in group),
        option=option,
        output=None if unknown else predicted(times.output, machine),
        grad_input=predicted(times.grad_input, machine) if times.grad_input else None,
        grad_weight=predicted(times.grad_weight, machine) if times.grad_weight else None,
        cast=None if unknown else predicted(times.cast, machine, unsure=unsure),
        total=None if unknown else predicted(total, machine, unsure=unsure),
        unknown=unknown,
        parameter_bytes=round(size * _numel(own) * share),
        gradient_bytes=round(size * trained * share),
        optimizer_bytes=round(states * trained * share),
        activation_bytes=round(size * _saved_elements(layer, parallel)),
    )


def _call_times(layer: LayerSpec, call: CallSpec, option: Option, setting: Setting) -> LinearTimes:
    """Return the times of one call: of memory traffic, or of the GEMM that it amounts to."""
    has_grad_input = any(tensor.requires_grad for tensor in call.inputs)
    elements = math.prod(call.inputs[0].shape) if call.inputs else 0
    size = element_bytes(option)
    if layer.kind is LayerKind.EMBEDDING:
        width = layer.parameters[0].shape[-1] if layer.parameters[0].shape else 1
        rows = 2 * size * elements * width
        table = size * _numel(layer.parameters) / setting.parallel.tp
        back = 0.0 if layer.is_frozen else _traffic_us(rows + table, setting)
        return LinearTimes(output=_traffic_us(rows, setting), grad_weight=back)
    is_other = layer.kind not in (LayerKind.LINEAR, LayerKind.CONV, LayerKind.ATTENTION)
    if layer.kind is LayerKind.NORM or (is_other and _is_elementwise(layer)):
        moved = size * elements / setting.parallel.tp
        back = _traffic_us(3 * moved, setting) if has_grad_input else 0.0
        return LinearTimes(output=_traffic_us(2 * moved, setting), grad_input=back)
    runs = {Gemm.GRAD_INPUT: has_grad_input, Gemm.GRAD_WEIGHT: not layer.is_frozen}
    gemms = [gemm for gemm in Gemm if runs.get(gemm, True)]
    shape = _gemm_shape(layer, call, setting.parallel)
    return linear_times(
        setting.machine,
        *shape,
        option,
        compiled=setting.compiled,
        gemms=gemms,
        fp32=setting.fp32_kernel(layer.kind),
    )


def _gemm_shape(layer: LayerSpec, call: CallSpec, parallel: Parallel) -> tuple[int, int, int]:
    """Return [M, K] @ [K, N] of a call's output; a 0 among them where it computes nothing."""
    shape = call.inputs[0].shape if call.inputs else ()
    tokens = math.prod(shape[:-1]) if call.inputs else 0
    if not tokens:  # none came to it, in any batch that was seen
        return 0, 0, 0
    if layer.kind is LayerKind.LINEAR:
        gemm = shard_gemm(layer, parallel)
        return tokens, gemm.K, gemm.N
    if layer.kind is LayerKind.CONV:
        weight = max((p.shape for p in layer.parameters), key=len)
        out, inner, *window = weight if len(weight) > 2 else (*weight, 1)
        stride = _STRIDE.search(layer.settings)
        step = int(stride[1]) if stride else 1
        images = shape[0] if shape else 0
        positions = images * math.prod(max(size // step, 1) for size in shape[2:])
        return positions, inner * math.prod(window), out
    if layer.kind is LayerKind.ATTENTION:
        width = shape[-1] if shape else 0
        columns = _numel(p for p in layer.parameters if len(p.shape) == 2) // max(width, 1)
        return tokens, width, columns
    return (tokens, *(_one_matrix(layer) or (0, 0)))


def _matrices(layer: LayerSpec) -> list[tuple[int, ...]]:
    return [p.matrix_shape for p in layer.parameters if len(p.matrix_shape) > 1]


def _one_matrix(layer: LayerSpec) -> tuple[int, int] | None:
    """Return K and N of a layer's only matrix, if its input is as wide as one of its sides."""
    shapes = _matrices(layer)
    width = next((call.inputs[0].shape[-1:] for call in layer.calls if call.inputs), ())
    if len(shapes) != 1 or len(shapes[0]) != 2 or not set(width) & set(shapes[0]):
        return None
    (K,), (rows, columns) = width, shapes[0]
    return K, (rows if columns == K else columns)


def _is_elementwise(layer: LayerSpec) -> bool:
    """Whether it has no matrix, or one that can only be added: its output is as its input."""
    found = _one_matrix(layer)
    if found is None:
        return not _matrices(layer)
    inputs = sum(c.count * math.prod(c.inputs[0].shape) for c in layer.calls if c.inputs)
    return found[0] != found[1] and layer.output_elements == inputs


def _traffic_us(moved: float, setting: Setting) -> float:
    machine = setting.machine
    host = 0.0 if setting.compiled else machine.eager_host_us
    return max(moved / machine.bytes_per_us, machine.kernel_floor_us, host)


def _numel(parameters: Iterable[ParameterSpec]) -> int:
    return sum(p.numel for p in parameters)


def _saved_elements(layer: LayerSpec, parallel: Parallel) -> float:
    """Return the elements that the backward needs on one device: those of the layer's inputs.

    Tensor parallelism with its sequence-parallel norms splits them as it splits the work.
    """
    share = 1 / parallel.tp if layer.kind is LayerKind.NORM else parameter_share(layer, parallel)
    return (1 - parallel.recomputed) * share * floating_elements(layer.calls)
