"""The CUDA clock on a virtual GPU: the device's time alone, the host's apart, and a loaded device.

And graphs: what is captured, and what a capture that fails must not leave behind.
"""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autoprec.device.cuda_clock import (
    CACHE_FACTOR,
    DEFAULT_CACHE_BYTES,
    GRAPH_WARMUPS,
    IDLE_S,
    LOAD_S,
    CudaClock,
    graph_replay,
)
from autoprec.device.timing import Observation, Samples, Stopping, sample_interleaved
from autoprec.errors import DeviceError
from tests.fake_queue import FakeQueue


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeQueue:
    return FakeQueue(monkeypatch)


def sampled(gpu: FakeQueue, fn: Any, *, warmup: int = 1, **given: Any) -> Samples:
    stopping = Stopping(samples=5)
    found = sample_interleaved(
        {"fn": fn}, clock=gpu.clock(), stopping=stopping, warmup=warmup, **given
    )
    return found["fn"]


# --- the device's time, and the host's --------------------------------------------------------


def test_an_eager_fp8_layer_is_timed_without_the_host(gpu: FakeQueue) -> None:
    layer = gpu.call(launches=12, host_ms=0.05, device_ms=0.02)  # 0.6 ms of Python for 0.24
    taken = sampled(gpu, layer)
    assert taken.clean == pytest.approx([0.24] * 5, abs=0.01)
    assert taken.timing().host_ms == pytest.approx(0.6, rel=0.01)
    assert taken.is_host_bound
    assert taken.timing(as_trained=True).median_ms == pytest.approx(0.6, rel=0.01)


def test_a_layer_that_queues_longer_than_the_first_lead_gets_a_longer_one(gpu: FakeQueue) -> None:
    taken = sampled(gpu, gpu.call(launches=60, host_ms=0.05, device_ms=0.01))
    assert taken.clean == pytest.approx([0.6] * 5, abs=0.01)
    assert taken.rejected == 0  # the warm-up told how long


@pytest.mark.parametrize("launches", [100, 3000])  # 3000: more than CUDA queues
def test_a_step_that_the_device_bounds_takes_the_devices_time(
    gpu: FakeQueue, launches: int
) -> None:
    taken = sampled(gpu, gpu.call(launches=launches, host_ms=0.01, device_ms=0.03))
    assert taken.timing(as_trained=True).median_ms == pytest.approx(launches * 0.03, rel=0.01)
    assert not taken.is_host_bound


@pytest.mark.parametrize("launches", [100, 3000])
def test_a_step_that_the_host_bounds_takes_the_hosts_time_and_says_so(
    gpu: FakeQueue, launches: int
) -> None:
    taken = sampled(gpu, gpu.call(launches=launches, host_ms=0.02, device_ms=0.012))
    assert taken.is_host_bound
    timing = taken.timing(as_trained=True)
    assert timing.median_ms == timing.host_ms == pytest.approx(launches * 0.02, rel=0.01)


