"""Whole steps: in turns, one in memory at a time, as written or plain, compiled or said why not."""

import itertools
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.device.timing import UNWATCHED, Samples, Stopping
from autoprec.errors import DeviceError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.layers import find_layers
from autoprec.profiler import open_compilation, parking, profile_model, time_steps
from autoprec.profiler.measure import check_room, sum_totals
from autoprec.profiler.parking import Parking
from autoprec.profiler.steps import (
    AS_WRITTEN,
    AUTOCAST,
    Eager,
    Variant,
    turn_error,
    written_variants,
)
from autoprec.records import BF16_O2, AsWritten, Option, StepTiming, Timing
from autoprec.records.cost import ratio_error
from autoprec.report.remarks import profile_notes
from autoprec.runtime import attach_optimizer, install_options, stepping
from autoprec.workload.functions import Batch, Workload, workload_from
from tests.constant_clock import CPU, ConstantClock, WithoutBf16
from tests.models import Mlp, mlp_workload
from tests.peaks import tracked_peak, training_peak

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of dynamo itself
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # dynamo looks at a layer's input
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # dynamo does it, torch 2.13
]
BASE = mlp_workload()


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]).float(), batch[1])


BF16: dict[str, Option] = dict.fromkeys(find_layers(Mlp()), BF16_O2)


def workload(
    build_model: Callable[[], nn.Module] = Mlp,
    loss_fn: Callable[[nn.Module, Any], Tensor] = mse,
) -> Workload:
    functions = {"train_batches": BASE.train_batches, "build_model": build_model}
    return workload_from({**functions, "loss_fn": loss_fn})


def timed(
    given: Workload, variants: dict[str, Variant], *, samples: int = 4, **more: Any
) -> dict[str, StepTiming]:  # Any: of time_steps
    context = Context(given, CPU, clock=ConstantClock())
    stopping = Stopping(samples, min(samples, 2))
    found, _ = time_steps(context, variants, stopping=stopping, monitor=UNWATCHED, **more)
    return {step.label: step for step in found}


# --- turns ------------------------------------------------------------------------------------


def test_variants_take_turns_on_the_same_batches() -> None:
    seen: list[tuple[str, float]] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        dtype = str(next(model.parameters()).dtype)
        seen.append(
            ("autocast" if torch.is_autocast_enabled("cpu") else dtype, float(batch[0][0, 0]))
        )
        return mse(model, batch)

    variants: dict[str, Variant] = {"fp32": {}, "bf16_o2": BF16, AUTOCAST: AUTOCAST}
    found = timed(workload(loss_fn=loss_fn), variants)
    assert list(found) == ["fp32", "bf16_o2", "autocast_bf16"]
    assert all(step.timing.samples == 4 and step.peak_bytes is None for step in found.values())
    assert all(step.is_compiled is False and step.note == "" for step in found.values())
    turns = seen[3:]  # after each was built: two turns of a warm-up call and two samples
    assert len(turns) == 2 * 3 * 3
    for first in (0, 9):
        blocks = [turns[first + 3 * i : first + 3 * i + 3] for i in range(3)]
        assert all(len({arm for arm, _ in block}) == 1 for block in blocks)
        assert len({block[0][0] for block in blocks}) == 3
        assert len({tuple(batch for _, batch in block) for block in blocks}) == 1
    assert len({batch for _, batch in turns}) == 4  # all of them, over the turns


@pytest.mark.parametrize("gemm_ms", [1.0, 700.0])
def test_where_bf16_is_far_slower_it_takes_few_steps_and_autocast_none(gemm_ms: float) -> None:
    steps: list[torch.dtype] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        steps.append(next(model.parameters()).dtype)
        return mse(model, batch)

    context = Context(workload(loss_fn=loss_fn), CPU, clock=WithoutBf16(300.0, gemm_ms))
    variants: dict[str, Variant] = {"fp32": {}, "bf16_o2": BF16, AUTOCAST: AUTOCAST}
    found, left_out = time_steps(
        context, variants, stopping=Stopping(4, 2, budget_ms=1200.0), monitor=UNWATCHED
    )
    samples = {step.label: step.timing.samples for step in found}
    if gemm_ms == 1.0:
        assert samples == {"fp32": 4, "bf16_o2": 4, AUTOCAST: 4}
        assert left_out == {}
        return
    assert samples == {"fp32": 4, "bf16_o2": 1}
    assert steps.count(torch.bfloat16) == 1  # it is the sample
    gemms = round((found[1].ms - 300.0) / 700.0)
    assert left_out == {
        AUTOCAST: "it runs the GEMMs of BF16 O2, whose first step took "
        f"{(300 + 700 * gemms) / 1e3:.2g} s, and FP32's 0.3 s"
    }


