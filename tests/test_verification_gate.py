"""Branch and anneal on toy models: verdicts, resuming, checkpoints, bad input, the error rate."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprec.errors import RecordError, WorkloadError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.profiler.layers import predicted_timing
from autoprec.records import (
    BF16_O2,
    FP32,
    Assignment,
    Basis,
    Branch,
    Constraint,
    Fingerprint,
    ModelSpec,
    Option,
    Plan,
    PredictedStep,
    Recipe,
    StepTiming,
    Verdict,
    Verification,
    fp8_option,
)
from autoprec.report.step_times import _speedup
from autoprec.sensitivity.gap import expected_gap, gap_per_error
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from autoprec.verification import Terms, verify_plans
from autoprec.verification.branches import evaluate, train_branch, train_seed
from autoprec.verification.evidence import Evidence, advice, expected_gap_of, predicted_gap
from autoprec.verification.gate import gather_evidence, keep_warm_up, open_session
from autoprec.verification.sequential import gap_interval, verdict_of
from autoprec.verification.session import REFERENCE, BranchStore, Session
from autoprec.workload.functions import Workload, workload_from
from tests.models import Mlp, mlp_workload, token_workload
from tests.plans import plan_for
from tests.search_tables import profile_of

CPU = torch.device("cpu")
TENSORWISE = fp8_option(Recipe.TENSORWISE)
STEPS = 8


@pytest.fixture(autouse=True)
def few_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprec.verification.gate.TIMING_SAMPLES", 1)


def changed(workload: Workload, **functions: object) -> Workload:
    names = ("build_model", "train_batches", "loss_fn", "build_optimizer", "eval_batches")
    own = {name: getattr(workload, name) for name in names}
    return workload_from(SimpleNamespace(**{**own, **functions}), name="changed")


def plan_of(spec: ModelSpec, option: Option) -> Plan:
    chosen = [option if option in layer.options else BF16_O2 for layer in spec.layers]
    layers = tuple(
        Assignment.of(layer, own) for layer, own in zip(spec.layers, chosen, strict=True)
    )
    return Plan(
        layers=layers,
        uncovered=tuple(parameter.name for parameter in spec.uncovered),
        constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=None, keep=()),
        fingerprint=Fingerprint(
            structure=spec.structure,
            device="cpu",
            capability="",
            software={},
            compile_mode="",
            tokens_per_step=0,
        ),
        grad_error=None,
        grad_error_basis=Basis.UNKNOWN,
        predicted=None,
    )


TERMS = Terms(seeds_min=2, seeds_max=3, warmup_steps=STEPS, branch_steps=STEPS)


def opened(
    workload: Workload,
    spec: ModelSpec,
    *,
    folder: Path | None = None,
    checkpoint: Path | None = None,
    terms: Terms = TERMS,
) -> Session:
    return open_session(
        Context(workload, CPU),
        terms,
        loss_tolerance=0.05,
        spec=spec,
        state_dir=folder,
        checkpoint=checkpoint,
    )


def verified(
    workload: Workload, *options: Option, tolerance: float = 0.05, terms: Terms = TERMS
) -> Verification:
    context = Context(workload, CPU)
    spec = capture_model(context)
    plans = [plan_of(spec, option) for option in options]
    return verify_plans(context, plans, loss_tolerance=tolerance, terms=terms)


def test_a_precise_plan_is_verified_with_its_control_and_its_times() -> None:
    found = verified(mlp_workload(), TENSORWISE, tolerance=0.5)
    assert found.verdict is Verdict.VERIFIED
    assert found.gap is not None
    assert found.control_gap is not None
    assert found.gap.low <= found.gap.mean <= found.gap.high <= 0.5
    assert {branch.label for branch in found.branches} == {"reference", "bf16_o2", "plan"}
    assert found.bf16_gap is not None
    assert found.bf16_gap.mean == pytest.approx(
        found.gap.mean - found.control_gap.mean, abs=1e-2 * abs(found.gap.mean)
    )
    assert found.loss_exponent is not None
    assert found.loss_exponent > 0.0
    assert found.floor == 0.0
    assert found.seed_spread is not None
    assert {step.label for step in found.steps} == {"fp32", "bf16_o2", "autocast_bf16", "plan"}


def test_a_plan_of_fp32_is_the_reference_itself_and_moves_no_random_state() -> None:
    before = torch.get_rng_state()
    found = verified(mlp_workload(), FP32, tolerance=1e-9)
    assert found.verdict is Verdict.VERIFIED
    assert found.gap is not None
    assert (found.gap.low, found.gap.mean, found.gap.high) == (0.0, 0.0, 0.0)
    assert any("FP32 reference" in note for note in found.notes)
    assert torch.equal(torch.get_rng_state(), before)


def test_where_bf16_is_slower_it_is_neither_trained_nor_timed_beside_a_plan_of_fp32() -> None:
    context = Context(mlp_workload(), CPU)
    spec = capture_model(context)
    slower = PredictedStep(plan_ms=1.0, fp32_ms=1.0, bf16_o2_ms=22.0)
    steps = tuple(
        StepTiming(label=label, timing=predicted_timing(ms), peak_bytes=None)
        for label, ms in {"fp32": 1.0, "bf16_o2": 22.0, "fp8_o1": 3.0}.items()
    )
    found = verify_plans(
        context,
        [plan_of(spec, FP32).model_copy(update={"predicted": slower})],
        loss_tolerance=0.05,
        profile=profile_of(spec, {}).model_copy(update={"steps": steps}),
        terms=replace(TERMS, seeds_min=3),
    )
    assert found.verdict is Verdict.VERIFIED
    assert len(found.branches) == 2 * 2  # seeds
    assert {branch.label for branch in found.branches} == {"reference", "plan"}
    assert found.control_gap is None
    plan = steps[0].model_copy(update={"label": "plan"})
    assert found.steps == (*steps[:2], plan)


def test_a_uniform_plan_takes_what_its_baseline_takes() -> None:
    steps = {step.label: step for step in verified(mlp_workload(), BF16_O2, tolerance=0.5).steps}
    assert steps["plan"].timing == steps["bf16_o2"].timing != steps["fp32"].timing
    same = _speedup(steps["bf16_o2"], steps["plan"], shared_ms=0.0)
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)


def overflowing(workload: Workload) -> Workload:
    """Return the workload with a loss that is infinite in 16-bit only."""

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        weight = model.get_parameter("first.weight")
        loss = F.mse_loss(model(batch[0]), batch[1])
        return loss * math.inf if weight.dtype is torch.bfloat16 else loss

    return changed(workload, loss_fn=loss_fn)


def test_a_branch_that_diverges_refutes_at_once_with_its_step() -> None:
    found = verified(overflowing(mlp_workload()), TENSORWISE)
    assert found.verdict is Verdict.REFUTED
    assert "diverged at step 0 of the branch of seed 1: its gradients are not fin" in found.advice
    assert found.branches[-1].not_finite == ("head", "norm", "second", "first")
    assert {branch.seed for branch in found.branches} == {1}
    assert found.gap is None


def test_a_negative_loss_has_not_diverged() -> None:
    plain = mlp_workload()  # its loss is 28 to 40
    moved = changed(plain, loss_fn=lambda model, batch: plain.loss_fn(model, batch) - 90.0)
    found = verified(moved, BF16_O2, tolerance=0.5)
    assert found.branches[0].curve[-1] < 0.0
    assert [branch.diverged_at for branch in found.branches if branch.diverged_at is not None] == []
    assert found.verdict is Verdict.VERIFIED


def test_a_loss_of_data_known_by_heart_may_grow_many_times() -> None:
    plain = mlp_workload()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss, is_plan = (
            plain.loss_fn(model, batch),
            model.get_parameter("first.weight").dtype is torch.bfloat16,
        )
        return loss * (1e-3 if is_plan else 1e-5) if model.training else loss

    found = verified(changed(plain, loss_fn=loss_fn), BF16_O2, tolerance=0.5)
    assert found.verdict is Verdict.VERIFIED


@pytest.mark.parametrize(("rate", "is_idle"), [(1e-6, True), (1e-2, False)])
def test_a_proof_whose_training_hardly_learns_says_so(rate: float, is_idle: bool) -> None:
    plain = mlp_workload()
    workload = changed(plain, build_optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=rate))
    found = verified(workload, BF16_O2, tolerance=1e-2)
    assert found.verdict is Verdict.VERIFIED
    assert ("one that learned nothing, as these branches lower the" in found.advice) is is_idle
    assert verified(workload, FP32).advice == ""


def test_a_loss_is_small_only_beside_what_training_starts_from() -> None:
    plain = mlp_workload()
    tiny = changed(plain, loss_fn=lambda model, batch: plain.loss_fn(model, batch) * 1e-12)
    assert verified(tiny, BF16_O2, tolerance=0.5).verdict is Verdict.VERIFIED

    def memorised(model: nn.Module, batch: object) -> Tensor:
        return plain.loss_fn(model, batch) * (1.0 if model.training else 1e-9)

    with pytest.raises(WorkloadError, match="away from zero, but the reference's is"):
        verified(changed(plain, loss_fn=memorised), BF16_O2)


def test_a_loss_that_only_training_mode_gives_is_evaluated_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = mlp_workload()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        output = {"loss": plain.loss_fn(model, batch)} if model.training else {}
        return output["loss"]

    detector = changed(plain, loss_fn=loss_fn)
    assert verified(detector, BF16_O2, tolerance=0.5).verdict is Verdict.VERIFIED
    assert "plans are evaluated in training mode" in caplog.text


@pytest.mark.parametrize(("count", "is_single"), [(1, True), (2, False)])
def test_a_single_evaluation_batch_is_noted_and_only_that(count: int, is_single: bool) -> None:
    workload = overflowing(mlp_workload())
    batches = workload.eval_batches()[:count]
    found = verified(changed(workload, eval_batches=lambda: batches), TENSORWISE)
    assert found.branches[-1].diverged_at == 0
    assert any("single evaluation batch" in note for note in found.notes) is is_single


def test_a_refuted_plan_gives_way_to_the_next() -> None:
    workload = overflowing(mlp_workload())
    spec = capture_model(Context(workload, CPU))
    found = verified(workload, TENSORWISE, FP32)
    assert found.plan == plan_of(spec, FP32).digest
    assert found.verdict is Verdict.VERIFIED
    assert len(found.refuted_plans) == 1


def test_evaluation_is_fp32_of_the_master_weights() -> None:
    """A branch of steps too small for BF16 must still move the evaluation loss."""

    def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-5)

    workload = changed(mlp_workload(), build_optimizer=build_optimizer)
    spec = capture_model(Context(workload, CPU))
    session = opened(workload, spec)
    _, _, variant = session.variants(plan_of(spec, BF16_O2))
    reference, plan = train_seed(session, [variant], 1)
    start = sum(session.checkpoint.eval_losses)
    moved = sum(reference.eval_losses) - start
    assert moved < 0.0
    assert sum(plan.eval_losses) - start == pytest.approx(moved, rel=0.05)


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole() -> Evidence:
    """Return the evidence of a plan that nothing interrupted."""
    plain = mlp_workload()
    spec = capture_model(Context(plain, CPU))
    return gather_evidence(opened(plain, spec), plan_of(spec, TENSORWISE))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "branches").touch()
    with pytest.raises(RecordError, match=r"must be writable, but \S+branches is not"):
        BranchStore("setup", tmp_path / "branches")


@pytest.mark.parametrize("kill_at", [1, 2 * STEPS + 1, 5 * STEPS])
def test_a_kill_costs_at_most_the_branch_in_flight(
    tmp_path: Path, whole: Evidence, kill_at: int
) -> None:
    plain = mlp_workload()
    spec = capture_model(Context(plain, CPU))
    plan = plan_of(spec, TENSORWISE)
    steps = 0

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal steps
        if torch.is_grad_enabled():
            steps += 1
            if steps == kill_at:
                raise Killed
        return plain.loss_fn(model, batch)

    workload = changed(plain, loss_fn=loss_fn)
    with pytest.raises(Killed):
        gather_evidence(opened(workload, spec, folder=tmp_path), plan)
    resumed = gather_evidence(opened(workload, spec, folder=tmp_path), plan)
    assert resumed.branches == whole.branches
    count = STEPS * (1 + len(whole.branches)) + 2  # and two steps for the floor
    assert steps - count <= STEPS + 2


def test_saved_branches_of_another_setup_are_not_picked_up(tmp_path: Path) -> None:
    workload = mlp_workload()
    spec = capture_model(Context(workload, CPU))
    plan = plan_of(spec, TENSORWISE)
    one = gather_evidence(opened(workload, spec, folder=tmp_path), plan)
    asked = replace(TERMS, branch_steps=STEPS + 1)
    other = gather_evidence(opened(workload, spec, folder=tmp_path, terms=asked), plan)
    assert len(other.branches[0].curve) == STEPS + 1
    assert one.branches != other.branches


def test_a_changed_workload_is_told_from_the_saved_one(tmp_path: Path) -> None:
    plain = mlp_workload()
    spec = capture_model(Context(plain, CPU))
    opened(changed(plain), spec, folder=tmp_path)
    shifted = changed(plain, loss_fn=lambda model, batch: plain.loss_fn(model, batch) * 2)
    with pytest.raises(RecordError, match="evaluates to another loss now"):
        opened(shifted, spec, folder=tmp_path)


def test_branches_start_from_the_users_checkpoint(tmp_path: Path) -> None:
    workload = mlp_workload()
    spec = capture_model(Context(workload, CPU))
    model = workload.build_model(seed=9)
    optimizer = workload.build_optimizer(model)
    workload.loss_fn(model, next(workload.train_batches(3))).backward()  # type: ignore[no-untyped-call]  # torch's own
    optimizer.step()
    path = tmp_path / "whole.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    session = opened(workload, spec, checkpoint=path)
    assert session.checkpoint.curve == ()
    own = evaluate(session.context, model, session.evaluation)
    assert session.checkpoint.eval_losses == own
    torch.save(model.state_dict(), path)
    assert len(opened(workload, spec, checkpoint=path).checkpoint.curve) == STEPS
    path.write_bytes(b"broken")
    with pytest.raises(RecordError, match="weights_only=True"):
        opened(workload, spec, checkpoint=path)


def test_the_predicted_gap_is_of_the_branch_and_the_expected_one_of_the_planned_run() -> None:
    workload = mlp_workload()
    spec = capture_model(Context(workload, CPU))
    reference = prepare_reference(Context(workload, CPU), spec, warmup_steps=4)
    sensitivity = measure_sensitivity(reference)
    session = opened(workload, spec)
    plan = plan_of(spec, BF16_O2).model_copy(update={"grad_error": 0.01})
    expected = 0.01 * gap_per_error(2 * STEPS) / 4  # the branch is a half
    assert predicted_gap(session, plan, sensitivity) == pytest.approx(expected)
    assert predicted_gap(session, plan_of(spec, BF16_O2), sensitivity) is None
    # of the planned run, if its length is known
    assert expected_gap_of(plan, sensitivity) is None
    told = expected_gap(sensitivity, 0.01, 2000)
    planned = plan.model_copy(update={"expected_gap": told})
    found = expected_gap_of(planned, sensitivity)
    assert found is not None
    assert found.steps == 2000
    assert found.mean == pytest.approx(0.01 * gap_per_error(2000))


def test_dropout_masks_are_paired() -> None:
    workload = token_workload(dropout=0.5)
    found = verified(workload, BF16_O2, tolerance=0.5)
    assert found.floor == 0.0
    assert found.gap is not None
    assert abs(found.gap.mean) < 0.01
    assert any("one branch serves as plan and control" in note for note in found.notes)
    assert found.bf16_gap is not None
    assert (found.bf16_gap.low, found.bf16_gap.high) == (0.0, 0.0)


def noisy(workload: Workload, noise: torch.Generator, scale: float = 1e-3) -> Workload:
    """Return the workload with rounding noise that no seed controls, in training only."""

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if not torch.is_grad_enabled():
            return workload.loss_fn(model, batch)
        x = batch[0] * (1.0 + scale * torch.randn(batch[0].shape, generator=noise))
        return workload.loss_fn(model, (x, batch[1]))

    return changed(workload, loss_fn=loss_fn)


def test_training_that_is_not_deterministic_has_a_floor() -> None:
    workload = noisy(mlp_workload(), torch.Generator().manual_seed(0))
    found = verified(workload, BF16_O2, tolerance=0.5)
    assert found.floor is not None
    assert found.floor > 0.0
    assert any("not deterministic" in note for note in found.notes)


@pytest.mark.slow
def test_the_reference_against_itself_is_refuted_in_at_most_one_of_ten() -> None:
    """10 sequential tests of trained branches that differ by rounding noise, tolerance zero."""
    workload = noisy(mlp_workload(), torch.Generator().manual_seed(1))
    terms = Terms(seeds_max=4, warmup_steps=2, branch_steps=2)
    session = opened(workload, capture_model(Context(workload, CPU)), terms=terms)
    session.evaluation = session.evaluation[:2]
    refuted = 0
    for repeat in range(10):
        gaps: list[float] = []
        for seed in range(terms.seeds_max):
            losses = [
                train_branch(session, REFERENCE, seed=1000 * repeat + seed).eval_loss
                for _ in range(2)
            ]
            assert losses[0] is not None
            assert losses[1] is not None
            gaps.append((losses[1] - losses[0]) / losses[0])
            if len(gaps) >= terms.seeds_min:
                verdict = verdict_of(gap_interval(gaps, terms), 0.0)
                if verdict is not Verdict.INCONCLUSIVE:
                    refuted += verdict is Verdict.REFUTED
                    break
    assert refuted <= 1


def evidence_of(*gaps: float) -> Evidence:
    """Return the evidence of a plan whose seeds have these gaps to a reference loss of 1."""
    plan = plan_for(Mlp(), BF16_O2)
    branches = [
        Branch(
            label=label, seed=seed, eval_loss=loss, diverged_at=None, curve=(1.0,), eval_losses=()
        )
        for seed, gap in enumerate(gaps, start=1)
        for label, loss in (("reference", 1.0), ("plan", 1.0 + gap))
    ]
    return Evidence(plan, Terms(), 0.01, tuple(branches))


def test_a_spread_too_large_to_decide_says_what_it_would_take() -> None:
    unsure = evidence_of(0.0, 0.002, -0.001)
    assert unsure.verdict is Verdict.INCONCLUSIVE
    assert re.search(r"^about \d+ seeds would decide", advice(unsure))
    on_the_tolerance = evidence_of(0.009, 0.01, 0.011)
    assert on_the_tolerance.verdict is Verdict.INCONCLUSIVE
    assert "sits on the tolerance" in advice(on_the_tolerance)
    assert advice(evidence_of(0.0, 0.0001, -0.0001)) == ""


def test_a_tolerance_that_no_seed_count_resolves_ends_the_proof_after_the_first_seeds() -> None:
    noise = torch.Generator().manual_seed(2)
    terms = Terms(warmup_steps=2, branch_steps=4)
    found = verified(noisy(mlp_workload(), noise, scale=0.3), BF16_O2, tolerance=1e-5, terms=terms)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert len({branch.seed for branch in found.branches}) == terms.seeds_min
    assert re.fullmatch(
        r"it stopped after 3 seeds, since 10 could not decide: gaps differ by \S+ % from seed to "
        r"seed, which resolves \S+ % at best; the way out is --branch-steps 8 or longer, more "
        r"evaluation batches, or --loss-tolerance \S+%",
        found.advice,
    )


def nan_from(step: int) -> Workload:
    plain = mlp_workload()

    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (x, y) in enumerate(plain.train_batches(seed)):
            yield (x * math.nan if seed > 0 and index >= step else x), y

    return changed(plain, train_batches=train_batches)


def test_a_reference_that_does_not_train_is_one_clear_line() -> None:
    with pytest.raises(WorkloadError, match="at step 3 of the branch of seed 1") as caught:
        verified(nan_from(3), BF16_O2)
    assert "\n" not in str(caught.value)


def test_a_constant_loss_is_refused() -> None:
    workload = changed(
        mlp_workload(), loss_fn=lambda model, batch: model(batch[0]).mean() * 0.0 + 1.0
    )
    with pytest.raises(WorkloadError, match="training must move the evaluation loss"):
        verified(workload, BF16_O2)


def test_sensitivitys_reference_is_the_start_of_the_proof_bit_for_bit(tmp_path: Path) -> None:
    """With dropout, whose draws are the steps' own; errors measured on the way change nothing."""
    context, terms = Context(token_workload(dropout=0.1), CPU), Terms(warmup_steps=14)
    keep = partial(keep_warm_up, context, terms, tmp_path)
    prepare_reference(context, capture_model(context), warmup_steps=14, on_warm=keep)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    kept, own = (
        open_session(context, terms, loss_tolerance=0.01, state_dir=folder).checkpoint
        for folder in (tmp_path, None)
    )
    assert [file.stat().st_mtime_ns] == [written]
    assert (kept.curve, kept.eval_losses) == (own.curve, own.eval_losses)
    for one, other in ((kept.model, own.model), (kept.optimizer, own.optimizer)):
        pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
