"""Layers in which FP8 really hurts, of six kinds, through the whole product but the timing."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.common.progress import NOW
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import (
    BF16_O2,
    Assignment,
    Basis,
    Constraint,
    FrontPoint,
    ModelSpec,
    Operand,
    Plan,
    Recipe,
    Search,
    Sensitivity,
    Verdict,
    Verification,
    fp8_option,
)
from autoprec.search import build_plan, search_plan
from autoprec.sensitivity.causes import explain_statistics
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from autoprec.sensitivity.repairs import with_shares
from autoprec.sensitivity.tables import Method
from autoprec.verification import verify_plans
from autoprec.workload.functions import Workload, workload_from
from tests.planted import Planted, plant, times_of
from tests.search_tables import profile_of

CPU = torch.device("cpu")
WIDTH, BATCH = 64, 64
FAULT = "layers.1.layer"
TOLERANCE = 0.01
BUDGET = 0.05  # healthy layers in FP8 have 0.02 together


class Mlp(nn.Module):
    """Four linears in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        out: Tensor = self.head(x)
        return out


def faulty_workload(kind: str, strength: int, shift: float = 0.0) -> Workload:
    """Return a workload that learns what a fixed random network computes.

    `shift` is the mean that the faulty layer's input has anyway.
    """
    generator = torch.Generator().manual_seed(99)
    inner, outer = (torch.randn(WIDTH, n, generator=generator) / 8 for n in (WIDTH, 16))

    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        drawn = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(BATCH, WIDTH, generator=drawn)
            noise = 0.1 * torch.randn(BATCH, 16, generator=drawn)
            yield x, torch.tanh(2 * x @ inner) @ outer + noise

    def build_model() -> Mlp:
        model = Mlp()
        torch.nn.init.constant_(model.layers.get_submodule("0").get_parameter("bias"), shift)
        return model

    functions = {
        "build_model": build_model,
        "train_batches": train_batches,
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        "build_optimizer": lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
    }
    planted = plant(SimpleNamespace(**functions), "layers.1", kind, strength)
    return workload_from(planted, name="faulty")


class Run:
    """The records of one planted fault."""

    def __init__(self, kind: str, strength: int, shift: float = 0.0) -> None:
        self.workload = faulty_workload(kind, strength, shift)
        self.spec: ModelSpec = capture_model(Context(self.workload, CPU))
        reference = prepare_reference(Context(self.workload, CPU), self.spec)
        self.sensitivity: Sensitivity = measure_sensitivity(reference)
        rows = {layer.name: times_of(layer) for layer in self.spec.layers}
        self.profile = profile_of(self.spec, rows, basis=Basis.PREDICTED)
        self.constraint = Constraint(loss_tolerance=TOLERANCE, grad_error_budget=BUDGET)
        meter = JointMeter(reference, islands=self.sensitivity.islands)
        self.search: Search = search_plan(
            self.profile,
            self.sensitivity,
            constraint=self.constraint,
            evaluate=meter.measure,
            trials=2,
        )

    @property
    def fault(self) -> Assignment:
        layers = self.plan(self.search.chosen).layers
        return next(layer for layer in layers if layer.name == FAULT)

    def plan(self, point: FrontPoint) -> Plan:
        return build_plan(
            self.profile, self.sensitivity, self.search, point, constraint=self.constraint
        )

    def verify(self, plan: Plan, folder: Path) -> Verification:
        context = Context(self.workload, CPU)
        return verify_plans(context, [plan], loss_tolerance=TOLERANCE, state_dir=folder)


@cache
def run_of(kind: str, strength: int) -> Run:
    return Run(kind, strength)


@pytest.mark.parametrize(
    ("kind", "strength", "cause"),
    [
        ("rows", 20, r"weight: \d\d % underflow under tensorwise"),
        ("rows", 20, r"weight: outlier channels 0, 1"),
        pytest.param("gradient", 44, r"grad_output: \d\d % underflow", marks=pytest.mark.slow),
        ("channel", 20, r"input: outlier channel 3"),
        ("offset", 16, r"input: mean"),
        pytest.param("sink", 20, r"input: outlier tokens \(3.1 %\)", marks=pytest.mark.slow),
    ],
)
def test_the_faulty_layer_alone_is_treated_for_its_cause(
    kind: str, strength: int, cause: str
) -> None:
    run = run_of(kind, strength)
    plan = run.plan(run.search.chosen)
    assert run.fault.option != fp8_option(Recipe.TENSORWISE)  # the fastest
    assert re.search(cause, run.fault.reason)
    blamed = set(re.findall(r"(\w+): (?:mean|outlier|\d+ %)", run.fault.reason))
    assert blamed == {cause.partition(":")[0]}  # and no other operand
    is_island = "an island" in run.fault.reason  # then it is BF16 that is too coarse
    assert is_island or re.search(r"\((100|9\d) % of the error\)", run.fault.reason)
    out = [layer for layer in plan.layers if not layer.option.is_fp8 and layer.name != FAULT]
    assert all("an island in FP32" in layer.reason for layer in out)  # that makes its input
    assert plan.grad_error is not None
    assert plan.grad_error <= BUDGET


