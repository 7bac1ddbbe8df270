"""The probes where the derivative jumps: against the exact table, and where it does not jump."""

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import (
    BF16_O2,
    Estimate,
    Gemm,
    LayerSensitivity,
    Operand,
    Recipe,
    fp8_option,
)
from autoprec.runtime import install_options
from autoprec.sensitivity import doubts, tables
from autoprec.sensitivity.check import bf16_within, check_table, measure_bf16
from autoprec.sensitivity.choices import Choice, kept_choices, recorded_choices
from autoprec.sensitivity.doubts import guessed_cells
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.kinks import TwoSteps
from autoprec.sensitivity.local import BF16_OUTPUT, Component, components_of, list_cells
from autoprec.sensitivity.moves import Pass, run_moved
from autoprec.sensitivity.parked import InTurn
from autoprec.sensitivity.probes import probe_batches
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.sensitivity.replay import differentiated_calls
from autoprec.sensitivity.rows import make_rows
from autoprec.sensitivity.tables import (
    Method,
    Table,
    make_table,
    refine_table,
)
from autoprec.workload.functions import workload_from
from tests.models import sine_batches

CPU = torch.device("cpu")


def prepared(activation: type[nn.Module]) -> Reference:
    """Return a warmed-up regression by four linears."""

    def build_model() -> nn.Module:
        layers = [nn.Linear(64, 128), *(nn.Linear(128, 128) for _ in range(2))]
        parts = [part for layer in layers for part in (layer, activation())]
        return nn.Sequential(*parts, nn.Linear(128, 16))

    return reference_of(build_model)


def reference_of(build_model: Callable[[], nn.Module]) -> Reference:
    """Return a warmed-up regression of 512 points by any model."""
    functions = {
        "build_model": build_model,
        "train_batches": partial(sine_batches, rows=512, width=64),
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        "build_optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    }
    context = Context(workload_from(SimpleNamespace(**functions), name="kinks"), CPU)
    return prepare_reference(context, capture_model(context), warmup_steps=6)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU,
        pytest.param(nn.Hardtanh, marks=pytest.mark.slow),
        pytest.param(nn.SiLU, marks=pytest.mark.slow),
    ],
)
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
    related = {"kinked": ([0, 1], []), "smooth": ([1], [0]), "unused": ([1], [])}
    steps = TwoSteps(4.0, products, changes, related)
    found = steps.correction([keys[0]], 4.0)
    assert found == pytest.approx((1.0 + (3.0 * 12.0) ** 0.5) / 4.0)
    # of a mean square 4 times as large the smooth part is, and what kinks add is twice as large
    found = steps.correction([keys[0]], 16.0)
    assert found == pytest.approx((4.0 + 2.0 * (3.0 * 12.0) ** 0.5) / 16.0)
    assert [steps.correction([key], 4.0) for key in keys[1:]] == [1.0, 1.0]


def test_all_casts_of_a_layer_tell_together_which_part_of_their_squares_kinks_are() -> None:
    x, weight, other = (
        ("layer", Component(gemm, operand))
        for gemm, operand in (
            (Gemm.OUTPUT, Operand.INPUT),
            (Gemm.OUTPUT, Operand.WEIGHT),
            (Gemm.GRAD_INPUT, Operand.WEIGHT),
        )
    )
    changes = [(49.0, 13.0)]
    for fine in (13.0, 4.4):  # 9 of 8 more in all, or 0.4 of 8: less than what makes a kink
        products = {x: (fine, 4.0), weight: (4.0, 4.0), other: (100.0, 100.0)}
        steps = TwoSteps(4.0, products, changes, {"layer": ([0], [])})
        part = (fine - 4.0) / 8.0 / 3.0
        for key in (x, weight):
            assert steps.added([key], 4.0) == pytest.approx((part * 4.0 * 12.0) ** 0.5)
    assert replace(steps, changes=[(13.0, 13.0)]).added([x], 4.0) == 0.0  # a smooth network


def test_kinks_of_one_branch_are_none_of_another() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pairs = (nn.Linear(64, 128), nn.ReLU()), (nn.Linear(128, 16), nn.ReLU())
            self.plain = nn.Sequential(nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 16))
            self.kinked = nn.Sequential(*pairs[0], *pairs[1], nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.plain(x) + self.kinked(x))

    reference = reference_of(Towers)
    steps = probe_batches(reference, list_cells(reference.spec, None), probes=1)[0].steps
    assert steps is not None
    assert steps.are_kinked
    added = {name: steps.added([(name, BF16_OUTPUT)], 1.0) for name in reference.spec.names}
    assert max(added["plain.0"], added["plain.2"], added["kinked.4"]) < 0.05 * added["kinked.2"]
    assert added["kinked.0"] > 0.5 * added["kinked.2"]


