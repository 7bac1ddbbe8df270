"""A host and a GPU on one virtual clock: the host queues, the GPU works, each in its own time."""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autoprec.device import cuda_clock

LAUNCHES = 1024  # that CUDA holds before a launch waits
CYCLES_PER_MS = 1_700_000  # of an SM clock of 1.7 GHz
CLEAR_MS = 0.033  # what overwriting an L2 cache takes


class FakeQueue:
    """Times are in ms. Patches what a CudaClock asks of torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, l2_bytes: int = 0) -> None:
        self.host = 0.0
        self.free = 0.0  # when the device is through with all that is queued
        self.unfinished: deque[float] = deque()
        self.stats = {"num_alloc_retries": 0, "num_device_alloc": 3, "num_device_free": 0}
        fakes: dict[str, Any] = {
            "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=l2_bytes),
            "device": lambda _: nullcontext(),
            "synchronize": lambda _: self.wait(),
            "memory_stats": lambda _: dict(self.stats),
            "_sleep": lambda cycles: self.launch(0.005, cycles / CYCLES_PER_MS),
            "Event": lambda **_: FakeEvent(self),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch, "mm", lambda *_, **__: self.launch(0.005, 0.03))
        clock = SimpleNamespace(perf_counter=lambda: self.host / 1e3)
        monkeypatch.setattr(cuda_clock, "time", clock)

    def launch(self, host_ms: float, device_ms: float) -> None:
        """Queue a kernel; wait for a place where the queue is full."""
        while self.unfinished and self.unfinished[0] <= self.host:
            self.unfinished.popleft()
        if len(self.unfinished) >= LAUNCHES:
            self.host = self.unfinished.popleft()
        self.host += host_ms
        self.free = max(self.free, self.host) + device_ms
        self.unfinished.append(self.free)

    def wait(self) -> None:
        self.host = max(self.host, self.free)

    def call(self, *, launches: int, host_ms: float, device_ms: float) -> Callable[[], None]:
        """Return a function of this many launches, and the ms of each on host and device."""

        def run() -> None:
            for _ in range(launches):
                self.launch(host_ms, device_ms)

        return run

    def clock(self) -> cuda_clock.CudaClock:
        clock = cuda_clock.CudaClock(torch.device("meta"))
        overwrite = SimpleNamespace(zero_=lambda: self.launch(0.005, CLEAR_MS))
        object.__setattr__(clock, "buffer", overwrite)
        return clock


class FakeEvent:
    def __init__(self, queue: FakeQueue) -> None:
        self.queue = queue
        self.at = 0.0

    def record(self) -> None:
        self.queue.launch(0.001, 0.0)
        self.at = self.queue.free

    def query(self) -> bool:
        return self.queue.host >= self.at

    def synchronize(self) -> None:
        self.queue.host = max(self.queue.host, self.at)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at
