"""Profiles of toy models: complete, timed once per shape, proven, and exact under a fake clock."""

import copy
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import autoprec
from autoprec.device.tracing import Operation, traced
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.layers import find_layers
from autoprec.model.meta import capture_on_meta
from autoprec.model.neighbours import Neighbour, Surroundings
from autoprec.model.recording import Call
from autoprec.profiler import profile_model
from autoprec.profiler.candidates import make_candidate
from autoprec.profiler.groups import (
    copy_layer,
    group_layers,
    moved_call,
    record_step,
    uniform_options,
)
from autoprec.profiler.layers import LayerMeter, sum_parts
from autoprec.profiler.measure import sum_totals
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    LayerTiming,
    Option,
    Profile,
    Recipe,
    TensorSpec,
)
from autoprec.runtime.fit import uniform_plan
from autoprec.workload.functions import Workload, take_batches, workload_from
from tests.constant_clock import CPU, RUNS_FP8, TENSORWISE, ConstantClock, needs_fp8
from tests.models import WIDTH, conv_workload, mlp_workload, token_workload


class SequenceNet(nn.Module):
    """A frozen embedding, an LSTM, one linear called three times, and two of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.embed.weight.requires_grad_(False)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.left, self.right = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embed(tokens))
        for _ in range(3):
            x = F.relu(self.shared(x))
        logits: Tensor = self.left(x) + self.right(x)
        return logits


def sequence_workload() -> Workload:
    def train_batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(16, (4, 8), generator=generator)

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    functions = {"build_model": SequenceNet, "train_batches": train_batches, "loss_fn": loss_fn}
    return workload_from(SimpleNamespace(**functions), name="sequence")


WORKLOADS = {
    "mlp": mlp_workload,
    "conv": conv_workload,
    "tokens": token_workload,
    "sequence": sequence_workload,
}


def profile_of(workload: Workload, options: tuple[Option, ...] = (TENSORWISE,)) -> Profile:
    context = Context(workload, CPU, clock=ConstantClock())
    return profile_model(context, capture_model(context), options=options)


def row_of(profile: Profile, name: str, option: Option) -> LayerTiming:
    row = profile.timing(name, option)
    assert row is not None
    return row


def test_the_stages_leave_the_random_state_as_it_was() -> None:
    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]

    context = Context(token_workload(dropout=0.1), CPU, clock=ConstantClock())
    before = states()
    spec = capture_model(context)
    assert states() == before
    capture_on_meta(context.workload)
    assert states() == before
    profile_model(context, spec, options=())
    assert states() == before


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n in ("tokens", "sequence") else [])
        for n in WORKLOADS
    ],
)
def test_every_layer_has_a_row_for_every_option(name: str) -> None:
    profile = profile_of(WORKLOADS[name]())
    for layer in profile.model.layers:
        for option in layer.options:
            row = profile.timing(layer.name, option)
            if option.is_fp8 and option.recipe is not Recipe.TENSORWISE:
                assert row is None  # not asked for
                continue
            assert row is not None
            assert row.infeasible == ""
            assert (row.total is not None) == bool(layer.calls)
            assert bool(row.kernels) == bool(layer.calls)
    assert Profile.from_json(profile.to_json()) == profile


def test_a_group_norm_of_channels_last_images_does_not_end_the_process() -> None:
    functions = {
        "build_model": lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16)),
        "train_batches": lambda seed: iter([torch.ones(2, 3, 4, 4)] * 8),
        "loss_fn": lambda model, x: model(x.to(memory_format=torch.channels_last)).square().mean(),
    }
    profile = profile_of(workload_from(functions, name="images"))
    row = row_of(profile, "1", BF16_O2)
    assert row.total is not None
    assert row.grad_weight is None  # asked for alone, torch 2.13 crashes


def test_what_is_wrapped_for_checkpointing_is_profiled_under_plain_names() -> None:
    """Whole steps install options by the names of the spec, which are those of a plan."""
    plain = mlp_workload()

    def build_model() -> nn.Module:
        model: Any = plain.build_model()
        model.first = checkpoint_wrapper(model.first)
        return checkpoint_wrapper(model)

    functions = {"train_batches": plain.train_batches, "loss_fn": plain.loss_fn}
    context = Context(workload_from({"build_model": build_model, **functions}), CPU)
    spec = capture_model(context)
    assert spec.names == capture_model(Context(plain, CPU)).names
    profile = profile_model(context, spec, options=())
    assert {name for row in profile.layers for name in row.names} == set(spec.names)
    assert all(step.timing.samples for step in profile.steps)
    autoprec.apply(uniform_plan(build_model(), BF16_O2), build_model())


def test_layers_of_one_shape_are_timed_once() -> None:
    profile = profile_of(sequence_workload())
    assert row_of(profile, "right", FP32).names == ("left", "right")
    assert len([row for row in profile.layers if "left" in row.names]) == len(
        profile.model.layer("left").options
    ) - len([o for o in profile.model.layer("left").options if o.is_fp8 and o != TENSORWISE])


def test_frozen_weights_have_no_grad_weight_and_constant_inputs_no_grad_input() -> None:
    profile = profile_of(sequence_workload())
    frozen = row_of(profile, "embed", FP32)
    assert (frozen.grad_input, frozen.grad_weight, frozen.gradient_bytes) == (None, None, 0)
    functions = {
        "build_model": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16)),
        "train_batches": lambda seed: iter([torch.ones(4, WIDTH)] * 8),
        "loss_fn": lambda model, x: model(x).square().mean(),
    }
    profile = profile_of(workload_from(functions, name="linears"))
    first, inner = (row_of(profile, name, FP32) for name in "01")
    assert first.grad_input is None  # the input is data
    assert first.grad_weight is not None
    assert inner.grad_input is not None
    assert inner.cast is None


@needs_fp8
def test_an_fp8_row_tells_its_casts_apart_and_proves_its_gemms() -> None:
    row = row_of(profile_of(mlp_workload()), "second", TENSORWISE)
    assert row.output is not None
    assert row.cast is not None
    assert row.cast.median_ms > row.output.median_ms  # 1 ms per operation: casts are many
    assert "_scaled_mm float8_e4m3fn" in row.kernels
    bf16 = row_of(profile_of(mlp_workload()), "second", BF16_O2)
    assert all("float8" not in kernel for kernel in bf16.kernels)
    assert "mm bfloat16" in bf16.kernels


def test_bytes_are_those_of_the_layer() -> None:
    profile = profile_of(mlp_workload())
    numel = WIDTH * 64 + WIDTH  # second: 64 -> WIDTH
    fp32, bf16 = (row_of(profile, "second", option) for option in (FP32, BF16_O2))
    assert (fp32.parameter_bytes, fp32.gradient_bytes) == (4 * numel, 4 * numel)
    assert (bf16.parameter_bytes, bf16.gradient_bytes) == (2 * numel, 2 * numel)
    assert fp32.optimizer_bytes == pytest.approx(8 * numel)  # Adam's two moments
    assert bf16.optimizer_bytes == pytest.approx(12 * numel)  # and the FP32 master
    assert fp32.activation_bytes == 2 * bf16.activation_bytes == 4 * 48 * 64  # its input


def test_batch_norm_keeps_fp32_parameters_in_a_16_bit_option() -> None:
    row = row_of(profile_of(conv_workload()), "norm", BF16_O2)
    assert row.parameter_bytes == 4 * 2 * 16


def test_tied_weights_are_counted_where_they_come_first() -> None:
    profile = profile_of(token_workload())
    assert row_of(profile, "embedding", FP32).parameter_bytes == 4 * 16 * WIDTH
    assert row_of(profile, "head", FP32).parameter_bytes == 0


def test_the_fixed_time_closes_the_sum() -> None:
    profile = profile_of(mlp_workload())
    spec = profile.model
    for label, option, fixed in (
        ("fp32", FP32, profile.fixed_ms),
        ("bf16_o2", BF16_O2, profile.fixed_bf16_ms),
    ):
        step = profile.step(label)
        assert step is not None
        total = sum_totals(profile.layers, dict.fromkeys(spec.names, option))
        assert fixed + total == pytest.approx(step.timing.median_ms)
    check = profile.sum_check
    assert (check is not None) == RUNS_FP8
    if check is not None:  # on this clock every step takes a millisecond, and so does every layer
        assert (check.layers_ms, check.steps_ms) == (0.0, 0.0)
    labels = {step.label for step in profile.steps}
    assert labels >= {"fp32", "bf16_o2", "autocast_bf16"}
    assert ("fp8_o1" in labels) == RUNS_FP8


def test_inputs_and_gradients_are_the_real_ones() -> None:
    workload = sequence_workload()
    model = workload.build_model().train()
    layers = find_layers(model)
    batch = take_batches(workload, seed=0, count=1)[0]
    calls = record_step(Context(workload, CPU), model, batch, layers)
    assert torch.equal(calls["embed"][0].args[0], batch)
    assert [call.count for call in calls["shared"]] == [1, 2]  # an LSTM gives another stride
    spec = capture_model(Context(workload, CPU))
    for name in ("lstm", "shared", "left"):
        tensor = calls[name][0].args[0]
        seen = spec.layer(name).calls[0].inputs[0]
        assert seen == TensorSpec(
            shape=tuple(tensor.shape),
            stride=tensor.stride(),
            dtype="float32",
            requires_grad=tensor.requires_grad,
        )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_isolated_step_gives_the_gradients_of_the_whole_one() -> None:
    workload = mlp_workload()
    model = workload.build_model().train()
    batch = take_batches(workload, seed=0, count=1)[0]
    layers = find_layers(model)
    calls = record_step(Context(workload, CPU), model, batch, layers)["second"]
    workload.loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]  # torch's own
    second = copy.deepcopy(layers["second"])
    alone = make_candidate(lambda: second, calls, FP32)
    outputs, gradients = zip(*alone.forward(), strict=True)
    found = torch.autograd.grad(outputs, alone.parameters, gradients)
    expected = [parameter.grad for parameter in layers["second"].parameters()]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_runs_forward_twice_and_backward_once(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(
                lambda z: self.last(F.relu(self.first(z))), x, use_reentrant=reentrant
            )
            return y

    functions = {
        "build_model": Checkpointed,
        "train_batches": lambda seed: iter([torch.randn(8, WIDTH, requires_grad=True)]),
        "loss_fn": lambda model, batch: model(batch).square().mean(),
    }
    workload = workload_from(functions)
    model = workload.build_model().train()
    batch = take_batches(workload, seed=0, count=1)[0]
    layers = find_layers(model)
    calls = record_step(Context(workload, CPU), model, batch, layers)["first"]
    assert [call.count for call in calls] == [1, 1]
    alone = make_candidate(lambda: copy.deepcopy(layers["first"]), calls, FP32)
    gemms = [op.is_backward for op in alone.trace_step() if op.is_gemm]
    assert gemms == [False, False, True, True]  # grad_input and grad_weight once


def test_a_layer_that_cannot_be_copied_is_built_anew() -> None:
    layer = nn.Linear(4, 4)
    layer.cached = layer.weight * 2  # deepcopy refuses tensors that autograd made
    fresh = nn.Sequential(nn.Linear(4, 4))
    assert copy_layer(layer, lambda: fresh, "0") is fresh[0]


def test_an_option_that_cannot_run_is_infeasible_with_the_reason() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is torch.bfloat16:
                raise RuntimeError("out of memory\nat some address")
            return x @ self.weight.t()

    functions = {
        "build_model": lambda: nn.Sequential(Stubborn(), nn.Linear(16, 10)),
        "train_batches": lambda seed: mlp_workload().train_batches(seed),
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
    }
    workload = workload_from(SimpleNamespace(**functions))
    spec = capture_model(Context(workload, CPU))
    groups = group_layers(spec, ())
    model = workload.build_model()
    layer = model.get_submodule("0")
    batch = take_batches(workload, seed=0, count=1)[0]
    calls = record_step(Context(workload, CPU), model, batch, find_layers(model))
    meter = LayerMeter(CPU, ConstantClock(), 2.0)
    rows = meter.time_group(groups[0], calls["0"], lambda: copy.deepcopy(layer))
    assert [row.infeasible for row in rows] == ["", "out of memory"]
    assert rows[1].total is None
    assert rows[1].parameter_bytes == 2 * 16 * WIDTH


@needs_fp8
def test_a_hopelessly_slow_option_is_predicted_and_not_run() -> None:
    class SlowFp8Clock(ConstantClock):
        """What runs FP8 GEMMs takes a second more each time, as a reference kernel's rows do."""

        def measure(self, fn: Callable[[], object]) -> float:
            with traced() as trace:
                fn()
            gemms = [op for op in trace.operations if op.name == "_scaled_mm"]
            self.calls += 1
            return 1.0 + (1e3 * self.calls if gemms else 0.0)

    context = Context(mlp_workload(), CPU, clock=SlowFp8Clock())
    asked = {"first": (TENSORWISE,)}
    spec = capture_model(context)
    profile = profile_model(context, spec, options=(TENSORWISE,), asked=asked)
    row = row_of(profile, "second", TENSORWISE)
    assert row.total is not None
    assert (row.total.basis, row.total.samples) == (Basis.PREDICTED, 0)
    assert row.total.p20_ms < 0.6 * row.total.median_ms
    assert row.total.p80_ms > 1.7 * row.total.median_ms
    assert "_scaled_mm float8_e4m3fn" in row.kernels
    step = profile.step("fp8_o1")
    assert step is not None
    assert step.timing.basis is Basis.PREDICTED
    assert step.timing.p20_ms < step.timing.median_ms < step.timing.p80_ms
    kept = row_of(profile, "first", TENSORWISE)  # a plan has it, whatever it costs
    assert kept.total is not None
    assert kept.total.samples > 0


