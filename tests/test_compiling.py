"""The profiler under torch.compile: compile time apart, no graph in a sample, failures named."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprec.common.text import first_line
from autoprec.device.timing import (
    UNWATCHED,
    Clock,
    Observation,
    Samples,
    Stopping,
    sample_interleaved,
    timing_from,
)
from autoprec.errors import DeviceError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.layers import find_layers
from autoprec.model.recording import Call
from autoprec.profiler import open_compilation, profile_model
from autoprec.profiler.candidates import Attempt, Candidate
from autoprec.profiler.compiling import (
    MOST_SPOILED,
    Compilation,
    GraphMonitor,
    made_graphs,
)
from autoprec.profiler.groups import Group, group_layers, record_step
from autoprec.profiler.layers import LayerMeter
from autoprec.records import BF16_O2, FP32, LayerTiming, Option, Recipe, fp8_option
from autoprec.records.cost import ratio_error
from autoprec.runtime import install_options
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings
from autoprec.workload.functions import take_batches
from tests.constant_clock import CPU, RUNS_FP8, TENSORWISE, ConstantClock, needs_fp8
from tests.models import mlp_workload

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of dynamo and inductor themselves
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # dynamo does it, torch 2.13
]


class CleanMonitor:
    def settle(self) -> int:
        return 2

    def observe(self, sample: Callable[[], float]) -> tuple[float, Observation]:
        return sample(), Observation()

    def look(self) -> None: ...


def opened(backend: Any = "aot_eager") -> Any:  # Any: dynamo's backends; a context of this module
    return open_compilation(CPU, "default", backend=backend)


def rows_of(compilation: Compilation, name: str = "second") -> dict[str, LayerTiming]:
    workload = mlp_workload()
    spec = capture_model(Context(workload, CPU))
    model = workload.build_model().train()
    layers = find_layers(model)
    batch = take_batches(workload, seed=0, count=1)[0]
    calls = record_step(Context(workload, CPU), model, batch, layers, in_surroundings=True)[name]
    group = next(g for g in group_layers(spec, (TENSORWISE,)) if g.first.name == name)
    meter = LayerMeter(CPU, ConstantClock(), 2.0, compilation=compilation)
    rows = meter.time_group(group, calls, lambda: copy.deepcopy(layers[name]))
    return {row.option.key: row for row in rows}


def test_layers_are_timed_compiled_and_their_parts_eager() -> None:
    with opened() as compilation:
        before = made_graphs()
        rows = rows_of(compilation)
        assert made_graphs() > before
    assert compilation.seconds > 0
    assert compilation.recompiles == 0
    assert all(row.total is not None and not row.infeasible for row in rows.values())
    if RUNS_FP8:
        fp8 = rows[TENSORWISE.key]
        assert "_scaled_mm float8_e4m3fn" in fp8.kernels
        assert fp8.cast is not None
        assert fp8.cast.median_ms == 0.0  # 1 ms in all, and each GEMM takes as long on this clock
        assert fp8.beside == ("gelu", "add")
        assert fp8.note == ""
        assert rows["bf16_o2"].beside == rows["fp32"].beside == ()


def test_a_layer_alone_is_a_graph_in_each_precision() -> None:
    for option in (FP32, BF16_O2):
        model = nn.Sequential(nn.Linear(8, 8))
        install_options(model, {"0": option})
        with opened() as compilation:
            before = made_graphs()
            compilation.compile_layer(model[0])(torch.ones(2, 8))
            assert made_graphs() == before + 1


@needs_fp8
def test_an_fp8_layer_that_does_not_compile_is_timed_eagerly_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_fp8(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        if any("float8" in str(node.args) + str(node.target) for node in graph.graph.nodes):
            raise RuntimeError("no FP8 kernel for this layer\nwith much more to say")
        return graph.forward

    with opened(no_fp8) as compilation:
        rows = rows_of(compilation)
    fp8 = rows[TENSORWISE.key]
    assert "no FP8 kernel for this layer" in fp8.note
    assert "\n" not in fp8.note
    assert fp8.infeasible == ""
    assert fp8.total is not None
    assert fp8.beside == ()
    assert rows["bf16_o2"].note == ""
    assert f"a layer is timed eagerly in {TENSORWISE.key}" in caplog.text


@needs_fp8
def test_an_fp8_layer_whose_input_nothing_makes_is_compiled_with_what_is_behind_it() -> None:
    with opened() as compilation:
        assert rows_of(compilation, "first")[TENSORWISE.key].beside == ("gelu",)


class TellingClock(Clock):
    """Says what the step that it runs has told it."""

    told = 1.0

    def measure(self, fn: Callable[[], object]) -> float:
        fn()
        return self.told


class Fixed(Candidate):
    """Its step takes the ms that it says."""

    def __init__(self, clock: TellingClock, option: Option, ms: float) -> None:
        super().__init__(option, nn.Linear(4, 4), [])
        self.clock, self.ms = clock, ms

    def step(self) -> None:
        self.clock.told = self.ms


def test_the_neighbours_own_time_is_taken_off_alike_for_all_options() -> None:
    other, clock = fp8_option(Recipe.ROWWISE), TellingClock()
    timed = partial(Fixed, clock)
    attempts = [
        Attempt(FP32, timed(FP32, 10.0)),
        Attempt(BF16_O2, timed(BF16_O2, 5.0), surrounded=timed(BF16_O2, 7.0)),
        Attempt(TENSORWISE, timed(TENSORWISE, 99.0), surrounded=timed(TENSORWISE, 5.5)),
        Attempt(other, timed(other, 6.0)),  # it did not compile between them
    ]
    meter = LayerMeter(CPU, clock, 2.0)
    totals = meter._sample_totals(attempts)
    ms = {option: samples.timing().median_ms for option, samples in totals.items()}
    assert ms == {FP32: 10.0, BF16_O2: 5.0, TENSORWISE: 3.5, other: 6.0}
    # c(fp8) - c(bf16) = total(fp8) - total(bf16)
    assert ms[TENSORWISE] - ms[BF16_O2] == 5.5 - 7.0


def test_what_the_neighbours_time_is_uncertain_by_is_in_the_layers_time() -> None:
    fp8 = Samples(rounds=[5.5, None, 5.5, 5.5, 5.5], hosts=[1.0] * 4)
    left = fp8.beyond(Samples(rounds=[7.0, 7.0, 5.0, 9.0]), plus_ms=5.0)
    assert left.rounds == [3.5, None, 5.5, 1.5, 3.5]
    assert left.timing().host_ms is None
    bf16 = timing_from([5.0] * 4)
    error = ratio_error(bf16, left.timing())
    assert error
    assert error > abs(math.log(3.5 / 5.0))  # by the medians a gain, but no sure one


@pytest.mark.slow  # of steps, test_steps.py has the same
def test_a_layer_that_compiles_in_every_sample_is_timed_eagerly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Counting(nn.Linear):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x) * self.count

    x = torch.randn(8, 16)
    call = Call((x,), {}, [torch.randn(8, 16)])
    spec = capture_model(Context(mlp_workload(), CPU))
    group = Group((spec.layer("first"),), (FP32, BF16_O2))
    with opened("eager") as compilation:
        meter = LayerMeter(CPU, ConstantClock(), 2.0, compilation=compilation)
        rows = meter.time_group(group, [call], lambda: Counting(16, 16))
    assert all("give batches of one shape" in row.note for row in rows)
    assert all(row.total is not None for row in rows)
    assert "a layer is timed eagerly" in caplog.text


def test_a_sample_in_which_a_graph_was_made_is_left_out() -> None:
    with opened("eager") as compilation:
        sizes = iter([4, 4, 5, *[4] * 9])
        fn = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
        found = sample_interleaved(
            {"a": lambda: fn(torch.ones(next(sizes)))},
            clock=ConstantClock(),
            stopping=Stopping(samples=3, rejections=0),
            warmup=1,
            monitor=GraphMonitor(compilation, CleanMonitor()),
        )["a"]
    assert found.rounds == [1.0, None, 1.0]  # no rejection is allowed, and yet this one is
    assert (found.rejected, compilation.recompiles, found.pauses) == (1, 1, 6)


def test_a_step_that_compiles_again_and_again_is_an_error() -> None:
    with opened("eager") as compilation:
        sizes = iter(range(2, 99))
        fn = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
        with pytest.raises(DeviceError, match="give batches of one shape"):
            sample_interleaved(
                {"a": lambda: fn(torch.ones(next(sizes)))},
                clock=ConstantClock(),
                stopping=Stopping(samples=9),
                monitor=GraphMonitor(compilation, UNWATCHED),
            )
    assert compilation.recompiles == MOST_SPOILED + 1


def test_many_layers_of_one_class_are_all_compiled() -> None:
    with opened("eager") as compilation:
        before = made_graphs()
        for width in range(1, 12):  # dynamo itself stops at eight
            layer = nn.Linear(width, 2)
            compilation.compile_layer(layer)(torch.ones(3, width))
        assert made_graphs() - before == 11


def test_eager_mode_compiles_nothing() -> None:
    before = made_graphs()
    with open_compilation(CPU, "eager") as compilation:
        assert compilation is None
    assert made_graphs() == before


def test_a_missing_compiler_is_one_line() -> None:
    def broken(*_: object) -> Callable[..., Any]:
        raise RuntimeError("InvalidCxxCompiler: no g++\nstack\nstack")

    with pytest.raises(DeviceError) as error, opened(broken):
        pass
    assert "a C++ compiler" in str(error.value)
    assert "no g++" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reason_is_the_line_that_tells() -> None:
    assert first_line(RuntimeError("backend='inductor' raised:\nE: no\nmore")) == "E: no"
    dynamo = "RuntimeError when making fake tensor call\n  Explanation: got RuntimeError('no fake')"
    assert first_line(RuntimeError(dynamo)) == "got RuntimeError('no fake')"
    assert first_line(ValueError("")) == "ValueError('')"


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(
        "import torch, torch.nn.functional as F\n"
        "def build_model():\n    return torch.nn.Sequential(torch.nn.Linear(16, 16))\n"
        "def train_batches(seed):\n    while True:\n        yield torch.ones(16, 16)\n"
        "def loss_fn(model, x):\n    return F.mse_loss(model(x), x)\n"
    )
    return path


@pytest.mark.slow  # the inductor compiles C++
def test_profile_with_compile_is_of_the_inductor(tmp_path: Path, tiny_file: Path) -> None:
    settings = Settings(
        workload=str(tiny_file),
        target="cpu",
        out=tmp_path,
        compile=True,
        recipes=(Recipe.TENSORWISE,),
        gemms_hp=False,
    )
    profile = Run(settings, stages=("profile",)).profile
    assert profile.device.compile_mode == "default"
    assert profile.compile_s > 0
    assert profile.recompiles == 0
    row = profile.timing("0", FP32)
    assert row is not None
    assert row.total is not None
    assert {step.label for step in profile.steps} >= {"fp32", "bf16_o2", "autocast_bf16"}


@pytest.mark.slow  # imports the inductor
def test_no_cpp_compiler_is_named() -> None:
    import torch._inductor.config as inductor

    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        pytest.raises(DeviceError, match="No working C\\+\\+ compiler"),
        open_compilation(CPU, "default"),
    ):
        pass


@pytest.mark.slow  # the inductor compiles C++
def test_profile_model_is_complete_when_compiled() -> None:
    context = Context(mlp_workload(), CPU, clock=ConstantClock())
    spec = capture_model(context)
    profile = profile_model(context, spec, options=(TENSORWISE,), compiled=True)
    assert all(row.total is not None for row in profile.layers if not row.infeasible)
    assert profile.step_equivalents > 0
    assert profile.compile_s > 1
