"""What a plan costs by the tables: step time, gradient perturbation e and bytes, layer by layer.

    step_ms  = fixed time of the flow + sum over layers of the measured total
               + casts at the boundary of every FP32 layer, where the flow is BF16
             + FSDP communication that the plan's shorter compute no longer hides (predicted only)
    e        = e of the BF16 flow + sum over layers of the layer's e

A plan with any 16-bit or FP8 layer has a BF16 flow; an all-FP32 plan has an FP32 flow, pays no
cast and has e = 0. Within the BF16 flow every term but the last belongs to one layer, so the sums
are exact for this model and the choice is a knapsack. The last does not change it: compute hides at
most its own time, so that a step is never shorter with more compute. (Only where gathers are in FP8
do the layers' times hold more than compute, and the order of near plans can differ.) A plan's step
is then the cost model's whole step of that plan, but for an FP32 layer's gathers, priced as BF16.
Estimates of e that noise made negative count as 0.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from autoprec.errors import RecordError
from autoprec.predict.step import unhidden
from autoprec.predict.transfer import default_locks, sensitivity_basis
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    CallSpec,
    Communication,
    LayerKind,
    LayerSensitivity,
    LayerSpec,
    LayerTiming,
    Option,
    Precision,
    Profile,
    Recipe,
    Sensitivity,
    TensorSpec,
)

# A layer with this e in some whole FP8 recipe has outliers (a healthy one has under 0.3 %, an
# output head 2 %). It is not offered FP8 in single GEMMs: what breaks it moves in training.
BROKEN_E = 0.05
CONV_CHANNELS = re.compile(r"^(\d+), (\d+), kernel_size")  # torch's extra_repr of a convolution
CONV_STRIDE = re.compile(r"stride=\(([\d, ]+)\)")


@dataclass(frozen=True)
class Price:
    """What a layer costs in one option: ms per step (median, low, high), e and bytes."""

    ms: float
    low_ms: float
    high_ms: float
    compute_ms: float  # `ms` without communication
    boundary_ms: float  # paid in a BF16 flow; 0 but for FP32
    grad_error: float
    memory_bytes: int
    time_basis: Basis
    grad_error_basis: Basis

    @property
    def flow_ms(self) -> float:
        """The time in a BF16 flow."""
        return self.ms + self.boundary_ms


@dataclass(frozen=True)
class Flow:
    """What a plan pays once: the time and bytes outside the layers, and the e of the flow.

    `low` and `high` are the ends of a predicted time's interval, relative to it; a measured one
    counts as exact.
    """

    ms: float
    grad_error: float
    memory_bytes: int
    low: float = 1.0
    high: float = 1.0


@dataclass(frozen=True)
class Costs:
    """The prices of every layer, in model order, and of the two flows.

    `missing` says of each layer why an option has no price, `locks` which layers stay out of FP8
    unless they are kept in it, and why.
    """

    layers: tuple[LayerSpec, ...]
    prices: tuple[Mapping[Option, Price], ...]
    missing: tuple[Mapping[Option, str], ...]
    fp32_flow: Flow
    bf16_flow: Flow
    locks: Mapping[str, str] = field(default_factory=dict)
    communication: Communication | None = None

    def flow(self, options: Sequence[Option]) -> Flow:
        """Return the flow of a plan."""
        return self.fp32_flow if is_all_fp32(options) else self.bf16_flow

    def step_ms(self, options: Sequence[Option]) -> float:
        """Return the predicted step time of a plan."""
        is_bf16 = not is_all_fp32(options)
        layers = [price.flow_ms if is_bf16 else price.ms for price in self._chosen(options)]
        outside = [self.flow(options).ms, self.unhidden_ms(options)]
        return max(math.fsum([*outside, *layers]), 0.0)

    def unhidden_ms(self, options: Sequence[Option]) -> float:
        """Return the communication that a plan hides less than BF16 O2 does."""
        if self.communication is None or is_all_fp32(options):
            return 0.0
        fsdp = self.communication
        layers = math.fsum(price.compute_ms + price.boundary_ms for price in self._chosen(options))
        exposed = unhidden(fsdp.moved_ms, fsdp.between_ms + layers, share=fsdp.share)
        return exposed - fsdp.exposed_ms

    def step_interval(self, options: Sequence[Option]) -> tuple[float, float]:
        """Return the step time with every layer, and what is predicted outside, at either end."""
        chosen, flow = list(self._chosen(options)), self.flow(options)
        outside = self.step_ms(options) - math.fsum(price.ms for price in chosen)
        low = math.fsum(price.low_ms for price in chosen) + flow.low * outside
        high = math.fsum(price.high_ms for price in chosen) + flow.high * outside
        return max(low, 0.0), max(high, 0.0)

    def grad_error(self, options: Sequence[Option]) -> float:
        """Return the sum of the parts' e."""
        return math.fsum(
            [self.flow(options).grad_error, *(price.grad_error for price in self._chosen(options))]
        )

    def memory_bytes(self, options: Sequence[Option]) -> int:
        """Return the bytes of a step."""
        layers = sum(price.memory_bytes for price in self._chosen(options))
        return self.flow(options).memory_bytes + layers

    def _chosen(self, options: Sequence[Option]) -> Iterator[Price]:
        for prices, option in zip(self.prices, options, strict=True):
            yield prices[option]


