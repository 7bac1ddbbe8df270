"""What a plan costs by the tables: step time, gradient error and bytes, layer by layer.

    step_ms    = time outside the layers + sum over layers of the measured total
                 + casts at the boundary of every FP32 layer, where activations are BF16
                 + FSDP communication that the plan's shorter compute no longer hides (predicted)
    grad_error = that of BF16 activations + sum over layers of the layer's, as plans count it

What is not sure is not counted: an option other than BF16 is chosen by its time with the margin
within which it could be no faster than BF16,

    measured     t * (exp(95 % half-width of the log ratio of its median to BF16's) - 1), and of a
                 single sample, which has no spread, all that it seems to save
    predicted    its FP8 GEMMs and casts * (exp(how far predicted speedups may be too high) - 1)

so that a layer leaves BF16 only for a gain beyond its uncertainty, or for its gradient error. Where
no time is known it leaves BF16 for FP32 last of all: the margin is a whole BF16 step.

A plan with any 16-bit or FP8 layer has BF16 activations; an all-FP32 plan has FP32 ones, pays no
cast and has no error. Every term but the last belongs to one layer, so that the choice is a
knapsack; the last needs one more variable. A plan's step is the cost model's whole step of that
plan, but for an FP32 layer's gathers, priced as BF16. Estimates of an error that noise made
negative count as 0.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoprec.common.recipes import Precision
from autoprec.errors import RecordError
from autoprec.model.memory import io_elements
from autoprec.predict.step import unhidden
from autoprec.predict.transfer import default_locks, sensitivity_basis
from autoprec.records.cost import Communication, LayerTiming, Profile, Timing, ratio_error
from autoprec.records.model import BF16_O2, FP32, Basis, LayerSpec, Option
from autoprec.records.sensitivity import LayerSensitivity, Operand, Sensitivity

# A layer with this error in some whole FP8 recipe has outliers (a healthy one has under 0.3 %, an
# output head 2 %). It is not offered FP8 in single GEMMs: what breaks it moves in training.
UNMEASURED = "its effect on the gradient was not measured"  # on a proxy that cannot take FP8
BROKEN_ERROR = 0.05


@dataclass(frozen=True)
class Price:
    """What a layer costs in one option: ms per step (median, low, high), gradient error, bytes."""

    ms: float
    low_ms: float
    high_ms: float
    compute_ms: float  # `ms` without communication
    boundary_ms: float  # casts beside BF16 activations; 0 but for FP32
    margin_ms: float  # of its time, within which it may be no faster than BF16; 0 of BF16
    grad_error: float
    memory_bytes: int
    time_basis: Basis
    grad_error_basis: Basis
    grad_error_stderr: float = 0.0  # of the measurement; a table may be wrong beyond it
    unknown: str = ""  # why no time is known; then `ms` is 0, and in no step
    uncounted: float = 0.0  # of the measured gradient error, what `grad_error` is less

    def scaled(self, factor: float) -> "Price":
        """Return the price with its times multiplied."""
        times = ("ms", "low_ms", "high_ms", "compute_ms", "boundary_ms", "margin_ms")
        return replace(self, **{name: getattr(self, name) * factor for name in times})

    @property
    def with_casts_ms(self) -> float:
        """The time where activations are BF16."""
        return self.ms + self.boundary_ms

    @property
    def counted_ms(self) -> float:
        """The time that the choice counts: with casts, and with what is not sure of it."""
        return self.with_casts_ms + self.margin_ms


@dataclass(frozen=True)
class OutsideLayers:
    """What a plan pays once: time, bytes and the gradient error of its activations' dtype."""

    ms: float
    grad_error: float
    memory_bytes: int
    low: float = 1.0  # ends of the interval of the uniform step's time, relative to it
    high: float = 1.0
    margin_ms: float = 0.0  # of the all-FP32 step, within which it may be no faster than BF16


