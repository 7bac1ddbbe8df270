import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from autoprec.records import LossGap, Verdict
from autoprec.verification.sequential import (
    Terms,
    can_decide,
    gap_interval,
    half_widths,
    seeds_needed,
    smallest_tolerance,
    verdict_of,
)
from tests.examples import examples

REPEATS = 4000  # the standard error of a rate of 5 % is then 0.34 %
TOLERANCE = 1e-3


def run_test(gaps: np.ndarray, terms: Terms, tolerance: float) -> tuple[Verdict, int]:
    """Feed the gaps one by one, as the gate does."""
    for count in range(terms.seeds_min, terms.seeds_max + 1):
        found = gap_interval(gaps[:count].tolist(), terms, tolerance=tolerance)
        verdict = verdict_of(found, tolerance)
        if verdict is not Verdict.INCONCLUSIVE:
            return verdict, count
    return Verdict.INCONCLUSIVE, terms.seeds_max


def rates(mean: float, sd: float, *, repeats: int = 1000) -> dict[Verdict, float]:
    draws = np.random.default_rng(0).normal(mean, sd, size=(repeats, Terms().seeds_max))
    verdicts = [run_test(row, Terms(), TOLERANCE)[0] for row in draws]
    return {verdict: verdicts.count(verdict) / repeats for verdict in Verdict}


def test_an_interval_is_students_with_room_for_the_warm_up_and_for_unseen_jumps() -> None:
    gaps = [0.001, 0.003, 0.002, 0.0015]

    found = gap_interval(gaps, Terms(seeds_min=4, seeds_max=4))

    # one planned look uses the usual t; the warm-up's share is 0.21 of the variance
    sd, quantile = np.std(gaps, ddof=1), stdtrit(3, 0.975)
    half = quantile * sd * math.sqrt(1 / 4 + 0.21 / 0.79)
    assert found.mean - found.low == pytest.approx(half, rel=0.01)
    # four seeds miss runs that are 52.7 % of all in 5 % of cases: 0.473^4
    assert found.high - found.mean == pytest.approx(half + 0.527 * 8 * sd, rel=0.01)
    assert (found.seeds, found.confidence) == (4, 0.95)
    tested = gap_interval(gaps, Terms(seeds_min=4, seeds_max=4), tolerance=0.1)
    assert tested.high - tested.mean == pytest.approx(half + 0.527 * 0.1, rel=0.01)
    assert tested.low == found.low


@pytest.mark.parametrize(("jumps", "spread"), [(15.0, 0.2), (15.0, 0.5), (20.0, 0.5), (5.0, 0.05)])
def test_a_plan_on_the_tolerance_with_rare_jumps_is_hardly_ever_verified(
    jumps: float, spread: float
) -> None:
    """One of ten runs jumps; Student's interval alone verified such plans in 37 % of cases."""
    generator = np.random.default_rng(3)
    shape = (1000, Terms().seeds_max)
    jumped = jumps * (generator.random(shape) < 0.1) - 0.1 * jumps
    gaps = TOLERANCE * (1.0 + spread * (generator.standard_normal(shape) + jumped))
    verdicts = [run_test(row, Terms(), TOLERANCE)[0] for row in gaps]

    assert verdicts.count(Verdict.VERIFIED) / len(gaps) <= 0.05 + 0.01


def test_a_tail_to_the_right_does_not_verify_a_plan_on_the_tolerance() -> None:
    """Lognormal gaps; Student's interval alone verified such plans in 20 % of cases."""
    shape = (1000, Terms().seeds_max)
    gaps = np.exp(np.random.default_rng(4).standard_normal(shape)) * TOLERANCE / math.exp(0.5)
    verdicts = [run_test(row, Terms(), TOLERANCE)[0] for row in gaps]

    assert verdicts.count(Verdict.VERIFIED) / len(gaps) <= 0.02


def test_a_spread_that_no_seed_count_can_resolve_is_told_after_the_first_seeds() -> None:
    wide = [0.0, 10 * TOLERANCE, -8 * TOLERANCE]
    assert not can_decide(wide, TOLERANCE, Terms())
    assert can_decide([0.0, 0.1 * TOLERANCE, 0.2 * TOLERANCE], TOLERANCE, Terms())
    assert can_decide([9 * TOLERANCE, 10 * TOLERANCE, 11 * TOLERANCE], TOLERANCE, Terms())

    at_best = smallest_tolerance(wide, Terms())

    # all ten seeds, with such a spread and no gap, would just verify it
    ten = np.array([1.0, -1.0] * 5)
    gaps = (ten * np.std(wide, ddof=1) / np.std(ten, ddof=1)).tolist()
    assert gap_interval(gaps, Terms(), tolerance=at_best).high == pytest.approx(at_best)


