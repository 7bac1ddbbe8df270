"""An operand that BF16 is too coarse for: an island in FP32, and not the whole model."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.errors import InfeasibleError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import (
    FP32,
    Basis,
    Constraint,
    ModelSpec,
    Plan,
    Precision,
    Sensitivity,
)
from autoprec.runtime import apply, install_options, undo
from autoprec.search import build_plan, search_plan
from autoprec.sensitivity.islands import find_producers
from autoprec.sensitivity.joint import JointMeter, tied_with
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.workload.functions import Workload, workload_from
from tests.models import token_workload
from tests.search_tables import profile_of

CPU = torch.device("cpu")
WIDTH, OFFSET = 64, 256.0
MS = {Precision.FP32: 4.0, Precision.BF16_O2: 2.0, Precision.FP8_O1: 1.0}


class Shifted(nn.Module):
    """Linears of which one gets its input with an offset that no BF16 value resolves."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset
        self.first, self.before, self.behind = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(F.gelu(self.first(x))) + self.offset
        x = self.behind(x) - self.offset * self.behind.weight.detach().sum(1)
        out: Tensor = self.head(F.gelu(x))
        return out


def workload_of(offset: float) -> Workload:
    target = torch.randn(WIDTH, 16, generator=torch.Generator().manual_seed(9)) / 8

    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(128, WIDTH, generator=generator)
            yield x, (x @ target).tanh()

    functions = {
        "build_model": lambda: Shifted(offset),
        "train_batches": train_batches,
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        "build_optimizer": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    }
    return workload_from(SimpleNamespace(**functions), name="shifted")


class Run:
    """The records of one offset."""

    def __init__(self, offset: float) -> None:
        context = Context(workload_of(offset), CPU)
        self.spec: ModelSpec = capture_model(context)
        self.reference: Reference = prepare_reference(context, self.spec)
        self.sensitivity: Sensitivity = measure_sensitivity(self.reference)

    def plan(self, *keep: str) -> Plan:
        rows = {x.name: {o: (MS[o.precision], 0.0) for o in x.options} for x in self.spec.layers}
        profile = profile_of(self.spec, rows, basis=Basis.PREDICTED)
        constraint = Constraint(loss_tolerance=0.001, grad_error_budget=None, keep=keep)
        meter = JointMeter(self.reference, fp32_outputs=self.sensitivity.island_names)
        search = search_plan(
            profile, self.sensitivity, constraint=constraint, evaluate=meter.measure
        )
        return build_plan(profile, self.sensitivity, search, search.chosen, constraint=constraint)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(OFFSET)


def test_the_layer_with_its_producer_is_an_island_and_all_others_stay_low(run: Run) -> None:
    (island,) = run.sensitivity.islands
    assert island.names == ("before", "behind")
    assert island.grad_error > 0.1
    assert run.sensitivity.activation_error.mean < 1e-4  # without it
    plan = run.plan()
    options = {layer.name: layer.option for layer in plan.layers}
    assert [options["before"], options["behind"]] == [FP32, FP32]
    assert options["first"].is_fp8
    assert options["head"].is_fp8
    assert plan.fp32_outputs == ("before", "behind")
    reason = next(layer.reason for layer in plan.layers if layer.name == "behind")
    assert "an island in FP32" in reason
    assert "input: mean" in reason


def test_the_plan_as_applied_has_the_error_that_was_measured(run: Run) -> None:
    plan = run.plan()
    model = run.reference.model
    assert plan.grad_error is not None
    assert plan.grad_error < 0.01

    def error(fp32_outputs: tuple[str, ...] = ()) -> float:
        options = {layer.name: layer.option for layer in plan.layers}
        found = run.reference.measure_errors(
            {"plan": lambda: install_options(model, options, fp32_outputs=fp32_outputs)}, batches=2
        )
        return found["plan"].mean

    assert error(plan.fp32_outputs) == pytest.approx(plan.grad_error, rel=1e-3)
    assert error() > 1.0  # FP32 layers with BF16 between them are of no use
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        exact = model(x)
        apply(plan, model)
        seen: list[torch.dtype] = []
        hook = model.get_submodule("before").register_forward_hook(
            lambda _m, _x, y: seen.append(y.dtype)
        )
        near = model(x)
        hook.remove()
        undo(model)
    assert seen == [torch.float32]
    assert float((near - exact).norm() / exact.norm()) < 0.1


def test_a_kept_layer_of_an_island_is_respected(run: Run) -> None:
    with pytest.raises(InfeasibleError, match="drop a --keep"):
        run.plan("before=bf16_o2")
    plan = run.plan("before=fp32")
    assert plan.fp32_outputs == ("before", "behind")


def test_without_an_offset_there_is_no_island() -> None:
    assert Run(0.0).sensitivity.islands == ()


def test_producers_are_found_through_functions_and_not_through_other_layers(run: Run) -> None:
    found = find_producers(run.reference, ["first", "behind", "head"])
    assert found == {"first": (), "behind": ("before",), "head": ("behind",)}


def test_an_island_is_measured_with_the_layers_that_share_its_storage() -> None:
    spec = capture_model(Context(token_workload(), torch.device("cpu")))
    assert tied_with(spec, ["head"]) == ["embedding", "head"]
    assert tied_with(spec, ["embedding"]) == ["embedding", "head"]
    assert tied_with(spec, ["mix"]) == ["mix"]