@dataclass(frozen=True)
class Costs:
    """The prices of every layer, in model order, and what is outside them by activation dtype."""

    layers: tuple[LayerSpec, ...]
    prices: tuple[Mapping[Option, Price], ...]
    missing: tuple[Mapping[Option, str], ...]  # why an option has no price
    outside_fp32: OutsideLayers
    outside_bf16: OutsideLayers
    locks: Mapping[str, str] = field(default_factory=dict)  # out of FP8 unless kept, and why
    communication: Communication | None = None
    islands: tuple[tuple[tuple[int, ...], float], ...] = ()  # layers, and their error in 16 bits
    fp32_always: frozenset[str] = frozenset()  # what every plan has in FP32, by name

    def outside(self, options: Sequence[Option]) -> OutsideLayers:
        """Return the time, error and bytes of a plan outside its layers."""
        return self.outside_fp32 if is_all_fp32(options) else self.outside_bf16

    def step_ms(self, options: Sequence[Option]) -> float:
        """Return the predicted step time of a plan."""
        is_bf16 = not is_all_fp32(options)
        layers = [price.with_casts_ms if is_bf16 else price.ms for price in self._chosen(options)]
        outside = (self.outside(options).ms, self.unhidden_ms(options))
        return max(math.fsum((*outside, *layers)), 0.0)

    def counted_ms(self, options: Sequence[Option]) -> float:
        """Return the time of a plan that the choice counts: with what is not sure of it."""
        if is_all_fp32(options):
            margin_ms = self.outside_fp32.margin_ms
        else:
            margin_ms = math.fsum(price.margin_ms for price in self._chosen(options))
        return self.step_ms(options) + margin_ms

    def without_margins(self) -> "Costs":
        """Return the costs with every expected gain counted whole."""
        prices = (
            {
                o: price if price.unknown else replace(price, margin_ms=0.0)
                for o, price in row.items()
            }
            for row in self.prices
        )
        fp32 = replace(self.outside_fp32, margin_ms=0.0)
        return replace(self, prices=tuple(prices), outside_fp32=fp32)

    def unhidden_ms(self, options: Sequence[Option]) -> float:
        """Return the communication that a plan hides less than BF16 O2 does."""
        if self.communication is None or is_all_fp32(options):
            return 0.0
        fsdp = self.communication
        layers = math.fsum(price.compute_ms + price.boundary_ms for price in self._chosen(options))
        exposed = unhidden(fsdp.moved_ms, fsdp.between_ms + layers, share=fsdp.share)
        return exposed - fsdp.exposed_ms

    def taken_ms(self, options: Sequence[Option], changed: Mapping[int, Option]) -> float:
        """Return the communication that layers no longer hide where these options change."""
        others = [changed.get(index, option) for index, option in enumerate(options)]
        return self.unhidden_ms(others) - self.unhidden_ms(options)

    def step_interval(self, options: Sequence[Option]) -> tuple[float, float]:
        """Return the step time with every layer, and what is outside, at either end."""
        chosen, outside = list(self._chosen(options)), self.outside(options)
        rest_ms = self.step_ms(options) - math.fsum(price.ms for price in chosen)
        low = math.fsum(price.low_ms for price in chosen) + outside.low * rest_ms
        high = math.fsum(price.high_ms for price in chosen) + outside.high * rest_ms
        return max(low, 0.0), max(high, 0.0)

    def grad_error(self, options: Sequence[Option]) -> float:
        """Return the sum of the parts."""
        layers = (price.grad_error for price in self._chosen(options))
        islands = self.island_error(dict(enumerate(options)))
        return math.fsum((self.outside(options).grad_error, islands, *layers))

    def counted_share(self, options: Sequence[Option]) -> float:
        """Return the part of a plan's measured gradient error that counts, as in its rows."""
        counted = self.grad_error(options)
        uncounted = math.fsum(price.uncounted for price in self._chosen(options))
        return counted / (counted + uncounted) if uncounted > 0.0 else 1.0

    def island_error(self, chosen: Mapping[int, Option]) -> float:
        """Return what BF16 costs between the layers of islands that these have not in FP32."""
        whole = ((at, error) for at, error in self.islands if chosen.keys() >= set(at))
        return math.fsum(e for at, e in whole if not is_all_fp32([chosen[i] for i in at]))

    def memory_bytes(self, options: Sequence[Option]) -> int:
        """Return the bytes of a step."""
        layers = sum(price.memory_bytes for price in self._chosen(options))
        return self.outside(options).memory_bytes + layers

    def _chosen(self, options: Sequence[Option]) -> Iterator[Price]:
        return (prices[o] for prices, o in zip(self.prices, options, strict=True))


