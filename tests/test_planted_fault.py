"""A layer in which FP8 really hurts, through the whole product but the timing."""

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import (
    BF16_O2,
    Basis,
    Constraint,
    FrontPoint,
    LayerSpec,
    ModelSpec,
    Option,
    Plan,
    Recipe,
    Search,
    Sensitivity,
    Verdict,
    Verification,
    fp8_option,
)
from autoprec.search import build_plan, search_plan
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from autoprec.sensitivity.tables import Method
from autoprec.verification import verify_plans
from autoprec.workload.functions import Workload, workload_from
from tests.search_tables import profile_of

CPU = torch.device("cpu")
WIDTH, BATCH = 64, 128
FAULT = "layers.1.0"
TOLERANCE = 0.01
MS = {"fp32": 4.0, "bf16_o2": 2.0, "fp8_o1": 1.0}  # FP8 pays everywhere


class Rescale(nn.Module):
    """Divide outputs by what the rows of the weight before were multiplied with."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, output: Tensor) -> Tensor:
        return output / self.get_buffer("scale").to(output.dtype)


class Faulty(nn.Module):
    """Four linears in a row; the second has two outlier rows of 2^20, exact in FP32 and BF16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        scale = torch.ones(WIDTH)
        scale[:2] = 2.0**20
        own = self.layers[1]
        with torch.no_grad():
            for parameter in own.parameters():
                parameter.mul_(scale[:, None] if parameter.ndim == 2 else scale)
        self.layers[1] = nn.Sequential(own, Rescale(scale))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        out: Tensor = self.head(x)
        return out


def faulty_workload() -> Workload:
    """Return a workload that learns what a fixed random network computes."""
    generator = torch.Generator().manual_seed(99)
    inner, outer = (torch.randn(WIDTH, n, generator=generator) / 8 for n in (WIDTH, 16))

    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        drawn = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(BATCH, WIDTH, generator=drawn)
            noise = 0.1 * torch.randn(BATCH, 16, generator=drawn)
            yield x, torch.tanh(2 * x @ inner) @ outer + noise

    functions = {
        "build_model": Faulty,
        "train_batches": train_batches,
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        "build_optimizer": lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
    }
    return workload_from(SimpleNamespace(**functions), name="faulty")


class Run:
    """The records of the planted fault, made once."""

    def __init__(self) -> None:
        self.workload = faulty_workload()
        self.spec: ModelSpec = capture_model(Context(self.workload, CPU))
        reference = prepare_reference(Context(self.workload, CPU), self.spec)
        self.sensitivity: Sensitivity = measure_sensitivity(reference)
        rows = {layer.name: _row(layer) for layer in self.spec.layers}
        self.profile = profile_of(self.spec, rows, basis=Basis.PREDICTED)
        self.constraint = Constraint(loss_tolerance=TOLERANCE, grad_error_budget=None)
        meter = JointMeter(reference)
        self.search: Search = search_plan(
            self.profile, self.sensitivity, constraint=self.constraint, evaluate=meter.measure
        )

    def plan(self, point: FrontPoint) -> Plan:
        return build_plan(
            self.profile, self.sensitivity, self.search, point, constraint=self.constraint
        )

    def verify(self, plan: Plan) -> Verification:
        return verify_plans(Context(self.workload, CPU), [plan], loss_tolerance=TOLERANCE)


def _row(layer: LayerSpec) -> dict[Option, tuple[float, float]]:
    return {option: (MS[option.precision], 0.0) for option in layer.options}


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def test_exactly_the_faulty_layer_stays_out_of_fp8_with_its_cause(run: Run) -> None:
    plan = run.plan(run.search.chosen)
    kept = [layer for layer in plan.layers if not layer.option.is_fp8]
    assert [layer.name for layer in kept] == [FAULT]
    assert "over the budget" in kept[0].reason
    assert re.search(r"weight: \d\d % underflow under tensorwise", kept[0].reason)


def test_an_error_too_large_for_probes_is_measured_exactly() -> None:
    workload = faulty_workload()
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


def test_the_plan_without_it_holds_and_fp8_everywhere_is_refuted(run: Run) -> None:
    assert run.verify(run.plan(run.search.chosen)).verdict is Verdict.VERIFIED
    fp8 = tuple(
        next((option for option in layer.options if option.is_fp8), BF16_O2)
        for layer in run.spec.layers
    )
    everywhere = run.plan(FrontPoint(options=fp8, step_ms=0.0, grad_error=0.0))
    assert run.verify(everywhere).verdict is Verdict.REFUTED
