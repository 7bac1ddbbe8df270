"""How far a speedup can be trusted: its interval from the spread of the samples."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import stdtrit

from autoprec.records import Timing
from autoprec.report.step_times import plan_speedups
from tests.report_runs import make_run


def test_the_interval_of_a_speedup_follows_from_the_spread_of_the_samples() -> None:
    run = make_run()
    assert run.verification
    sigma = 2 * 0.012 / (2 * 0.8416)  # the steps of the test run spread by +- 1.2 %
    error = math.sqrt(2) * 1.2533 * sigma / math.sqrt(12)
    factor = float(stdtrit(11, 0.975))  # of twelve samples
    speedup = plan_speedups(run)["fp32"]
    assert speedup.high
    assert math.log(speedup.high / speedup.value) == pytest.approx(factor * error, rel=2e-3)


def test_a_single_sample_has_no_interval() -> None:
    run = make_run()
    assert run.verification
    steps = tuple(
        step.model_copy(update={"timing": step.timing.model_copy(update={"samples": 1})})
        for step in run.verification.steps
    )
    found = plan_speedups(
        replace(run, verification=run.verification.model_copy(update={"steps": steps}))
    )
    assert {(each.low, each.high) for each in found.values()} == {(None, None)}


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    run, covered, draws = make_run(blocks=1), 0, 600
    assert run.verification
    for _ in range(draws):
        steps = []
        for step, true_ms in zip(run.verification.steps, (200.0, 100.0, 1.0, 50.0), strict=True):
            samples = rng.normal(true_ms, 0.03 * true_ms, size=12)
            p20, median, p80 = (float(q) for q in np.percentile(samples, (20, 50, 80)))
            timing = Timing(median_ms=median, p20_ms=p20, p80_ms=p80, samples=12)
            steps.append(step.model_copy(update={"timing": timing}))
        proof = run.verification.model_copy(update={"steps": tuple(steps)})
        speedup = plan_speedups(replace(run, verification=proof))["fp32"]
        assert speedup.low
        assert speedup.high
        covered += speedup.low <= 4.0 <= speedup.high
    assert 0.92 <= covered / draws <= 0.98