def is_all_fp32(options: Sequence[Option]) -> bool:
    """Whether no layer is 16-bit, so that activations are FP32."""
    return all(option.precision is Precision.FP32 for option in options)


def make_costs(profile: Profile, sensitivity: Sensitivity) -> Costs:
    """Return the prices of every layer and option that was both timed and measured.

    Raises:
        RecordError: a layer that runs has no option with a price.
    """
    timings: dict[str, dict[Option, LayerTiming]] = defaultdict(dict)
    for timing in profile.layers:
        for name in timing.names:
            timings[name][timing.option] = timing
    effects: dict[str, dict[Option, LayerSensitivity]] = defaultdict(dict)
    for row in sensitivity.rows:
        effects[row.name][row.option] = row
    # a layer has a price in what is both timed and measured
    layers = profile.model.layers
    places = {layer.name: index for index, layer in enumerate(layers)}
    inside = (island for island in sensitivity.islands if island.names)
    islands = [(tuple(places[name] for name in i.names), i.grad_error) for i in inside]
    always = sensitivity.fp32_always
    priced = [
        _price_layer(x, timings[x.name], effects[x.name], profile, is_fp32_behind=x.name in always)
        for x in layers
    ]
    scale = _layer_scale(profile)
    prices = tuple({o: price.scaled(scale) for o, price in own.items()} for own, _ in priced)
    activation_error = max(sensitivity.activation_error.mean, 0.0)
    between = FP32 if sensitivity.is_fp32_between else BF16_O2
    return Costs(
        layers=layers,
        prices=prices,
        missing=tuple(missing for _, missing in priced),
        outside_fp32=_outside(profile, prices, FP32, grad_error=0.0),
        outside_bf16=_outside(profile, prices, between, grad_error=activation_error),
        locks=(
            default_locks(layers)
            if sensitivity_basis(sensitivity) is Basis.UNKNOWN
            else _unseen_locks(sensitivity)
        ),
        communication=profile.communication,
        islands=tuple((at, e) for at, e in islands if all(FP32 in prices[i] for i in at)),
        fp32_always=frozenset(always),
    )


def _unseen_locks(sensitivity: Sensitivity) -> dict[str, str]:
    """Return the linears of whose FP8 the measured batches say nothing, and why.

    An operand was zero in the first of them, and the others say no more than BF16 has. It may be
    the path of a rare token, which an error of 0 must not give to FP8.
    """
    errors: dict[str, list[list[float]]] = {}
    for row in sensitivity.rows:
        own = errors.setdefault(row.name, [[], []])
        own[row.option.is_fp8].append(row.grad_error.mean)
    return {
        found.name: f"its {found.operand.replace('_', ' ')} was zero where gradient errors were "
        f"measured, so that what FP8 costs it is not known (--keep {found.name}=fp8_o1 overrules)"
        for found in sensitivity.statistics
        for bf16, fp8 in [errors.get(found.name, [[], []])]
        if found.operand is not Operand.WEIGHT and found.amax == 0.0
        if max(fp8, default=0.0) <= 2.0 * max(bf16, default=0.0)
    }


