import copy
import json
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprec.device.torchao import float8_config
from autoprec.errors import PlanMismatchError, RecordError, TrainingStoppedError
from autoprec.guard import Guard, Limits
from autoprec.guard.sampling import range_shares
from autoprec.guard.signals import FEWEST_VALUES, Bounds, RunningBand, read_signals
from autoprec.records import (
    BF16_O2,
    FP32,
    Option,
    Phase,
    Plan,
    Recipe,
    fp8_option,
)
from autoprec.runtime import apply, uniform_plan

TENSORWISE, ROWWISE = fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE)
QUIET = Limits(sample_every=10_000, patience=3)
FP8_LAYERS = ("first", "second", "third")


class Chain(nn.Module):
    """Three FP8 linears, a norm and a head that FP8 cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.third = nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.second(F.gelu(self.first(x)))))
        y: Tensor = self.head(F.gelu(self.third(x)))
        return y


def plan_for(model: nn.Module, option: Option = ROWWISE, **fields: Any) -> Plan:  # Any: fields
    options = {"norm": FP32, "head": BF16_O2}
    return uniform_plan(model, option, options).model_copy(update=fields)


class Run:
    """A small training run under a plan, with a place to break it."""

    def __init__(self, *, seed: int = 0, lr: float = 1e-2, **guard: Any) -> None:  # Any: a guard's
        torch.manual_seed(seed)
        self.model: Any = Chain()  # Any: a Chain, whose layers tests name
        plan = guard.pop("plan", None) or plan_for(self.model)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=lr)
        apply(plan, self.model, self.optimizer)
        guard.setdefault("limits", QUIET)
        self.guard = Guard(self.model, self.optimizer, plan, **guard)
        self.batches = torch.Generator().manual_seed(seed)
        self.target = torch.randn(16, 10, generator=torch.Generator().manual_seed(99)) / 4
        self.losses: list[float] = []
        self.good: list[bool] = []

    def train(self, steps: int, breaks: Callable[[int], None] = lambda step: None) -> None:
        """Train; `breaks` is called between backward and the guard's look."""
        for _ in range(steps):
            x = torch.randn(16, 16, generator=self.batches)
            noise = torch.randn(16, 10, generator=self.batches)  # what no model can learn
            loss = F.mse_loss(self.model(x), x @ self.target + noise)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            breaks(self.guard.steps)
            self.good.append(self.guard.step(loss))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())

    def evaluate(self) -> float:
        x = torch.randn(512, 16, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            return float(F.mse_loss(self.model(x), x @ self.target)) + 1  # and the noise

    def spoil(self, name: str, *steps: int, value: float = math.nan) -> Callable[[int], None]:
        """Return what writes a value into one layer's gradient at these steps."""

        def breaks(step: int) -> None:
            if step in steps:
                self.model.get_submodule(name).weight.grad[0, 0] = value

        return breaks


def lines(path: Path) -> list[dict[str, Any]]:  # Any: JSON values
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- faults ------------------------------------------------------------------------------------


def test_a_nan_in_one_layers_gradient_is_survived_within_one_percent(tmp_path: Path) -> None:
    clean, hurt = Run(), Run(events=tmp_path / "events.jsonl")
    for run, breaks in ((clean, lambda step: None), (hurt, hurt.spoil("third", 20))):
        run.train(50, breaks)
        run.optimizer.param_groups[0]["lr"] = 1e-3
        run.train(30, breaks)
    assert all(clean.good)
    assert clean.evaluate() < 0.75 * Run().evaluate()  # it learned
    assert [step for step, good in enumerate(hurt.good) if not good] == [20]
    assert hurt.guard.in_bf16 == ("third",)
    assert hurt.evaluate() == pytest.approx(clean.evaluate(), rel=0.01)
    (event,) = lines(tmp_path / "events.jsonl")
    assert event["kind"] == "not_finite"
    assert (event["step"], event["layers"], event["is_skipped"]) == (20, ["third"], True)
    assert event["grad_norm"] is None  # JSON has no NaN


def test_without_a_guard_the_same_nan_ends_the_run() -> None:
    run = Run(on_alarm="switch")
    run.train(3, run.spoil("third", 1))
    assert math.isnan(run.losses[-1])


def test_a_skipped_step_changes_no_parameter_and_no_optimizer_state() -> None:
    run = Run()
    run.train(5)
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.train(1, run.spoil("second", 5))
    after = (run.model.state_dict(), run.optimizer.state_dict())
    assert str(before) == str(after)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


def test_the_blame_is_on_the_last_bad_layer_and_the_one_that_fed_it() -> None:
    run = Run()

    def breaks(step: int) -> None:
        if step == 1:  # what a NaN in grad_input of `second` leaves behind
            run.model.first.weight.grad.fill_(math.nan)

    run.train(3, breaks)
    assert run.guard.in_bf16 == ("first", "second")


def test_when_it_happens_again_soon_every_layer_moves() -> None:
    run = Run()
    run.train(9, run.spoil("first", 2, 6))
    assert run.guard.in_bf16 == FP8_LAYERS


def test_one_loss_that_is_not_finite_is_skipped_and_moves_nothing() -> None:
    run = Run()
    run.train(2)
    assert not run.guard.step(torch.tensor(math.inf))
    assert not run.guard.in_bf16
    assert not run.guard.step(math.nan)
    assert run.guard.in_bf16 == FP8_LAYERS


@pytest.mark.parametrize("option", [TENSORWISE, ROWWISE], ids=str)
@pytest.mark.parametrize("value", [1e12, math.inf])
def test_a_layer_that_runs_out_of_range_moves_alone(
    option: Option, value: float, tmp_path: Path
) -> None:
    plan = plan_for(Chain(), option)
    limits = Limits(sample_every=5)
    run = Run(plan=plan, limits=limits, on_alarm="switch", events=tmp_path / "events.jsonl")

    def outlier(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0].clone()
        x[..., 0] = value
        return x

    run.train(3)
    with torch.no_grad():
        run.model.second.weight[:, 0] = 0  # so that a huge input stays without effect
    handle = run.model.second.register_forward_pre_hook(outlier, prepend=True)
    run.guard._sampler.arm()
    run.train(1)
    handle.remove()
    assert run.guard.in_bf16 == ("second",)
    kinds = [event["kind"] for event in lines(tmp_path / "events.jsonl")]
    assert kinds[0] == ("not_finite" if math.isinf(value) else "range")


def test_a_loss_that_stays_high_moves_all_layers_and_one_spike_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(lr=1e-4)
    run.train(40)
    assert run.guard.step(10 * run.losses[-1])
    assert run.guard.step(run.losses[-1])
    assert not run.guard.in_bf16
    with caplog.at_level(logging.WARNING, "autoprec.guard.records"):
        good = [run.guard.step(10 * run.losses[-1]) for _ in range(3)]
    assert good == [True, True, False]
    assert run.guard.in_bf16 == FP8_LAYERS
    assert "stays above its band; first, second, third moved to BF16; step skipped" in caplog.text


def test_a_spike_of_the_gradient_norm_is_skipped_and_a_row_of_them_moves_layers() -> None:
    run = Run(lr=1e-4)
    run.train(40, run.spoil("head", 30, value=1e4))
    assert [step for step, good in enumerate(run.good) if not good] == [30]
    assert not run.guard.in_bf16
    run.train(3, run.spoil("head", 40, 41, 42, value=1e4))
    assert run.guard.in_bf16 == FP8_LAYERS


def test_stop_raises_and_touches_nothing() -> None:
    run = Run(on_alarm="stop")
    run.train(2)
    with pytest.raises(TrainingStoppedError, match=r"at step 2 loss .* gradient norm nan is not"):
        run.train(1, run.spoil("first", 2))
    assert not run.guard.in_bf16
    assert all(parameter.grad is not None for parameter in run.model.parameters())


def test_a_run_that_only_skips_is_stopped() -> None:
    run = Run(limits=Limits(most_bad=4))
    with pytest.raises(TrainingStoppedError, match="its last 4 steps were all bad"):
        run.train(20, run.spoil("first", *range(2, 20)))
    assert run.guard.steps == 6


# --- switches ----------------------------------------------------------------------------------


def test_moving_layers_leaves_parameters_masters_and_keys_alone() -> None:
    run = Run()
    run.train(3)
    parameters = dict(run.model.named_parameters())
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train(1, run.spoil("second", 3))
    assert dict(run.model.named_parameters()).keys() == parameters.keys()
    assert all(dict(run.model.named_parameters())[n] is p for n, p in parameters.items())
    assert all(torch.equal(value, state[n]) for n, value in run.model.state_dict().items())
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    second = run.model.second
    assert torch.equal(second(x), F.linear(x, second.weight, second.bias))


def test_layers_are_given_back_and_wait_twice_as_long_the_second_time(tmp_path: Path) -> None:
    limits = Limits(sample_every=10_000, quiet_steps=10, window=21)
    run = Run(limits=limits, events=tmp_path / "events.jsonl")
    run.train(51, run.spoil("third", 5, 30))
    assert not run.guard.in_bf16
    events = [(event["step"], event["kind"]) for event in lines(tmp_path / "events.jsonl")]
    assert events == [
        (5, "not_finite"),
        (15, "promoted"),
        (30, "not_finite"),
        (50, "promoted"),
    ]


def test_after_the_last_allowed_demotion_all_layers_stay_in_bf16() -> None:
    run = Run(limits=Limits(sample_every=10_000, quiet_steps=5, window=21, most_demotions=2))
    run.train(60, run.spoil("third", 10, 35))
    assert run.guard.in_bf16 == FP8_LAYERS
    assert run.guard.demotions == 2


def test_a_schedule_switches_every_layer_at_its_steps(tmp_path: Path) -> None:
    schedule = [Phase(start_step=s, fp8=on) for s, on in ((0, False), (4, True), (8, False))]
    plan = plan_for(Chain(), schedule=tuple(schedule))
    run = Run(plan=plan, events=tmp_path / "events.jsonl")
    seen = []
    run.train(10, lambda _: seen.append({run.model.first.fp8_active, run.model.third.fp8_active}))
    assert seen == [{False}] * 4 + [{True}] * 4 + [{False}] * 2
    assert [event["step"] for event in lines(tmp_path / "events.jsonl")] == [4, 8]
    assert not run.guard.in_bf16  # the plan did it, not the guard


def test_a_logger_hears_of_every_event_with_the_layers_that_are_left_in_fp8() -> None:
    heard: list[tuple[str, float, int]] = []
    schedule = (Phase(start_step=4, fp8=False), Phase(start_step=6, fp8=True))
    limits = Limits(sample_every=10_000, quiet_steps=5, window=21)
    run = Run(
        plan=plan_for(Chain(), schedule=schedule), limits=limits, log=lambda *x: heard.append(x)
    )
    run.train(12, run.spoil("third", 2))
    assert heard == [
        ("guard/not_finite", 1.0, 2),
        ("guard/fp8_layers", 2.0, 2),
        ("guard/schedule", 2.0, 4),  # off: the third is off already
        ("guard/fp8_layers", 0.0, 4),
        ("guard/schedule", 2.0, 6),
        ("guard/fp8_layers", 2.0, 6),
        ("guard/promoted", 1.0, 7),
        ("guard/fp8_layers", 3.0, 7),
    ]


def test_a_schedule_does_not_bring_back_what_the_guard_took_out() -> None:
    plan = plan_for(
        Chain(), schedule=(Phase(start_step=4, fp8=False), Phase(start_step=6, fp8=True))
    )
    run = Run(plan=plan)
    run.train(8, run.spoil("third", 2))
    assert [run.model.get_submodule(name).fp8_active for name in FP8_LAYERS] == [True, True, False]


# --- checkpoints -------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    limits = Limits(sample_every=7, quiet_steps=12, window=21)
    whole = Run(limits=limits)
    whole.train(40, whole.spoil("third", 10, 30))
    assert whole.guard.demotions == 2  # it was given back between

    first = Run(limits=limits)
    first.train(20, first.spoil("third", 10))
    state = {
        "model": first.model.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "guard": first.guard.state_dict(),
    }
    torch.save(state, tmp_path / "checkpoint.pt")
    json.dumps(state["guard"])

    second = Run(limits=limits, seed=3)
    saved = torch.load(tmp_path / "checkpoint.pt")
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.guard.load_state_dict(saved["guard"])
    assert second.guard.in_bf16 == first.guard.in_bf16 == ("third",)
    assert not second.model.third.fp8_active
    second.batches, second.target = first.batches, first.target
    second.train(20, second.spoil("third", 30))
    assert second.losses == whole.losses[20:]
    assert second.guard.state_dict() == whole.guard.state_dict()


def test_another_runs_state_and_nonsense_are_refused() -> None:
    run = Run()
    run.train(2, run.spoil("third", 1))
    state = run.guard.state_dict()
    demoted = {"lm_head": state["demoted"]["third"]}
    with pytest.raises(PlanMismatchError, match="demoted 'lm_head', which is no FP8 layer"):
        run.guard.load_state_dict({**state, "demoted": demoted})
    with pytest.raises(RecordError, match=r"what Guard.state_dict\(\) returned"):
        run.guard.load_state_dict({"step": 3})


def test_a_model_without_the_plan_is_refused() -> None:
    model = Chain()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(
        PlanMismatchError, match=r"FP8 layers first, second, third; call autoprec\."
    ):
        Guard(model, optimizer, plan_for(model))


def test_an_event_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="event file must be writable"):
        Run(events=tmp_path / "absent" / "events.jsonl")


