"""On a machine without a GPU: nothing of a step lands on another device, or asks it for a value."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import autoprec
from autoprec.cli import main as cli
from autoprec.device import torchao
from autoprec.device.fp8 import Fp8Support
from autoprec.device.timing import Clock, Function
from autoprec.guard.sampling import Sampler
from autoprec.model.recording import Call
from autoprec.predict.measure import casts_of, gemm_candidates
from autoprec.profiler.layers import LayerMeter
from autoprec.profiler.measure import time_boundary_cast
from autoprec.records import (
    APPLICABLE_RECIPES,
    BF16_O2,
    FP32,
    Gemm,
    GemmShape,
    Option,
    Recipe,
    fp8_option,
)
from autoprec.runtime import install_options
from autoprec.runtime.masters import CLOSE_LOOKS, masters_of
from autoprec.tuning import doctor
from tests.fake_gpu import GPU, FakeGpu
from tests.models import Mlp
from tests.plans import plan_for

MASKED = fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT)
FP8 = [*map(fp8_option, APPLICABLE_RECIPES), MASKED]
NAMES = [option.key for option in FP8]
CUDA = torch.device("cuda", 0)


class QuietClock(Clock):
    """Runs what it is given and says that it took a millisecond."""

    def measure(self, fn: Function) -> float:
        fn()
        return 1.0


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake CUDA tensors, of a GPU that runs every recipe."""
    h100 = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    monkeypatch.setattr(doctor, "fp8_support", lambda _: Fp8Support(APPLICABLE_RECIPES, ""))
    with FakeTensorMode(), torch.no_grad():
        yield


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int) -> None:
    optimizer.zero_grad()
    x, y = torch.empty(rows, 32, device=GPU), torch.empty(rows, 10, device=GPU)
    torch.autograd.backward(F.mse_loss(model(x), y))
    optimizer.step()


# --- that a wrong place would show ------------------------------------------------------------


def test_a_scale_on_the_cpu_is_seen() -> None:
    a, b = (torch.empty(16, 16, device=GPU).to(torch.float8_e4m3fn) for _ in "ab")
    one, here = torch.ones((), device=GPU), torch.ones(())
    with FakeGpu() as gpu:
        torch._scaled_mm(a, b.t(), scale_a=one, scale_b=here, out_dtype=torch.bfloat16)
    assert gpu.mixed == ["aten._scaled_mm.default on cpu, meta"]


def test_gemms_that_cuda_refuses_are_refused() -> None:
    a, b, uneven = (
        torch.empty(64, inner, device=GPU).to(torch.float8_e4m3fn) for inner in (32, 32, 24)
    )
    one, rows = torch.ones((), device=GPU), torch.ones(63, 1, device=GPU)
    given: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    with pytest.raises(RuntimeError, match="col_major"):
        torch._scaled_mm(a, b.t().contiguous(), **given)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        torch._scaled_mm(uneven, uneven.t(), **given)
    with pytest.raises(RuntimeError, match="scaling"):
        torch._scaled_mm(a, b.t(), **{**given, "scale_a": rows, "scale_b": rows.t()})


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", FP8, ids=NAMES)
@pytest.mark.parametrize("rows", [48, 40])  # 40: rows are padded to a multiple of 16
def test_a_training_step_stays_on_its_device(option: Option, rows: int) -> None:
    model = Mlp().to(GPU)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)  # as on CUDA
    autoprec.apply(plan_for(model, option), model, optimizer)
    masters_of(model).steps = CLOSE_LOOKS  # a close look at values would wait for the device
    step(model, optimizer, rows)  # makes moments; their step counters are made on the CPU
    with FakeGpu() as gpu:
        step(model, optimizer, rows)
    assert gpu.mixed == []
    in_bf16 = option == MASKED or option.recipe is Recipe.ROWWISE_WITH_GW_HP
    assert len(gpu.gemms) == (4 if in_bf16 else 6)  # of two layers
    assert all(set(pair) != {torch.float8_e5m2} for pair in gpu.gemms)  # cuBLASLt has none of these


@pytest.mark.parametrize("option", FP8, ids=NAMES)
def test_images_that_lie_transposed_are_multiplied_as_cuda_wants(option: Option) -> None:
    layer = nn.Linear(32, 64, device=GPU)
    install_options(layer, {"": option})
    x = torch.empty(2, 32, 4, 4, device=GPU).flatten(2).transpose(1, 2).requires_grad_()
    with FakeGpu() as gpu:
        layer(x).sum().backward()
    assert gpu.mixed == []


