"""A profile that is cut off: what was timed is kept, and only the rest is timed again."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoprec.cli.main import main
from autoprec.device.timing import Function
from autoprec.errors import DeviceError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.profiler import KeptRows, profile_model
from autoprec.profiler.kept import STEP
from autoprec.profiler.layers import LayerMeter
from autoprec.records import BF16_O2, FP32, Precision, Profile, ProfileRows
from autoprec.tuning.profiling import ROWS
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings
from autoprec.workload.functions import workload_from
from tests.constant_clock import CPU, ConstantClock
from tests.models import mlp_workload
from tests.ranks import exit_code_of

TINY = Path(__file__).parent / "workloads" / "tiny.py"


class EndingClock(ConstantClock):
    """The process is stopped when it has measured this often."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def measure(self, fn: Function) -> float:
        if self.calls >= self.most:
            raise KeyboardInterrupt
        return super().measure(fn)


def profiled(kept: KeptRows, clock: ConstantClock) -> Profile:
    context = Context(mlp_workload(), CPU, clock=clock)
    return profile_model(context, capture_model(context), options=(), kept=kept)


@pytest.fixture(scope="module")
def whole() -> tuple[Profile, int]:
    """A profile that was not cut off, and how much it measured."""
    clock = ConstantClock()
    return profiled(KeptRows(), clock), clock.calls


def test_a_profile_that_was_cut_off_goes_on(tmp_path: Path, whole: tuple[Profile, int]) -> None:
    path, (profile, calls) = tmp_path / "rows.json", whole
    with pytest.raises(KeyboardInterrupt):
        profiled(KeptRows.of(path, "same", resume=True), EndingClock(calls // 3))
    saved = ProfileRows.load(path)
    done = {row.names for row in saved.rows}
    assert 0 < len(done) < len({row.names for row in profile.layers})
    rest = ConstantClock()
    resumed = profiled(KeptRows.of(path, "same", resume=True), rest)
    assert [(row.names, row.option) for row in resumed.layers] == [
        (row.names, row.option) for row in profile.layers
    ]
    assert rest.calls < calls
    assert KeptRows.of(path, "other", resume=True).rows == {}
    assert KeptRows.of(path, "same", resume=False).rows == {}
    path.write_text("{")
    assert KeptRows.of(path, "same", resume=True).rows == {}
    assert KeptRows.of(path, "", resume=True).path is None  # live functions


def test_a_run_keeps_its_rows_until_the_profile_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(workload=str(TINY), out=tmp_path, target="cpu", recipes=(), gemms_hp=False)
    timed: list[tuple[str, ...]] = []
    time_group = LayerMeter.time_group

    def cut_off(self: LayerMeter, group, calls, make_layer, *asked):  # type: ignore[no-untyped-def]  # as it is
        if len(timed) == 2:
            raise KeyboardInterrupt
        timed.append(group.names)
        return time_group(self, group, calls, make_layer, *asked)

    with monkeypatch.context() as patch:
        patch.setattr(LayerMeter, "time_group", cut_off)
        with pytest.raises(KeyboardInterrupt):
            _ = Run(settings, stages=("profile",)).profile
    assert (tmp_path / ROWS).exists()
    assert not (tmp_path / "profile.json").exists()
    again: list[tuple[str, ...]] = []

    def noted(self: LayerMeter, group, calls, make_layer, *asked):  # type: ignore[no-untyped-def]  # as it is
        again.append(group.names)
        return time_group(self, group, calls, make_layer, *asked)

    monkeypatch.setattr(LayerMeter, "time_group", noted)
    profile = Run(replace(settings, resume=True), stages=("profile",)).profile
    assert again
    assert not set(again) & set(timed)
    assert {row.names for row in profile.layers} == {*again, *timed}
    assert not (tmp_path / ROWS).exists()


def test_kernels_are_named_when_all_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUPTI slows what is launched after it, and verification's steps are the last to be timed."""
    order: list[str] = []
    monkeypatch.setattr(Run, "plan", property(lambda _: order.append("verified")))
    monkeypatch.setattr(Run, "report", lambda _: order.append("report"))
    monkeypatch.setattr("autoprec.tuning.run.named_profile", lambda _: order.append("named"))
    Run(Settings(workload=str(TINY), out=tmp_path, target="cpu")).make()
    assert order == ["verified", "named", "report"]


def test_names_are_written_into_the_profile_of_a_gpu_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Profile, int]
) -> None:
    made, _ = whole
    run = Run(Settings(workload=str(TINY), out=tmp_path, target="cpu"), stages=("profile",))
    asked: list[Profile] = []

    def name(_context: Context, profile: Profile, *, options: object) -> Profile:
        asked.append(profile)
        return profile.model_copy(update={"has_kernel_names": True})

    monkeypatch.setattr("autoprec.profiler.name_kernels", name)
    run.profile = made
    assert run.name_kernels() is made  # a CPU has no CUDA kernels
    run.profile = made.model_copy(
        update={"device": made.device.model_copy(update={"kind": "cuda"})}
    )
    assert run.name_kernels().has_kernel_names
    assert run.name_kernels() is run.profile
    assert len(asked) == 1
    assert Profile.load(tmp_path / "profile.json") == run.profile


