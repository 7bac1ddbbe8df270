"""An operand that BF16 is too coarse for: an island in FP32, and not the whole model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.errors import InfeasibleError, RecordError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.memory import io_elements
from autoprec.predict.carry import carry_plan
from autoprec.predict.transfer import transfer_sensitivity, unknown_sensitivity
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    Constraint,
    Estimate,
    Island,
    LayerSensitivity,
    ModelSpec,
    Option,
    Plan,
    Precision,
    Sensitivity,
)
from autoprec.runtime import apply, install_options, undo
from autoprec.search import build_plan, search_plan
from autoprec.search.costs import make_costs
from autoprec.sensitivity.estimates import Squares
from autoprec.sensitivity.islands import find_islands, find_producers
from autoprec.sensitivity.joint import JointMeter, tied_with
from autoprec.sensitivity.measure import _error_now, measure_sensitivity
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


class Stream(nn.Module):
    """A residual linear behind an offset that the code adds to what another one gives."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset
        self.first, self.inner = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x)) + self.offset
        x = x + self.inner(x - self.offset).tanh()
        out: Tensor = self.head(x - self.offset)
        return out


class Offsets(nn.Module):
    """Linears whose outputs are all too far from zero for BF16, in code between them alone."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = F.gelu((layer(x) + self.offset) - self.offset)
        out: Tensor = self.head(x)
        return out


def workload_of(offset: float, model: Callable[[float], nn.Module] = Shifted) -> Workload:
    target = torch.randn(WIDTH, 16, generator=torch.Generator().manual_seed(9)) / 8

    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(128, WIDTH, generator=generator)
            yield x, (x @ target).tanh()

    functions = {
        "build_model": lambda: model(offset),
        "train_batches": train_batches,
        "loss_fn": lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        "build_optimizer": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    }
    return workload_from(SimpleNamespace(**functions), name="shifted")


class Chain(nn.Module):
    """Scores of tags and of their transitions, which belong to no layer, summed over 32 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scores = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16)
        self.moves = nn.Parameter(torch.zeros(16, 16))

    def forward(self, x: Tensor, tags: Tensor) -> Tensor:
        own = self.scores(F.gelu(self.inner(x)))
        all_ways = own[:, 0]
        for step in range(1, own.shape[1]):
            all_ways = (all_ways[:, :, None] + self.moves).logsumexp(1) + own[:, step]
        chosen = own.gather(2, tags[..., None]).sum((1, 2))
        chosen = chosen + self.moves[tags[:, :-1], tags[:, 1:]].sum(1)
        loss: Tensor = (all_ways.logsumexp(1) - chosen).mean()
        return loss