def test_the_guard_looks_at_operands_where_they_are() -> None:
    model = Mlp().to(GPU)
    install_options(model, {"first": FP8[0], "second": FP8[1]})
    sampler = Sampler(model, {"first": model.first, "second": model.second})
    sampler.arm()
    with FakeGpu() as gpu:
        torch.autograd.backward(model(torch.empty(48, 32, device=GPU)).sum())
        shares = sampler.shares(GPU)
    assert gpu.mixed == []
    assert (shares.device, shares.shape) == (GPU, (2, 3, 2))


# --- the profiler -----------------------------------------------------------------------------


@pytest.mark.parametrize("option", [FP32, BF16_O2, *FP8], ids=["fp32", "bf16", *NAMES])
def test_a_layer_alone_is_built_and_run_on_its_device(option: Option) -> None:
    def make_layer() -> nn.Linear:
        return nn.Linear(32, 64, device=GPU)

    x, gradient = torch.empty(48, 32, device=GPU), torch.empty(48, 64, device=GPU)
    call = Call(args=(x.requires_grad_(),), kwargs={}, gradients=[gradient])
    meter = LayerMeter(GPU, QuietClock(), 2.0)
    with FakeGpu() as gpu:
        run = meter.try_option(option, [call], make_layer)
        assert run.candidate is not None, run.infeasible
        meter.time_parts([run.candidate])
    assert gpu.mixed == []


def test_a_boundary_cast_is_timed_on_its_device() -> None:
    calls = [[Call(args=(torch.empty(8, 32, device=GPU),), kwargs={})]]
    with FakeGpu() as gpu:
        assert time_boundary_cast(calls, clock=QuietClock(), device=GPU) > 0
    assert gpu.mixed == []


def test_a_gpu_is_never_probed_with_a_tiny_layer() -> None:
    """A microsecond more to launch it would be minutes at a real layer's size."""
    meter = LayerMeter(CUDA, QuietClock(), 2.0)
    call = Call(args=(torch.ones(48, 32),), kwargs={}, gradients=[torch.ones(48, 64)])
    assert meter.slow_fp8.predict(FP8[0], [call], fp32_ms=0.0) is None
    assert meter.slow_fp8.known == {}


@pytest.mark.usefixtures("hopper")
def test_measured_gemms_follow_the_rules_of_cuda() -> None:
    shapes = ((256, 64, 128), (8192, 4096, 4096))
    for M, K, N in shapes:
        found = gemm_candidates(CUDA, (M, K, N), APPLICABLE_RECIPES)
        assert len(found) == 5
        for fn in found.values():
            out = fn()
            assert isinstance(out, Tensor)
            assert (out.device, out.shape) == (CUDA, (M, N))


@pytest.mark.usefixtures("hopper")
def test_the_doctors_gemms_follow_the_rules_of_cuda() -> None:
    found = doctor.gemm_functions(GemmShape(M=128, K=128, N=64), CUDA)
    outs = [fn() for fn in found.values()]
    assert list(found) == ["fp32", "bf16", "fp8"]
    assert all(isinstance(out, Tensor) and out.device == CUDA for out in outs)


@pytest.mark.parametrize("recipe", [Recipe.TENSORWISE, Recipe.ROWWISE])
def test_measured_casts_stay_on_their_device(recipe: Recipe) -> None:
    with FakeGpu() as gpu:
        direct, turned = casts_of(recipe)(torch.empty(64, 32, device=GPU, dtype=torch.bfloat16))
    assert gpu.mixed == []
    assert (direct.shape, turned.shape) == ((64, 32), (32, 64))


# --- compiled casts ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_here", [True, False])
def test_torchaos_workaround_for_triton_is_in_place_where_triton_compiles(
    monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    patch = pytest.importorskip("torchao.float8._inductor_patch", reason="torchao 0.17 has none")
    done: list[str] = []
    monkeypatch.setattr(patch, "_patch_inductor_min_max_codegen", lambda: done.append("once"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_here)
    torchao._fix_compiled_casts.cache_clear()
    for _ in range(2):
        torchao.import_torchao()
    torchao._fix_compiled_casts.cache_clear()
    assert done == ["once"] * is_here


# --- memory -----------------------------------------------------------------------------------


def test_memory_that_runs_out_in_any_stage_is_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."
        )

    monkeypatch.setattr("autoprec.tuning.run.make_profile", full)
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", "model.py", "--out", str(tmp_path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "must fit into the memory of the device, but it ran out (CUDA out of memory" in error


def test_other_errors_of_ours_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("autoprec.tuning.run.make_profile", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["profile", "model.py", "--out", str(tmp_path)])
