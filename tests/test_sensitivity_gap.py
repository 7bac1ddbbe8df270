import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.records import FP32, Basis, Estimate, HorizonGap, LossGap, Sensitivity, StepError
from autoprec.sensitivity.gap import (
    FARTHEST,
    LEVEL,
    LONGEST_STEPS,
    USUAL_EXPONENT,
    expected_gap,
    gap_per_error,
    grad_error_budget_for,
    growth,
    loss_exponent,
    predicted_loss_gap,
    with_measured,
)


def make_sensitivity() -> Sensitivity:
    zero = Estimate(mean=0.0)
    return Sensitivity(
        structure="s",
        reference=FP32,
        method="layerwise",
        preconditioner="adam",
        batches=4,
        passes=1,
        step_equivalents=1.0,
        warmup_steps=0,
        checkpoint="",
        seed=0,
        rows=(),
        activation_error=zero,
        floor=zero,
        statistics=(),
        joint=(),
        loss_curve=(),
        software={},
    )


def falling(slope: float, level: float = 5.0, steps: int = 20) -> list[float]:
    return [level - slope * math.log(t) for t in range(1, steps + 1)]


def test_a_gap_is_in_proportion_to_the_error_and_grows_with_the_run() -> None:
    sensitivity = make_sensitivity()
    gaps = [predicted_loss_gap(sensitivity, 0.01, steps) for steps in (300, 1200)]
    assert predicted_loss_gap(sensitivity, 0.02, 300) == pytest.approx(2 * gaps[0])
    assert gaps[0] == pytest.approx(0.01 * LEVEL)
    assert gaps[1] == pytest.approx(2 * gaps[0])


def test_gap_of_a_branch_counts_the_branch_only() -> None:
    sensitivity = make_sensitivity()
    whole = predicted_loss_gap(sensitivity, 0.01, 100)
    branch = predicted_loss_gap(sensitivity, 0.01, 25, start=75)
    assert branch == pytest.approx(whole / 16)


def test_the_largest_of_the_errors_on_the_way_is_held_to_the_budget() -> None:
    sensitivity = make_sensitivity()
    points = [StepError(step=s, grad_error=Estimate(mean=e)) for s, e in ((10, 0.03), (50, 0.02))]
    fallen = sensitivity.model_copy(update={"by_step": tuple(points)})
    grown = sensitivity.model_copy(update={"by_step": tuple(reversed(points))})
    assert growth(sensitivity) == growth(grown.model_copy(update={"by_step": points[:1]})) == 1.0
    assert growth(fallen) == pytest.approx(1.5)
    plain, larger = (predicted_loss_gap(s, 0.01, 300) for s in (sensitivity, fallen))
    assert larger == plain  # the last one predicts, the largest is held to the budget
    # the first 50 of 75 steps may be all that counts, of 5000 a seventh
    for steps, times in ((75, 1.5), (110, 1.5), (5000, 1.075)):
        budgets = [grad_error_budget_for(s, 1e-3, steps) for s in (sensitivity, fallen)]
        assert budgets[0] == pytest.approx(times * budgets[1])
    # by what one batch's scatter leaves of it
    points[0] = StepError(step=10, grad_error=Estimate(mean=0.06, stderr=0.02))
    assert growth(sensitivity.model_copy(update={"by_step": tuple(points)})) == pytest.approx(2.0)
    # a step that no FP8 plan would survive says nothing of gaps (a memory's unstable recurrence)
    points[0] = StepError(step=10, grad_error=Estimate(mean=9.3))
    broken = sensitivity.model_copy(update={"by_step": tuple(points)})
    assert growth(broken) == pytest.approx(465.0)  # holds the search's ceiling down
    budgets = [grad_error_budget_for(s, 1e-3, 75) for s in (sensitivity, broken)]
    assert budgets[1] == pytest.approx(budgets[0] * 0.06)


def test_an_expected_gap_has_an_interval_that_widens_with_the_run() -> None:
    sensitivity = make_sensitivity()
    near, far = (expected_gap(sensitivity, 0.01, steps) for steps in (2000, 10_000))
    for found in (near, far):
        assert found.basis is Basis.PREDICTED
        assert (found.low or 0.0) < (found.mean or 0.0) < (found.high or 0.0)
    assert (far.high or 0.0) / (far.low or 1.0) > (near.high or 0.0) / (near.low or 1.0)


@pytest.mark.parametrize(
    ("grad_error", "steps", "reason"),
    [
        (0.01, 10**6, "runs of up to 2,000 steps"),
        (None, 300, "gradient error is not known"),
    ],
)
def test_what_is_not_known_has_no_number(grad_error: float | None, steps: int, reason: str) -> None:
    found = expected_gap(make_sensitivity(), grad_error, steps)
    assert (found.mean, found.low, found.high, found.basis) == (None, None, None, Basis.UNKNOWN)
    assert reason in found.reason


@given(
    tolerance=st.floats(1e-5, 0.1),
    steps=st.integers(1, FARTHEST * LONGEST_STEPS),
)
def test_within_the_budget_the_interval_is_within_the_tolerance(
    tolerance: float, steps: int
) -> None:
    sensitivity = make_sensitivity()
    budget = grad_error_budget_for(sensitivity, tolerance, steps)
    assert expected_gap(sensitivity, budget, steps).high == pytest.approx(tolerance)


