"""The table of e: the exact way by hand, the depth-free way against the exact one."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.options import grad_weight_in_bf16
from autoprec.records import (
    BF16_O2,
    Estimate,
    Gemm,
    LayerSensitivity,
    ModelSpec,
    Operand,
    Option,
    Recipe,
    fp8_option,
)
from autoprec.sensitivity.casts import Cast, cast_scaled, gemm_casts, largest_of, scale_from
from autoprec.sensitivity.doubts import large_cells
from autoprec.sensitivity.local import list_cells
from autoprec.sensitivity.probes import probe_batches
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.sensitivity.rows import make_rows
from autoprec.sensitivity.tables import Method, make_table
from autoprec.workload.functions import Workload, workload_from
from tests.models import conv_workload, mlp_workload, token_workload

CPU = torch.device("cpu")
TENSORWISE, ROWWISE = fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE)
Rows = dict[tuple[str, Option], LayerSensitivity]


def one_linear() -> Workload:
    """Return a workload of one linear, mean squares and plain SGD: all can be written down."""

    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(64, 32, generator=generator)
            yield x, x.flip(1)[:, :16]

    functions = {
        "build_model": lambda: nn.Sequential(nn.Linear(32, 16, bias=False)),
        "train_batches": train_batches,
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        "build_optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    }
    return workload_from(SimpleNamespace(**functions), name="linear")


def recurrent() -> Workload:
    """Return a next-token workload for an LSTM whose head is its embedding."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 32)
            self.lstm = nn.LSTM(32, 32, batch_first=True)
            self.head = nn.Linear(32, 16)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.lstm(self.embedding(x))[0])
            return out

    def train_batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(3, (8, 13), generator=generator).cumsum(1) % 16

    functions = {
        "build_model": Net,
        "train_batches": train_batches,
        "loss_fn": lambda model, x: F.cross_entropy(model(x[:, :-1]).mT, x[:, 1:]),
    }
    return workload_from(SimpleNamespace(**functions), name="lstm")


def frozen_first() -> Workload:
    """Return the Mlp workload with its first layer frozen."""
    plain = mlp_workload()

    def build_model() -> nn.Module:
        model = plain.build_model()
        model.get_submodule("first").requires_grad_(False)
        return model

    functions = {
        "build_model": build_model,
        "train_batches": plain.train_batches,
        "loss_fn": plain.loss_fn,
    }
    return workload_from(SimpleNamespace(**functions), name="frozen")


def prepared(workload: Workload, *, batches: int = 2) -> tuple[ModelSpec, Reference]:
    spec = capture_model(Context(workload, CPU))
    reference = prepare_reference(Context(workload, CPU), spec, batches=batches, warmup_steps=6)
    return spec, reference


def by_cell(rows: tuple[LayerSensitivity, ...]) -> Rows:
    return {(row.name, row.option): row for row in rows}


def both(workload: Workload, *, batches: int = 4, probes: int = 4) -> tuple[Rows, Rows]:
    """Return the exact rows and the probed ones, none of them refined."""
    spec, reference = prepared(workload, batches=batches)
    cells = list_cells(spec, None)
    exact = by_cell(make_table(reference, cells, Method.LAYERWISE).rows)
    return exact, by_cell(make_rows(probe_batches(reference, cells, probes=probes), cells))


def cast_operand(x: Tensor, cast: Cast) -> Tensor:
    return cast_scaled(x, cast, scale_from(largest_of(x, cast), cast))


def gradient_by_hand(x: Tensor, target: Tensor, weight: Tensor, option: Option) -> Tensor:
    """Return the weight gradient of one linear under an option, step by step."""

    def rounded(t: Tensor) -> Tensor:
        return t.bfloat16().float()

    casts = gemm_casts(option)
    x_MK, weight_NK = rounded(x), rounded(weight)
    left, right = x_MK, weight_NK
    if Gemm.OUTPUT in casts:
        sides = dict(casts[Gemm.OUTPUT])
        left = cast_operand(left, sides[Operand.INPUT])
        right = cast_operand(right, sides[Operand.WEIGHT])
    y_MN = rounded(left @ right.t())
    grad_MN = rounded(2 * (y_MN - target) / y_MN.numel())
    left, right = grad_MN, x_MK
    if Gemm.GRAD_WEIGHT in casts:
        sides = dict(casts[Gemm.GRAD_WEIGHT])
        left = cast_operand(left, sides[Operand.GRAD_OUTPUT])
        right = cast_operand(right, sides[Operand.INPUT])
    return rounded(left.t() @ right)


@pytest.mark.parametrize("option", [BF16_O2, TENSORWISE, ROWWISE], ids=str)
def test_exact_mode_is_what_the_formula_says(option: Option) -> None:
    spec, reference = prepared(one_linear())
    name = spec.names[0]
    rows = make_table(reference, [(name, option)], Method.LAYERWISE).rows
    weight = next(reference.model.parameters()).detach()
    changed, squared = [], []
    for x, target in reference.batches:
        y = x.double() @ weight.double().t()
        exact = (2 * (y - target) / y.numel()).t() @ x.double()
        changed.append(float((gradient_by_hand(x, target, weight, option) - exact).square().sum()))
        squared.append(float(exact.square().sum()))
    assert rows[0].grad_error.mean == pytest.approx(sum(changed) / sum(squared), rel=0.01)
    assert rows[0].grad_error.stderr is not None