def is_all_fp32(options: Sequence[Option]) -> bool:
    """Whether no layer is 16-bit, so that the flow is FP32."""
    return all(option.precision is Precision.FP32 for option in options)


def make_costs(profile: Profile, sensitivity: Sensitivity) -> Costs:
    """Return the prices of every layer and option that was both timed and measured.

    Raises:
        RecordError: a layer that runs has no option with a price.
    """
    one = {FP32: FP32, BF16_O2: BF16_O2}  # one object per option: look-ups compare by identity
    timings: dict[str, dict[Option, LayerTiming]] = {}
    for timing in profile.layers:
        option = one.setdefault(timing.option, timing.option)
        for name in timing.names:
            timings.setdefault(name, {})[option] = timing
    effects: dict[str, dict[Option, LayerSensitivity]] = {}
    for row in sensitivity.rows:
        effects.setdefault(row.name, {})[one.setdefault(row.option, row.option)] = row
    by_layer = [
        _price_layer(
            layer,
            [one.setdefault(option, option) for option in layer.options],
            timings.get(layer.name, {}),
            effects.get(layer.name, {}),
            cast_ms=profile.boundary_cast_ms_per_melement,
        )
        for layer in profile.model.layers
    ]
    prices = tuple(prices for prices, _ in by_layer)
    is_unknown = sensitivity_basis(sensitivity) is Basis.UNKNOWN
    return Costs(
        layers=profile.model.layers,
        prices=prices,
        missing=tuple(missing for _, missing in by_layer),
        fp32_flow=_flow(profile, prices, FP32, grad_error=0.0),
        bf16_flow=_flow(
            profile, prices, BF16_O2, grad_error=max(sensitivity.activation_error.mean, 0.0)
        ),
        locks=default_locks(profile.model.layers) if is_unknown else {},
        communication=profile.communication,
    )


def boundary_melements(layer: LayerSpec) -> float:
    """Return how many million floating elements go in and out of a layer in one step."""
    return sum(call.count * (_in(call) + _out(layer, call)) for call in layer.calls) / 1e6


def _price_layer(
    layer: LayerSpec,
    options: Sequence[Option],
    timings: Mapping[Option, LayerTiming],
    effects: Mapping[Option, LayerSensitivity],
    *,
    cast_ms: float,
) -> tuple[dict[Option, Price], dict[Option, str]]:
    prices: dict[Option, Price] = {}
    missing: dict[Option, str] = {}
    boundary_ms = boundary_melements(layer) * cast_ms
    for option in dict.fromkeys((*options, *timings)):
        timing, effect = timings.get(option), effects.get(option)
        why = _why_missing(layer, option, timing, effect)
        if why:
            missing[option] = why
        else:
            prices[option] = _price(
                timing, effect, boundary_ms=boundary_ms if option == FP32 else 0.0
            )
    if _is_broken(prices):
        for option in [option for option in prices if option.gemms_hp]:
            del prices[option]
            missing[option] = "FP8 breaks the layer in some recipe, so that it is all or nothing"
    if not prices:
        raise RecordError(
            f"every layer needs a time and an e in some precision, but {layer.name!r} has none "
            f"({'; '.join(f'{o}: {why}' for o, why in missing.items()) or 'it takes no option'}); "
            "make the profile and the sensitivity again"
        )
    return prices, missing


def _is_broken(prices: Mapping[Option, Price]) -> bool:
    whole = [
        price.grad_error
        for option, price in prices.items()
        if option.is_fp8 and not option.gemms_hp
    ]
    return max(whole, default=0.0) > BROKEN_E