@pytest.mark.parametrize(("first", "last"), [(2, 5), (3, 5), (3, 12)])
def test_a_look_gets_more_than_bonferroni_and_less_than_the_whole(first: int, last: int) -> None:
    terms = Terms(seeds_min=first, seeds_max=last)

    assert 0.05 / (last - first + 1) < terms.p_value < 0.05


def smallest_p_values(draws: np.ndarray) -> np.ndarray:
    """Return the smallest p-value of each row's looks, after three gaps and each further one."""
    from scipy import stats  # a second to import, in each worker

    looks = [
        np.asarray(stats.ttest_1samp(draws[:, :count], 0.0, axis=1).pvalue) for count in range(3, 7)
    ]
    return np.asarray(np.min(looks, axis=0))


def test_all_looks_together_miss_the_true_gap_as_often_as_they_may() -> None:
    terms = Terms(seeds_min=3, seeds_max=6)
    draws = np.random.default_rng(1).normal(0.0, 1.0, size=(REPEATS, 6))
    missed = int((smallest_p_values(draws) < terms.p_value).sum())

    assert 0.035 < missed / REPEATS < 0.065  # 0.05 +- 4 standard errors


def test_looking_without_paying_for_it_would_miss_too_often() -> None:
    """The reason for the module: the usual 95 % interval at each of four terms."""
    draws = np.random.default_rng(1).normal(0.0, 1.0, size=(REPEATS, 6))
    missed = int((smallest_p_values(draws) < 0.05).sum())

    assert missed / REPEATS > 0.09


@pytest.mark.parametrize("sd", [1e-5, 3e-4, 3e-3])
def test_a_null_comparison_is_almost_never_refuted(sd: float) -> None:
    assert rates(0.0, sd)[Verdict.REFUTED] <= 0.01


def test_a_gap_on_the_tolerance_is_decided_wrongly_in_at_most_one_of_twenty() -> None:
    found = rates(TOLERANCE, 3e-4, repeats=REPEATS)

    assert found[Verdict.REFUTED] + found[Verdict.VERIFIED] <= 0.05 + 0.014  # 4 standard errors


def test_gaps_like_those_of_short_branches_are_resolved_in_ten_seeds() -> None:
    """A spread of 0.015 % (the largest seen in 80-step branches of a char GPT) against 0.1 %."""
    assert rates(0.0002, 0.00015)[Verdict.VERIFIED] > 0.9
    assert rates(0.0018, 0.00015)[Verdict.REFUTED] > 0.99


def test_equal_gaps_have_a_point_for_an_interval() -> None:
    found = gap_interval([0.0, 0.0, 0.0], Terms())

    assert (found.low, found.mean, found.high) == (0.0, 0.0, 0.0)
    assert verdict_of(found, 0.0) is Verdict.VERIFIED


@given(
    st.lists(st.floats(-0.1, 0.1), min_size=3, max_size=5),
    st.floats(0.0, 0.05),
    st.floats(0.1, 10.0),
)
@examples(100)
def test_the_verdict_does_not_depend_on_the_unit(
    gaps: list[float], tolerance: float, scale: float
) -> None:
    scaled = gap_interval([gap * scale for gap in gaps], Terms())
    plain = gap_interval(gaps, Terms())

    assert scaled.low == pytest.approx(plain.low * scale, abs=1e-12)
    edge = min(abs(plain.high - tolerance), abs(plain.low - tolerance))
    if edge > 1e-9:
        assert verdict_of(scaled, tolerance * scale) is verdict_of(plain, tolerance)


def gap(low: float, high: float) -> LossGap:
    return LossGap(mean=(low + high) / 2, low=low, high=high, confidence=0.95, seeds=3)


def test_the_whole_interval_decides() -> None:
    assert verdict_of(gap(-0.002, 0.001), 0.001) is Verdict.VERIFIED
    assert verdict_of(gap(0.0011, 0.002), 0.001) is Verdict.REFUTED
    assert verdict_of(gap(0.0005, 0.002), 0.001) is Verdict.INCONCLUSIVE


def test_advised_seeds_would_indeed_decide() -> None:
    gaps = [0.0, 0.0004, 0.0002, -0.0001, 0.0005]

    needed = seeds_needed(gaps, TOLERANCE, Terms())

    assert needed is not None
    assert needed > 10
    sd, distance = float(np.std(gaps, ddof=1)), TOLERANCE - float(np.mean(gaps))
    share = Terms().p_value * 10 / needed
    assert half_widths(sd, needed, share, TOLERANCE)[1] <= distance
    assert half_widths(sd, needed - 1, Terms().p_value * 10 / (needed - 1), TOLERANCE)[1] > distance


def test_a_gap_on_the_tolerance_has_no_number_of_seeds() -> None:
    assert seeds_needed([0.0, 0.002, 0.001], TOLERANCE, Terms()) is None
