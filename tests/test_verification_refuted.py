"""What a refuted plan teaches, and that the report says it."""

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.records import BF16_O2, FP32, Branch, Option, Plan, Recipe, fp8_option
from autoprec.verification import Terms
from autoprec.verification.evidence import Evidence, exceeds_limit, repair_notes
from tests.models import Mlp
from tests.plans import plan_for

TENSORWISE = fp8_option(Recipe.TENSORWISE)
TOLERANCE = 1e-3


@cache
def uniform(option: Option) -> Plan:
    return plan_for(Mlp(), option)


def plan(option: Option, grad_error: float | None) -> Plan:
    return uniform(option).model_copy(update={"grad_error": grad_error})


def refuted(grad_error: float | None, gap: float, *, diverged_at: int | None = None) -> Evidence:
    branches = [
        Branch(
            label=label,
            seed=seed,
            eval_loss=None if diverged_at is not None and shift else 2.0 * (1.0 + shift),
            diverged_at=diverged_at if shift else None,
            curve=(2.0,),
            eval_losses=(),
        )
        for seed in (1, 2)
        for label, shift in (("reference", 0.0), ("plan", gap))
    ]
    return Evidence(
        plan=plan(TENSORWISE, grad_error),
        terms=Terms(seeds_min=2),
        loss_tolerance=TOLERANCE,
        branches=tuple(branches),
    )


@given(grad_error=st.floats(1e-4, 1.0), gap=st.floats(1.1e-3, 0.5))
def test_the_implied_limit_is_where_a_proportional_gap_meets_the_tolerance(
    grad_error: float, gap: float
) -> None:
    limit = refuted(grad_error, gap).implied_limit
    assert limit == pytest.approx(grad_error * TOLERANCE / gap, rel=1e-6)


def test_plans_above_the_implied_limit_are_passed_over() -> None:
    seen = [refuted(0.04, 0.004)]
    assert exceeds_limit(plan(BF16_O2, 0.02), seen)
    assert not exceeds_limit(plan(BF16_O2, 0.009), seen)
    assert not exceeds_limit(plan(BF16_O2, None), seen)
    assert not exceeds_limit(plan(BF16_O2, 0.02), [])
    assert not exceeds_limit(plan(BF16_O2, 0.02), [refuted(0.04, 0.1, diverged_at=1)])


def test_the_notes_name_the_layers_that_are_otherwise_now() -> None:
    notes = repair_notes(plan(FP32, 0.0), [refuted(0.04, 0.004)], skipped=2)
    assert "mean loss gap +0.40%" in notes[0]
    assert "changed since: first, second" in notes[0]
    assert notes[1].startswith("2 more plans were passed over")
    same = repair_notes(plan(TENSORWISE, 0.01), [refuted(0.04, 0.1, diverged_at=1)], skipped=0)
    assert "diverged at step 1" in same[0]


def test_the_notes_name_the_layers_whose_first_step_is_not_finite() -> None:
    seen = refuted(0.04, 0.1, diverged_at=0)
    branches = [each.model_copy(update={"not_finite": ("first", "norm")}) for each in seen.branches]
    (note,) = repair_notes(plan(FP32, 0.0), [replace(seen, branches=tuple(branches))], skipped=0)
    assert (
        "(diverged at step 0: its gradients are not finite, beginning in 'first', 'norm')" in note
    )
