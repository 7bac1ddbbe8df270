"""What a refuted plan teaches, and that the report says it."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.records import BF16_O2, FP32, Branch, Option, Plan, Recipe, fp8_option
from autoprec.verification.branches import Arm
from autoprec.verification.evidence import Evidence
from autoprec.verification.refuted import Refuted, is_hopeless, repair_notes
from autoprec.verification.sequential import Looks
from autoprec.verification.session import REFERENCE, Terms
from tests.models import Mlp
from tests.plans import plan_for

TENSORWISE = fp8_option(Recipe.TENSORWISE)
TERMS = Terms(
    tolerance=1e-3,
    looks=Looks(seeds_min=2, seeds_max=5),
    warmup_steps=1,
    branch_steps=2,
    seed=0,
    time_budget_s=None,
)


@cache
def uniform(option: Option) -> Plan:
    return plan_for(Mlp(), option)


def plan(option: Option, grad_error: float | None) -> Plan:
    return uniform(option).model_copy(update={"grad_error": grad_error})


def refuted(grad_error: float | None, gap: float, *, diverged_at: int | None = None) -> Refuted:
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
    arm = Arm(label="plan", options={})
    evidence = Evidence(arms=(REFERENCE, arm, arm), terms=TERMS, branches=tuple(branches))
    return Refuted(plan(TENSORWISE, grad_error), evidence)


@given(grad_error=st.floats(1e-4, 1.0), gap=st.floats(1.1e-3, 0.5))
def test_the_bearable_e_is_where_a_proportional_gap_meets_the_tolerance(
    grad_error: float, gap: float
) -> None:
    bearable = refuted(grad_error, gap).bearable_e
    assert bearable == pytest.approx(grad_error * TERMS.tolerance / gap, rel=1e-6)


def test_plans_above_the_bearable_e_are_passed_over() -> None:
    seen = [refuted(0.04, 0.004)]
    assert is_hopeless(plan(BF16_O2, 0.02), seen)
    assert not is_hopeless(plan(BF16_O2, 0.009), seen)
    assert not is_hopeless(plan(BF16_O2, None), seen)
    assert not is_hopeless(plan(BF16_O2, 0.02), [])
    assert not is_hopeless(plan(BF16_O2, 0.02), [refuted(0.04, 0.1, diverged_at=1)])


def test_the_notes_name_the_layers_that_left_fp8() -> None:
    notes = repair_notes(plan(FP32, 0.0), [refuted(0.04, 0.004)], skipped=2)
    assert "mean loss gap +0.40%" in notes[0]
    assert "out of FP8 since: first, second" in notes[0]
    assert notes[1].startswith("2 more plans were passed over")
    same = repair_notes(plan(TENSORWISE, 0.01), [refuted(0.04, 0.1, diverged_at=1)], skipped=0)
    assert "diverged at step 1" in same[0]
    assert "no layer, but recipes are gentler" in same[0]