# --- around it ---------------------------------------------------------------------------------


def test_hooks_are_there_in_sampled_steps_only_and_gone_after_the_context() -> None:
    run = Run(limits=Limits(sample_every=4))
    seen: list[int] = []
    with run.guard:
        run.train(9, lambda _: seen.append(len(run.model.first._forward_hooks)))
    assert seen == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert "fp8_sampled" not in vars(run.model.first)
    assert not run.model.first._forward_hooks


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo does it, torch 2.13
@pytest.mark.parametrize(
    ("sees_compiled", "layers", "steps", "expected"),
    [
        (True, ("third",), 4, [0, 1]),
        pytest.param(  # moved at 5, given back at 9
            *(False, ("second", "third"), 11, [0, 1, 6, 7]), marks=pytest.mark.slow
        ),
    ],
)
def test_a_compiled_model_has_two_graphs_for_each_set_of_layers(
    sees_compiled: bool, layers: tuple[str, ...], steps: int, expected: list[int]
) -> None:
    limits = Limits(sample_every=3, quiet_steps=4, window=22)
    plan = uniform_plan(Chain(), BF16_O2, dict.fromkeys(layers, ROWWISE))
    run, eager = (Run(limits=limits, plan=plan) for _ in range(2))
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(run.guard.steps)
        return graph.forward

    inner = run.model
    run.model = torch.compile(inner, backend=backend, fullgraph=True)
    if sees_compiled:
        run.guard.close()
        run.guard = Guard(run.model, run.optimizer, plan, limits=limits)
    for each in (run, eager):
        each.train(steps, each.spoil("third", 5))
    assert graphs == expected
    assert not run.guard.in_bf16
    assert run.losses == pytest.approx(eager.losses, rel=1e-3)
    torch._dynamo.reset()