def chain_workload() -> Workload:
    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(16, 32, WIDTH, generator=generator)
            yield x, (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()

    functions = {
        "build_model": Chain,
        "train_batches": train_batches,
        "loss_fn": lambda model, batch: model(*batch),
        "build_optimizer": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    }
    return workload_from(SimpleNamespace(**functions), name="chain")


class Run:
    """The records of one workload."""

    def __init__(self, workload: Workload) -> None:
        context = Context(workload, CPU)
        self.spec: ModelSpec = capture_model(context)
        self.reference: Reference = prepare_reference(context, self.spec)
        self.sensitivity: Sensitivity = measure_sensitivity(self.reference)

    def plan(self, *keep: str) -> Plan:
        rows = {x.name: {o: (MS[o.precision], 0.0) for o in x.options} for x in self.spec.layers}
        profile = profile_of(self.spec, rows, basis=Basis.PREDICTED)
        constraint = Constraint(loss_tolerance=0.001, grad_error_budget=None, keep=keep)
        meter = JointMeter(self.reference, islands=self.sensitivity.islands)
        search = search_plan(
            profile, self.sensitivity, constraint=constraint, evaluate=meter.measure
        )
        return build_plan(profile, self.sensitivity, search, search.chosen, constraint=constraint)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(workload_of(OFFSET))


def test_the_layer_is_an_island_with_its_producers_output_and_all_others_stay_low(
    run: Run,
) -> None:
    (island,) = run.sensitivity.islands
    assert (island.names, island.outputs) == (("behind",), ("before",))
    assert island.grad_error > 0.1
    assert run.sensitivity.activation_error.mean < 1e-4  # without it
    plan = run.plan()
    options = {layer.name: layer.option for layer in plan.layers}
    assert options.pop("behind") == FP32
    assert all(option.is_fp8 for option in options.values())
    assert plan.fp32_outputs == ("behind", "before")
    reason = next(layer.reason for layer in plan.layers if layer.name == "behind")
    assert "BF16 between it and before alone" in reason
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
        run.plan("behind=bf16_o2")
    plan = run.plan("before=fp32")
    assert plan.fp32_outputs == ("behind", "before")


def test_a_layer_whose_output_is_too_coarse_stays_low_with_that_output_in_fp32() -> None:
    run = Run(workload_of(OFFSET, Stream))
    (island,) = run.sensitivity.islands
    assert (island.names, island.outputs) == ((), ("first",))
    assert island.grad_error > 0.1
    plan = run.plan()
    assert FP32 not in plan.options
    assert plan.fp32_outputs == ("first",)
    assert plan.grad_error is not None
    assert plan.grad_error < 0.01
    assert any("too coarse for what is computed behind first:" in note for note in plan.notes)
    large = run.spec.model_copy(update={"structure": "large"})
    other = transfer_sensitivity(run.sensitivity, large)  # whose layers are others
    assert other.islands == ()
    assert other.activation_error.mean > 0.1


def test_without_an_offset_there_is_no_island() -> None:
    assert Run(workload_of(0.0)).sensitivity.islands == ()


def test_a_mean_near_the_spread_is_not_blamed_for_an_island(run: Run) -> None:
    rows = run.sensitivity.statistics
    other = copy(run)
    near = [row.model_copy(update={"mean_over_std": 1.2}) for row in rows]
    other.sensitivity = run.sensitivity.model_copy(update={"statistics": near})
    (reason,) = (x.reason for x in other.plan().layers if x.option == FP32)
    assert reason.endswith("an island in FP32")


def test_an_island_whose_rows_tell_all_is_no_reason(run: Run) -> None:
    (island,) = run.sensitivity.islands
    coarse = LayerSensitivity(name="", option=BF16_O2, grad_error=Estimate(mean=0.5))
    kept = {(name, BF16_O2) for name in island.names}
    rows = [row for row in run.sensitivity.rows if (row.name, row.option) not in kept]
    rows += [coarse.model_copy(update={"name": name}) for name in island.names]
    found = {"rows": rows, "islands": (island.model_copy(update={"grad_error": 0.0}),)}
    other = copy(run)
    other.sensitivity = run.sensitivity.model_copy(update=found)
    behind = next(layer for layer in other.plan().layers if layer.name == "behind")
    assert behind.option == FP32
    assert "alone is over the budget (error 50 %" in behind.reason


def test_parameters_outside_of_layers_stay_fp32_where_bf16_is_too_coarse() -> None:
    run = Run(chain_workload())
    (island,) = run.sensitivity.islands
    assert island.outputs == ("moves",)
    assert not island.names
    assert island.grad_error > 0.01
    first, last = (step.grad_error.mean for step in run.sensitivity.by_step)
    assert min(first, last) > 0.01  # of one kind: with them in BF16, as nothing is known earlier
    plan = run.plan()
    assert FP32 not in plan.options
    assert plan.fp32_outputs == ("moves",)
    assert plan.grad_error is not None
    assert plan.grad_error < 1e-3
    assert any(note.startswith("BF16 O2 is too coarse for moves") for note in plan.notes)
    mistyped = plan.to_json().replace('"fp32_outputs": [\n  "moves"', '"fp32_outputs": [\n  "move"')
    with pytest.raises(RecordError, match="not 'move'"):
        Plan.from_json(mistyped)
    model = run.reference.model
    apply(plan, model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    undo(model)
    assert dtypes.pop("moves") is torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_what_little_fp32_between_layers_takes_is_added_to_the_error_of_today() -> None:
    run = Run(chain_workload())
    (found,), (*_, now) = run.sensitivity.joint, run.sensitivity.by_step
    assert now.grad_error.mean > 2 * found.grad_error.mean  # of much, without it
    passes = run.reference.passes
    little = Island(outputs=run.spec.names, grad_error=0.01 * found.grad_error.mean)
    (step,) = _error_now(run.reference, [found], [little])
    assert step.grad_error.mean == pytest.approx(1.01 * found.grad_error.mean)
    assert run.reference.passes == passes


def test_fp32_between_all_layers_where_bf16_is_too_coarse_there_and_not_in_them() -> None:
    run = Run(workload_of(OFFSET, Offsets))
    (island,) = run.sensitivity.islands
    assert island.outputs == run.spec.names
    assert run.sensitivity.activation_error.mean < 1e-3
    plan = run.plan()
    assert FP32 not in plan.options
    assert plan.fp32_outputs == run.spec.names
    assert plan.grad_error is not None
    assert plan.grad_error < 0.01
    assert any("what is computed between layers" in note for note in plan.notes)
    large = run.spec.model_copy(update={"structure": "large"})
    assert transfer_sensitivity(run.sensitivity, large).fp32_always == run.spec.names
    assert carry_plan(plan, run.spec, run.sensitivity).fp32_outputs == run.spec.names
    model, x = run.reference.model, torch.randn(4, WIDTH)
    with torch.no_grad():
        exact = model(x)
        apply(plan, model)
        near, dtypes = model(x), {parameter.dtype for parameter in model.parameters()}
        undo(model)
    assert dtypes == {torch.bfloat16}
    assert float((near - exact).norm() / exact.norm()) < 0.1


def test_a_plan_with_fp32_between_layers_costs_what_is_between_them_in_fp32() -> None:
    spec = capture_model(Context(workload_of(0.0), CPU))
    rows = {x.name: {o: (MS[o.precision], 0.0) for o in x.options} for x in spec.layers}
    profile = profile_of(spec, rows, basis=Basis.PREDICTED).model_copy(
        update={"fixed_ms": 3.0, "fixed_bf16_ms": 1.0, "boundary_cast_ms_per_melement": 1.0}
    )
    table = unknown_sensitivity(spec)
    times = [
        make_costs(
            profile, table.model_copy(update={"islands": (Island(outputs=outputs),)})
        ).step_ms([BF16_O2] * len(spec.layers))
        for outputs in ((), spec.names[:1], spec.names)
    ]
    casts = [io_elements(layer) / 1e6 for layer in spec.layers]
    assert times[1] - times[0] == pytest.approx(casts[0])  # of one layer, those behind it alone
    assert times[2] - times[0] == pytest.approx(2.0 + sum(casts))


def test_a_proxy_says_it_of_the_models_parameters_outside_of_layers_too() -> None:
    run = Run(chain_workload())
    large = run.spec.model_copy(
        update={
            "structure": "large",
            "uncovered": tuple(
                parameter.model_copy(update={"name": f"{parameter.name}.{number}"})
                for parameter in run.spec.uncovered
                for number in range(2)
            ),
        }
    )
    (island,) = transfer_sensitivity(run.sensitivity, large).islands
    assert island.outputs == ("moves.0", "moves.1")
    kept = {"uncovered": island.outputs, "fp32_outputs": island.outputs}
    plan = run.plan().model_copy(update=kept)
    assert carry_plan(plan, run.spec, run.sensitivity).fp32_outputs == ("moves",)
    plain = plan.model_copy(update={"fp32_outputs": ()})
    assert carry_plan(plain, run.spec, run.sensitivity).fp32_outputs == ()


@pytest.mark.parametrize(
    ("enough", "row", "island"),
    [
        ({"behind"}, 0.01, Island(outputs=("behind",))),
        ({"behind!"}, 0.01, Island(names=("behind",))),
        ({"before", "behind"}, 0.01, Island(outputs=("before", "behind"))),
        ({"before", "behind!"}, 0.01, Island(names=("behind",), outputs=("before",))),
        ({"before!", "behind!"}, 0.01, Island(names=("before", "behind"))),
        (set(), 0.04, Island(names=("behind",))),  # its row explains it: no output would help
    ],
)
def test_an_island_has_in_fp32_only_what_rows_do_not_tell(
    run: Run, enough: set[str], row: float, island: Island
) -> None:
    own = {"first": 1e-6, "before": 5e-3, "behind": row, "head": 1e-6}
    rows = [
        LayerSensitivity(name=name, option=BF16_O2, grad_error=Estimate(mean=error))
        for name, error in own.items()
    ]

    def measure(islands: Sequence[Island]) -> float:
        low = {name for x in islands for name in x.names}
        has = {*low, *(name for x in islands for name in x.outputs), *(f"{name}!" for name in low)}
        beyond = 0.0 if enough <= has else 0.03
        return beyond + math.fsum(error for name, error in own.items() if name not in low)

    first, *_ = find_islands(run.reference, rows, 0.05, measure, lambda *_: 0.0)[0]
    assert (first.names, first.outputs) == (island.names, island.outputs)


@pytest.mark.parametrize(
    ("joint", "row", "with_it", "is_found"),
    [
        (0.011, 1.5e-3, 6e-3, True),
        (0.011, 2.7e-3, 0.0108, False),
        (0.011, 2.7e-3, 5e-3, True),
        (2e-3, 1e-4, 9e-4, True),
        (9e-4, 1e-5, 1e-4, False),
    ],
    ids=[
        "what no row knows goes",
        "rows know it all, and it stays",
        "rows know it, and it goes",
        "too much for a long run",
        "it is small",
    ],
)
def test_fp32_between_layers_is_for_what_goes_with_it(
    run: Run, joint: float, row: float, with_it: float, is_found: bool
) -> None:
    names = run.spec.names
    rows = [
        LayerSensitivity(name=name, option=BF16_O2, grad_error=Estimate(mean=row)) for name in names
    ]

    def measure(islands: Sequence[Island]) -> float:
        return with_it if set(islands[-1].outputs) == set(names) else joint

    islands, left = find_islands(run.reference, rows, joint, measure, lambda *_: 0.0)
    assert [island.outputs for island in islands] == [names] * is_found
    assert left == (with_it if is_found else joint)


@pytest.mark.parametrize(
    ("without", "with_it", "is_found"),
    [(0.009, 1e-3, True), (3e-3, 1e-4, True), (0.009, 0.005, False), (9e-4, 1e-4, False)],
    ids=["goes with half of the layers", "for long runs, too", "stays", "is small"],
)
def test_fp32_between_layers_is_for_kinks_that_go_with_the_worse_half_of_them(
    run: Run, without: float, with_it: float, is_found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # kinks that any small error crosses: neither FP32 between layers nor in a few makes it less
    names, joint = run.spec.names, 0.011
    rows = [
        LayerSensitivity(name=name, option=BF16_O2, grad_error=Estimate(mean=(1 + i) * 1e-3))
        for i, name in enumerate(names)
    ]

    def measure(
        _: JointMeter,
        options: Mapping[str, Option],
        *,
        batches: Sequence[int],
        islands: Sequence[Island],
    ) -> Squares:
        assert [*batches] == [1]  # the kinks of the other one are hardly crossed
        low = [name for name, option in options.items() if option == BF16_O2]
        if low != [*names[:2]] or any(x.names for x in islands):  # the half of the smaller rows
            return Squares([1.8 * joint], [1.0])
        return Squares([1.8 * (with_it if islands else without)], [1.0])

    monkeypatch.setattr(JointMeter, "_measure", measure)
    uniform = Squares([0.2 * joint, 1.8 * joint], [1.0, 1.0])
    activations, islands = JointMeter(run.reference).measure_activations(rows, uniform)
    assert [island.outputs for island in islands] == [names] * is_found
    # rows are all that is left of it then
    assert activations.mean == (0.0 if is_found else pytest.approx(joint - 0.01))
    assert sum(x.grad_error for x in islands) == pytest.approx(is_found * (without - with_it))


def test_producers_are_found_through_functions_and_not_through_other_layers(run: Run) -> None:
    found = find_producers(run.reference, ["first", "behind", "head"])
    assert found == {"first": (), "behind": ("before",), "head": ("behind",)}


def test_an_island_is_measured_with_the_layers_that_share_its_storage() -> None:
    spec = capture_model(Context(token_workload(), torch.device("cpu")))
    assert tied_with(spec, ["head"]) == ["embedding", "head"]
    assert tied_with(spec, ["embedding"]) == ["embedding", "head"]
    assert tied_with(spec, ["mix"]) == ["mix"]


def test_fp32_between_layers_costs_one_pass_where_it_does_not_help_half_of_them(run: Run) -> None:
    rows = [
        LayerSensitivity(name=name, option=BF16_O2, grad_error=Estimate(mean=1e-4))
        for name in run.spec.names
    ]
    asked: list[Sequence[Island]] = []

    def measure(islands: Sequence[Island]) -> float:
        asked.append(islands)
        return 0.011

    def measure_low(_: Sequence[str], islands: Sequence[Island]) -> float:
        asked.append(islands)
        return 0.01

    assert find_islands(run.reference, rows, 0.011, measure, measure_low) == ((), 0.011)
    everywhere = [x for islands in asked for x in islands if x.outputs == run.spec.names]
    assert len(everywhere) == 1


def test_what_islands_leave_is_measured_on_the_other_batches(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = run.spec.names
    rows = [LayerSensitivity(name=n, option=BF16_O2, grad_error=Estimate(mean=1e-4)) for n in names]
    asked: list[list[int]] = []

    def measure(
        _: JointMeter,
        options: Mapping[str, Option],
        *,
        batches: Sequence[int],
        islands: Sequence[Island],
    ) -> Squares:
        asked.append([*batches])
        is_between = any(island.outputs == names for island in islands)
        left = {0: 1e-4, 1: 2e-3} if is_between else {0: 0.002, 1: 0.04}
        return Squares([left[index] for index in batches], [1.0] * len(batches))

    monkeypatch.setattr(JointMeter, "_measure", measure)
    uniform = Squares([0.002, 0.04], [1.0, 1.0])
    activations, islands = JointMeter(run.reference).measure_activations(rows, uniform)
    assert [island.outputs for island in islands] == [names]
    assert {*map(tuple, asked[:-1])} == {(1,)}  # the one that has most of the error
    assert asked[-1] == [0]
    own = len(names) * 1e-4
    assert activations.mean == pytest.approx((1e-4 + 2e-3) / 2 - own)
