"""Every layer x option of a model on a device: time per GEMM, casts, memory.

Linears are three GEMMs and FP8 casts (`linear`). The rest is memory traffic, or the GEMM that it
amounts to:

    norm          reads and writes its input, and reads twice, writes once in the backward
    embedding     gathers rows; its gradient is dense, so the whole table is written
    conv          the GEMM [positions, in * kernel] @ [in * kernel, out]
    attention     its projections (nn.MultiheadAttention)
    other         a GEMM with as many weights
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autoprec.predict.casts import cast_cost, fp8_gemms
from autoprec.predict.gemm import Kernel
from autoprec.predict.linear import LinearTimes, fp8_linear, plain_linear
from autoprec.predict.machine import Machine
from autoprec.predict.parallel import Parallel, gathers_fp8, parameter_share, shard_gemm
from autoprec.records.cost import LayerTiming, Timing
from autoprec.records.model import (
    Basis,
    CallSpec,
    Gemm,
    LayerKind,
    LayerSpec,
    Option,
    ParameterSpec,
    Precision,
)

MASTER_BYTES = 4  # an FP32 copy per 16-bit parameter
_STRIDE = re.compile(r"stride=\(?(\d+)")


@dataclass(frozen=True)
class Setting:
    """What layers are priced for."""

    machine: Machine
    parallel: Parallel
    compiled: bool
    state_ratio: float


@dataclass(frozen=True)
class Passes:
    """Which backward GEMMs a layer has."""

    has_grad_input: bool
    has_grad_weight: bool


def time_layers(
    layers: Iterable[LayerSpec], setting: Setting, gathers: Mapping[str, float] | None = None
) -> tuple[LayerTiming, ...]:
    """Return one timing per option for each group of layers that cost the same.

    `gathers` are the microseconds that FP8 gathers save a layer (`step.gather_savings_us`): the
    totals of its options that are not gathered in FP8 have them on top.
    """
    gathers = gathers or {}
    groups: dict[tuple[object, ...], list[LayerSpec]] = {}
    for layer in layers:
        if layer.calls:
            shard = shard_gemm(layer, setting.parallel) if layer.gemm else None
            key = (
                layer.shape_key,
                shard,
                layer.options,
                layer.tied_to is None,
                gathers.get(layer.name),
            )
            groups.setdefault(key, []).append(layer)
    return tuple(
        _layer_timing(group, option, setting, gather=gathers.get(group[0].name, 0.0))
        for group in groups.values()
        for option in group[0].options
    )


def layer_times(layer: LayerSpec, option: Option, setting: Setting) -> LinearTimes:
    """Return a layer's times per step in microseconds, recomputed forwards included."""
    price = _PRICES.get(layer.kind, _other_times)
    total = LinearTimes(0.0, 0.0, 0.0, 0.0)
    for call in layer.calls:
        times = price(layer, call, option, setting)
        total = _added(total, times, count=call.count)
    return replace(total, output=total.output * (1 + setting.parallel.recomputed))


def element_bytes(option: Option) -> int:
    """Return the size of an element of the flow in which a layer of that option lives."""
    return 4 if option.precision is Precision.FP32 else 2


def passes_of(layer: LayerSpec, call: CallSpec) -> Passes:
    """Return which gradients a call computes."""
    return Passes(any(tensor.requires_grad for tensor in call.inputs), not layer.is_frozen)


def predicted(us: float, machine: Machine) -> Timing:
    """Return microseconds as a predicted timing with its interval."""
    spread = math.exp(machine.time_error)
    ms = us / 1e3
    return Timing(
        median_ms=ms,
        p20_ms=ms / spread,
        p80_ms=ms * spread,
        samples=0,
        basis=Basis.PREDICTED,
    )


