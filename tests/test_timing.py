"""Turns, stopping, rejection and medians, exactly, by a clock that the functions advance."""

import gc
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprec.device.timing import (
    SHORTEST_SAMPLE_MS,
    Clock,
    CpuClock,
    Observation,
    Samples,
    Stopping,
    last_level_cache_bytes,
    make_clock,
    sample_interleaved,
    timing_from,
)
from autoprec.records import Conditions, Timing


def timed(
    candidates: Mapping[str, Callable[[], object]],
    *,
    clock: Clock,
    samples: int = 20,
    **given: Any,  # Any: what sample_interleaved takes
) -> dict[str, Timing]:
    stopping = Stopping(samples=samples)
    found = sample_interleaved(candidates, clock=clock, stopping=stopping, **given)
    return {name: taken.timing() for name, taken in found.items()}


class VirtualClock(Clock):
    """Time moves only when a function made by `takes` runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def takes(self, name: str, *ms: float) -> Callable[[], None]:
        """Return a function that takes these times in turn."""
        calls = 0

        def run() -> None:
            nonlocal calls
            self.order.append(name)
            self.now += ms[calls % len(ms)]
            calls += 1

        return run

    def measure(self, fn: Callable[[], object]) -> float:
        before = self.now
        fn()
        return self.now - before


class ScriptedMonitor:
    """Says of each sample whether it is dirty, as the script goes."""

    def __init__(self, *dirty: bool) -> None:
        self.dirty = list(dirty)
        self.settled = 0

    def settle(self) -> int:
        self.settled += 1
        return 2

    def observe(self, sample: Callable[[], float]) -> tuple[float, Observation]:
        is_dirty = self.dirty.pop(0) if self.dirty else False
        return sample(), Observation(is_dirty, Conditions(temperature_c=80 if is_dirty else 60))

    def look(self) -> None: ...


def test_every_candidate_has_one_turn_per_round() -> None:
    clock = VirtualClock()
    functions = {name: clock.takes(name, 1.0) for name in "abc"}
    timed(functions, clock=clock, samples=5, warmup=2)
    warm, rounds = clock.order[:6], np.array(clock.order[6:]).reshape(5, 3)
    assert warm == ["a", "a", "b", "b", "c", "c"]
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) > 1


def test_the_order_of_turns_follows_the_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        clock = VirtualClock()
        functions = {name: clock.takes(name, 1.0) for name in "abcd"}
        timed(functions, clock=clock, samples=6, seed=seed)
        orders.append(clock.order)
    assert orders[0] == orders[1] != orders[2]


def test_median_and_spread_are_those_of_the_samples() -> None:
    clock = VirtualClock()
    fn = clock.takes("a", 9.0, 1.0, 2.0, 3.0, 4.0, 5.0)  # the first call is the warm-up
    timing = timed({"a": fn}, clock=clock, samples=5, warmup=1)["a"]
    assert (timing.median_ms, timing.samples, timing.rejected) == (3.0, 5, 0)
    assert (timing.p20_ms, timing.p80_ms) == pytest.approx((1.8, 4.2))


def test_dirty_samples_are_left_out_counted_and_taken_again() -> None:
    clock = VirtualClock()
    fn = clock.takes("a", 1.0, 100.0, 1.0, 1.0, 1.0)
    monitor = ScriptedMonitor(True)
    found = sample_interleaved(
        {"a": fn}, clock=clock, stopping=Stopping(samples=3), warmup=1, monitor=monitor
    )["a"]
    assert found.rounds == [None, 1.0, 1.0, 1.0]
    assert (found.rejected, found.pauses, monitor.settled) == (1, 8, 4)
    assert found.timing().rejected == 1


@given(
    dirty=st.lists(st.booleans(), max_size=40),
    samples=st.integers(3, 8),
    rejections=st.integers(0, 8),
)
def test_there_are_always_as_many_clean_samples_as_asked(
    dirty: list[bool], samples: int, rejections: int
) -> None:
    clock = VirtualClock()
    found = sample_interleaved(
        {"a": clock.takes("a", 1.0)},
        clock=clock,
        stopping=Stopping(samples=samples, rejections=rejections),
        warmup=1,
        monitor=ScriptedMonitor(*dirty),
    )["a"]
    assert len(found.clean) == samples
    assert found.rejected <= rejections


def test_steady_candidates_stop_early_and_unsteady_ones_go_on() -> None:
    clock = VirtualClock()
    functions = {"steady": clock.takes("s", 1.0), "unsteady": clock.takes("u", 1.0, 3.0)}
    found = sample_interleaved(
        functions, clock=clock, stopping=Stopping(samples=10, least=4, precision=0.01), warmup=1
    )
    assert len(found["steady"].clean) == 4
    assert len(found["unsteady"].clean) == 10


def test_a_least_time_is_taken_whatever_else_would_stop() -> None:
    clock = VirtualClock()
    stopping = Stopping(samples=6, least=2, budget_ms=100.0, least_ms=1000.0)
    functions = {"short": clock.takes("short", 50.0), "long": clock.takes("long", 600.0)}
    found = sample_interleaved(functions, clock=clock, stopping=stopping, warmup=1)
    assert (len(found["short"].clean), len(found["long"].clean)) == (20, 2)


def test_slow_candidates_stop_at_their_budget() -> None:
    clock = VirtualClock()
    functions = {"slow": clock.takes("slow", 50.0), "fast": clock.takes("fast", 1.0)}
    found = sample_interleaved(
        functions, clock=clock, stopping=Stopping(samples=10, budget_ms=100.0), warmup=1
    )
    assert (len(found["slow"].clean), len(found["fast"].clean)) == (3, 10)


def test_a_very_short_function_is_repeated_within_a_sample() -> None:
    clock = VirtualClock()
    timing = timed(
        {"a": clock.takes("a", SHORTEST_SAMPLE_MS / 8)}, clock=clock, samples=3, warmup=1
    )["a"]
    assert len(clock.order) == 1 + 3 * 8
    assert timing.median_ms == pytest.approx(SHORTEST_SAMPLE_MS / 8)


def test_prepare_runs_outside_of_the_timing() -> None:
    clock = VirtualClock()
    rounds: list[int] = []

    def prepare(number: int) -> None:
        rounds.append(number)
        clock.now += 1000.0

    timing = timed({"a": clock.takes("a", 1.0)}, clock=clock, samples=3, warmup=1, prepare=prepare)[
        "a"
    ]
    assert timing.p80_ms == 1.0
    assert rounds == [0, 0, 1, 2]


def test_the_collector_sleeps_during_samples_and_wakes_after() -> None:
    was_on: list[bool] = []
    timed({"a": lambda: was_on.append(gc.isenabled())}, clock=CpuClock(), samples=3)
    assert not was_on[-1]
    assert gc.isenabled()


def test_conditions_of_many_samples_become_one() -> None:
    cold = Conditions(sm_clock_mhz=1700, power_w=400.0, temperature_c=50)
    hot = Conditions(sm_clock_mhz=1500, power_w=600.0, temperature_c=80, throttle_reasons=("x",))
    merged = Samples(pauses=3, conditions=[cold, hot]).merged_conditions()
    assert merged == Conditions(
        sm_clock_mhz=1600, power_w=500.0, temperature_c=80, throttle_reasons=("x",), pauses=3
    )
    assert Samples().merged_conditions() is None


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=50))
def test_percentiles_are_in_order_and_within_the_samples(samples: list[float]) -> None:
    timing = timing_from(samples)
    bounds = (min(samples), timing.p20_ms, timing.median_ms, timing.p80_ms, max(samples))
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(bounds))


def test_the_error_of_a_median_is_that_of_normal_samples() -> None:
    generator = np.random.default_rng(0)
    errors = [timing_from(list(generator.normal(100, 5, 25))).relative_error for _ in range(300)]
    medians = [float(np.median(generator.normal(100, 5, 25))) for _ in range(300)]
    assert np.mean(errors) == pytest.approx(np.std(medians) / 100, rel=0.15)


def test_the_largest_cache_is_found_and_a_common_one_assumed(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20
    assert last_level_cache_bytes(tmp_path / "absent") > 0


def test_the_cpu_clock_measures_what_passes() -> None:
    clock = make_clock(torch.device("cpu"))
    x = torch.randn(256, 256)
    work = min(clock.measure(lambda: [x @ x for _ in range(20)]) for _ in range(5))
    assert work > min(clock.measure(lambda: None) for _ in range(5))  # others may need the core too