def _why_missing(
    layer: LayerSpec,
    option: Option,
    timing: LayerTiming | None,
    effect: LayerSensitivity | None,
) -> str:
    if option.recipe is Recipe.DELAYED:
        return "it is emulated for comparison, and no plan applies it"
    if not layer.calls:
        return "" if not option.is_fp8 else "the step did not call it"
    if timing is not None and timing.infeasible:
        return timing.infeasible
    if timing is None or timing.total is None:
        return "it was not timed"
    if effect is None and option != FP32:
        return "its effect on the gradient was not measured"
    return ""


def _price(
    timing: LayerTiming | None, effect: LayerSensitivity | None, *, boundary_ms: float
) -> Price:
    total = timing.total if timing else None
    bytes_ = (
        timing.parameter_bytes
        + timing.gradient_bytes
        + timing.optimizer_bytes
        + timing.activation_bytes
        if timing
        else 0
    )
    return Price(
        ms=total.median_ms if total else 0.0,
        low_ms=min(total.p20_ms, total.median_ms) if total else 0.0,
        high_ms=max(total.p80_ms, total.median_ms) if total else 0.0,
        compute_ms=_compute_ms(timing) if timing else 0.0,
        boundary_ms=boundary_ms,
        grad_error=max(effect.grad_error.mean, 0.0) if effect else 0.0,
        memory_bytes=bytes_,
        time_basis=total.basis if total else Basis.MEASURED,
        grad_error_basis=effect.basis if effect else Basis.MEASURED,
    )


def _compute_ms(timing: LayerTiming) -> float:
    """Return the sum of the parts; the total of a predicted layer can hold communication too."""
    parts = (timing.output, timing.grad_input, timing.grad_weight, timing.cast)
    return math.fsum(part.median_ms for part in parts if part)


def _flow(
    profile: Profile, prices: Sequence[Mapping[Option, Price]], option: Option, *, grad_error: float
) -> Flow:
    step = profile.step(option.precision.value)
    low = high = 1.0
    if profile.basis is Basis.PREDICTED and step is not None and step.timing.median_ms > 0.0:
        low, high = (ms / step.timing.median_ms for ms in (step.timing.p20_ms, step.timing.p80_ms))
    return Flow(
        ms=profile.fixed_ms if option == FP32 else profile.fixed_bf16_ms,
        grad_error=grad_error,
        memory_bytes=_fixed_bytes(profile, prices, option),
        low=low,
        high=high,
    )


def _fixed_bytes(profile: Profile, prices: Sequence[Mapping[Option, Price]], option: Option) -> int:
    """Return the bytes outside the layers: the measured peak of the uniform step minus theirs."""
    step = profile.step(option.precision.value)
    if step is None or step.peak_bytes is None:
        ratio = profile.model.optimizer_state_numel_ratio
        numel = sum(parameter.numel for parameter in profile.model.uncovered)
        return int(numel * 4 * (2 + ratio))  # FP32 parameter, gradient and optimizer state
    layers = sum(nearest(row, option).memory_bytes for row in prices)
    return max(step.peak_bytes - layers, 0)


def nearest(prices: Mapping[Option, Price], option: Option) -> Price:
    """Return the price of an option, or of the first one there is."""
    return prices.get(option) or next(iter(prices.values()))


def _in(call: CallSpec) -> int:
    return sum(_numel(tensor) for tensor in call.inputs if _is_floating(tensor))


def _out(layer: LayerSpec, call: CallSpec) -> float:
    """Return the elements that a call gives, as far as the shapes tell."""
    first = call.inputs[0] if call.inputs else None
    if first is None:
        return 0
    if layer.kind is LayerKind.LINEAR and layer.gemm is not None:
        return _numel(first) / layer.gemm.K * layer.gemm.N
    if layer.kind is LayerKind.EMBEDDING:
        return _numel(first) * layer.parameters[0].shape[-1]
    if layer.kind is LayerKind.CONV:
        return _numel(first) * _conv_growth(layer)
    return _numel(next((t for t in call.inputs if _is_floating(t)), first))


def _conv_growth(layer: LayerSpec) -> float:
    """Return output elements per input element of a convolution that pads its borders."""
    channels, stride = (p.search(layer.settings) for p in (CONV_CHANNELS, CONV_STRIDE))
    ratio = int(channels[2]) / max(int(channels[1]), 1) if channels else 1.0
    steps = math.prod(int(s) for s in stride[1].split(",") if s.strip()) if stride else 1
    return ratio * steps if "ConvTranspose" in layer.type_name else ratio / max(steps, 1)


def _numel(tensor: TensorSpec) -> int:
    return math.prod(tensor.shape)


def _is_floating(tensor: TensorSpec) -> bool:
    return tensor.dtype.startswith(("float", "bfloat"))