def _layer_timing(
    group: Sequence[LayerSpec], option: Option, setting: Setting, *, gather: float
) -> LayerTiming:
    layer, machine = group[0], setting.machine
    times = layer_times(layer, option, setting)
    total = times.total + (0.0 if gathers_fp8(option, setting.parallel) else gather)
    passes = [passes_of(layer, call) for call in layer.calls]
    has_grad_input = any(p.has_grad_input for p in passes) and times.grad_input > 0
    has_grad_weight = any(p.has_grad_weight for p in passes) and times.grad_weight > 0
    own = [p for p in layer.parameters if p.shared_with is None]
    share = parameter_share(layer, setting.parallel) / setting.parallel.fsdp
    size, trained = element_bytes(option), _numel(p for p in own if p.is_trainable)
    states = 4 * setting.state_ratio + (MASTER_BYTES if size == 2 else 0)
    return LayerTiming(
        names=tuple(item.name for item in group),
        option=option,
        output=predicted(times.output, machine),
        grad_input=predicted(times.grad_input, machine) if has_grad_input else None,
        grad_weight=predicted(times.grad_weight, machine) if has_grad_weight else None,
        cast=predicted(times.cast, machine),
        total=predicted(total, machine),
        parameter_bytes=round(size * _numel(own) * share),
        gradient_bytes=round(size * trained * share),
        optimizer_bytes=round(states * trained * share),
        activation_bytes=round(size * _saved_elements(layer, setting.parallel)),
    )


def _linear_times(
    layer: LayerSpec, call: CallSpec, option: Option, setting: Setting
) -> LinearTimes:
    gemm, machine = shard_gemm(layer, setting.parallel), setting.machine
    M, K, N = _tokens(call), gemm.K, gemm.N
    if not M:
        return LinearTimes(0.0, 0.0, 0.0, 0.0)
    passes = passes_of(layer, call)
    if option.recipe is None:
        kernel = Kernel.FP32 if option.precision is Precision.FP32 else Kernel.BF16
        times = plain_linear(machine, M, K, N, kernel=kernel, compiled=setting.compiled)
        return _trimmed(times, passes)
    recipe, compiled = option.recipe, setting.compiled
    times = fp8_linear(machine, M, K, N, recipe=recipe, compiled=compiled, gemms_hp=option.gemms_hp)
    run = {Gemm.OUTPUT: True, Gemm.GRAD_INPUT: passes.has_grad_input}
    run[Gemm.GRAD_WEIGHT] = passes.has_grad_weight
    gemms = tuple(gemm for gemm in fp8_gemms(recipe, option.gemms_hp) if run[gemm])
    cast = cast_cost(machine, M, K, N, recipe=recipe, gemms=gemms, compiled=compiled)
    cast_us = cast.us if compiled else max(cast.us, cast.kernels * machine.eager_host_us)
    return replace(_trimmed(times, passes), cast=cast_us)


def _norm_times(layer: LayerSpec, call: CallSpec, option: Option, setting: Setting) -> LinearTimes:
    elements = math.prod(call.inputs[0].shape) if call.inputs else 0
    moved = element_bytes(option) * elements / setting.parallel.tp
    passes = passes_of(layer, call)
    times = LinearTimes(_traffic_us(2 * moved, setting), _traffic_us(3 * moved, setting), 0.0, 0.0)
    return _trimmed(times, passes)


def _embedding_times(
    layer: LayerSpec, call: CallSpec, option: Option, setting: Setting
) -> LinearTimes:
    indices = math.prod(call.inputs[0].shape) if call.inputs else 0
    width = layer.parameters[0].shape[-1] if layer.parameters[0].shape else 1
    rows = element_bytes(option) * indices * width
    table = element_bytes(option) * _numel(layer.parameters) / setting.parallel.tp
    back = _traffic_us(2 * rows + table, setting) if not layer.is_frozen else 0.0
    return LinearTimes(_traffic_us(2 * rows, setting), 0.0, back, 0.0)