def test_fp8_operations_are_given_to_their_gemms() -> None:
    def operation(name: str, ms: float, is_backward: bool) -> Operation:
        return Operation(name, "bfloat16", ms, is_backward)

    parts = sum_parts(
        [
            operation("amax", 1.0, False),
            operation("_scaled_mm", 2.0, False),
            operation("add", 4.0, False),
            operation("sum", 8.0, True),
            operation("_to_copy", 16.0, True),
            operation("_scaled_mm", 32.0, True),
            operation("mm", 64.0, True),
        ]
    )
    assert parts == {"output": 6.0, "grad_input": 32.0, "grad_weight": 72.0, "cast": 17.0}


def test_uniform_plans_take_the_first_fp8_option_where_there_is_one() -> None:
    spec = capture_model(Context(mlp_workload(), CPU))
    groups = group_layers(spec, (TENSORWISE,))
    fp8 = uniform_options(groups, fp8=True)
    assert fp8["norm"] == fp8["head"] == BF16_O2
    assert (fp8["first"] == TENSORWISE) == RUNS_FP8
    assert set(uniform_options(groups).values()) == {BF16_O2}


def test_memory_that_runs_out_is_a_reason_and_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    class Greedy(nn.Linear):
        """Fits once per precision; a second graph beside the first does not."""

        def __init__(self) -> None:
            super().__init__(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is torch.bfloat16:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
            return x @ self.weight

    call = Call(args=(torch.randn(2, 4),), kwargs={}, gradients=[torch.randn(2, 4)])
    meter = LayerMeter(CPU, ConstantClock(), 2.0)
    run = meter.try_option(BF16_O2, [call], Greedy)
    assert run.infeasible == "CUDA out of memory. Tried to allocate 2 GiB"
    plain = meter.try_option(FP32, [call], Greedy)
    assert plain.candidate is not None

    def full(*_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain.candidate.forward = full  # type: ignore[assignment,method-assign]  # from now on
    assert meter.time_parts([plain.candidate]) == {}
    assert "only its total" in caplog.text


def test_calls_that_do_not_fit_together_are_recorded_one_kind_at_a_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def scarce(*args: Any, **kwargs: Any) -> Any:  # Any: as it is
        asked.append(len(args[3]))
        if len(args[3]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return record_step(*args, **kwargs)

    whole = profile_of(mlp_workload(), ())
    monkeypatch.setattr("autoprec.profiler.groups.record_step", scarce)
    profile = profile_of(mlp_workload(), ())
    assert asked == [0, 4, 1, 1, 1, 1]
    assert "recorded one kind at a time (CUDA out of memory" in caplog.text
    assert [(row.names, row.option, row.total) for row in profile.layers] == [
        (row.names, row.option, row.total) for row in whole.layers
    ]


def test_calls_wait_elsewhere_with_their_strides_or_not_at_all() -> None:
    x, expanded = torch.randn(4, 8).t().requires_grad_(), torch.randn(1, 8).expand(4, 8)
    call = Call(args=(x,), kwargs={"mask": expanded}, gradients=[torch.randn(4, 8), None])
    behind = Neighbour(torch.mul, (x, 2), {}, (8, 4), 0, torch.randn(8, 4))
    call.surroundings = Surroundings(None, behind)
    moved = moved_call(call, torch.device("meta"))
    assert moved.args[0].device.type == "meta"
    assert (moved.args[0].stride(), moved.args[0].requires_grad) == (x.stride(), True)
    assert moved.kwargs["mask"] is expanded
    assert [None if g is None else g.device.type for g in moved.gradients] == ["meta", None]
    assert moved.surroundings is not None
    assert moved.surroundings.behind is not None
    assert moved.surroundings.behind.args[0].device.type == "meta"
    assert moved_call(call, CPU).args[0] is x