def test_beyond_the_curve_the_slope_tends_to_the_usual_one() -> None:
    steep, flat = (partial(loss_exponent, falling(slope)) for slope in (1.0, 0.01))
    own = 1.0 / (5.0 - math.log(20))
    assert steep(5) == steep(20) == pytest.approx(own)
    assert steep(80) == pytest.approx(own / 4 + 0.75 * USUAL_EXPONENT)
    assert (flat(80) or 1.0) < USUAL_EXPONENT < (steep(80) or 0.0)
    assert flat(10**6) == pytest.approx(USUAL_EXPONENT, rel=1e-3)
    assert loss_exponent(falling(1.0, steps=4), 80) is not None
    assert loss_exponent(falling(1.0, steps=3), 80) is None


# families of bench/convergence.py without a fault: the mean loss of two or three seeds in the first
# ten steps, what the log line extrapolated from it gives for r at step 75, and r as it was there
GPT = (5.51, 4.89, 4.47, 4.27, 4.13, 3.69, 3.62, 3.62, 3.31, 3.36), 0.79, 0.06
VIT = (2.85, 2.57, 2.59, 2.52, 2.49, 2.42, 2.4, 2.45, 2.43, 2.37), 0.076, 0.19
ENCODER = (2.86, 2.75, 2.73, 2.65, 2.68, 2.63, 2.44, 2.52, 2.59, 2.67), 0.051, 0.49


@pytest.mark.parametrize(
    ("early", "log_line", "measured"), [GPT, VIT, ENCODER], ids=["gpt", "vit", "encoder"]
)
def test_ten_steps_guess_the_slope_at_the_horizon(
    early: tuple[float, ...], log_line: float, measured: float
) -> None:
    guess = loss_exponent(early, 75)
    assert guess is not None
    assert abs(math.log(guess / measured)) < abs(math.log(log_line / measured))
    assert measured / 6 < guess < 3 * measured


def test_noisy_curve_is_not_taken_for_flat() -> None:
    noisy = [3.0 + 0.1 * (-1) ** t for t in range(1, 21)]
    assert (loss_exponent(noisy, 20) or 0.0) > 0.01 / 3.0


def test_without_an_error_the_gap_is_nothing_whatever_the_length() -> None:
    found = expected_gap(make_sensitivity(), 0.0, 10**6)
    assert (found.mean, found.low, found.high, found.basis) == (0.0, 0.0, 0.0, Basis.MEASURED)


def measured(mean: float, stderr: float, steps: int = 300, branch_steps: int = 300) -> HorizonGap:
    gap = LossGap(mean=mean, low=mean, high=mean, confidence=0.95, seeds=5)
    return HorizonGap(
        warmup_steps=steps - branch_steps, branch_steps=branch_steps, gap=gap, stderr=stderr
    )


def test_a_measured_gap_corrects_the_prediction_as_far_as_it_is_sure() -> None:
    before = expected_gap(make_sensitivity(), 0.01, 2000)
    short = 0.01 * gap_per_error(300)
    assert before.mean is not None
    sure, unsure = (with_measured(before, measured(3 * short, se)) for se in (1e-6, 10 * short))
    for found in (sure, unsure):
        assert found.low is not None
        assert found.high is not None
        assert found.mean is not None
        assert found.low < found.mean < found.high
        assert found.basis is Basis.PREDICTED
    assert 1.2 * before.mean < (sure.mean or 0.0) < 3 * before.mean
    assert unsure.mean == pytest.approx(before.mean, rel=0.05)
    assert (sure.high or 0.0) / (sure.low or 1.0) < (before.high or 0.0) / (before.low or 1.0)
    # a gap below nothing says that the true one is small, not that it is negative
    helped = with_measured(before, measured(-short, short / 10))
    assert 0.0 < (helped.mean or 0.0) < before.mean


def test_a_far_shorter_measurement_or_none_corrects_nothing() -> None:
    before = expected_gap(make_sensitivity(), 0.01, 2000)
    assert with_measured(before, measured(0.01, 1e-4, steps=150, branch_steps=150)) == before
    far = expected_gap(make_sensitivity(), 0.01, 3001)
    assert with_measured(far, measured(0.01, 1e-4)) == far
    diverged = measured(0.01, 1e-4).model_copy(update={"gap": None})
    assert with_measured(before, diverged) == before
    unknown = expected_gap(make_sensitivity(), None, 2000)
    assert with_measured(unknown, measured(0.01, 1e-4)) == unknown


def test_a_branch_corrects_by_the_share_of_the_run_that_had_the_plan() -> None:
    before = expected_gap(make_sensitivity(), 0.01, 900)
    branch = predicted_loss_gap(make_sensitivity(), 0.01, 100, start=200)
    found = with_measured(before, measured(branch, branch / 10, branch_steps=100))
    assert before.mean is not None
    assert before.mean / 1.5 < (found.mean or 0.0) < 1.5 * before.mean
