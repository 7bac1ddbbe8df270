"""FP8 with some GEMMs in BF16, as options of the search: only where the device makes them pay."""

import math
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprec.device.timing import Clock, Function
from autoprec.device.tracing import PLAIN_TENSORS
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.recording import Call
from autoprec.predict import load_device_profile, predict_profile
from autoprec.profiler import profile_model
from autoprec.profiler.groups import Group
from autoprec.profiler.layers import LayerMeter, promising_gemms_hp
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    Constraint,
    Gemm,
    LayerTiming,
    Option,
    Profile,
    Recipe,
    Timing,
    fp8_option,
    with_gemms_hp,
)
from autoprec.search import search_plan
from autoprec.sensitivity.local import list_cells
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from tests.constant_clock import WithoutBf16
from tests.decoder_specs import linear_layer, model_of
from tests.models import mlp_workload
from tests.search_tables import tables_of

TENSORWISE, GW_HP = fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE_WITH_GW_HP)


def predicted(
    device: str, M: int, K: int, N: int, options: tuple[Option, ...] = (TENSORWISE, GW_HP)
) -> Profile:
    spec = model_of(linear_layer("wide", K, N, shape=(1, M)))
    return predict_profile(
        spec, load_device_profile(device), options=options, compiled=True, gemms_hp=True
    )


def partly_of(profile: Profile) -> list[Option]:
    return [option for option in profile.model.layers[0].options if option.gemms_hp]


def test_every_legal_set_of_bf16_gemms_is_considered_once() -> None:
    options = with_gemms_hp((FP32, BF16_O2, TENSORWISE, GW_HP))
    assert len(options) == len(set(options)) == 4 + 6
    assert all(option.recipe is Recipe.TENSORWISE for option in options if option.gemms_hp)
    assert with_gemms_hp(options) == options


def test_a_wide_layer_gets_bf16_gemms_that_beat_bf16_and_not_therror_whole_of_fp8() -> None:
    profile = predicted("h100-sxm", 16384, 8192, 8192)
    ms = {row.option: row.total.median_ms for row in profile.layers if row.total}
    partly = partly_of(profile)
    assert fp8_option(Recipe.TENSORWISE, Gemm.GRAD_INPUT) in partly
    for option in partly:
        assert ms[option] < ms[BF16_O2]
        assert ms[option] > ms[TENSORWISE]


def test_no_gemm_stays_in_bf16_where_fp8_does_not_pay() -> None:
    assert partly_of(predicted("h100-sxm", 512, 256, 256)) == []
    assert partly_of(predicted("a100", 16384, 8192, 8192)) == []


def test_bf16_gemms_that_the_shape_needs_stay_though_they_are_slow() -> None:
    options = predicted("h100-sxm", 257, 256, 256, (TENSORWISE,)).model.layers[0].options
    assert fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT) in options


def timing(ms: float) -> Timing:
    return Timing(median_ms=ms, p20_ms=ms, p80_ms=ms, samples=3, basis=Basis.MEASURED)


def timed(option: Option, gemms: tuple[float, float, float], cast: float = 0.0) -> LayerTiming:
    output, grad_input, grad_weight = map(timing, gemms)
    return LayerTiming(
        names=("a",),
        option=option,
        output=output,
        grad_input=grad_input,
        grad_weight=grad_weight,
        cast=timing(cast) if option.is_fp8 else None,
        total=timing(sum(gemms) + cast),
        parameter_bytes=0,
        gradient_bytes=0,
        optimizer_bytes=0,
        activation_bytes=0,
    )


def test_the_parts_tell_which_gemms_in_bf16_are_worth_timing() -> None:
    plain = timed(BF16_O2, (2.0, 2.0, 2.0))
    fast = timed(TENSORWISE, (1.0, 1.0, 1.0), cast=0.6)  # one in BF16: 4.4 ms, two: 5.2, all: 6
    every = set(with_gemms_hp((TENSORWISE,)))
    assert set(promising_gemms_hp([plain, fast])) == every - {TENSORWISE}
    slow = timed(TENSORWISE, (1.0, 1.0, 5.5), cast=3.0)  # only without its own grad_weight
    found = promising_gemms_hp([plain, slow])
    assert fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT) in found
    assert all(Gemm.GRAD_WEIGHT in option.gemms_hp for option in found)
    assert promising_gemms_hp([plain]) == []
    assert promising_gemms_hp([timed(FP32, (1.0, 1.0, 1.0)), plain, fast]) == []


