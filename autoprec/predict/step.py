"""A whole training step: the layers, what lies between them, the optimizer, communication.

    step = layers + products + glue + loss + optimizer + communication that does not hide

Matrix products outside of layers (attention) are flops, the rest memory traffic per element. FSDP
hides behind a share of the compute; tensor parallelism does not hide.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from autoprec.common.recipes import Precision
from autoprec.model.roles import Role, own_name, role_of
from autoprec.predict.gemm import kernel_flops_per_us
from autoprec.predict.layers import Setting, element_bytes, layer_times
from autoprec.predict.linear import linear_times
from autoprec.predict.parallel import (
    collective_us,
    gathers_fp8,
    parameter_share,
    shard_gemm,
    split_axis,
)
from autoprec.records.cost import Communication
from autoprec.records.model import BF16_O2, FP32, LayerKind, LayerSpec, ModelSpec, Option

ADAM_VALUES = 3  # optimizer_bytes counts AdamW: a parameter and two states
REDUCED_BYTES = 4  # gradients are reduced in FP32
EAGER_GLUE = 2.8  # traffic of unfused kernels: torchtitan's Llama3-8B, 5762 eager, 6667 compiled
AUTOCAST_BYTES = 12  # per parameter: to BF16 in the forward, its gradient back to FP32
Choice = Callable[[LayerSpec], Option]


@dataclass(frozen=True)
class StepTimes:
    """Microseconds of one step.

    `sharded` is all of FSDP's communication, `exposed` what compute does not hide of it, and
    `split` that of tensor parallelism.
    """

    layers: float
    between: float
    optimizer: float
    sharded: float
    exposed: float
    split: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.layers + self.between + self.optimizer + (self.exposed + self.split)

    def communication(self, setting: Setting) -> Communication | None:
        """Return FSDP's part of the step; None where nothing is sharded."""
        if setting.parallel.fsdp == 1:
            return None
        return Communication(
            moved_ms=self.sharded / 1e3,
            between_ms=self.between / 1e3,
            share=setting.machine.communication_overlap,
            exposed_ms=self.exposed / 1e3,
        )


def step_times(spec: ModelSpec, choice: Choice, setting: Setting) -> StepTimes:
    """Return a step in which each layer has the option that `choice` gives it."""
    called = [layer for layer in spec.layers if layer.calls]
    chosen = {layer.name: choice(layer) for layer in called}
    # Layers that are alike are priced once: a model of 80 blocks has a dozen kinds.
    cost: dict[tuple[object, ...], float] = {}
    layers = 0.0
    for layer in called:
        axis = split_axis(layer, setting.parallel)
        key = (layer.shape_key, layer.made_by, chosen[layer.name], axis)
        if key not in cost:
            cost[key] = layer_times(layer, chosen[layer.name], setting).total
        layers += cost[key]
    is_fp32 = all(option.precision is Precision.FP32 for option in chosen.values())
    activation = FP32 if is_fp32 else BF16_O2  # whose dtype flows between the layers
    machine = setting.machine
    between = products_us(spec, activation, setting) + between_us(called, activation, setting)
    between *= machine.step_overhead
    between += sum(_uncalled_us(spec, each, activation, setting) for each in spec.layers)
    # calls without a gradient, as a teacher's, which no recomputation repeats
    once = replace(setting, parallel=replace(setting.parallel, recomputed=0.0))
    forward = [layer.forward_only for layer in spec.layers if layer.forward_calls]
    between += between_us(forward, activation, once, is_forward=True) * machine.step_overhead
    # they are in no row of a layer, so a plan's time has them as what is between layers
    between += sum(layer_times(x, chosen.get(x.name, activation), once).total for x in forward)
    numel = sum(_numel(layer, setting) for layer in forward if layer.name not in chosen)
    sharded = _fsdp_us(called, chosen, setting, once=numel * element_bytes(activation))
    return StepTimes(
        layers=layers,
        between=between,
        optimizer=optimizer_us(spec, setting) * machine.step_overhead,
        sharded=sharded,
        exposed=unhidden(sharded, layers + between, share=machine.communication_overlap),
        split=_tensor_parallel_us(called, chosen, activation, setting)
        + _tensor_parallel_us(forward, chosen, activation, once, is_forward=True),
    )