def routed(
    seen: Callable[[Tensor], Tensor] = lambda scores: scores, *, is_checkpointed: bool = False
) -> Reference:
    """Return a warmed-up mixture whose experts take the rows that a router gives them.

    The choice is made by what is `seen` of its scores.
    """

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # in another order than they are called in
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
            self.router = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (
                checkpoint(self.mixed, x, use_reentrant=False) if is_checkpointed else self.mixed(x)
            )

        def mixed(self, x: Tensor) -> Tensor:
            scores = self.router(x)
            scores = scores - 0.5 * scores.max(-1, keepdim=True).values
            which = seen(scores).topk(2).indices
            weights, out = scores.gather(-1, which).softmax(-1), torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows, places = (which == number).nonzero(as_tuple=True)
                part = weights[rows, places, None] * expert(x[rows])
                out = out.index_add(0, rows, part.to(out.dtype))
            return out

    return reference_of(lambda: nn.Sequential(nn.Linear(64, 32), Mixture(), nn.Linear(32, 16)))


def test_moved_passes_keep_the_experts_of_the_reference() -> None:
    reference = routed()
    cells = list_cells(reference.spec, None)
    probes = probe_batches(reference, cells, probes=2)
    assert not any(probe.unseen for probe in probes)
    steps = probes[0].steps
    assert steps is not None
    assert steps.jumps > 0.0  # some rows go elsewhere where the choice is free
    jumps = [jump for probe in probes for jump in probe.jumps]
    assert len(jumps) == 2 * len(reference.batches)  # few in one pass: the mean of all
    assert steps.jumps == pytest.approx(statistics.fmean(jumps))
    # all layers up to the router move its choice, none behind it do
    assert steps.choices == {
        name: float(name in ("0", "1.router")) for name in reference.spec.names
    }
    assert steps.are_followed
    rows = {(r.name, r.option): r.grad_error.mean for r in make_rows(probes, cells)}
    assert all(value > 0.0 for value in rows.values())


def test_what_errors_do_to_choices_is_what_they_do_to_the_scores() -> None:
    reference = routed()
    cells = list_cells(reference.spec, [fp8_option(Recipe.ROWWISE)])
    steps = probe_batches(reference, cells, probes=1)[0].steps
    assert steps is not None
    layers: dict[str, nn.Module] = {"0": reference.model.get_submodule("0")}
    with differentiated_calls(layers) as found, recorded_choices(layers) as choices:
        gradient = reference.run_gradient(0, found.begin_backward)
    step = Pass(reference, 0, layers, found.calls, choices, gradient, 1 << 20, reference.batches[0])
    (moved,) = run_moved(step, code=0, are_changes=False).at_choices.values()

    for name, option in cells:
        changes = list[float]()

        def see(_: int, choice: Choice, changes: list[float] = changes) -> None:
            assert choice.dim == -1
            (before,) = choices.compared.values()
            change = choice.x - before
            changes.append(float((change - change.mean(-1, keepdim=True)).square().sum()))

        options = {name: option}
        with (
            install_options(reference.model, options, activation_dtype=torch.float32),
            kept_choices(choices, see),
        ):
            reference.run(0, keep=())
        keys = [(name, component) for component in components_of(option)[Gemm.OUTPUT]]
        reached = math.fsum(steps.reached[key] for key in keys)
        # BF16's of four scores are four groups
        assert reached == pytest.approx(changes[0] / moved, rel=0.35 if option.is_fp8 else 1.5)
        assert (reached > 0.0) == (name in ("0", "1.router"))


def test_choices_that_checkpointing_makes_again_are_those_of_the_pass() -> None:
    rows = []
    for is_checkpointed in (False, True):
        reference = routed(is_checkpointed=is_checkpointed)
        cells = list_cells(reference.spec, [fp8_option(Recipe.ROWWISE)])
        found = make_rows(probe_batches(reference, cells, probes=1), cells)
        rows.append({row.cell: row.grad_error.mean for row in found})
    assert rows[1] == pytest.approx(rows[0])