def test_of_a_layer_that_is_far_slower_in_bf16_no_part_is_timed_in_it() -> None:
    layer = linear_layer("a", 16, 16, shape=(2, 16), options=(FP32, BF16_O2))
    call = Call(
        args=(torch.randn(32, 16).requires_grad_(),), kwargs={}, gradients=[torch.randn(32, 16)]
    )
    for gemm_ms, has_parts in ((1.0, True), (2.0, False)):  # three GEMMs beside 1 ms
        meter = LayerMeter(torch.device("cpu"), WithoutBf16(1.0, gemm_ms), state_ratio=2.0)
        fp32, bf16 = meter.time_group(
            Group((layer,), layer.options), [call], lambda: nn.Linear(16, 16, bias=False)
        )
        assert fp32.grad_input is not None
        assert bf16.total is not None
        assert bf16.total.median_ms == 1.0 + 3 * gemm_ms
        assert (bf16.grad_input is not None) == has_parts
    none = bf16.model_copy(update={"total": timing(18.1)})
    rows = [timed(FP32, (1.0, 1.0, 1.0)), none, timed(TENSORWISE, (0.1, 0.1, 0.1))]
    assert promising_gemms_hp(rows) == []


class PlainGemms(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Counts the GEMMs that are not FP8."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(kind not in PLAIN_TENSORS for kind in types):
            return NotImplemented  # torchao's own tensors take their operations apart first
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


class KindToFp8(Clock):
    """A clock by which a plain GEMM takes a millisecond and all else next to nothing."""

    def measure(self, fn: Function) -> float:
        with PlainGemms() as seen:  # type: ignore[no-untyped-call]
            fn()
        return float(seen.count) + 1e-3


@pytest.mark.slow
def test_a_measured_profile_times_the_sets_of_bf16_gemms_that_promise_a_gain() -> None:
    layer = linear_layer("a", 16, 16, shape=(2, 16), options=(FP32, BF16_O2, TENSORWISE))
    call = Call(
        args=(torch.randn(32, 16).requires_grad_(),), kwargs={}, gradients=[torch.randn(32, 16)]
    )
    meter = LayerMeter(torch.device("cpu"), KindToFp8(), state_ratio=2.0, gemms_hp=True)
    rows = meter.time_group(
        Group((layer,), layer.options), [call], lambda: nn.Linear(16, 16, bias=False)
    )
    ms = {row.option: row.total.median_ms for row in rows if row.total}
    assert set(with_gemms_hp((TENSORWISE,))) <= set(ms)
    assert ms[fp8_option(Recipe.TENSORWISE, Gemm.OUTPUT)] > ms[TENSORWISE]


def search_of(error_whole: float, error_partly: float, *, budget: float) -> Option:
    """Return what the search gives the one layer whose whole FP8 is over the budget."""
    partly = fp8_option(Recipe.TENSORWISE, Gemm.GRAD_INPUT)
    rows = {"a": {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5), TENSORWISE: (1.0, error_whole)}}
    rows["a"][partly] = (1.3, error_partly)
    profile, sensitivity = tables_of(rows)
    search = search_plan(
        profile,
        sensitivity,
        constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=budget),
        evaluate=None,
    )
    return search.chosen.options[0]


def test_a_gemm_stays_in_bf16_where_therror_whole_of_fp8_is_over_the_budget() -> None:
    chosen = search_of(0.008, 0.001, budget=0.005)
    assert chosen == fp8_option(Recipe.TENSORWISE, Gemm.GRAD_INPUT)


def test_a_layer_that_fp8_breaks_keeps_no_gemm_in_it() -> None:
    assert search_of(0.2, 0.001, budget=0.005) == BF16_O2


class Unsteady(KindToFp8):
    """The same within 20 %: two plain GEMMs of three may seem to take as long as three."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.factors: dict[Function, float] = {}  # one for all samples, or many would be taken

    def measure(self, fn: Function) -> float:
        factor = self.factors.setdefault(fn, self.random.uniform(0.8, 1.2))
        return math.sqrt(super().measure(fn)) * factor


@pytest.mark.slow
def test_what_sensitivity_measures_does_not_depend_on_times() -> None:
    workload, cpu, offered, found = mlp_workload(), torch.device("cpu"), set(), []
    captured = capture_model(Context(workload, cpu))
    for seed in range(2):
        context = Context(workload, cpu, clock=Unsteady(seed))
        timed = profile_model(context, captured, options=(TENSORWISE,), gemms_hp=True)
        offered.add(tuple(layer.options for layer in timed.model.layers))
        reference = prepare_reference(Context(workload, cpu), timed.model, warmup_steps=3)
        found.append(measure_sensitivity(reference, options=(TENSORWISE,), gemms_hp=True))
    assert len(offered) == 2  # the profiles differ
    one, other = (table.model_copy(update={"step_equivalents": 0.0}) for table in found)
    assert one == other
    first = [row.option for row in one.rows if row.name == "first"]
    assert first == [BF16_O2, *with_gemms_hp((TENSORWISE,))]
    for reference_spec in (captured, timed.model):  # whichever command measures
        assert [n for n, _ in list_cells(reference_spec, (TENSORWISE,), gemms_hp=True)] == [
            row.name for row in one.rows
        ]
