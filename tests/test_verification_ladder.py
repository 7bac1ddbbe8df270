"""The gap over other lengths: which are trained, how it grows, and what to expect further on."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from autoprec.errors import SettingsError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import FP32, HorizonGap, Recipe, fp8_option
from autoprec.report import RunRecords
from autoprec.report.promise import Promise
from autoprec.report.summary import summarise_run
from autoprec.tuning.settings import Settings
from autoprec.verification import Terms, verify_plans
from autoprec.verification.gate import open_session
from autoprec.verification.ladder import climb, gap_growth, rung_terms
from autoprec.verification.sequential import gap_interval
from autoprec.workload.functions import workload_from
from tests.models import mlp_workload
from tests.test_verification_gate import CPU, plan_of


def rung(steps: int, mean: float, stderr: float) -> HorizonGap:
    gap = gap_interval([mean, mean], Terms())
    return HorizonGap(
        warmup_steps=steps // 2, branch_steps=steps - steps // 2, gap=gap, stderr=stderr
    )


def test_a_growth_is_fitted_to_the_lengths_and_carried_on() -> None:
    rungs = [rung(steps, 1e-4 * steps**0.5, 1e-5 * steps**0.5) for steps in (75, 150, 300)]
    growth = gap_growth(rungs)
    assert growth is not None
    assert growth.mean == pytest.approx(0.5)
    # three points with errors of a tenth, a factor of 2 apart: 0.1 / (log 2 * sqrt 2)
    assert growth.stderr == pytest.approx(0.1 / math.log(2) / math.sqrt(2))


def test_gaps_within_their_noise_have_no_growth() -> None:
    rungs = [rung(75, 1e-4, 6e-5), rung(150, 3e-4, 1e-5)]
    assert gap_growth(rungs) is None
    assert gap_growth(rungs[1:]) is None


def test_a_longer_length_that_was_trained_is_told_with_what_is_expected_further_on() -> None:
    proof = Promise(warmup_steps=30, branch_steps=45, has_gap=True)
    expected = "what the gap is after more steps is not known; --run-steps N predicts it"
    assert proof.expectation == expected
    assert replace(proof, horizons=(rung(75, 1e-4, 1e-5),)).expectation == expected
    longer = replace(proof, horizons=(rung(75, 1e-4, 1e-5), rung(300, 2e-4, 1e-5)))
    seen = "over 300 steps the gap is 0.020 % +- 0.0010 % (measured)"
    assert longer.expectation == f"{seen}; {expected}"


def test_points_that_scatter_make_the_growth_unsure() -> None:
    straight = [rung(steps, 1e-4 * steps, 1e-6 * steps) for steps in (75, 150, 300)]
    bent = [straight[0], rung(150, 3e-2, 3e-4), straight[2]]
    sure, unsure = gap_growth(straight), gap_growth(bent)
    assert sure is not None
    assert unsure is not None
    assert unsure.stderr is not None
    assert sure.stderr is not None
    assert unsure.stderr > 5 * sure.stderr


def test_lengths_are_doubled_as_long_as_the_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("autoprec.verification.ladder.time.monotonic", lambda: clock[0])
    trained = []

    def gaps_of(own: Terms) -> Sequence[float]:
        trained.append((own.warmup_steps, own.branch_steps))
        clock[0] += 2.0 * (own.warmup_steps + own.branch_steps)
        return [1e-4, 2e-4]

    terms = Terms(budget_s=1200.0)
    assert [r.steps for r in climb(terms, gaps_of, spent_s=150.0)] == [150, 300]
    assert trained == [(100, 50), (200, 100)]  # 150 + 300 + 600 s; 1200 more would be too much
    assert not list(climb(Terms(budget_s=100.0), gaps_of, spent_s=150.0))
    assert not list(climb(Terms(), gaps_of, spent_s=0.0))


def test_a_plan_that_diverges_on_the_way_ends_the_ladder() -> None:
    found = list(climb(Terms(horizons=(80, 160, 320)), lambda own: None, spent_s=0.0))
    assert [r.gap for r in found] == [None]
    assert rung_terms(Terms(warmup_steps=0, branch_steps=10), 40).warmup_steps == 0


def test_a_proof_climbs_its_horizons_with_the_plan_that_stands() -> None:
    context = Context(mlp_workload(), CPU)
    spec = capture_model(context)
    plan = plan_of(spec, fp8_option(Recipe.TENSORWISE))
    terms = Terms(seeds_min=2, seeds_max=2, warmup_steps=4, branch_steps=4, horizons=(8, 16))
    found = verify_plans(context, [plan], loss_tolerance=0.9, spec=spec, terms=terms)
    assert [(r.warmup_steps, r.branch_steps) for r in found.horizons] == [(4, 4), (8, 8)]
    assert found.horizons[0].gap == found.gap
    (said,) = [
        x for x in summarise_run(RunRecords(verification=found)).promise.measured if "by" in x
    ]
    assert " over 8 steps, " in said
    assert " over 16 steps; " in said


def test_a_checkpoint_with_optimizer_state_has_horizons_without_a_warm_up(tmp_path: Path) -> None:
    context = Context(mlp_workload(), CPU)
    spec, model = capture_model(context), context.workload.build_model()
    start = tmp_path / "start.pt"
    optimizer = context.workload.build_optimizer(model)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, start)
    found = verify_plans(
        context,
        [plan_of(spec, fp8_option(Recipe.TENSORWISE))],
        loss_tolerance=0.9,
        spec=spec,
        checkpoint=start,
        terms=Terms(seeds_min=2, seeds_max=2, warmup_steps=4, branch_steps=4, horizons=(8,)),
    )
    assert [(r.warmup_steps, r.branch_steps) for r in found.horizons] == [(0, 4), (0, 8)]


class Shaken(nn.Module):
    """A model that draws from numpy and `random` in training, as layer drop in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = np.random.uniform() + random.random() if self.training else 1.0
        y: Tensor = self.last(x + scale * self.first(x).tanh())
        return y