def test_the_largest_value_alone_is_a_kink_and_not_a_choice() -> None:
    class Pooled(nn.Module):
        def __init__(self, largest: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.each, self.all, self.largest = nn.Linear(16, 32), nn.Linear(32, 16), largest

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.all(self.largest(self.each(x.view(-1, 4, 16)))))

    rows = []
    for largest in (partial(torch.amax, dim=1), lambda x: x.max(1).values):
        reference = reference_of(partial(Pooled, largest))
        cells = list_cells(reference.spec, [fp8_option(Recipe.ROWWISE)])
        probes = probe_batches(reference, cells, probes=1)
        assert not any(probe.jumps for probe in probes)
        rows.append({row.cell: row.grad_error.mean for row in make_rows(probes, cells)})
    assert rows[1] == pytest.approx(rows[0])


def test_choices_by_what_has_no_gradient_are_expected_by_the_smooth_errors() -> None:
    reference = routed(seen=Tensor.detach)
    steps = probe_batches(reference, list_cells(reference.spec, None), probes=2)[0].steps
    assert steps is not None
    assert not steps.reached
    keys = [key for key in steps.products if key[0] == "0" and key[1].gemm is Gemm.OUTPUT]
    assert steps.chosen(keys[:1], 1e-4) > 0.0


def test_neither_a_largest_value_nor_an_accuracy_is_a_choice_that_layers_move() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with recorded_choices({"first": first, "second": second}) as choices:
        scores = first(x)
        hidden = scores - scores.max(-1, keepdim=True).values
        best = hidden.topk(2, -1)
        found = second(torch.zeros(4, 8).scatter(-1, best.indices, best.values))
        assert len(found.argmax(-1).eq(0)) == 4
    assert choices.indices.keys() == {1, 2}
    assert choices.compared.keys() == {1}
    assert torch.equal(choices.compared[1], hidden)
    assert choices.behind(choices.compared) == {"first": 1.0, "second": 0.0}


def test_choices_are_kept_as_they_were_made_whatever_the_model_adds_to_them() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0]])

    def chosen(values: Tensor) -> list[int]:
        places = values.topk(2)[1]
        made = places.flatten().tolist()
        places += 7  # as Mask2Former makes them places in a flat tensor
        return made

    with recorded_choices({}) as choices:
        assert chosen(x) == [0, 2]
    for _ in range(2):
        with kept_choices(choices):
            assert chosen(-x) == [0, 2]