def _price_layer(
    layer: LayerSpec,
    timings: Mapping[Option, LayerTiming],
    effects: Mapping[Option, LayerSensitivity],
    profile: Profile,
    *,
    is_fp32_behind: bool,
) -> tuple[dict[Option, Price], dict[Option, str]]:
    prices: dict[Option, Price] = {}
    missing: dict[Option, str] = {}
    boundary_ms = io_elements(layer) / 1e6 * profile.boundary_cast_ms_per_melement
    baseline = timings.get(BF16_O2)
    for option in dict.fromkeys((*layer.options, *timings)):
        timing, effect = timings.get(option), effects.get(option)
        if why := _why_missing(layer, option, timing, effect):
            missing[option] = why
        else:
            casts = (option == FP32) is not is_fp32_behind
            price = _price(timing, effect, boundary_ms=boundary_ms if casts else 0.0)
            margin_ms = _margin_ms(timing, baseline, profile)
            # what is not called takes no time of its own where other layers' times come from
            basis = price.time_basis if layer.calls else profile.basis
            prices[option] = replace(price, margin_ms=margin_ms, time_basis=basis)
    # what breaks a layer moves in training, so that no set of its GEMMs is safe
    whole_fp8 = [effects[o].grad_error.mean for o in prices if o.is_whole_fp8]
    if max(whole_fp8, default=0.0) > BROKEN_ERROR:
        for option in [option for option in prices if option.gemms_hp]:
            del prices[option]
            missing[option] = "FP8 breaks the layer in some recipe, so that it is all or nothing"
    if not prices:
        reasons = "; ".join(f"{option}: {why}" for option, why in missing.items())
        raise RecordError(
            f"every layer needs a time and a gradient error in some precision, but {layer.name!r} "
            f"has none ({reasons or 'it takes no option'}); "
            "make the profile and the sensitivity again"
        )
    return prices, missing


def _why_missing(
    layer: LayerSpec, option: Option, timing: LayerTiming | None, effect: LayerSensitivity | None
) -> str:
    if not layer.calls:
        return "" if not option.is_fp8 else "the step did not call it"
    if timing is not None and timing.infeasible:
        return timing.infeasible
    if timing is None or (timing.total is None and not timing.unknown):
        return "it was not timed"
    if effect is None and option != FP32:
        return UNMEASURED
    return ""


def _price(
    timing: LayerTiming | None, effect: LayerSensitivity | None, *, boundary_ms: float
) -> Price:
    total, ms, compute_ms, memory_bytes = None, 0.0, 0.0, 0  # of a layer that is not called
    unknown = timing.unknown if timing else ""
    if timing is not None:
        total = timing.total
        ms = total.median_ms if total else 0.0
        # the sum of the parts: the total of a predicted layer can hold communication too
        parts = (timing.output, timing.grad_input, timing.grad_weight, timing.cast)
        compute_ms = math.fsum(part.median_ms for part in parts if part) if any(parts) else ms
        memory_bytes = timing.parameter_bytes + timing.gradient_bytes
        memory_bytes += timing.optimizer_bytes + timing.activation_bytes
    return Price(
        ms=ms,
        low_ms=min(total.p20_ms, ms) if total else 0.0,
        high_ms=max(total.p80_ms, ms) if total else 0.0,
        compute_ms=compute_ms,
        boundary_ms=boundary_ms,
        margin_ms=0.0,
        grad_error=effect.counted_error if effect else 0.0,
        memory_bytes=memory_bytes,
        time_basis=total.basis if total else Basis.UNKNOWN if unknown else Basis.MEASURED,
        unknown=unknown,
        grad_error_basis=effect.basis if effect else Basis.MEASURED,
        grad_error_stderr=(effect.grad_error.stderr or 0.0) if effect else 0.0,
        uncounted=max(effect.grad_error.mean, 0.0) - effect.counted_error if effect else 0.0,
    )