@pytest.mark.parametrize("launches", [40, 2000])
def test_a_function_that_waits_for_the_device_is_timed_as_it_runs(
    gpu: FakeQueue, launches: int
) -> None:
    half = gpu.call(launches=launches // 2, host_ms=0.01, device_ms=0.03)

    def step() -> None:  # a loss that is read in the middle
        half()
        gpu.wait()
        half()

    taken = sampled(gpu, step)
    # both halves on the device, and at the wait and the end nothing is queued ahead of it
    assert taken.clean == pytest.approx([launches * 0.03] * 5, abs=0.1)
    assert taken.timing().host_ms is None
    assert not taken.is_host_bound


def test_calls_too_short_for_a_sample_are_repeated_without_the_host(gpu: FakeQueue) -> None:
    taken = sampled(gpu, gpu.call(launches=1, host_ms=0.02, device_ms=0.004))
    assert taken.clean == pytest.approx([0.004] * 5, rel=0.01)
    assert taken.timing().host_ms == pytest.approx(0.02, rel=0.01)


def test_the_machine_is_looked_at_while_the_device_works(gpu: FakeQueue) -> None:
    looks: list[bool] = []

    class Monitor:
        def settle(self) -> int:
            return 0

        def observe(self, sample: Any) -> tuple[float, Observation]:
            return sample(), Observation()

        def look(self) -> None:
            looks.append(gpu.host < gpu.free)

    sampled(gpu, gpu.call(launches=12, host_ms=0.05, device_ms=0.02), monitor=Monitor())
    assert looks == [True] * 5


def test_samples_in_which_the_allocator_asked_the_driver_are_taken_again(gpu: FakeQueue) -> None:
    calls = itertools.count()
    work = gpu.call(launches=12, host_ms=0.01, device_ms=0.02)

    def step() -> None:
        work()
        if next(calls) == 3:
            gpu.stats["num_alloc_retries"] += 1

    taken = sampled(gpu, step)
    assert taken.rejected == 1
    assert len(taken.clean) == 5


def test_a_gpu_that_was_idle_is_loaded_first(gpu: FakeQueue) -> None:
    clock = gpu.clock()
    work = gpu.call(launches=1, host_ms=0.01, device_ms=0.02)
    clock.measure(work)
    assert gpu.host >= LOAD_S * 1e3
    before = gpu.host
    clock.measure(work)
    assert gpu.host - before < 2.0  # it is warm
    gpu.host += IDLE_S * 1e3  # compiling, say
    before = gpu.host
    clock.measure(work)
    assert gpu.host - before >= LOAD_S * 1e3


@pytest.mark.parametrize("known", [50 * 2**20, 0])
def test_the_clock_overwrites_the_whole_cache(monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    FakeQueue(monkeypatch, l2_bytes=known)
    clock = CudaClock(torch.device("meta"))
    assert clock.buffer.nbytes == CACHE_FACTOR * (known or DEFAULT_CACHE_BYTES)


# --- graphs -----------------------------------------------------------------------------------


class FakeGenerator:
    """A CUDA generator as torch has it: a capture marks its state, and only its end unmarks it."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(is_captured=False)

    def clone_state(self) -> SimpleNamespace:
        return SimpleNamespace(is_captured=False)

    def graphsafe_set_state(self, state: SimpleNamespace) -> None:
        self.state = state

    def draw(self) -> None:
        if self.state.is_captured:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class FakeCapture:
    """Streams and graphs that note in which order they are used."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        self.generator = FakeGenerator()
        stream = SimpleNamespace(wait_stream=lambda _: self.order.append("wait"))
        fakes: dict[str, Any] = {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "current_device": lambda: 0,
            "stream": lambda _: nullcontext(),
            "set_stream": lambda _: self.order.append("back"),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.order.append("replay")),
            "graph": lambda _: self,
            "default_generators": (self.generator,),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def __enter__(self) -> None:
        self.generator.state.is_captured = True

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.generator.state.is_captured = False


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    return FakeCapture(monkeypatch)


def test_a_graph_is_warmed_up_on_another_stream_and_captured_once(capture: FakeCapture) -> None:
    replay = graph_replay(lambda: capture.order.append("call"))
    assert capture.order == ["wait", *["call"] * GRAPH_WARMUPS, "wait", "call"]
    replay()
    assert capture.order[-1] == "replay"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("operation not permitted\nwhen stream is capturing"), DeviceError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_capture_that_fails_leaves_stream_and_generator_as_they_were(
    capture: FakeCapture, error: BaseException, raised: type[BaseException]
) -> None:
    calls = itertools.count()

    def fn() -> None:
        capture.generator.draw()
        if next(calls) == GRAPH_WARMUPS:
            raise error

    capture.generator.draw = lambda: None  # type: ignore[method-assign]  # allowed in a capture
    with pytest.raises(raised) as caught:
        graph_replay(fn)
    if raised is DeviceError:
        assert "not permitted when stream is capturing" in str(caught.value)
    assert capture.order[-1] == "back"  # to the stream that was current before the capture
    FakeGenerator.draw(capture.generator)  # later random numbers can be drawn