def test_a_mean_beside_the_fault_is_not_blamed() -> None:
    run = Run("gradient", 44, shift=1.0)
    rows = {row.operand: row for row in run.sensitivity.statistics if row.name == FAULT}
    mean, gradient = rows[Operand.INPUT], rows[Operand.GRAD_OUTPUT]
    assert (mean.mean_over_std or 0.0) > 1.0  # it stands out
    assert mean.mean_share["tensorwise"] < 0.5 < gradient.range_share["tensorwise"]
    assert "grad_output: " in run.fault.reason
    assert "input: mean" not in run.fault.reason


def test_an_offset_is_blamed_though_a_more_precise_input_would_not_help() -> None:
    rows = run_of("offset", 16).sensitivity.statistics
    (found,) = (r for r in rows if (r.name, r.operand) == (FAULT, Operand.INPUT))
    assert found.mean_share["tensorwise"] > 0.9
    (other,) = (r for r in rows if (r.name, r.operand) == (FAULT, Operand.WEIGHT))
    assert explain_statistics([found, other], recipe="tensorwise").startswith("input: mean")


def test_nothing_is_blamed_if_no_repair_takes_half_of_the_error_away() -> None:
    rows = run_of("rows", 20).sensitivity.statistics
    (found,) = (r for r in rows if (r.name, r.operand) == (FAULT, Operand.WEIGHT))
    innocent = found.model_copy(update={"range_share": {"tensorwise": 0.3}})
    text = explain_statistics([innocent], recipe="tensorwise")
    assert text == "by rounding itself, not by a single underflow, outlier or offset"
    unmeasured = found.model_copy(update={"range_share": {}})
    text = explain_statistics([unmeasured], recipe="tensorwise")
    assert text.endswith("weight: outlier channels 0, 1")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strength"), [("control", 0), ("quantised", 7), ("channel", 8)])
def test_what_fp8_represents_well_is_not_blamed(kind: str, strength: int) -> None:
    run = run_of(kind, strength)
    plan = run.plan(run.search.chosen)
    assert all(layer.option == fp8_option(Recipe.TENSORWISE) for layer in plan.layers)
    assert not any(";" in layer.reason for layer in plan.layers)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "strength"), [("rows", 20), ("channel", 16), ("offset", 16)])
def test_fp32_does_not_notice_that_a_fault_is_undone(kind: str, strength: int) -> None:
    model = faulty_workload(kind, strength).build_model()
    planted = model.get_submodule("layers.1")
    assert isinstance(planted, Planted)
    x = torch.randn(64, WIDTH)
    before = planted(x)
    planted.undo()
    assert torch.allclose(planted.layer(x), planted(x))
    difference = planted(x) - before
    assert float(difference.norm() / before.norm()) < 1e-4


def test_causes_are_left_out_where_memory_runs_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_of("rows", 20).sensitivity
    workload = faulty_workload("rows", 20)
    spec = capture_model(Context(workload, CPU))
    shown: list[str] = []
    reference = prepare_reference(Context(workload, CPU), spec)
    telling = Context(workload, CPU, progress=lambda *_: shown.append(NOW.measures))
    reference = replace(reference, context=telling)
    bare = [s.model_copy(update={"range_share": {}, "mean_share": {}}) for s in found.statistics]
    assert with_shares(reference, found.rows, bare) == found.statistics
    assert "layers.1.layer in FP8 with any range of weight" in shown

    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(type(reference), "measure_errors", too_large)
    assert with_shares(reference, found.rows, bare) == tuple(bare)
    assert "memory ran out" in caplog.text


def test_an_error_too_large_for_probes_is_measured_exactly() -> None:
    workload = faulty_workload("rows", 20)
    spec = capture_model(Context(workload, CPU))
    reference = prepare_reference(Context(workload, CPU), spec)
    options = [fp8_option(Recipe.TENSORWISE)]
    exact, probed = (
        measure_sensitivity(reference, options=options, method=method).row(FAULT, options[0])
        for method in (Method.LAYERWISE, Method.SIGN_CODED)
    )
    assert exact is not None
    assert probed is not None
    assert exact.grad_error.mean > 0.1
    assert probed.grad_error.mean == pytest.approx(exact.grad_error.mean, rel=1e-6)


@pytest.mark.slow  # two proofs
def test_the_plan_without_it_holds_and_fp8_everywhere_is_refuted(tmp_path: Path) -> None:
    run = run_of("rows", 20)
    assert run.verify(run.plan(run.search.chosen), tmp_path).verdict is Verdict.VERIFIED
    fp8 = tuple(
        next((option for option in layer.options if option.is_fp8), BF16_O2)
        for layer in run.spec.layers
    )
    everywhere = run.plan(FrontPoint(options=fp8, step_ms=0.0, grad_error=0.0))
    assert run.verify(everywhere, tmp_path).verdict is Verdict.REFUTED
