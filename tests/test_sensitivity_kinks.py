"""The probes where the derivative jumps: against the exact table, and where it does not jump."""

import statistics
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.sensitivity.kinks import TwoSteps
from autoprec.sensitivity.local import BF16_OUTPUT, list_cells
from autoprec.sensitivity.probes import probe_batches
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.sensitivity.tables import Method, make_rows, make_table
from autoprec.workload.functions import workload_from

CPU = torch.device("cpu")


def prepared(activation: type[nn.Module]) -> Reference:
    """Return a warmed-up regression of 512 points by four linears."""

    def build_model() -> nn.Module:
        layers = [nn.Linear(64, 128), *(nn.Linear(128, 128) for _ in range(2))]
        parts = [part for layer in layers for part in (layer, activation())]
        return nn.Sequential(*parts, nn.Linear(128, 16))

    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        truth = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(512, 64, generator=generator)
            yield x, (x @ truth / 4).sin()

    functions = {
        "build_model": build_model,
        "train_batches": train_batches,
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        "build_optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    }
    context = Context(workload_from(SimpleNamespace(**functions), name="kinks"), CPU)
    return prepare_reference(context, capture_model(context), warmup_steps=6)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, nn.SiLU])
def test_fp8_errors_are_the_exact_ones_where_derivatives_jump(activation: type[nn.Module]) -> None:
    reference = prepared(activation)
    cells = list_cells(reference.spec, None)
    exact = make_table(reference, cells, Method.LAYERWISE).rows
    probed = make_rows(probe_batches(reference, cells, probes=1), cells)
    ratios = [
        found.grad_error.mean / row.grad_error.mean
        for row, found in zip(exact, probed, strict=True)
        if row.option.is_fp8
    ]
    assert 0.8 < statistics.median(ratios) < 1.25
    assert 0.5 < min(ratios) < max(ratios) < 2.0


def test_a_smooth_layer_is_left_as_it_is_and_a_kink_counts_by_what_is_behind_it() -> None:
    keys = [(name, BF16_OUTPUT) for name in ("kinked", "smooth", "unused")]
    # at a step 4 times finer 3 of 4 parts of a square are kinks, 12 in 16; then none are
    products = {keys[0]: (13.0, 4.0), keys[1]: (4.0, 4.0), keys[2]: (0.0, 0.0)}
    changes = [(49.0, 13.0), (10.0, 10.0)]  # 12 and none
    steps = TwoSteps(4.0, products, changes, {"kinked": 0, "smooth": 1, "unused": 1})
    assert steps.correction([keys[0]]) == pytest.approx((1.0 + (3.0 * 12.0) ** 0.5) / 4.0)
    assert [steps.correction([key]) for key in keys[1:]] == [1.0, 1.0]