def _conv_times(layer: LayerSpec, call: CallSpec, option: Option, setting: Setting) -> LinearTimes:
    weight = max((p.shape for p in layer.parameters), key=len)
    out, inner, *window = weight if len(weight) > 2 else (*weight, 1)
    shape = call.inputs[0].shape if call.inputs else ()
    stride = _STRIDE.search(layer.settings)
    step = int(stride[1]) if stride else 1
    positions = math.prod(max(size // step, 1) for size in shape[2:]) * (shape[0] if shape else 0)
    return _gemm_like(layer, call, option, setting, (positions, inner * math.prod(window), out))


def _attention_times(
    layer: LayerSpec, call: CallSpec, option: Option, setting: Setting
) -> LinearTimes:
    shape = call.inputs[0].shape if call.inputs else ()
    width = shape[-1] if shape else 0
    columns = _numel(p for p in layer.parameters if len(p.shape) == 2) // max(width, 1)
    return _gemm_like(layer, call, option, setting, (_tokens(call), width, columns))


def _other_times(layer: LayerSpec, call: CallSpec, option: Option, setting: Setting) -> LinearTimes:
    if all(len(p.shape) < 2 for p in layer.parameters):
        return _norm_times(layer, call, option, setting)
    side = math.isqrt(_numel(layer.parameters))
    return _gemm_like(layer, call, option, setting, (_tokens(call), side, side))


def _gemm_like(
    layer: LayerSpec,
    call: CallSpec,
    option: Option,
    setting: Setting,
    shape: tuple[int, int, int],
) -> LinearTimes:
    if min(shape) < 1:
        return LinearTimes(0.0, 0.0, 0.0, 0.0)
    kernel = Kernel.FP32 if option.precision is Precision.FP32 else Kernel.BF16
    times = plain_linear(setting.machine, *shape, kernel=kernel, compiled=setting.compiled)
    return _trimmed(times, passes_of(layer, call))


def _trimmed(times: LinearTimes, passes: Passes) -> LinearTimes:
    return replace(
        times,
        grad_input=times.grad_input if passes.has_grad_input else 0.0,
        grad_weight=times.grad_weight if passes.has_grad_weight else 0.0,
    )


def _added(total: LinearTimes, times: LinearTimes, *, count: int) -> LinearTimes:
    return LinearTimes(
        total.output + count * times.output,
        total.grad_input + count * times.grad_input,
        total.grad_weight + count * times.grad_weight,
        total.cast + count * times.cast,
    )


def _traffic_us(moved: float, setting: Setting) -> float:
    floor = setting.machine.kernel_floor_us
    if not setting.compiled:
        floor = max(floor, setting.machine.eager_host_us)
    return max(moved / setting.machine.bytes_per_us, floor)


def _tokens(call: CallSpec) -> int:
    return math.prod(call.inputs[0].shape[:-1]) if call.inputs else 0


def _numel(parameters: Iterable[ParameterSpec]) -> int:
    return sum(p.numel for p in parameters)


def _saved_elements(layer: LayerSpec, parallel: Parallel) -> float:
    """Return what the backward needs of the forward on one device: the layer's inputs.

    Tensor parallelism with its sequence-parallel norms splits them as it splits the work.
    """
    share = 1 / parallel.tp if layer.kind is LayerKind.NORM else parameter_share(layer, parallel)
    inputs = sum(
        call.count * math.prod(tensor.shape)
        for call in layer.calls
        for tensor in call.inputs
        if tensor.dtype.startswith(("float", "bfloat"))
    )
    return (1 - parallel.recomputed) * share * inputs


_Price = Callable[[LayerSpec, CallSpec, Option, Setting], LinearTimes]
_PRICES: dict[LayerKind, _Price] = {
    LayerKind.LINEAR: _linear_times,
    LayerKind.NORM: _norm_times,
    LayerKind.EMBEDDING: _embedding_times,
    LayerKind.CONV: _conv_times,
    LayerKind.ATTENTION: _attention_times,
}