def _margin_ms(timing: LayerTiming | None, baseline: LayerTiming | None, profile: Profile) -> float:
    """Return the part of an option's time within which it may be no faster than BF16."""
    if timing is None or baseline is None or timing.option == BF16_O2:
        return 0.0
    if timing.unknown:
        whole = profile.step(BF16_O2.precision.value)
        return whole.timing.median_ms if whole else 0.0
    if timing.total is None or baseline.total is None:
        return 0.0
    if timing.total.samples and baseline.total.samples:
        return _sampling_margin_ms(timing.total, baseline.total)
    # Predicted: its GEMMs in BF16 are BF16's own, so that only the others may gain less.
    fp8 = [getattr(timing, gemm) for gemm in timing.option.fp8_gemms]
    changed = (timing.cast, *fp8) if timing.option.is_fp8 else ()
    return math.fsum(part.median_ms for part in changed if part) * math.expm1(profile.speedup_error)


def _sampling_margin_ms(timing: Timing, baseline: Timing) -> float:
    """Return the margin of a measured time; of a single sample all that it seems to save."""
    error = ratio_error(baseline, timing)
    if error is None:
        return max(baseline.median_ms - timing.median_ms, 0.0)
    return timing.median_ms * math.expm1(error)


def _layer_scale(profile: Profile) -> float:
    """Return what layers' times are multiplied by so that they are no more than their steps.

    Alone, one layer may be timed at many times what it takes in the step (a busy machine); a plan
    without it would seem to take no time at all.
    """
    scale = 1.0
    for label, fixed_ms in (("fp32", profile.fixed_ms), ("bf16_o2", profile.fixed_bf16_ms)):
        step = profile.step(label)
        if step is not None and fixed_ms < 0.0 < step.timing.median_ms:
            scale = min(scale, step.timing.median_ms / (step.timing.median_ms - fixed_ms))
    return scale


def _outside(
    profile: Profile, prices: Sequence[Mapping[Option, Price]], option: Option, *, grad_error: float
) -> OutsideLayers:
    step = profile.step(option.precision.value)
    low = high = 1.0
    if step is not None and step.timing.median_ms > 0.0:
        low, high = (ms / step.timing.median_ms for ms in (step.timing.p20_ms, step.timing.p80_ms))
    if step is not None and step.peak_bytes is not None:
        # the peak of the uniform step, without its layers
        uniform = nearest_plan(prices, option)
        layers = sum(row[chosen].memory_bytes for row, chosen in zip(prices, uniform, strict=True))
        memory_bytes = max(step.peak_bytes - layers, 0)
    else:
        # FP32 parameters, gradients and optimizer states
        numel = sum(parameter.held_numel for parameter in profile.model.uncovered)
        memory_bytes = int(numel * 4 * (2 + profile.model.optimizer_state_numel_ratio))
    ms = profile.fixed_ms if option == FP32 else profile.fixed_bf16_ms
    if step is not None:  # what layers that were timed too long alone have not in the step
        ms = step.timing.median_ms - (step.timing.median_ms - ms) * _layer_scale(profile)
    margin_ms, bf16 = 0.0, profile.step(BF16_O2.precision.value)
    is_apart = profile.fixed_ms != profile.fixed_bf16_ms  # else BF16's is FP32's: no gain to doubt
    if (
        option == FP32
        and is_apart
        and step
        and bf16
        and step.timing.samples
        and bf16.timing.samples
    ):
        margin_ms = _sampling_margin_ms(step.timing, bf16.timing)
    return OutsideLayers(ms, grad_error, memory_bytes, low=low, high=high, margin_ms=margin_ms)


def nearest_plan(prices: Sequence[Mapping[Option, Price]], option: Option) -> tuple[Option, ...]:
    """Return the option wherever it has a price, else the layer's first; whatever is kept."""
    return tuple(option if option in row else next(iter(row)) for row in prices)