def uniform_times(spec: ModelSpec, option: Option, setting: Setting) -> StepTimes:
    """Return a step in which every layer has one option."""
    return step_times(spec, lambda _: option, setting)


def first_fp8(layer: LayerSpec) -> Option:
    """Return a layer's first FP8 option, else BF16."""
    return next((option for option in layer.options if option.is_fp8), BF16_O2)


def autocast_extra_us(spec: ModelSpec, setting: Setting) -> float:
    """Return the time torch.autocast adds to a BF16 step: weights cast anew, norms in FP32."""
    moved = extra = 0.0
    for layer in spec.layers:
        if layer.kind is LayerKind.LINEAR and layer.calls:
            share = parameter_share(layer, setting.parallel)
            moved += AUTOCAST_BYTES * share * sum(p.numel for p in layer.parameters)
        if layer.kind is LayerKind.NORM and layer.calls:
            fp32, bf16 = (layer_times(layer, option, setting).total for option in (FP32, BF16_O2))
            extra += fp32 - bf16
    return moved / setting.machine.bytes_per_us + extra


def between_us(
    layers: Sequence[LayerSpec], activation: Option, setting: Setting, *, is_forward: bool = False
) -> float:
    """Return residuals, activations and loss, forward and, if not alone, backward."""
    machine = setting.machine
    glue = loss = 0.0
    for layer in layers:
        if layer.kind is not LayerKind.LINEAR or layer.gemm is None:
            continue
        gemm = shard_gemm(layer, setting.parallel)
        elements = gemm.M * gemm.N * layer.calls_per_step
        if role_of(layer) is Role.HEAD:
            loss += machine.loss_bytes * elements
        else:
            glue += machine.glue_bytes * elements * element_bytes(activation) / 2
    glue *= 1.0 if setting.compiled else EAGER_GLUE
    if is_forward:
        glue, loss = glue / 3, loss / 3
    return (glue * _passes(setting) + loss) / machine.bytes_per_us


def products_us(spec: ModelSpec, activation: Option, setting: Setting) -> float:
    """Return the matrix products outside of layers, such as attention, which has heads to split."""
    rate = setting.machine.bf16_peak_tflops * setting.machine.attention_fraction * 1e6
    if activation.precision is Precision.FP32:
        rate = kernel_flops_per_us(setting.machine, setting.fp32_kernel())
    return spec.product_flops / setting.parallel.tp / rate * _passes(setting)


def _passes(setting: Setting) -> float:
    return 1 + setting.parallel.recomputed / 3


def _uncalled_us(spec: ModelSpec, layer: LayerSpec, option: Option, setting: Setting) -> float:
    """Return the GEMMs of a head whose weight a fused linear cross-entropy uses: never in FP8.

    It sees every token, and its logits are never written whole: no traffic of a loss.
    """
    if not layer.is_used_uncalled:
        return 0.0
    N, K = layer.parameters[0].shape
    share = parameter_share(layer, setting.parallel)
    machine, M = setting.machine, spec.tokens_per_step
    wide = setting.fp32_kernel(layer.kind)
    times = linear_times(machine, M, K, N, option, compiled=setting.compiled, fp32=wide)
    return share * times.total


def optimizer_us(spec: ModelSpec, setting: Setting) -> float:
    """Return the optimizer step: it reads and writes parameters and states in FP32."""
    numel = sum(
        p.numel * parameter_share(layer, setting.parallel)
        for layer in spec.layers
        for p in layer.parameters
        if p.is_trainable and p.shared_with is None
    )
    numel += sum(p.numel for p in spec.uncovered if p.is_trainable)
    values = (1 + setting.state_ratio) / ADAM_VALUES
    moved = setting.machine.optimizer_bytes * values * numel / setting.parallel.fsdp
    return moved / setting.machine.bytes_per_us


