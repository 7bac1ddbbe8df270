"""The peak tracker on cases that can be counted by hand, what is free, and predicted peaks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from autoprec.device import memory
from autoprec.device.memory import can_take, free_bytes, is_out_of_memory
from autoprec.errors import DeviceError, WorkloadError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.memory import step_bytes
from autoprec.tuning.ranks import made_on_all
from autoprec.workload.functions import Workload
from autoprec.workload.optimizers import plain_parts
from tests.memory_families import Scored, convolutions, decoder, family, mlp, values
from tests.peaks import tracked_peak, training_peak

CPU = torch.device("cpu")
KIB = 1024


def stack(depth: int, width: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def train(model: nn.Module, x: Tensor, *, steps: int, foreach: bool = False) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(model(x).square().mean())
        optimizer.step()


def test_live_tensors_are_counted_once_and_given_back() -> None:
    held = torch.zeros(KIB)
    with tracked_peak() as peak:
        x = torch.zeros(2 * KIB)  # 8 KiB
        view = x.view(2, -1)[0]
        y = view + 1  # 4 KiB
        del y
        z = x * 2  # 8 KiB: the peak
        del x, view, z
        held.add_(1)
    assert peak.rise_bytes == 16 * KIB
    assert peak.before_bytes >= 4 * KIB
    assert peak.peak_bytes == peak.before_bytes + peak.rise_bytes


def test_what_was_alive_before_makes_room_when_it_dies() -> None:
    before = [torch.zeros(4 * KIB)]
    with tracked_peak() as peak:
        before.clear()
        torch.zeros(2 * KIB)
    assert peak.rise_bytes == 0


class Placed(TwoTensor):
    """Names a part that is no tensor, as a DTensor does its mesh."""

    mesh = "all ranks"

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        names, context = super().__tensor_flatten__()  # type: ignore[no-untyped-call]  # torch's
        return [*names, "mesh"], context


def test_parts_of_a_tensor_are_tensors() -> None:
    placed = Placed(torch.ones(2), torch.zeros(2))  # type: ignore[no-untyped-call]  # torch's
    assert [id(part) for part in plain_parts(placed)] == [id(placed.a), id(placed.b)]


def test_training_with_adamw_takes_16_bytes_per_parameter() -> None:
    """Weight, gradient, two moments: 16; and what a step makes of one tensor at a time."""
    model, x = stack(16, 64), torch.zeros(1, 64)
    parameters = 16 * 64 * 64
    with tracked_peak() as peak:
        train(model, x, steps=2, foreach=False)
    taken = peak.rise_bytes / parameters + 4  # the weights were there before
    passing = 3 * 4 / 16  # what the step of one of 16 weights makes on its way
    assert 16.0 <= taken < 16.0 + passing + 0.05
    with tracked_peak() as peak:
        train(model, x, steps=2, foreach=True)
    assert 20.0 <= peak.rise_bytes / parameters + 4 + 4 < 24.5  # .grad of the run before is there


def test_a_gpu_is_asked_for_its_memory_and_a_cpu_for_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def give(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert (dtype, device.type) == (torch.uint8, "cuda")
        if size > KIB:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(size)

    monkeypatch.setattr(torch, "empty", give)
    assert [can_take(torch.device("cuda"), size) for size in (KIB, KIB + 1)] == [True, False]
    monkeypatch.setattr(memory, "free_bytes", lambda _: KIB)
    assert [can_take(CPU, size) for size in (KIB, KIB + 1)] == [True, False]


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_saved_activations_are_seen_within_backward(is_recomputed: bool) -> None:
    """Tanh saves its output: `depth` of them are alive when backward begins, recomputed or not."""
    depth, x = 8, torch.zeros(KIB, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        for _ in range(depth):
            x = torch.tanh(x)
        return x

    def run() -> None:
        y = checkpoint(forward, x, use_reentrant=False) if is_recomputed else forward(x)
        torch.autograd.backward(y.sum())

    with tracked_peak() as peak:
        run()
    x.grad = None
    # the outputs, the gradient that flows, and what it becomes
    assert (depth + 1) * 4 * KIB <= peak.rise_bytes <= (depth + 3) * 4 * KIB


def test_gradients_and_hooks_of_the_engine_are_seen() -> None:
    """What only backward makes: without the mode in the engine's calls the rise would be tiny."""
    w = torch.zeros(64, KIB, requires_grad=True)
    x = torch.ones(1, 64)
    with tracked_peak() as peak:
        torch.autograd.backward((x @ w).sum())
    assert peak.rise_bytes >= 64 * KIB * 4
    assert w.grad is not None