def test_draws_are_kept_wherever_torch_makes_them_and_an_accuracy_is_no_choice() -> None:
    layer = nn.Linear(8, 8)

    def drawn(scale: float) -> list[Tensor]:
        torch.manual_seed(0)
        logits = scale * layer(torch.randn(64, 8))
        inner = F.gumbel_softmax(logits, hard=True).detach()
        tokens = torch.multinomial(logits.softmax(-1), 1)
        gates = [torch.bernoulli(logits.sigmoid()), torch.empty(64, 8).bernoulli_(logits.sigmoid())]
        F.dropout(logits)  # with one probability, whatever the weights are
        torch.arange(8).max(0)  # of indices: no choice that weights move
        layer(inner)
        logits.argmax(-1)  # what an accuracy takes: no layer sees it
        return [inner, tokens, *gates]

    with torch.no_grad(), recorded_choices({"layer": layer}) as choices:
        first = drawn(1.0)
    assert (len(choices.indices), choices.followed) == (5, 4)
    with torch.no_grad(), kept_choices(choices):
        assert all(torch.equal(a, b) for a, b in zip(first, drawn(-2.0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, drawn(-2.0), strict=True))


def test_thresholds_of_what_weights_make_are_seen_and_not_kept() -> None:
    layer = nn.Linear(8, 8)

    def gated(x: Tensor, scale: float) -> Tensor:
        score: Tensor = scale * layer(x)
        with torch.no_grad():
            gate: Tensor = score > 0.0
        layer(torch.where(score < 0.5, score, score.clamp(-1.0, 1.0)) * (x > 0.0))
        _ = torch.rand(8) < 0.5, torch.arange(8) > 3, score > 1.0  # draws, places, an accuracy
        return gate

    x = torch.randn(64, 8)
    with recorded_choices({"layer": layer}) as choices:
        gate = gated(x, 1.0)
        layer(x).clamp(-1.0, 1.0).sum().backward()  # whose backward compares too
    assert not choices.indices
    assert choices.followed == 3  # before the last call
    with kept_choices(choices):
        assert torch.equal(gated(x, -1.0), ~gate)


def test_what_comes_back_without_gradients_is_kept_and_known() -> None:
    """Of what checkpointing computes again nothing is, nor what a metric uses, nor a weight."""
    first, second, third = (nn.Linear(8, 8) for _ in range(3))
    layers, x = {"first": first, "second": second, "third": third}, torch.randn(4, 8)

    def forward(*, is_used: bool) -> Tensor:
        h = first(x)
        with torch.no_grad():
            found = second(h.relu())
        out: Tensor = third(found) if is_used else third(x)
        return out

    with recorded_choices(layers) as choices:
        before = forward(is_used=True)
        before.sum().backward()  # type: ignore[no-untyped-call]  # torch
    assert choices.constant == {"first"}
    with torch.no_grad():
        second.weight.zero_()
    with kept_choices(choices):
        assert torch.equal(forward(is_used=True), before)
    with recorded_choices(layers) as choices, torch.no_grad():
        first.weight.clamp_(-1.0, 1.0).detach().clamp_(-1.0, 1.0)
    moved = first.weight.data.mul_(0.5).clone()
    with kept_choices(choices), torch.no_grad():
        first.weight.clamp_(-1.0, 1.0).detach().clamp_(-1.0, 1.0)
        assert torch.equal(first.weight, moved)
    with recorded_choices(layers) as choices:
        (forward(is_used=False) + first(x)).sum().backward()
    assert choices.constant == set()
    with recorded_choices(layers) as choices:
        again = checkpoint(second, first(x), use_reentrant=True)
        third(again).sum().backward()
    assert not choices.constant
    assert not choices.given


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_constant_is_kept_beside_what_checkpointing_computes_again(use_reentrant: bool) -> None:
    first, second, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)

    def output() -> Tensor:
        with torch.no_grad():
            found = first(x)
        out: Tensor = found + checkpoint(second, x, use_reentrant=use_reentrant)
        return out

    with recorded_choices({"first": first, "second": second}) as choices:
        before = output()
        torch.autograd.backward(before.sum())
    with torch.no_grad():
        first.weight.zero_()
    with kept_choices(choices):
        assert torch.equal(output(), before)


def test_what_a_custom_function_makes_is_no_constant() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(4, 8)

    def output() -> Tensor:
        made: Tensor = Squared.apply(first(x))  # type: ignore[no-untyped-call]  # torch
        out: Tensor = second(made)
        return out

    with recorded_choices({"first": first, "second": second}) as choices:
        torch.autograd.backward(output().sum())
    assert not choices.constant
    with torch.no_grad():
        first.weight.mul_(2.0)
    expected = output()
    with kept_choices(choices):
        assert torch.equal(output(), expected)  # the moved weights'


class Squared(torch.autograd.Function):
    """A custom function, whose forward torch runs under no_grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient  # type: ignore[no-any-return]  # a tensor


class Tenth(nn.Module):
    """Hands a tenth of the gradient back, as GradMultiply does."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * x + 0.9 * x.detach()


def test_a_loss_that_changes_otherwise_than_its_gradient_says_is_seen() -> None:
    """A sum that probes take apart is no derivative then; what is kept out of it is."""

    class Target(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                scale = x.abs().mean()
            return x / scale

    def missed(*between: nn.Module) -> float:
        first = nn.Linear(64, 64), nn.GELU(), *between, nn.Linear(64, 64), nn.GELU()
        reference = reference_of(lambda: nn.Sequential(*first, nn.Linear(64, 16)))
        steps = probe_batches(reference, list_cells(reference.spec, None), probes=1)[0].steps
        assert steps is not None
        return steps.missed

    assert missed() < 0.002
    assert missed(Target(), nn.Dropout()) < 0.002
    assert missed(Tenth()) > 0.05


class Looped(nn.Module):
    """Calls one block twice, each time checkpointed, so that its gradient comes in two parts."""

    def __init__(self, *, is_checkpointed: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 16)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.GELU())
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            run = self.block
            x = x + (checkpoint(run, x, use_reentrant=True) if self.is_checkpointed else run(x))
        out: Tensor = self.last(x)
        return out


def test_a_gradient_that_comes_in_parts_is_compared_whole() -> None:
    plain, again = (
        probe_batches(reference, list_cells(reference.spec, None), probes=1)[0].steps
        for is_checkpointed in (False, True)
        for reference in [reference_of(partial(Looped, is_checkpointed=is_checkpointed))]
    )
    assert plain is not None
    assert again is not None
    assert again.missed < 0.002
    assert not again.are_kinked
    for own, other in zip(plain.changes, again.changes, strict=True):
        assert own == pytest.approx(other, rel=1e-3)