@pytest.mark.parametrize(("rise", "trained"), [(0, 4), (2, 4), (40, 8)])
def test_a_warm_up_goes_on_from_a_shorter_one_where_it_is_the_same(rise: int, trained: int) -> None:
    """Bit for bit, of a model and a stream that draw from global generators."""
    steps = 0

    def train_batches(seed: int) -> Iterator[Tensor]:
        torch.manual_seed(seed)
        while True:
            yield torch.randn(4, 8)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal steps
        steps += model.training
        loss: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
        return loss

    def build_scheduler(optimizer: Optimizer) -> LambdaLR:
        rate = lambda step: min((step + 1) / (rise + 1), 1.0) * (step < 80)  # noqa: E731
        return LambdaLR(optimizer, rate)  # one without an end is looked ahead for a second

    functions = {"build_model": Shaken, "train_batches": train_batches, "loss_fn": loss_fn}
    context = Context(workload_from({**functions, "build_scheduler": build_scheduler}), CPU)
    session = partial(open_session, context, loss_tolerance=0.1)
    shorter = session(Terms(warmup_steps=4)).checkpoint
    straight = session(Terms(warmup_steps=8)).checkpoint
    random.seed(7)
    np.random.seed(7)
    steps = 0
    going_on = session(Terms(warmup_steps=8), earlier=shorter).checkpoint
    assert (going_on.curve, going_on.eval_losses) == (straight.curve, straight.eval_losses)
    assert steps == trained


def test_no_length_is_trained_for_a_plan_that_is_the_reference() -> None:
    context = Context(mlp_workload(), CPU)
    spec = capture_model(context)
    terms = Terms(seeds_min=2, seeds_max=2, warmup_steps=4, branch_steps=4, horizons=(8, 16))
    plan = plan_of(spec, FP32)
    found = verify_plans(context, [plan], loss_tolerance=0.9, spec=spec, terms=terms)
    assert found.horizons == ()


def test_horizons_and_a_budget_are_read_and_not_both() -> None:
    assert Settings.of(horizons="300, 75").terms.horizons == (75, 300)
    assert Settings.of(verify_budget="30m").terms.budget_s == 1800.0
    with pytest.raises(SettingsError, match="leave one of them out"):
        Settings.of(horizons="75", verify_budget="30m")
    for wrong in ("75,x", "3", "-75", "1e3"):
        with pytest.raises(SettingsError, match="--horizons must be whole numbers of steps"):
            Settings.of(horizons=wrong)
    with pytest.raises(SettingsError, match="--verify-budget must be a number with s, m or h"):
        Settings.of(verify_budget="soon")