@pytest.mark.parametrize(("gemm_ms", "is_known"), [(0.1, True), (90.0, False)])
def test_far_slower_bf16_steps_do_not_tell_what_is_outside_of_layers(
    gemm_ms: float, is_known: bool
) -> None:
    class SlowerAlone(WithoutBf16):
        """A layer takes longer alone than within a step."""

        def measure(self, fn: Callable[[], object]) -> float:
            count = (super().measure(fn) - self.base_ms) / self.gemm_ms
            return self.base_ms + self.gemm_ms * (count if count < 3.5 else 0.9 * count)

    context = Context(mlp_workload(), CPU, clock=SlowerAlone(1.0, gemm_ms))
    profile = profile_model(context, capture_model(context), options=())
    step = profile.step("bf16_o2")
    assert step is not None
    own = step.ms - sum_totals(profile.layers, profile.model.bf16_options)
    assert own != profile.fixed_ms
    assert profile.fixed_bf16_ms == pytest.approx(own if is_known else profile.fixed_ms)


class Wide(nn.Module):
    """Far more parameters than activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


def wide_workload() -> Workload:
    def train_batches(_seed: int) -> Iterator[Tensor]:
        while True:
            yield torch.ones(8, 256)

    functions = {"train_batches": train_batches, "build_model": Wide}
    return workload_from({**functions, "loss_fn": lambda model, x: F.mse_loss(model(x), x)})


def test_building_a_variant_is_progress_too() -> None:
    """It takes as long as a turn, with a compiler longer: a pipe must not fall silent."""
    seen: list[tuple[int, int, bool]] = []
    built: list[int] = []

    def build() -> Mlp:
        built.append(1)
        return Mlp()

    def progress(label: str, done: int, total: int) -> None:
        assert label == "steps"
        seen.append((done, total, bool(built)))

    context = Context(workload(build), CPU, clock=ConstantClock(), progress=progress)
    variants: dict[str, Variant] = {"fp32": {}, "bf16_o2": BF16}
    time_steps(context, variants, stopping=Stopping(4, 2), monitor=UNWATCHED)
    assert seen[0] == (0, 6, False)  # two are built, and have two turns each
    assert [done for done, *_ in seen] == list(range(7))
    assert {total for _, total, _ in seen} == {6}


def test_steps_take_the_memory_of_one_of_them() -> None:
    bf16 = dict.fromkeys(find_layers(Wide()), BF16_O2)
    with tracked_peak() as alone:
        timed(wide_workload(), {"bf16_o2": bf16}, samples=1)
    assert alone.rise_bytes > 18 * 6 * 256 * 256  # weights, gradients, masters and two moments
    with tracked_peak() as together:
        timed(wide_workload(), {"fp32": {}, "bf16_o2": bf16, "other": Eager(bf16)}, samples=2)
    assert together.rise_bytes < 1.1 * alone.rise_bytes


ON_DEVICE: "weakref.WeakSet[Waiting]" = weakref.WeakSet()


class Waiting:
    """A batch on a host; it is another on the device."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        self.pair = pair

    def to(self, _device: torch.device) -> "Waiting":
        """Return it on the device."""
        ON_DEVICE.add(moved := Waiting(self.pair))
        return moved