def unhidden(moved: float, compute: float, *, share: float) -> float:
    """Return the time of communication that a share of the compute does not hide."""
    return max(0.0, moved - share * compute)


def gather_savings_us(spec: ModelSpec, option: Option, setting: Setting) -> dict[str, float]:
    """Return the exposed communication that FP8 gathers save a step, layer by layer.

    Whether FSDP's gathers hide behind compute is a question to the whole step. It is asked of the
    step with `option` wherever it can run; a layer has the share that its bytes have.
    """
    takes = [layer for layer in spec.layers if layer.calls and option in layer.options]
    if not takes or not gathers_fp8(option, setting.parallel):
        return {}
    plain = replace(setting, parallel=replace(setting.parallel, fp8_gather=False))
    before, after = (
        step_times(spec, lambda layer: option if option in layer.options else BF16_O2, each)
        for each in (plain, setting)
    )
    # Weights are gathered by FSDP, inputs by tensor parallelism: each saving by its own bytes.
    weights = {layer.name: _numel(layer, setting) for layer in takes}
    inputs = {layer.name: float(layer.gemm.M * layer.gemm.K) for layer in takes if layer.gemm}
    return {
        name: (before.exposed - after.exposed) * weights[name] / max(sum(weights.values()), 1.0)
        + (before.split - after.split) * inputs.get(name, 0.0) / max(sum(inputs.values()), 1.0)
        for name in weights
    }


def _fsdp_us(
    layers: Sequence[LayerSpec], chosen: Mapping[str, Option], setting: Setting, *, once: float
) -> float:
    """Return FSDP's communication: weights are gathered twice, gradients reduced once.

    `once` are the bytes of weights that no backward gathers again.
    """
    machine, parallel = setting.machine, setting.parallel
    gathered = reduced = 0.0
    for layer in layers:
        option, numel = chosen[layer.name], _numel(layer, setting)
        gathered += numel * (1 if gathers_fp8(option, parallel) else element_bytes(option))
        reduced += numel * REDUCED_BYTES * (not layer.is_frozen)
    per_node = max(int(machine.devices_per_node) // parallel.tp, 1)
    return sum(
        collective_us(machine, moved, members=parallel.fsdp, per_node=per_node)
        for moved in (gathered + once, gathered, reduced)
    )


def _tensor_parallel_us(
    layers: Sequence[LayerSpec],
    chosen: Mapping[str, Option],
    activation: Option,
    setting: Setting,
    *,
    is_forward: bool = False,
) -> float:
    """Return tensor parallelism's communication: collectives before and behind each half block.

    Column-parallel layers gather their input and scatter its gradient; row-parallel ones scatter
    their output and gather its gradient. Casts can go before gathers, while scatters sum in the
    activations' dtype. Recomputation repeats the forward, which stands alone in a teacher.
    """
    machine, parallel = setting.machine, setting.parallel
    scatter = element_bytes(activation)
    options = (chosen.get(layer.name, activation) for layer in layers)
    gather = 1 if any(gathers_fp8(option, parallel) for option in options) else scatter
    forwards, backwards = 1 + parallel.recomputed, 0 if is_forward else 1
    moved = 0.0
    seen: set[tuple[str, str]] = set()
    for layer in layers:
        # One layer of each block and axis counts: q, k and v share their gathered input.
        axis = split_axis(layer, parallel)
        block = layer.name if role_of(layer) is Role.HEAD else own_name(layer).rpartition(".")[0]
        if layer.gemm is None or not axis or (block, axis) in seen:
            continue
        seen.add((block, axis))
        if axis == "N":
            moved += layer.gemm.M * layer.gemm.K * (gather * forwards + scatter * backwards)
        else:
            moved += layer.gemm.M * layer.gemm.N * (scatter * forwards + gather * backwards)
    per_node = int(machine.devices_per_node)
    return collective_us(machine, moved, members=parallel.tp, per_node=per_node)


def _numel(layer: LayerSpec, setting: Setting) -> float:
    return parameter_share(layer, setting.parallel) * sum(p.numel for p in layer.parameters)