def test_rows_beside_a_threshold_are_measured_though_no_kink_is_crossed() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1.0 + 1e-6 * (x > 0.0))  # too little to see

    def build(*between: nn.Module) -> nn.Sequential:
        first = (nn.Linear(64, 64), nn.GELU(), *between, nn.Linear(64, 64), nn.GELU())
        return nn.Sequential(*first, nn.Linear(64, 16))

    def refined(*between: nn.Module) -> bool:
        reference = reference_of(lambda: build(*between))
        cells = list_cells(reference.spec, None)
        return bool(make_table(reference, cells, Method.SIGN_CODED).refined)

    assert not refined()
    assert refined(Gate())
    assert refined(Tenth())


def test_layers_whose_shapes_depend_on_values_are_measured_one_by_one() -> None:
    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            (rows,) = (x[:, 0] > 0.0).nonzero(as_tuple=True)
            return x.index_add(0, rows, self.inner(x[rows]).to(x.dtype))

    reference = reference_of(
        lambda: nn.Sequential(nn.Linear(64, 32), Positive(), nn.Linear(32, 16))
    )
    table = make_table(reference, list_cells(reference.spec, None), Method.SIGN_CODED)
    found = [option for name, option in table.refined if name == "1.inner"]
    # BF16, and of recipes that cast alike forward the first; M differs: grad_weight is in BF16
    assert [option.recipe for option in found] == [None, Recipe.TENSORWISE, Recipe.ROWWISE]


def test_each_batch_has_a_code_of_its_own() -> None:
    """What one code exaggerates it does in all rows; two tell by how much."""
    reference = prepared(nn.SiLU)
    reference.batches[1], reference.gradients = reference.batches[0], InTurn((), CPU)
    first, second = probe_batches(reference, list_cells(reference.spec, None), probes=1)
    assert first.squared_norm == second.squared_norm
    found = [(square, second.squares[key]) for key, square in first.squares.items() if square]
    assert found
    assert all(a != b for a, b in found)


def test_whole_recipes_are_measured_where_probes_are_a_guess() -> None:
    recipes = (Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP, Recipe.TENSORWISE)

    def rows(**relative: float) -> list[LayerSensitivity]:
        return [
            LayerSensitivity(
                name=name,
                option=fp8_option(recipe),
                grad_error=Estimate(mean=1e-3, stderr=part * 1e-3),
            )
            for name, part in relative.items()
            for recipe in recipes
        ]

    assert guessed_cells(rows(sure=0.1, unsure=0.2), is_kinked=False) == ()
    assert guessed_cells(rows(sure=0.01, unsure=0.02), is_kinked=False, codes=9) == ()
    for found in (
        # means over four codes, of which each one has twice the standard error
        guessed_cells(rows(sure=0.15, unsure=0.2), is_kinked=False, codes=4),
        guessed_cells(rows(sure=0.5, unsure=0.6), is_kinked=False),
        guessed_cells(rows(sure=0.1, unsure=0.2), is_kinked=True),
    ):
        # the least certain layer first; recipes that cast alike forward once
        assert [name for name, _ in found] == ["unsure", "unsure", "sure", "sure"]
        assert Recipe.TENSORWISE in {option.recipe for _, option in found[:2]}