@pytest.mark.parametrize(
    "workload",
    [
        mlp_workload(),
        pytest.param(token_workload(), marks=pytest.mark.slow),
        conv_workload(),
        pytest.param(recurrent(), marks=pytest.mark.slow),
        pytest.param(frozen_first(), marks=pytest.mark.slow),
    ],
    ids=["mlp", "tied tokens", "conv", "lstm", "frozen"],
)
def test_probes_find_what_the_exact_mode_finds(workload: Workload) -> None:
    """Toy layers have a few dozen groups each, so their probes scatter; BF16 only to size."""
    exact, probed = both(workload)
    assert exact.keys() == probed.keys()
    for precision in {option.precision for _, option in exact}:
        keys = [
            key for key in exact if key[1].precision is precision and exact[key].grad_error.mean > 0
        ]
        left = np.array([exact[key].grad_error.mean for key in keys])
        right = np.array([probed[key].grad_error.mean for key in keys])
        heavy = left > 0.02 * left.max()
        off = np.abs(np.log(right[heavy] / left[heavy]))
        is_fp8 = precision is not BF16_O2.precision
        assert off.mean() < (math.log(1.5) if is_fp8 else math.log(2.5))
        assert abs(math.log(right.sum() / left.sum())) < (
            math.log(1.4) if is_fp8 else math.log(2.5)
        )


def test_what_no_layer_takes_part_in_has_no_error() -> None:
    exact, probed = both(token_workload(), batches=2, probes=1)
    assert exact["unused", BF16_O2].grad_error.mean == 0.0
    assert probed["unused", BF16_O2].grad_error.mean == 0.0


def test_probed_rows_have_standard_errors_that_cover_the_exact_ones() -> None:
    exact, probed = both(mlp_workload())
    keys = [key for key in exact if exact[key].grad_error.mean > 1e-9]
    distances = [
        abs(probed[key].grad_error.mean - exact[key].grad_error.mean)
        / (probed[key].grad_error.stderr or 1e-30)
        for key in keys
    ]
    assert np.median(distances) < 2.0


def test_a_frozen_layer_has_no_grad_weight_error() -> None:
    _, reference = prepared(frozen_first())
    (probed, *_) = probe_batches(reference, [("first", TENSORWISE)], probes=1)
    assert set(probed.parameter_errors["first"].values()) == {0.0}
    assert sum(probed.squares[key] for key in probed.squares if key[0] == "first") > 0.0


def test_both_tables_carry_statistics() -> None:
    spec, reference = prepared(mlp_workload())
    cells = list_cells(spec, [TENSORWISE])
    assert {option.recipe for _, option in cells} == {None, Recipe.TENSORWISE}
    for table in (make_table(reference, cells, method) for method in Method):
        assert [(row.name, row.option) for row in table.rows] == cells
        assert {(s.name, s.operand) for s in table.statistics} == {
            (name, operand) for name in ("first", "second") for operand in Operand
        }
        for statistics in table.statistics:
            assert 0.0 <= statistics.underflow["tensorwise"] < 0.5
            assert statistics.amax > 0.0


def test_rows_too_large_for_probes_are_measured_again() -> None:
    def row(name: str, grad_error: float, stderr: float) -> LayerSensitivity:
        return LayerSensitivity(
            name=name,
            option=TENSORWISE,
            grad_error=Estimate(mean=grad_error, stderr=stderr),
        )

    rows = [row("broken", 1.0, 0.5), row("small", 0.01, 0.01)]
    assert large_cells(rows) == (("broken", TENSORWISE),)
    assert large_cells([row("healthy", 0.003, 0.001)]) == ()


def test_few_cells_are_measured_one_by_one_and_many_by_probes() -> None:
    spec, reference = prepared(mlp_workload())
    cells = list_cells(spec, None)
    assert make_table(reference, cells[:3]).method is Method.LAYERWISE
    before = reference.passes
    table = make_table(reference, cells * 8)  # as many as a deeper model has
    assert table.method is Method.SIGN_CODED
    assert reference.passes - before < len(cells * 8) * len(reference.batches)


def test_a_layer_that_no_loss_reads_has_no_error_in_any_option() -> None:
    """As the pooler of an encoder whose last hidden states are all that is taken of it."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler = nn.Linear(32, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.body(x).tanh()
            return y, self.pooler(y)

    plain = one_linear()
    functions = {
        "build_model": Pooled,
        "train_batches": plain.train_batches,
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0])[0], batch[1]),
    }
    exact, probed = both(workload_from(SimpleNamespace(**functions), name="pooled"))
    assert {option for name, option in exact if name == "pooler"} > {BF16_O2, ROWWISE}
    for rows in (exact, probed):
        assert all(row.grad_error.mean == 0.0 for (n, _), row in rows.items() if n == "pooler")
        assert all(row.grad_error.mean > 0.0 for (n, _), row in rows.items() if n == "body")


def test_what_stays_in_a_layer_is_known_by_both_ways() -> None:
    """And is what the layer's error is less with its grad_weight GEMM in BF16."""
    spec, reference = prepared(mlp_workload(), batches=1)
    cells = list_cells(spec, None, gemms_hp=True)
    table = make_table(reference, cells, Method.LAYERWISE)
    exact, probed = by_cell(table.rows), make_rows(probe_batches(reference, cells, probes=1), cells)
    for row in probed:
        if row.option.is_fp8:
            assert exact[row.cell].staying == pytest.approx(row.staying, rel=1e-5)
    whole = [cell for cell in cells if cell[1].is_fp8 and not cell[1].gemms_hp]
    assert any(exact[cell].staying > 1e-4 for cell in whole)
    for name, option in whole:
        kept = grad_weight_in_bf16(option)
        if kept is not None and kept != option:
            less = exact[name, option].grad_error.mean - exact[name, kept].grad_error.mean
            staying = exact[name, option].staying - exact[name, kept].staying
            assert staying == pytest.approx(less, rel=0.2, abs=0.1 * exact[name, option].staying)
