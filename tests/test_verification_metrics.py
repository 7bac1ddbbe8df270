"""The user's metrics beside the loss: checked before any work, tested by the same branches."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autoprec.cli.main import main
from autoprec.errors import SettingsError, WorkloadError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import BF16_O2, Branch, MetricTolerance, Verdict, Verification
from autoprec.report import RunRecords, summary_object
from autoprec.report.summary import summarise_run
from autoprec.tuning.parsing import parse_metric
from autoprec.tuning.settings import Settings
from autoprec.verification import Terms
from autoprec.verification.evidence import Evidence, advice, metric_gaps
from autoprec.verification.gate import gather_evidence, open_session
from autoprec.verification.metrics import check_metrics, metrics_of
from autoprec.workload.functions import Workload
from tests.models import Mlp, mlp_workload
from tests.plans import plan_for
from tests.test_verification_gate import CPU, changed, plan_of

TINY = Path(__file__).parent / "workloads" / "tiny.py"
TERMS = Terms(seeds_min=2, seeds_max=2, warmup_steps=2, branch_steps=4)
ACCURACY = MetricTolerance(name="accuracy", at_least=-0.5)


def measured_by(evaluate: Any) -> Workload:  # Any: whatever a user might define
    return changed(mlp_workload(), evaluate=evaluate)


def evidence_of(*gaps: float, tolerance: MetricTolerance | None = ACCURACY) -> Evidence:
    """Return the evidence of a plan without a loss gap, whose metric differs by these gaps."""
    branches = [
        Branch(
            label=label,
            seed=seed,
            eval_loss=1.0,
            diverged_at=None,
            curve=(1.0,),
            metrics={"accuracy": 90.0 + seed + more},
        )
        for seed, gap in enumerate(gaps, start=1)
        for label, more in (("reference", 0.0), ("plan", gap))
    ]
    known = (tolerance,) if tolerance else ()
    return Evidence(plan_for(Mlp(), BF16_O2), Terms(), 0.01, tuple(branches), known)


def test_the_verdict_is_the_worst_of_the_loss_and_the_metrics() -> None:
    assert evidence_of(0.0, 0.01, -0.01).verdict is Verdict.VERIFIED
    fallen = evidence_of(-2.0, -2.01, -1.99)
    assert fallen.verdict is Verdict.REFUTED
    (found,) = metric_gaps(fallen)
    assert found.gap is not None
    assert found.gap.mean == pytest.approx(-2.0)
    assert found.gap.low < -2.0 < found.gap.high < -0.5
    assert found.reference == pytest.approx(92.0)
    assert evidence_of(-0.5, -0.51, -0.49).verdict is Verdict.INCONCLUSIVE
    # more accuracy is not worse, but it is where nothing says which way is
    assert evidence_of(2.0, 2.01, 1.99).verdict is Verdict.VERIFIED
    both = MetricTolerance(name="accuracy", at_least=-0.5, at_most=0.5)
    assert evidence_of(2.0, 2.01, 1.99, tolerance=both).verdict is Verdict.REFUTED
    # without a tolerance it is shown and decides nothing
    shown = evidence_of(-2.0, -2.01, -1.99, tolerance=None)
    assert shown.verdict is Verdict.VERIFIED
    assert [metric.verdict for metric in metric_gaps(shown)] == [Verdict.NOT_RUN]


def test_a_metric_that_is_not_finite_is_no_training_that_diverged() -> None:
    def evaluate(model: nn.Module) -> float:
        return math.nan if next(calls) else 1.0

    calls = iter(range(9))  # the reference's is the first
    context = Context(measured_by(evaluate), CPU)
    session = open_session(context, TERMS, loss_tolerance=0.9)
    spec = capture_model(context)
    evidence = gather_evidence(session, plan_of(spec, BF16_O2))
    assert evidence.verdict is Verdict.REFUTED
    assert advice(evidence) == (
        "its held-out loss or a metric is not finite after the branch of seed 1"
    )


def test_a_metric_too_noisy_for_its_tolerance_is_told_after_the_first_seeds() -> None:
    evidence = evidence_of(0.0, 9.0, -8.0)
    assert evidence.unresolved is not None
    assert evidence.unresolved.name == "accuracy"
    # no option to paste: its name and side are the user's
    assert re.search(r"or a --metric-tolerance of \d\S*$", advice(evidence))


def test_branches_measure_the_users_metrics_in_eval_mode_with_the_same_draws() -> None:
    seen = []

    def evaluate(model: nn.Module) -> dict[str, object]:
        seen.append((model.training, torch.is_grad_enabled(), next(model.parameters()).dtype))
        draws = (random.random(), np.random.random(), torch.rand(()).item())
        norm = sum(p.square().sum() for p in model.parameters())
        return {"norm": norm, "draws": sum(draws), "share": np.float32(0.5)}

    workload = measured_by(evaluate)
    context = Context(workload, CPU)
    spec = capture_model(context)
    tolerances = (MetricTolerance(name="norm", at_most=100.0),)
    session = open_session(context, TERMS, loss_tolerance=0.9, metrics=tolerances, spec=spec)
    evidence = gather_evidence(session, plan_of(spec, BF16_O2))
    assert set(seen) == {(False, False, torch.float32)}
    norm, draws, share = metric_gaps(evidence)
    assert draws.gap is not None
    assert (draws.gap.low, draws.gap.high) == (0.0, 0.0)
    assert share.reference == 0.5
    assert norm.gap is not None
    assert norm.gap.mean != 0.0
    assert norm.verdict is Verdict.VERIFIED
    # and what the plan's own forward gives
    plans = evidence.of("plan")
    assert all(branch.own_loss != branch.eval_loss for branch in plans)
    assert [b.own_loss for b in plans] == pytest.approx([b.eval_loss for b in plans], rel=0.05)


@pytest.mark.parametrize(
    ("evaluate", "rule"),
    [
        (lambda model: "good", "evaluate\\(model\\) must return numbers, but 'metric' is 'good'"),
        (lambda model: {"accuracy": None}, "must return numbers, but 'accuracy' is None"),
        (lambda model: {"accuracy": True}, "must return numbers, but 'accuracy' is True"),
        (lambda model: {"accuracy": torch.ones(2)}, "must return numbers, but 'accuracy' is"),
        (lambda model: 10**400, r"evaluate\(model\) must give numbers that a float can hold"),
        (lambda model: {}, "must return a number, or numbers by name"),
        (lambda model: {1: 2.0}, "must return a number, or numbers by name"),
        (lambda model: {"accuracy": math.nan}, "finite numbers in FP32, but 'accuracy' is nan"),
        (lambda model: {"f1": 0.5}, r"what evaluate\(model\) returns \(f1\), but 'accuracy' is"),
        (lambda model: 1 / 0, r"evaluate\(model\) must give .* raised ZeroDivisionError"),
        (None, "--metric-tolerance accuracy needs evaluate"),
    ],
)
def test_what_is_wrong_with_a_metric_is_one_line_before_any_training(
    evaluate: Any, rule: str
) -> None:
    with pytest.raises(WorkloadError, match=rule) as caught:
        check_metrics(Context(measured_by(evaluate), CPU), [ACCURACY])
    assert "\n" not in str(caught.value)


def test_the_command_line_says_it_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", str(TINY), "--out", str(tmp_path), "--metric-tolerance", "accuracy>=-0.2"]
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    assert "--metric-tolerance accuracy needs evaluate(model)" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_a_single_number_has_a_name() -> None:
    workload = measured_by(lambda model: torch.tensor([3.5]))
    assert metrics_of(workload, nn.Linear(1, 1)) == {"metric": 3.5}
    assert metrics_of(mlp_workload(), nn.Linear(1, 1)) == {}


@pytest.mark.parametrize(
    "text",
    ["accuracy", "accuracy>=90", "accuracy>=0", "loss<=-1", "fid=-0.1", "=0.2", "a<0.2", "a=nan"],
)
def test_tolerances_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--metric-tolerance must be the difference"):
        Settings.of(metric_tolerance=[text])


def test_a_tolerance_says_which_way_is_worse() -> None:
    assert parse_metric("top-1 acc >= -2e-1") == MetricTolerance(name="top-1 acc", at_least=-0.2)
    assert parse_metric("ppl<=.1") == MetricTolerance(name="ppl", at_most=0.1)
    assert parse_metric("fid=1") == MetricTolerance(name="fid", at_least=-1.0, at_most=1.0)
    with pytest.raises(SettingsError, match="name a metric once"):
        Settings.of(metric_tolerance=["fid=1", "fid<=1"])


def shown(evidence: Evidence) -> RunRecords:
    proof = Verification(
        plan=evidence.plan.digest,
        verdict=evidence.verdict,
        loss_tolerance=0.01,
        gap=evidence.gap("plan"),
        control_gap=None,
        seed_spread=None,
        predicted_gap=None,
        warmup_steps=50,
        branch_steps=25,
        branches=evidence.branches,
        steps=(),
        metrics=tuple(metric_gaps(evidence)),
    )
    return RunRecords(plan=evidence.plan, verification=proof)


def test_every_metric_is_shown_with_its_tolerance_and_verdict() -> None:
    run = shown(evidence_of(-2.0, -2.01, -1.99))
    promise = summarise_run(run).promise
    assert promise.headline == "but its loss gap and accuracy are refuted over 75 steps"
    assert "accuracy is refuted" in promise.sentence
    (said,) = promise.measured
    assert said.startswith("accuracy is 92 in FP32, -2 with the plan (interval -2.")
    assert said.endswith("; allowed -0.5: refuted")
    (found,) = summary_object(run, "out")["metrics"]
    assert found["verdict"] == "refuted"
    untested = summarise_run(shown(evidence_of(0.0, 0.0, 0.0, tolerance=None))).promise
    assert untested.measured[0].endswith("; not tested")
    assert untested.headline == "its loss gap is verified over 75 steps"