def test_measured_rows_take_along_what_casts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a part of the batches a measurement goes half the way, on all of them it is the row."""
    tensorwise, rowwise, with_gw_hp = map(
        fp8_option, (Recipe.TENSORWISE, Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP)
    )
    options = (tensorwise, rowwise, with_gw_hp, BF16_O2)
    rows = tuple(
        LayerSensitivity(name=name, option=option, grad_error=Estimate(mean=1.0, stderr=0.1))
        for name in ("seen", "other")
        for option in options
    )
    table = Table(Method.SIGN_CODED, rows, ())
    monkeypatch.setattr(
        tables, "_exact_errors", lambda _, cells, *__: {c: Estimate(mean=16.0) for c in cells}
    )
    reference = prepared(nn.SiLU)
    for batches, expected in ((2, (4.0, 16.0, 16.0, 1.0)), (1, (2.0, 4.0, 4.0, 1.0))):
        found = refine_table(reference, table, [("seen", rowwise)], batches=batches)
        means = [row.grad_error.mean for row in found.rows]
        assert means == pytest.approx([*expected, 1.0, 1.0, 1.0, 1.0])
    # what stays in a layer's own parameters is known, and not multiplied
    staying = {("seen", rowwise): 0.75, ("seen", tensorwise): 1.0}
    rows = tuple(r.model_copy(update={"staying": staying.get(r.cell, 0.0)}) for r in table.rows)
    table = replace(table, rows=rows)
    found = refine_table(reference, table, [("seen", with_gw_hp)], batches=2)
    means = [row.grad_error.mean for row in found.rows]
    assert means[:4] == pytest.approx([1.0, 0.75 + 0.25 * 16.0, 16.0, 1.0])


def test_recipes_that_cast_alike_forward_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of which least stays in the layer's own parameters, where both are too large."""
    monkeypatch.setattr(doubts, "LARGE_ERROR", 0.0)
    reference = prepared(nn.SiLU)
    table = make_table(reference, list_cells(reference.spec, None), Method.SIGN_CODED)
    casts = Counter((name, doubts.forward_casts(option)) for name, option in table.refined)
    assert set(casts.values()) == {1}
    assert len(casts) == 2 * len(reference.spec.layers)
    staying = {row.cell: row.staying for row in table.rows}
    for name, option in table.refined:
        alike = [r for r in table.rows if r.name == name and r.option.is_whole_fp8]
        alike = [r for r in alike if doubts.forward_casts(r.option) == doubts.forward_casts(option)]
        assert staying[name, option] == min(row.staying for row in alike) > 0.0


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.0])
def test_kinks_count_in_other_rows_as_they_do_in_measured_ones(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kinks add to a row is `scale` times what the probes say; the first batch has half."""
    rowwise, parts = fp8_option(Recipe.ROWWISE), {f"layer{i}": i / 10 for i in range(10)}
    rows = tuple(
        LayerSensitivity(name=name, option=rowwise, grad_error=Estimate(mean=2e-3, stderr=1e-3))
        for name in parts
    )
    truth = {(n, rowwise): 2e-3 * math.exp(math.log(scale) * part) for n, part in parts.items()}
    measured = tuple(cell for cell in truth if int(cell[0][-1]) % 2)
    exact = {
        c: Estimate(mean=truth[c] / 2 * (1.1 if i % 2 else 0.9)) for i, c in enumerate(measured)
    }
    monkeypatch.setattr(tables, "_exact_errors", lambda *_: exact)
    table = Table(Method.SIGN_CODED, rows, (), kinks={(n, rowwise): p for n, p in parts.items()})
    reference, first = SimpleNamespace(batches=range(2)), dict.fromkeys(truth, 1e-3)
    found = refine_table(reference, table, measured, batches=1, probed=first)  # type: ignore[arg-type]  # only counts
    others = {cell: error for cell, error in found.errors.items() if cell not in measured}
    assert others == pytest.approx({c: truth[c] for c in others}, rel=0.15)
    assert (others[("layer8", rowwise)] == 2e-3) == (scale == 1.0)
    # rows that have no factor in common say nothing of others
    for i, cell in enumerate(measured):
        exact[cell] = Estimate(mean=truth[cell] / 2 * (2.5 if i % 2 else 0.4))
    found = refine_table(reference, table, measured, batches=1, probed=first)  # type: ignore[arg-type]  # as above
    assert all(found.errors[cell] == 2e-3 for cell in others)


def test_rows_with_hardly_a_kink_say_nothing_of_those_with_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a PVT v2: of 13 measured rows one had kinks, 5e-5 of it, and was 0.62 of its probe."""
    rowwise, parts = fp8_option(Recipe.ROWWISE), [0.0, 0.0, 0.0, 5e-5, 0.9]
    cells = [(f"layer{i}", rowwise) for i in range(len(parts))]
    rows = [LayerSensitivity(name=n, option=o, grad_error=Estimate(mean=2e-3)) for n, o in cells]
    exact = {cell: Estimate(mean=1e-3) for cell in cells[:3]} | {cells[3]: Estimate(mean=6.2e-4)}
    monkeypatch.setattr(tables, "_exact_errors", lambda *_: exact)
    kinks = dict(zip(cells, parts, strict=True))
    table = Table(Method.SIGN_CODED, tuple(rows), (), kinks=kinks)
    reference, first = SimpleNamespace(batches=range(2)), dict.fromkeys(cells, 1e-3)
    found = refine_table(reference, table, cells[:4], batches=1, probed=first)  # type: ignore[arg-type]  # only counts
    assert found.errors[cells[4]] == 2e-3


def test_rows_with_choices_say_little_of_kinks_on_one_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rowwise = fp8_option(Recipe.ROWWISE)
    # what was measured over what the probes have: one factor of kinks, and a scatter of choices
    logs = {"kink0": -0.9, "kink1": -0.8, "kink2": -1.0, "kink3": -0.9}
    logs |= {"choice0": 0.6, "choice1": -1.5, "choice2": 0.2}
    names = [*logs, "other"]
    rows = tuple(
        LayerSensitivity(name=name, option=rowwise, grad_error=Estimate(mean=2e-3, stderr=1e-3))
        for name in names
    )
    kinks = {(name, rowwise): 0.45 if name.startswith("choice") else 1.0 for name in names}
    chosen = {(name, rowwise): 1.0 for name in names if name.startswith("choice")}
    exact = {(name, rowwise): Estimate(mean=1e-3 * math.exp(log)) for name, log in logs.items()}
    monkeypatch.setattr(tables, "_exact_errors", lambda *_: exact)
    reference, first = SimpleNamespace(batches=range(2)), dict.fromkeys(kinks, 1e-3)
    for choices, factor in ((chosen, math.exp(-0.9)), ({}, 1.0)):
        table = Table(Method.SIGN_CODED, rows, (), kinks=kinks, choices=choices)
        found = refine_table(reference, table, [*exact], batches=1, probed=first)  # type: ignore[arg-type]  # only counts
        assert found.errors["other", rowwise] == pytest.approx(2e-3 * factor, rel=0.05)


def test_the_table_is_checked_both_ways_and_says_what_stays_outside() -> None:
    reference = prepared(nn.SiLU)
    cells = list_cells(reference.spec, [fp8_option(Recipe.ROWWISE)])
    table = make_table(reference, cells, Method.SIGN_CODED)
    meter = JointMeter(reference)
    said = "holds in sum, not layer by layer (probes miss"
    for factor in (1.0, 5.0, 0.2):
        rows = tuple(
            row.model_copy(update={"grad_error": Estimate(mean=row.grad_error.mean * factor)})
            for row in table.rows
        )
        found = check_table(meter, replace(table, rows=rows, refined=()), outside=0.0)
        (joint,) = found.joint
        assert 0.7 <= joint.predicted_grad_error / joint.grad_error.mean <= 1.4
        # what was not measured of a wrong table is as wrong
        left = {name for name, _ in cells} - {name for name, _ in found.table.exact}
        assert (said in found.sentence) == bool(factor != 1.0 and left)
        # rows are measured only where the table is wrong
        assert bool(found.table.refined) == (factor != 1.0)
    stuck = replace(table, rows=rows, method=Method.LAYERWISE)
    found = check_table(meter, stuck, outside=0.0)
    assert "FP8 wherever it goes (errors of layers " in found.sentence
    assert found.table == stuck
    # where what was measured shows that probes guess, rows that were not are said to be guesses
    cells = [(row.name, row.option) for row in table.rows]
    far = check_table(meter, replace(table, tested={cells[0]: (5.0, 1e-3)}), outside=0.0).sentence
    assert "by a factor of 140)" in far
    assert len(textwrap.wrap(far, 70)) <= 2  # the answer has room for few lines, and cuts others
    for ratios in ((3.0, 1.0, 1.0, 0.1), (5.0,), (1.9, 1.0, 0.6, 1.0), (1.9,)):
        pairs = {c: (r * 1e-3, 1e-3) for c, r in zip(cells, ratios, strict=False)}
        tested = replace(table, refined=tuple(pairs), tested=pairs)  # on one of two batches
        is_far = max(ratios) > 2.0
        assert (said in check_table(meter, tested, outside=0.0).sentence) is is_far
        # nor do rows of a layer that is too broken for its probes, or a table without guesses
        broken = {cell: (1e3 * r, 1e3 * probed) for cell, (r, probed) in pairs.items()}
        for other in (replace(tested, tested=broken), replace(tested, exact=frozenset(cells))):
            assert check_table(meter, other, outside=0.0).sentence == ""


def test_rows_that_batches_do_not_agree_on_are_said_to_be_guesses() -> None:
    meter = JointMeter(prepared(nn.SiLU))
    cells = list_cells(meter.reference.spec, [fp8_option(Recipe.ROWWISE)])
    table = make_table(meter.reference, cells, Method.LAYERWISE)
    for part, is_said in ((0.8, True), (0.2, False)):
        rows = tuple(
            row.model_copy(update={"grad_error": Estimate(mean=e, stderr=part * e)})
            for row in table.rows
            for e in [row.grad_error.mean]
        )
        sentence = check_table(meter, replace(table, rows=rows), outside=0.0).sentence
        assert ("holds in sum, not layer by layer" in sentence) is is_said
        assert ("its batches differ by a factor of 2.2" in sentence) is is_said


def test_what_neighbours_have_jointly_says_how_far_the_probes_of_each_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables, "GUESSED_PASSES", 6)  # of 12 rows: two measurements of a kind
    meter = JointMeter(prepared(nn.SiLU))
    table = make_table(meter.reference, list_cells(meter.reference.spec, None), Method.SIGN_CODED)
    for factor, is_said in ((1.0, False), (0.1, True)):
        probed = tuple(tables.multiplied(row, factor) for row in table.rows)
        few = replace(table, rows=probed, tested={}, refined=(), exact=frozenset())
        found = tables.measure_unseen(meter.reference, few, meter.reference.spec.names)
        assert found.together == tuple(sorted(meter.reference.spec.names))
        sentence = check_table(meter, found, outside=0.0).sentence
        assert ("(probes miss the 4 measured rows by a factor of " in sentence) is is_said