@pytest.mark.slow  # inductor
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo and inductor themselves
def test_inductor_sees_the_shares_that_eager_sees() -> None:
    limits = Limits(sample_every=1)
    run, eager = Run(limits=limits), Run(limits=limits)
    torch._dynamo.reset()
    run.model = torch.compile(run.model, fullgraph=True)
    seen: dict[Run, list[Tensor]] = {run: [], eager: []}
    for each, shares in seen.items():
        each.train(10, lambda _: shares.append(each.guard._sampler.shares(torch.device("cpu"))))  # noqa: B023
    assert all(run.good)
    assert not run.guard.in_bf16
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(seen[run], seen[eager], strict=True))
    torch._dynamo.reset()


def test_a_sampled_step_computes_what_any_other_does_and_sees_gradients() -> None:
    run, unwatched = Run(limits=Limits(sample_every=1)), Run()
    for each in (run, unwatched):
        each.train(1)
        each.guard._sampler.arm() if each is run else each.guard._sampler.disarm()
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
        each.model(x * torch.arange(-14, 2).mul(2).exp2()).square().sum().backward()
    pairs = zip(run.model.parameters(), unwatched.model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    shares = run.guard._sampler.shares(torch.device("cpu"))
    assert (shares[:, :, 0] > 0)[0, 0]  # the first layer's input underflows


def test_a_model_is_copied_and_pickled_while_it_is_sampled() -> None:
    run = Run(limits=Limits(sample_every=1))
    run.train(1)
    for model in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        x = torch.randn(16, 16)
        assert torch.equal(model(x), run.model(x))


# --- numbers -----------------------------------------------------------------------------------


@given(
    st.lists(st.floats(1, 2), min_size=FEWEST_VALUES, max_size=60),
    st.floats(1, 10),
    st.floats(0.01, 1),
)
def test_a_band_never_alarms_within_its_values_and_always_far_above(
    values: list[float], width: float, floor: float
) -> None:
    band = RunningBand(64, width, floor=floor)
    for value in values:
        band.add(value, is_above=value > band.upper)
    assert sorted(values)[len(values) // 2] <= band.upper
    assert 2 + width * max(1.5, floor) + 1 > band.upper


def test_a_band_follows_a_lasting_change_of_level() -> None:
    band = RunningBand(32, 6, relative_floor=0.01)
    runs = [band.add(value, is_above=value > band.upper) for value in [1.0] * 32 + [5.0] * 40]
    assert runs.index(1) == 32
    assert not any(runs[32 + 17 :])


def test_a_loss_that_is_zero_mostly_has_a_band_of_what_is_not() -> None:
    """As triplets' margins have: three of the others in a row took all layers out of FP8."""
    band = RunningBand(128, 8, relative_floor=0.01)
    runs = [band.add(x, is_above=x > band.upper) for x in [0.0, 0.0, 0.0, 0.0, 0.4, 0.5, 0.6] * 30]
    assert not any(runs)
    assert 0.6 < band.upper < 2.0
    band.restore([0.0] * 128, 0)
    assert band.upper == math.inf


@pytest.mark.parametrize("recipe", [Recipe.TENSORWISE, Recipe.ROWWISE])
@pytest.mark.parametrize("operand", ["input", "grad_output"])
def test_shares_are_those_of_the_cast_itself(recipe: Recipe, operand: str) -> None:
    cast = getattr(float8_config(fp8_option(recipe)), f"cast_config_{operand}")
    x = torch.randn(64, 96, dtype=torch.float64) * torch.randn(64, 96).double().mul(9).exp2()
    x[0, :5] = 0
    is_rowwise = recipe is Recipe.ROWWISE
    amax = x.abs().amax(1, keepdim=True) if is_rowwise else x.abs().max()
    scaled = (x * (torch.finfo(cast.target_dtype).max / amax)).float()
    flushed = (scaled.to(cast.target_dtype).float() == 0) & (x != 0)
    shares = range_shares(x.float(), cast.target_dtype, is_rowwise=is_rowwise)
    underflow, saturated = shares.tolist()
    assert underflow == pytest.approx(float(flushed.sum() / (x != 0).sum()), abs=2e-3)
    assert underflow > 0
    assert saturated == 0


def test_a_norm_is_that_of_the_gradients_and_zero_without_one() -> None:
    model = Chain()
    model(torch.randn(4, 16)).sum().backward()
    model.first.weight.grad = None
    parameters = list(model.parameters())
    reading = read_signals(torch.tensor(2.0), parameters, shares=None, bounds=Bounds())
    signals = reading.signals()
    expected = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    assert signals.norms[0] == 0
    assert signals.grad_norm == pytest.approx(float(expected), rel=1e-5)
    assert signals.loss == 2.0