DEADLY = """
import os, signal
import torch
from torch import nn
from pathlib import Path

class Deadly(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        armed = Path(__file__).with_name("armed")
        if x.dtype == torch.bfloat16:
            if armed.exists():
                armed.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("it would end the process again")
        return x * self.weight

def build_model():
    return nn.Sequential(nn.Linear(16, 16), Deadly())

def train_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(16, 16, generator=generator)

def loss_fn(model, x):
    return (model(x) - x).square().mean()
"""


def test_a_run_that_was_killed_in_a_layer_goes_on_past_it(tmp_path: Path) -> None:
    model, out = tmp_path / "deadly.py", tmp_path / "out"
    model.write_text(DEADLY)
    (tmp_path / "armed").touch()
    words = ["profile", str(model), "--target", "cpu", "--out", str(out), "--recipes", "tensorwise"]
    assert exit_code_of(main, words) == -signal.SIGKILL
    settings = Settings.of(
        workload=str(model),
        target="cpu",
        out=str(out),
        recipes="tensorwise",
        resume=True,
        trials=2,
        seeds="2",
        warmup_steps=2,
        branch_steps=2,
    )
    run = Run(settings)
    profile = run.profile
    rows = {(row.names, str(row.option)): row for row in profile.layers}
    passed_over = rows[("1",), "bf16_o2"]
    assert passed_over.total is None
    assert passed_over.infeasible.startswith("the process ended while 1 was measured in bf16_o2")
    assert rows[("1",), "fp32"].total is not None
    assert rows[("0",), "bf16_o2"].total is not None
    assert not list(out.glob("*.at"))
    # no later stage runs it: where it ends the process each time, no --resume would get further
    assert {row.name for row in run.sensitivity.rows if row.option == BF16_O2} == {"0"}
    assert run.plan.layers[1].option == FP32
    assert "the process ended while 1 was measured" in run.plan.layers[1].reason
    assert run.verification is not None
    assert "skipped   left out, as the process ended in it: 1 in bf16_o2; tune without" in str(run)


def test_a_step_or_an_fp32_layer_that_ended_the_process_is_passed_over_too() -> None:
    killed = (("0", "fp32"), (STEP, "autocast_bf16"))
    profile = profiled(KeptRows(ended=killed), ConstantClock())
    assert all(row.unknown and row.total is None for row in profile.layers if "0" in row.names)
    assert profile.steps_left_out["autocast_bf16"].startswith("the process ended while")
    with pytest.raises(DeviceError, match="the process ended in 'fp32', as it does when memory"):
        profiled(KeptRows(ended=((STEP, "fp32"),)), ConstantClock())


def test_what_shares_a_parameter_with_what_ended_the_process_keeps_fp32_too() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(32, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.inner(self.embed(tokens)))
            return logits

    functions = {
        "build_model": Tied,
        "train_batches": lambda _: iter([torch.arange(32).reshape(2, 16)] * 99),
        "loss_fn": lambda model, tokens: model(tokens).float().logsumexp(-1).mean(),
    }
    context = Context(workload_from(functions), CPU, clock=ConstantClock())
    spec, kept = capture_model(context), KeptRows(ended=(("embed", "bf16_o2"),))
    profile = profile_model(context, spec, kept=kept)
    options = {layer.name: layer.options for layer in profile.model.layers}
    assert options["embed"] == options["head"] == (FP32,)
    assert options["inner"] == spec.layer("inner").options
    for precision in (Precision.BF16_O2, Precision.FP8_O1):
        reason = profile.model.layer("head").refusal(precision) or ""
        assert reason.startswith("the process ended while embed was measured in bf16_o2")
    assert {step.label for step in profile.steps} >= {"fp32", "bf16_o2"}
