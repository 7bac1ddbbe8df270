"""What only a CUDA device can show: real kernels, real clocks. Run by `make test-gpu`.

The most telling first: whoever has a GPU for 100 seconds stops it then. Each test stands alone and
leaves the device as it found it. CUPTI, which names kernels, slows all launches after it, so tests
that use it are the last.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from transformers.pytorch_utils import Conv1D

import autoprec
from autoprec.common.text import first_line
from autoprec.device.cuda_clock import CudaClock, graph_replay
from autoprec.device.fp8 import fp8_self_test, fp8_support
from autoprec.device.local import (
    device_facts,
    find_sensor,
    fp8_format_gaps,
    release_memory,
    resolve_device,
)
from autoprec.device.timing import (
    Stopping,
    make_clock,
    sample_interleaved,
    time_interleaved,
    timing_from,
)
from autoprec.errors import DeviceError
from autoprec.guard import Guard, Limits
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.layers import comes_from_plan
from autoprec.model.recording import Call
from autoprec.predict import load_device_profile
from autoprec.predict.gemm import Kernel, gemm_us
from autoprec.predict.measure import gemm_candidates, measure_device_profile, replay_of
from autoprec.profiler import profile_model
from autoprec.profiler.layers import LayerMeter
from autoprec.profiler.proving import cuda_kernels, is_fp8_kernel
from autoprec.records import (
    APPLICABLE_RECIPES,
    BF16_O2,
    FP32,
    Basis,
    Option,
    Profile,
    Recipe,
    fp8_option,
)
from autoprec.records.devices import ConstantKind
from autoprec.runtime import attach_optimizer
from autoprec.runtime.masters import CLOSE_LOOKS
from tests.models import Mlp, mlp_workload
from tests.plans import plan_for
from tests.ranks import leave_group
from tests.test_kinds import Casting, with_linears

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of dynamo, inductor and Triton
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the inductor: TF32, few SMs
    pytest.mark.timeout(90),
]
STEPS = 8
LARGE = (8192, 4096, 4096)
MOST_LEFT_BYTES = 2**28  # cuBLAS keeps a workspace of 32 MiB for each stream


@pytest.fixture(autouse=True)
def _left_as_found() -> Iterator[None]:
    """Check what a test leaves: a device that answers, draws, and has its memory back."""
    before = torch.cuda.memory_allocated()
    yield
    torch.compiler.reset()
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # an illegal access: every later test would fail by it
        pytest.exit(f"the device answers no more: {first_line(error)}", returncode=1)
    release_memory(torch.device("cuda"))
    assert torch.randn(2, device="cuda").isfinite().all()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.cuda.memory_allocated() - before < MOST_LEFT_BYTES


@pytest.fixture
def device() -> torch.device:
    return resolve_device("cuda")


@pytest.fixture
def fp8(device: torch.device) -> Option:
    support = fp8_support(device)
    if not support.recipes:
        pytest.skip(support.reason)
    return fp8_option(support.recipes[0])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> list[float]:
    losses = []
    for x, y in itertools.islice(mlp_workload().train_batches(0), STEPS):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x.to(device)), y.to(device))
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


# --- what the device can do, and that FP8 is right there -------------------------------------


def test_facts_name_the_device_and_its_driver(device: torch.device) -> None:
    facts = device_facts(device)
    assert facts.name == torch.cuda.get_device_name()
    assert facts.capability
    missing = dict(facts.missing)
    assert facts.driver or {"driver", "nvml"} & set(missing)
    assert set(fp8_format_gaps(device)) <= set(missing)


def test_fp8_is_right_or_missing_with_a_reason(device: torch.device) -> None:
    support = fp8_support(device)
    if not support.recipes:
        assert support.reason
        return
    checks = fp8_self_test(device, recipes=support.recipes)
    assert [check.detail for check in checks if not check.is_good] == []
    assert support.reason or set(support.recipes) == set(APPLICABLE_RECIPES)


def test_hopper_and_later_run_every_recipe(device: torch.device) -> None:
    if torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("an older GPU, or not NVIDIA's")
    assert set(fp8_support(device).recipes) == set(APPLICABLE_RECIPES), fp8_support(device).reason


def test_nvml_reads_the_gpu_while_it_works(device: torch.device) -> None:
    sensor = find_sensor(device)
    if sensor is None:
        pytest.skip(str(dict(device_facts(device).missing)))
    x = torch.randn(8192, 8192, device=device).bfloat16()
    for _ in range(200):
        x @ x
    seen = sensor.read()
    torch.cuda.synchronize()
    assert seen.sm_clock_mhz or "sm_clock_mhz" in sensor.missing
    assert seen.power_w or "power_w" in sensor.missing
    assert seen.temperature_c or "temperature_c" in sensor.missing


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", APPLICABLE_RECIPES)
def test_every_recipe_trains_as_on_the_cpu(device: torch.device, recipe: Recipe) -> None:
    if recipe not in fp8_support(device).recipes:
        pytest.skip(fp8_support(device).reason)
    losses = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = Mlp().to(place)
        _, optimizer = autoprec.apply(plan_for(model, fp8_option(recipe)), model, adam(model))
        losses.append(train(model, optimizer, place))
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)


@pytest.mark.parametrize("make", [Casting, lambda K, N: Conv1D(N, K)], ids=["own", "Conv1D"])
def test_linears_of_other_classes_train_as_torchs_own(
    device: torch.device, fp8: Option, make: Callable[[int, int], nn.Module]
) -> None:
    losses = []
    for each in with_linears(make):
        model = each.to(device)
        _, optimizer = autoprec.apply(plan_for(model, fp8), model, adam(model))
        losses.append(train(model, optimizer, device))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_plan_is_applied_guarded_and_undone_on_cuda(device: torch.device, fp8: Option) -> None:
    torch.manual_seed(0)
    model = Mlp().to(device)
    optimizer = adam(model)
    plan = plan_for(model, fp8)
    autoprec.apply(plan, model, optimizer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    guard = Guard(model, optimizer, plan, limits=Limits(sample_every=2))
    with guard:
        for x, y in itertools.islice(mlp_workload().train_batches(1), STEPS):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x.to(device)), y.to(device))
            torch.autograd.backward(loss)
            assert guard.step(loss)
            optimizer.step()
    assert not guard.in_bf16
    autoprec.undo(model, optimizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(comes_from_plan(type(module)) for module in model.modules())
    assert all(map(torch.isfinite, torch.tensor(train(model, optimizer, device))))


def test_a_guarded_step_never_waits_for_the_device(device: torch.device, fp8: Option) -> None:
    torch.manual_seed(0)
    model = Mlp().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    plan = plan_for(model, fp8)
    autoprec.apply(plan, model, optimizer)
    stream = itertools.islice(mlp_workload().train_batches(0), CLOSE_LOOKS + STEPS)
    batches = [(x.to(device), y.to(device)) for x, y in stream]
    try:
        with Guard(model, optimizer, plan, limits=Limits(sample_every=2)) as guard:
            for number, (x, y) in enumerate(batches):
                if number == 1:  # the optimizer has its state; close looks do not wait either
                    torch.cuda.set_sync_debug_mode("error")
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                torch.autograd.backward(loss)
                guard.step(loss)
                optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- times -----------------------------------------------------------------------------------


def test_a_large_gemm_is_faster_in_fp8(device: torch.device, fp8: Option) -> None:
    if fp8.recipe is not Recipe.TENSORWISE:
        pytest.skip("no tensorwise FP8")
    found = gemm_candidates(device, (8192, 8192, 8192), (Recipe.TENSORWISE,))
    timed = time_interleaved(
        {name: found[name] for name in (Kernel.BF16, Kernel.FP8_FAST)}, clock=CudaClock(device)
    )
    assert timed[Kernel.FP8_FAST].median_ms < timed[Kernel.BF16].median_ms / 1.2


def test_the_clock_is_stable(device: torch.device) -> None:
    x = torch.randn(4096, 4096, device=device).bfloat16()
    same = {name: lambda: x @ x for name in "abc"}
    found = sample_interleaved(same, clock=CudaClock(device), stopping=Stopping(30))
    medians = [taken.timing().median_ms for taken in found.values()]
    assert max(medians) < 1.05 * min(medians)
    assert all(timing_from(taken.clean).relative_error < 0.02 for taken in found.values())
    assert not any(taken.is_host_bound for taken in found.values())


def test_the_clock_clears_the_cache(device: torch.device) -> None:
    clock = CudaClock(device)
    size = int(torch.cuda.get_device_properties(device).L2_cache_size) // 16
    x = torch.ones(size, device=device)  # FP32: a quarter of the cache
    cold = [clock.measure(x.sum) for _ in range(20)]

    def warm() -> None:
        for _ in range(10):
            x.sum()

    clock.measure(warm)
    repeated = [clock.measure(warm) / 10 for _ in range(20)]
    assert sorted(cold)[10] > sorted(repeated)[10]


def test_a_replayed_graph_computes_the_same_and_is_no_slower(device: torch.device) -> None:
    x = torch.randn(1024, 1024, device=device).bfloat16()
    out = torch.empty_like(x)

    def work() -> None:
        for _ in range(8):
            torch.mm(x, x, out=out)

    work()
    expected = out.clone()
    replay = graph_replay(work)
    out.zero_()
    replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    x.mul_(2)  # a replay reads its tensors anew
    replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, 4 * expected)
    found = time_interleaved({"plain": work, "graph": replay}, clock=CudaClock(device))
    assert found["graph"].median_ms <= 1.1 * found["plain"].median_ms


def test_short_kernels_are_timed_without_their_launches(device: torch.device) -> None:
    one = torch.ones((), device=device)
    replay = replay_of(lambda: one.add_(0), 20)
    found = time_interleaved({"empty": replay}, clock=CudaClock(device))["empty"]
    assert 0.3 < found.median_ms * 1e3 / 20 < 6.0  # microseconds; Python needs as long to launch


def test_work_that_waits_is_no_graph_and_leaves_the_stream_as_it_was(device: torch.device) -> None:
    x, before = torch.ones(4, device=device), torch.cuda.current_stream()
    with pytest.raises(DeviceError, match="must not wait"):
        graph_replay(lambda: x.sum().item())
    assert torch.cuda.current_stream() == before
    assert float(x.sum()) == 4.0
    assert torch.randn(4, device=device).isfinite().all()  # the generator is not in capture


def test_a_candidate_that_does_not_fit_is_infeasible_with_the_reason(device: torch.device) -> None:
    class Greedy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is torch.bfloat16:
                torch.empty(2**44, dtype=torch.uint8, device=x.device)  # 16 TiB
            return super().forward(x)

    x = torch.randn(32, 16, device=device)
    call = Call(args=(x,), kwargs={}, gradients=[torch.randn(32, 16, device=device)])
    meter = LayerMeter(device, make_clock(device), 2.0)
    assert meter.try_option(FP32, [call], lambda: Greedy(16, 16, device=device)).candidate
    before = torch.cuda.memory_allocated(device)
    run = meter.try_option(BF16_O2, [call], lambda: Greedy(16, 16, device=device))
    assert "out of memory" in run.infeasible
    assert torch.cuda.memory_allocated(device) == before


# --- compiled, sharded, measured: 10 to 50 seconds each --------------------------------------


def test_compiled_fp8_is_right(device: torch.device, fp8: Option) -> None:
    recipes = fp8_support(device).recipes
    checks = fp8_self_test(device, recipes=recipes, compiler=torch.compile)
    assert [check.detail for check in checks if not check.is_good] == []


def test_compiled_steps_learn_what_eager_ones_do(device: torch.device, fp8: Option) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Mlp().to(device)
        _, optimizer = autoprec.apply(plan_for(model, fp8), model, adam(model))
        if compiled:
            model.compile()
        losses.append(train(model, optimizer, device))
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)
    assert losses[0][-1] < losses[0][0]


def _shard(_rank: int, folder: str, recipe: str) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl", rank=0, world_size=1, init_method=store, device_id=device)
    torch.manual_seed(0)
    model = Mlp().to(device)
    autoprec.apply(plan_for(model, fp8_option(Recipe(recipe))), model)
    mesh = init_device_mesh("cuda", (1,))
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh)
    optimizer = adam(model)
    attach_optimizer(model, optimizer)
    losses = train(model, optimizer, device)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    torch.save(losses, Path(folder) / "losses.pt")
    leave_group()


def test_fsdp2_trains_on_one_gpu_as_without_it(
    device: torch.device, fp8: Option, tmp_path: Path
) -> None:
    assert fp8.recipe is not None
    spawn(_shard, args=(str(tmp_path), fp8.recipe.value), nprocs=1)  # type: ignore[no-untyped-call]  # torch's
    torch.manual_seed(0)
    model = Mlp().to(device)
    _, optimizer = autoprec.apply(plan_for(model, fp8), model, adam(model))
    sharded = torch.load(tmp_path / "losses.pt")
    assert sharded == pytest.approx(train(model, optimizer, device), rel=5e-3)


def test_a_plan_is_tuned_from_end_to_end(device: torch.device, tmp_path: Path) -> None:
    from autoprec.tuning.run import Run
    from autoprec.tuning.settings import Settings

    file = tmp_path / "tiny.py"
    file.write_text(
        "import torch, torch.nn.functional as F\n"
        "def build_model():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))\n"
        "def train_batches(seed):\n"
        "    generator = torch.Generator().manual_seed(seed)\n"
        "    while True:\n        yield torch.randn(64, 64, generator=generator)\n"
        "def loss_fn(model, x):\n    return F.mse_loss(model(x), x.flip(-1)) + 1.0\n"
    )
    settings = Settings(
        workload=str(file), target="cuda", out=tmp_path / "out", compile=False, verify=False
    )
    outcome = Run(settings).make()
    assert outcome.plan.fingerprint.device == torch.cuda.get_device_name()
    assert outcome.plan.fingerprint.time_basis is Basis.MEASURED


def test_a_measured_device_profile_predicts_what_it_measured(
    device: torch.device, tmp_path: Path
) -> None:
    profile = measure_device_profile("cuda")
    path = tmp_path / "here.json"
    path.write_text(profile.to_json())
    assert load_device_profile(path) == profile
    assert profile.basis is Basis.MEASURED
    recipes = fp8_support(device).recipes
    casts = [f"{r}_cast_bytes" for r in (Recipe.TENSORWISE, Recipe.ROWWISE) if r in recipes]
    for name in (*casts, *(["eager_host_us", "eager_cast_bytes"] if casts else [])):
        assert profile.constants[name].kind is ConstantKind.MEASURED, name
    x, w = (torch.randn(LARGE[1], LARGE[1], device=device).bfloat16() for _ in "xw")
    x = x.repeat(2, 1)  # M = 8192 rows
    found = time_interleaved({"bf16": lambda: x @ w}, clock=CudaClock(device))["bf16"]
    predicted = gemm_us(profile.machine, *LARGE, Kernel.BF16)
    assert predicted == pytest.approx(found.median_ms * 1e3, rel=0.25)


# --- kernels by name: last, since CUPTI slows all launches after it --------------------------


def test_fp8_gemms_launch_kernels_that_say_so(device: torch.device, fp8: Option) -> None:
    found = gemm_candidates(device, (1024, 1024, 1024), fp8_support(device).recipes)
    for name, fn in found.items():
        fn()
        kernels = cuda_kernels(fn)
        assert any(map(is_fp8_kernel, kernels)) is name.startswith("fp8"), (name, kernels)


def test_a_trained_plan_launches_fp8_kernels(device: torch.device, fp8: Option) -> None:
    model = Mlp().to(device)
    _, optimizer = autoprec.apply(plan_for(model, fp8), model, adam(model))
    names = cuda_kernels(lambda: train(model, optimizer, device))
    assert any(map(is_fp8_kernel, names)), names


def _assert_complete(profile: Profile, device: torch.device) -> None:
    assert Profile.from_json(profile.to_json()) == profile
    assert all(step.peak_bytes for step in profile.steps if step.timing.samples)
    rows = [row for row in profile.layers if row.option.is_fp8 and not row.infeasible]
    assert bool(rows) == bool(fp8_support(device).recipes)
    for row in rows:
        assert row.total is not None
        assert row.total.samples > 0  # timed, not predicted from a smaller layer
        assert any("_scaled_mm float8" in kernel for kernel in row.kernels)
        assert any(map(is_fp8_kernel, row.kernels)), row.kernels
    if find_sensor(device) is not None:
        assert all(row.conditions for row in profile.layers if row.total and row.total.samples)
        assert all(step.conditions for step in profile.steps if step.timing.samples)


def test_a_profile_proves_its_fp8_kernels(device: torch.device) -> None:
    workload = mlp_workload()
    spec = capture_model(Context(workload, device))
    profile = profile_model(Context(workload, device), spec)
    _assert_complete(profile, device)
    assert (profile.device.compile_mode, profile.compile_s) == ("eager", 0.0)


def test_a_compiled_profile_is_complete_and_never_recompiles(
    device: torch.device, fp8: Option
) -> None:
    workload = mlp_workload()
    spec = capture_model(Context(workload, device))
    options = (fp8,)  # each takes seconds to compile, layer by layer
    profile = profile_model(Context(workload, device), spec, options=options, compiled=True)
    _assert_complete(profile, device)
    assert profile.device.compile_mode == "default"
    assert profile.compile_s > 0
    assert profile.recompiles == 0
