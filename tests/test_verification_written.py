"""The user's own training in 16-bit parameters without FP32 masters, beside the plan."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import BF16_O2, FP32, Branch, PredictedStep
from autoprec.report.tables import branch_table
from autoprec.verification import Terms, verify_plans
from autoprec.verification.branches import train_branch
from autoprec.verification.evidence import Evidence
from autoprec.verification.gate import gather_evidence, open_session
from autoprec.verification.session import WRITTEN, Session
from autoprec.workload.functions import Workload, workload_from
from tests.models import Mlp, mlp_workload
from tests.plans import plan_for
from tests.test_verification_gate import CPU, plan_of

Batch = tuple[Tensor, Tensor]
STEPS, LR = 6, 3e-4
TERMS = Terms(seeds_min=2, seeds_max=2, warmup_steps=4, branch_steps=STEPS)
BASE = mlp_workload()


def held_in_bf16() -> nn.Module:
    model = Mlp().bfloat16()
    model.norm.float()
    model.register_buffer("offset", torch.zeros(1, dtype=torch.bfloat16), persistent=False)
    return model


def mixed_loss(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):  # between the FP32 norm and the BF16 head
        return F.mse_loss(model(x.to(model.get_parameter("first.weight").dtype)).float(), y)


def workload(
    build_model: Callable[[], nn.Module] = held_in_bf16,
    loss_fn: Callable[[nn.Module, Batch], Tensor] = mixed_loss,
) -> Workload:
    return workload_from(
        {
            "build_model": build_model,
            "train_batches": BASE.train_batches,
            "loss_fn": loss_fn,
            "build_optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=LR),
        }
    )


def opened(given: Workload, folder: Path | None = None) -> Session:
    return open_session(Context(given, CPU), TERMS, loss_tolerance=0.5, state_dir=folder)


def test_it_trains_from_the_checkpoint_in_the_users_dtypes_states_and_autocast() -> None:
    seen = set[tuple[object, ...]]()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        first, norm = model.get_parameter("first.weight"), model.get_parameter("norm.weight")
        seen.add((first.dtype, model.get_buffer("offset").dtype, norm.dtype, model.training))
        return mixed_loss(model, batch)

    given = workload(loss_fn=loss_fn)
    session = opened(given)
    seen.clear()
    found = train_branch(session, WRITTEN, seed=1)
    # evaluated in FP32, as all branches are
    trained = (torch.bfloat16, torch.bfloat16, torch.float32, True)
    assert seen == {trained, (*[torch.float32] * 3, False)}
    # by hand
    model = given.written_model()
    model.load_state_dict(session.checkpoint.model)
    optimizer = given.build_optimizer(model)
    assert session.checkpoint.optimizer is not None
    optimizer.load_state_dict(session.checkpoint.optimizer)
    moments = [optimizer.state[p]["exp_avg"].dtype for p in model.parameters()]
    assert moments == [p.dtype for p in model.parameters()]
    stream = given.train_batches(1)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (STEPS - step) / STEPS
        optimizer.zero_grad()
        mixed_loss(model, next(stream)).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
    plain = given.build_model()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        losses = [float(given.loss_fn(plain.eval(), batch)) for batch in given.eval_batches()]
    assert found.eval_losses == tuple(losses)


def test_a_rate_whose_updates_bf16_loses_is_told_beside_a_plan_that_keeps_them() -> None:
    context = Context(workload(), CPU)
    plan = plan_of(spec := capture_model(context), BF16_O2)
    found = verify_plans(context, [plan], loss_tolerance=0.5, spec=spec, terms=TERMS)
    gap, own = found.written_gap, found.gap
    assert gap
    assert own
    assert gap.mean > 10 * abs(own.mean)
    assert [x.label for x in found.branches[:4]] == ["reference", "bf16_o2", "plan", "as_written"]
    # it has no part in what is said of the plan
    others = tuple(x for x in found.branches if x.label != "as_written")
    assert Evidence(plan, TERMS, 0.5, others).gap("plan") == own


def test_fp32_parameters_are_trained_once_and_a_plan_of_fp32_beside_bf16_ones_is_not_rushed() -> (
    None
):
    slower = PredictedStep(plan_ms=1.0, fp32_ms=1.0, bf16_o2_ms=22.0)
    for build_model, labels in (
        (Mlp, {"reference", "plan"}),
        (held_in_bf16, {"reference", "plan", "as_written"}),
    ):
        context = Context(workload(build_model), CPU)
        plan = plan_of(capture_model(context), FP32).model_copy(update={"predicted": slower})
        terms = replace(TERMS, seeds_min=3, seeds_max=3)
        session = open_session(context, terms, loss_tolerance=0.5)
        evidence = gather_evidence(session, plan)
        assert {branch.label for branch in evidence.branches} == labels
        assert len(evidence.of("plan")) == (2 if build_model is Mlp else 3)


def test_what_fails_as_written_fails_no_proof_and_is_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = list[int]()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        norm = model.get_parameter("norm.weight")
        if model.get_parameter("first.weight").dtype is not norm.dtype:  # as the user has it
            calls.append(1)
            raise RuntimeError("no kernel for BFloat16")
        return mixed_loss(model, batch)

    context = Context(workload(loss_fn=loss_fn), CPU)
    plan = plan_of(spec := capture_model(context), FP32)
    for _ in range(2):
        found = verify_plans(
            context, [plan], loss_tolerance=0.5, spec=spec, terms=TERMS, state_dir=tmp_path
        )
        assert len(calls) == 1
    assert found.written_gap is None
    assert "what is trained now is not measured: it fails (" in caplog.text
    assert [row[2] for row in branch_table(found).rows if row[1] == "as_written"] == ["failed"]


def evidence_of(*gaps: float, diverged: bool = False) -> Evidence:
    """Return the evidence of a plan without a gap beside a training with these."""
    branches = [
        Branch(
            label=label,
            seed=seed,
            eval_loss=None if math.isinf(gap) else 1.0 + gap,
            diverged_at=3 if math.isinf(gap) and diverged else None,
            curve=(1.0,),
        )
        for seed, written in enumerate(gaps, start=1)
        for label, gap in (("reference", 0.0), ("plan", 0.0), ("as_written", written))
    ]
    return Evidence(plan_for(Mlp(), BF16_O2), Terms(), 0.01, tuple(branches))


def test_it_is_trained_until_it_is_known_whether_it_is_within_the_tolerance() -> None:
    assert evidence_of().asks_for_written
    assert evidence_of(0.05, 0.051).asks_for_written
    assert not evidence_of(0.05, 0.051, 0.049).asks_for_written  # it is above
    assert not evidence_of(0.0, 1e-5, -1e-5).asks_for_written  # it is within
    assert evidence_of(0.008, 0.0082, 0.0084).asks_for_written  # more seeds may tell
    assert not evidence_of(0.05, -0.03, 0.01).asks_for_written  # all seeds could not
    assert not evidence_of(math.inf, diverged=True).asks_for_written
    assert not evidence_of(math.inf).asks_for_written  # it failed