def test_a_step_has_its_own_batches_alone_on_the_device() -> None:
    alive = []

    def loss_fn(model: nn.Module, batch: Waiting) -> Tensor:
        alive.append(len(ON_DEVICE))
        return mse(model, batch.pair)

    functions = {"build_model": Mlp, "loss_fn": loss_fn, "accumulation_steps": 2}
    batches = {"train_batches": lambda seed: map(Waiting, BASE.train_batches(seed))}
    timed(workload_from({**functions, **batches}), {"fp32": {}})
    assert set(alive) == {2}


def transformers_adafactor(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(parameters)
    return made


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        torch.optim.AdamW,
        torch.optim.Adafactor,
        pytest.param(transformers_adafactor, marks=pytest.mark.slow),  # 4 s to import it
    ],
    ids=["sgd", "adamw", "adafactor", "adafactor of transformers"],
)
def test_steps_take_the_memory_of_training_in_fp32(
    make: Callable[..., torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masters, BF16 weights and both gradients are no more than FP32's where chunks are small."""
    monkeypatch.setattr(stepping, "CHUNK_BYTES", 0)  # of one parameter
    functions = {
        "build_model": lambda: nn.Sequential(*(nn.Linear(96, 96) for _ in range(12))),
        "train_batches": lambda _: itertools.repeat(torch.ones(4, 96)),
        "loss_fn": lambda model, x: F.mse_loss(model(x), x),
        "build_optimizer": lambda model: make(model.parameters()),
    }
    own = workload_from(functions)
    training = training_peak(own)
    bf16 = dict.fromkeys(find_layers(own.build_model()), BF16_O2)
    with tracked_peak() as peak:
        timed(own, {"fp32": {}, "bf16_o2": bf16}, samples=1)
    assert peak.rise_bytes < 1.1 * training.rise_bytes


@pytest.mark.parametrize("option", ["fp32", "bf16_o2"])
def test_a_parked_state_trains_on_as_if_it_had_stayed(option: str) -> None:
    def train(parks: bool) -> tuple[list[float], int]:
        torch.manual_seed(0)
        model = Mlp()
        optimizer = BASE.build_optimizer(model)
        if option != "fp32":
            install_options(model, BF16)
            attach_optimizer(model, optimizer)
        parked, losses, away = Parking(model, optimizer), [], 0
        for _, batch in zip(range(6), BASE.train_batches(0), strict=False):
            optimizer.zero_grad()
            loss = mse(model, batch)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
            if parks:
                parked.leave()
                away = model.first.weight.untyped_storage().nbytes()
                assert all(
                    value.untyped_storage().nbytes() == 0
                    for state in optimizer.state.values()
                    for value in state.values()
                    if isinstance(value, Tensor)
                )
                parked.come_back()
        return losses, away

    assert train(True) == (train(False)[0], 0)


def test_a_state_that_cannot_be_written_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = Path("/dev/full").open("r+b")  # noqa: SIM115  # closed with its owner
    monkeypatch.setattr(parking, "TemporaryFile", lambda **_: full)
    model = Mlp()
    parked, weight = Parking(model, BASE.build_optimizer(model)), model.first.weight.clone()
    parked.leave()
    assert "waits in memory" in caplog.text
    parked.come_back()
    assert torch.equal(model.first.weight, weight)


def test_what_does_not_fit_is_left_out_or_named(caplog: pytest.LogCaptureFixture) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        return mse(model, batch)

    found = timed(workload(loss_fn=loss_fn), {"fp32": {}, AUTOCAST: AUTOCAST})
    assert list(found) == ["fp32"]
    assert "the step autocast_bf16 is not timed: it does not fit into memory" in caplog.text

    def full(model: nn.Module, batch: Batch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DeviceError, match="but that of 'bf16_o2' does not"):
        timed(workload(loss_fn=full), {"bf16_o2": BF16})


# --- as written -------------------------------------------------------------------------------


def test_a_baseline_that_fails_is_named_and_not_the_end() -> None:
    class Product(torch.autograd.Function):
        """x (a b), whose backward autocast gives BF16 beside FP32."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(x, a, b)
            return x @ (a @ b)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            (g,), (x, a, b) = gradients, ctx.saved_tensors
            of_product = x.t() @ g
            return g @ (a @ b).t(), of_product @ b.t(), a.t() @ of_product

    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.a, self.b = nn.Parameter(torch.ones(32, 4)), nn.Parameter(torch.ones(4, 32))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = Product.apply(self.first(x), self.a, self.b)  # type: ignore[no-untyped-call]  # torch's own stub
            return found

    functions = {
        "build_model": LowRank,
        "train_batches": lambda seed: iter([torch.ones(4, 32)] * 8),
        "loss_fn": lambda model, x: model(x).float().square().mean(),
    }
    context = Context(workload_from(functions), CPU, clock=ConstantClock())
    profile = profile_model(context, capture_model(context), options=())
    assert "to have the same dtype" in profile.steps_left_out[AUTOCAST]
    assert profile.step("fp32") is not None
    assert any("'autocast BF16' is not timed: it fails" in note for note in profile_notes(profile))


def test_the_step_as_written_keeps_its_autocast_and_the_others_do_not() -> None:
    seen: list[torch.dtype] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            out = model(batch[0])
        seen.append(out.dtype)
        return F.mse_loss(out.float(), batch[1])

    given = workload(loss_fn=loss_fn)
    for variant, dtype in (
        ({}, torch.float32),
        (AUTOCAST, torch.bfloat16),
        (AS_WRITTEN, torch.half),
    ):
        del seen[:]
        timed(given, {"it": variant}, samples=1)
        assert set(seen) == {dtype}


def test_the_step_as_written_keeps_its_dtypes_and_the_others_do_not() -> None:
    seen: list[torch.dtype] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(next(model.parameters()).dtype)
        return F.mse_loss(model(batch[0].bfloat16()).float(), batch[1])

    given = workload(lambda: Mlp().bfloat16(), loss_fn)
    for variant, dtype in (({}, torch.float32), (AS_WRITTEN, torch.bfloat16)):
        del seen[:]
        timed(given, {"it": variant}, samples=1)
        assert set(seen) == {dtype}


def test_the_step_as_written_is_timed_where_it_is_another_one() -> None:
    for compiled in (False, True):
        assert written_variants(None, compiled=compiled) == {}
        same = AsWritten(is_compiled=compiled)
        assert written_variants(same, compiled=compiled) == {}
        assert list(written_variants(same, compiled=not compiled)) == ["as_written"]
        for other in (AsWritten(autocast="bfloat16"), AsWritten(parameters=("bfloat16",))):
            assert list(written_variants(other, compiled=compiled)) == ["as_written"]


# --- compiled ---------------------------------------------------------------------------------


def counting_backend(graphs: list[str]) -> Callable[..., Any]:
    def compile_graph(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(str(graph.graph))
        return graph.forward

    return compile_graph


def row_of_layers() -> nn.Module:
    return nn.Sequential(OrderedDict(Mlp().named_children()))


@pytest.mark.parametrize("build_model", [Mlp, row_of_layers])
def test_steps_are_compiled_but_for_the_eager_ones(build_model: Callable[[], nn.Module]) -> None:
    graphs: list[str] = []
    variants: dict[str, Variant] = {"fp32": {}, "bf16_o2": BF16, "eager_bf16_o2": Eager(BF16)}
    variants[AS_WRITTEN] = AS_WRITTEN
    with open_compilation(CPU, "default", backend=counting_backend(graphs)) as compilation:
        del graphs[:]  # of the check whether compiling works
        found = timed(workload(build_model), variants, compilation=compilation)
        assert compilation is not None
        assert compilation.seconds > 0
        assert compilation.recompiles == 0
    assert len(graphs) == 2
    compiled = {label: step.is_compiled for label, step in found.items()}
    assert compiled == {"fp32": True, "bf16_o2": True, "eager_bf16_o2": False, "as_written": False}
    assert all(step.timing.rejected == 0 and step.timing.samples == 4 for step in found.values())


def test_what_the_user_compiles_is_kept_with_a_plan_in_it() -> None:
    graphs: list[str] = []
    own, ours = counting_backend(graphs), counting_backend([])

    def build_model() -> nn.Module:
        model = Mlp()
        model.second = torch.compile(model.second, backend=own)  # type: ignore[assignment]  # a module
        return model

    given = workload(build_model)
    variants: dict[str, Variant] = {"bf16_o2": BF16, "eager_bf16_o2": Eager(BF16)}
    with open_compilation(CPU, "default", backend=ours) as compilation:
        found = timed(given, variants, compilation=compilation)
    assert [step.is_compiled for step in found.values()] == [True, False]
    assert len(graphs) == 1
    # asked to be eager, only the step as written is what the user compiles
    del graphs[:]
    torch.compiler.reset()
    variants = {"fp32": {}, AS_WRITTEN: AS_WRITTEN}
    found = timed(workload(build_model), variants)
    assert [step.is_compiled for step in found.values()] == [False, True]
    assert len(graphs) == 1


def test_a_step_that_does_not_compile_is_timed_eagerly_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_bf16(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        if "bfloat16" in graph.code:
            raise RuntimeError("no kernel for BF16\nwith much more to say")
        return graph.forward

    caplog.set_level(logging.WARNING)
    with open_compilation(CPU, "default", backend=no_bf16) as compilation:
        found = timed(workload(), {"fp32": {}, "bf16_o2": BF16}, compilation=compilation)
    assert [step.is_compiled for step in found.values()] == [True, False]
    assert found["fp32"].note == ""
    assert "no kernel for BF16" in found["bf16_o2"].note
    assert "\n" not in found["bf16_o2"].note
    assert "the step bf16_o2 is timed eagerly" in caplog.text
    assert found["bf16_o2"].timing.samples == 4


@pytest.mark.slow
def test_a_step_that_compiles_in_every_sample_is_timed_eagerly() -> None:
    sizes = iter(range(8, 999))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows = next(sizes)
        return F.mse_loss(model(batch[0][:rows]), batch[1][:rows])

    with (
        torch._dynamo.config.patch(automatic_dynamic_shapes=False),
        open_compilation(CPU, "default", backend="eager") as compilation,
    ):
        found = timed(workload(loss_fn=loss_fn), {"fp32": {}}, samples=9, compilation=compilation)
    assert found["fp32"].is_compiled is False
    assert "give batches of one shape" in found["fp32"].note


def test_a_whole_profile_takes_the_memory_of_one_step() -> None:
    """Layers are timed with one of their kind in memory, beside the FP32 model and its calls."""
    context = Context(wide_workload(), CPU, clock=ConstantClock())
    spec = capture_model(context)
    bf16 = dict.fromkeys(spec.names, BF16_O2)
    with tracked_peak() as alone:
        timed(wide_workload(), {"bf16_o2": bf16}, samples=1)
    with tracked_peak() as whole:
        profile_model(context, spec, options=())
    assert whole.rise_bytes < 1.1 * alone.rise_bytes


def test_a_step_beyond_the_limit_is_refused_before_anything_is_timed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ConstantClock()
    context = Context(wide_workload(), CPU, clock=clock, memory_limit=2**20)
    spec = capture_model(context)
    with pytest.raises(DeviceError, match=r"--memory-limit 1.00 MiB, but a training step takes"):
        profile_model(context, spec, options=())
    assert clock.calls == 0
    caplog.set_level(logging.INFO)
    check_room(Context(wide_workload(), CPU, memory_limit=2**30), spec)
    assert "steps are timed one model at a time" in caplog.text


def test_turns_that_differ_by_more_than_their_samples_widen_the_interval() -> None:
    steady = Timing(median_ms=10.0, p20_ms=9.99, p80_ms=10.01, samples=12)
    turns = [Samples(rounds=[level, None, level]) for level in (8.0, 10.0, 12.0)]
    error = turn_error(turns)
    assert error == pytest.approx(2.0 / math.sqrt(3) / 10.0)  # sd of the medians, over three turns
    drifting = steady.model_copy(update={"turn_error": error})
    assert drifting.relative_error == error
    narrow, wide = ratio_error(steady, steady), ratio_error(steady, drifting)
    assert narrow is not None
    assert wide is not None
    assert wide > 100 * narrow
    assert turn_error(turns[:1]) == 0.0