def test_choices_that_several_layers_change_count_once_in_the_sum() -> None:
    reference = prepared(nn.SiLU)
    cells = list_cells(reference.spec, [fp8_option(Recipe.ROWWISE)])
    table = make_table(reference, cells, Method.SIGN_CODED)
    shared = replace(table, choices=dict.fromkeys(cells, 0.5))
    (joint,) = check_table(JointMeter(reference), shared, outside=0.0).joint
    rows = [
        table.errors.get(cell, 0.0)
        for cell in zip(reference.spec.names, joint.options, strict=True)
    ]
    assert joint.predicted_grad_error == pytest.approx(sum(rows))
    assert joint.overlap == pytest.approx(0.5 * (sum(rows) - math.hypot(*rows)))
    # a search adds up rows of BF16, which are guesses: they are cut as if none were shared
    every = replace(table, choices=dict.fromkeys(cells, 1.0))
    least = Estimate(mean=sum(e for (_, o), e in table.errors.items() if o == BF16_O2) / 2.5)
    cut = bf16_within(every, least).errors
    assert sum(e for (_, o), e in cut.items() if o == BF16_O2) == pytest.approx(least.mean)


def test_bf16_rows_are_measured_where_guesses_would_take_layers_their_bf16() -> None:
    reference = prepared(nn.SiLU)
    exact = make_table(reference, list_cells(reference.spec, []), Method.LAYERWISE)
    guesses = tuple(r.model_copy(update={"grad_error": Estimate(mean=1.0)}) for r in exact.rows)
    table = Table(Method.SIGN_CODED, guesses, ())
    assert measure_bf16(reference, table, Estimate(mean=1e-4)) == table  # not worth a pass
    assert measure_bf16(reference, table, Estimate(mean=3.0)) == table  # they add up
    assert measure_bf16(reference, table, Estimate(mean=0.01)).errors == exact.errors


def test_bf16_rows_add_up_to_no_more_than_twice_their_joint_error() -> None:
    rows = tuple(
        LayerSensitivity(name=name, option=option, grad_error=Estimate(mean=mean))
        for name, mean in {"known": 0.125, "high": 2.0, "higher": 8.0}.items()
        for option in (BF16_O2, fp8_option(Recipe.ROWWISE))
    )
    table = Table(Method.SIGN_CODED, rows, ())
    assert bf16_within(table, Estimate(mean=5.1)) == table
    means = [row.grad_error.mean for row in bf16_within(table, Estimate(mean=1.125)).rows]
    assert means == [0.125, 0.125, 0.5, 2.0, 0.5, 8.0]
    kinked = replace(table, kinks={("high", BF16_O2): 1.0, ("higher", BF16_O2): 1.0})
    assert bf16_within(kinked, Estimate(mean=4.2)) == kinked  # kinks in common count once
    exact = replace(table, method=Method.LAYERWISE)
    assert bf16_within(exact, Estimate(mean=0.5)) == exact
