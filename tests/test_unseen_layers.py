"""Layers of which the measured batches say nothing, and some that only begin as if they were so."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import BF16_O2, Basis, Constraint, Recipe, fp8_option
from autoprec.search import build_plan, search_plan
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from autoprec.sensitivity.tables import Method
from autoprec.workload.functions import workload_from
from tests.models import sine_batches
from tests.planted import times_of
from tests.search_tables import profile_of

CPU = torch.device("cpu")


class Paths(nn.Module):
    """A linear, one of a path that no batch takes, an adapter that begins at zero, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16)
        self.down, self.up = nn.Linear(32, 16, bias=False), nn.Linear(16, 32)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.first(x))
        taken = self.rare(hidden * (x[:, :1] > 100.0))
        out: Tensor = self.head(hidden + taken + self.up(self.down(x)))
        return out


def test_a_linear_that_saw_zeros_alone_gets_no_fp8_and_its_reason_says_that_nothing_is_known() -> (
    None
):
    functions = SimpleNamespace(
        build_model=Paths,
        train_batches=partial(sine_batches, rows=256, width=32),
        loss_fn=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        build_optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-2),
    )
    context = Context(workload_from(functions, name="paths"), CPU)
    spec = capture_model(context)
    reference = prepare_reference(context, spec, warmup_steps=10)
    tables = [measure_sensitivity(reference, method=method) for method in Method]
    rowwise = fp8_option(Recipe.ROWWISE)
    rare = [table.row("rare", option) for table in tables for option in (rowwise, BF16_O2)]
    # what is left is the gradient of its bias in BF16, in both tables
    means = [row.grad_error.mean for row in rare if row is not None]
    assert means == pytest.approx([means[0]] * 4, rel=0.5)
    assert 0.0 < means[0] < 1e-4
    profile = profile_of(
        spec, {layer.name: times_of(layer) for layer in spec.layers}, basis=Basis.PREDICTED
    )
    meter = JointMeter(reference)
    for table in tables:
        for keep, is_fp8 in (((), False), (("rare=fp8_o1",), True)):
            limits = Constraint(loss_tolerance=0.001, grad_error_budget=0.5, keep=keep)
            search = search_plan(profile, table, constraint=limits, evaluate=meter.measure)
            plan = build_plan(profile, table, search, search.chosen, constraint=limits)
            found = {layer.name: layer for layer in plan.layers}
            assert found["rare"].option.is_fp8 is is_fp8
            if not is_fp8:
                assert "input was zero where gradient errors were measured" in found["rare"].reason
            # an adapter's output projection began at zero, and is measured after the warm-up
            assert found["up"].option.is_fp8
            assert found["down"].option.is_fp8
            assert "gradient error 0 %" not in found["up"].reason