def test_resized_storages_are_followed() -> None:
    own, x = torch.UntypedStorage.resize_, torch.zeros(KIB)
    with tracked_peak() as peak:
        storage = x.untyped_storage()
        storage.resize_(0)
        storage.resize_(12 * KIB)
        storage.resize_(4 * KIB)
    assert peak.rise_bytes == 8 * KIB
    assert torch.UntypedStorage.resize_ is own


def test_sparse_and_wrapped_tensors_are_taken_apart() -> None:
    weight = torch.zeros(100, KIB, requires_grad=True)
    with tracked_peak() as peak:
        torch.autograd.backward(F.embedding(torch.arange(2), weight, sparse=True).sum())
    assert 8 * KIB < peak.rise_bytes < 10 * KIB  # two rows, not a hundred
    wrapped = TwoTensor(torch.zeros(KIB), torch.zeros(KIB))  # type: ignore[no-untyped-call]  # torch's
    with tracked_peak() as peak:
        (wrapped * 2).sum()
    assert peak.before_bytes >= 8 * KIB
    assert 8 * KIB <= peak.rise_bytes < 9 * KIB


def test_compute_is_not_changed_by_the_tracker() -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(0)
        model = stack(2, 16)
        train(model, torch.ones(4, 16), steps=2)
        return list(model.parameters())

    plain = weights()
    with tracked_peak():
        tracked = weights()
    assert all(map(torch.equal, plain, tracked))


def test_free_bytes_are_the_smaller_of_machine_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_bytes(CPU)
    assert free is not None
    assert free > 2**20
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    monkeypatch.setattr(memory, "MEMORY_INFO", info)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_bytes(CPU) == 50 * KIB
    for name, text in {
        "memory.max": "40960\n",
        "memory.current": "20480\n",
        "memory.stat": "anon 1\ninactive_file 4096\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert free_bytes(CPU) == 24 * KIB
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == 50 * KIB
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "nowhere")
    assert free_bytes(CPU) is None


def _cpu_is_full() -> None:
    torch.empty(2**55)


def _cuda_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _user_code_ran_out() -> None:
    try:
        _cuda_is_full()
    except torch.OutOfMemoryError as error:
        raise WorkloadError("loss_fn raised") from error


@pytest.mark.parametrize("fill", [_cpu_is_full, _cuda_is_full, _user_code_ran_out])
def test_a_full_device_is_told_from_other_errors(fill: Callable[[], None]) -> None:
    with pytest.raises((RuntimeError, WorkloadError)) as caught:
        fill()
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    # a stage that meets it ends in one line
    with pytest.raises(DeviceError, match="must fit into the memory of the device") as told:
        made_on_all(fill)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "workload",
    [
        decoder(width=64, depth=8, batch=1),
        decoder(width=32, depth=2, batch=64),
        mlp(width=64, depth=4, batch=4096),
        convolutions(width=32, depth=6, batch=1, side=4),
        convolutions(width=16, depth=4, batch=32),
        family(Scored, values(2, 128, 32), lambda model, x: model(x).square().mean()),
        family(
            lambda: nn.Sequential(nn.Linear(16, 1000)),
            values(256, 16),
            lambda model, x: F.cross_entropy(model(x), (x[:, 0] > 0).long()),
        ),
    ],
    ids=[
        "deep decoder",
        "wide decoder",
        "wide mlp",
        "deep convolutions",
        "wide convolutions",
        "attention's scores",
        "many classes",
    ],
)
def test_a_steps_peak_is_predicted_within_15_percent(workload: Workload) -> None:
    spec = capture_model(Context(workload, CPU))
    assert step_bytes(spec) == pytest.approx(training_peak(workload).rise_bytes, rel=0.15)
