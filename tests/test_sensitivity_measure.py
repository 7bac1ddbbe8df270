"""The stage from end to end, the joint meter, the shared reference, and bad input."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from autoprec.errors import AutoprecError, RecordError, WorkloadError
from autoprec.model.averaging import GradientAverage
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import (
    BF16_O2,
    FP32,
    ModelSpec,
    Operand,
    Option,
    Recipe,
    Sensitivity,
    fp8_option,
)
from autoprec.runtime import install_options
from autoprec.sensitivity.causes import explain_statistics
from autoprec.sensitivity.hooks import after_hooks, has_hooks
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.sensitivity.tables import Method
from autoprec.workload.functions import Workload, workload_from
from tests.models import Mlp, mlp_workload, token_workload
from tests.optimizer_zoo import Together

CPU = torch.device("cpu")
BATCHES = 2  # of a joint measurement, as a search asks for
TENSORWISE = fp8_option(Recipe.TENSORWISE)


def captured(workload: Workload) -> ModelSpec:
    return capture_model(Context(workload, CPU))


def warmed_up(
    workload: Workload, spec: ModelSpec, *, seed: int = 0, warmup_steps: int = 3, **terms: Any
) -> Reference:
    context = Context(workload, CPU, seed)
    return prepare_reference(context, spec, warmup_steps=warmup_steps, **terms)


def uniform(spec: ModelSpec, option: Option) -> tuple[Option, ...]:
    return tuple(option if option in layer.options else BF16_O2 for layer in spec.layers)


def changed(workload: Workload, **functions: object) -> Workload:
    """Return the workload with some of its functions exchanged."""
    names = ("build_model", "train_batches", "loss_fn", "build_optimizer")
    own = {name: getattr(workload, name) for name in names}
    return workload_from(SimpleNamespace(**{**own, **functions}), name="changed")


def test_a_measurement_is_whole_and_survives_its_file(tmp_path: Path) -> None:
    workload = mlp_workload()
    spec = captured(workload)
    found = measure_sensitivity(warmed_up(workload, spec, warmup_steps=6))
    cells = {(layer.name, option) for layer in spec.layers for option in layer.options}
    assert {(row.name, row.option) for row in found.rows} == {c for c in cells if c[1] != FP32}
    assert all(row.grad_error.stderr is not None for row in found.rows)
    assert found.preconditioner == "adam"
    assert found.floor.mean == 0.0
    assert 0.0 <= found.activation_error.mean < 1e-3
    assert len(found.loss_curve) == found.warmup_steps == 6
    assert found.joint[0].label == "fp8_everywhere"
    assert found.by_step[-1].grad_error == found.joint[0].grad_error  # measured once
    assert found.joint[0].grad_error.mean == pytest.approx(
        found.joint[0].predicted_grad_error, rel=0.5
    )
    path = found.save(tmp_path / "sensitivity.json")
    assert Sensitivity.load(path) == found


def test_same_seed_same_table() -> None:
    workload = mlp_workload()
    spec = captured(workload)
    one, other = (measure_sensitivity(warmed_up(workload, spec, seed=5)) for _ in range(2))
    assert one.rows == other.rows
    assert one.loss_curve == other.loss_curve


def test_the_model_is_left_as_it_was() -> None:
    workload = mlp_workload()
    spec = captured(workload)
    reference = warmed_up(workload, spec)
    before = {k: v.clone() for k, v in reference.model.state_dict().items()}
    classes = [type(module) for module in reference.model.modules()]
    for method in Method:
        measure_sensitivity(reference, method=method)
    assert classes == [type(module) for module in reference.model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in reference.model.state_dict().items())


def test_one_reference_serves_sensitivity_and_search() -> None:
    workload = mlp_workload()
    spec = captured(workload)
    options = uniform(spec, TENSORWISE)
    reference = warmed_up(workload, spec)
    shared = measure_sensitivity(reference)
    alone = measure_sensitivity(warmed_up(workload, spec))
    assert shared.rows == alone.rows
    assert shared.passes == alone.passes
    before = reference.passes
    meter = JointMeter(reference)
    found = meter.measure(options, BATCHES)
    assert reference.passes - before == 2  # nothing is warmed up or run for the reference again
    assert found == JointMeter(warmed_up(workload, spec)).measure(options, BATCHES)


def test_a_plan_is_measured_once_and_all_fp32_costs_nothing() -> None:
    workload = mlp_workload()
    spec = captured(workload)
    meter = JointMeter(warmed_up(workload, spec))
    first = meter.measure(uniform(spec, TENSORWISE), BATCHES)
    passes = meter.reference.passes
    assert meter.measure(uniform(spec, TENSORWISE), BATCHES) == first
    assert meter.reference.passes == passes
    assert meter.measure((FP32,) * len(spec.layers), BATCHES).mean == 0.0
    assert first.mean > meter.measure((BF16_O2,) * len(spec.layers), BATCHES).mean > 0.0


def test_dropout_is_paired_so_that_its_floor_is_zero() -> None:
    workload = token_workload(dropout=0.5)
    spec = captured(workload)
    assert spec.has_randomness
    reference = warmed_up(workload, spec)
    assert reference.squared_error(0, reference.gradient(0)) == 0.0
    quiet = measure_sensitivity(reference)
    assert max(row.grad_error.mean for row in quiet.rows if row.option == BF16_O2) < 1e-2


def test_a_reference_that_differs_from_run_to_run_is_reported() -> None:
    plain = mlp_workload()
    noise = torch.Generator().manual_seed(0)

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = batch[0] + 1e-3 * torch.randn(batch[0].shape, generator=noise)
        return F.mse_loss(model(x), batch[1])

    workload = changed(plain, loss_fn=loss_fn)
    spec = captured(workload)
    found = measure_sensitivity(warmed_up(workload, spec))
    assert not spec.is_deterministic
    assert found.floor.mean > 0.0
    assert any("two runs of the reference differ" in note for note in found.notes)


def test_a_fallback_preconditioner_is_said_in_the_notes() -> None:
    workload = changed(
        mlp_workload(), build_optimizer=lambda model: Together(model.parameters(), lr=1e-2)
    )
    found = measure_sensitivity(warmed_up(workload, captured(workload)))
    assert found.preconditioner == "identity"
    assert any("Together: no rule for 100 %" in note for note in found.notes)


def test_rows_that_are_measured_with_their_neighbours_are_said_to_be_guesses() -> None:
    def build_model() -> nn.Module:
        teacher = [nn.Linear(16, 16) for _ in range(16)]
        return nn.ModuleDict({"student": nn.Linear(16, 16), "teacher": nn.Sequential(*teacher)})

    def loss_fn(model: Any, batch: torch.Tensor) -> torch.Tensor:  # Any: entries by name
        with torch.no_grad():
            target = model["teacher"](batch)
        return F.mse_loss(model["student"](batch), target)

    functions = {
        "build_model": build_model,
        "train_batches": lambda seed: iter(torch.linspace(-2, 2, 64 * 32 * 16).view(64, 32, 16)),
        "loss_fn": loss_fn,
    }
    workload = workload_from(SimpleNamespace(**functions), name="teacher")
    reference = warmed_up(workload, captured(workload))
    found = measure_sensitivity(reference, options=[TENSORWISE], method=Method.SIGN_CODED)
    note = next(note for note in found.notes if "neighbours" in note)
    assert "so that single rows are a guess: teacher.0, teacher.1, teacher.10, " in note


def test_gradients_too_large_to_keep_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = mlp_workload()
    spec = captured(workload)
    kept = measure_sensitivity(warmed_up(workload, spec))
    monkeypatch.setattr("autoprec.sensitivity.reference.KEPT_SHARE", 0)
    again = measure_sensitivity(warmed_up(workload, spec))
    assert again.rows == kept.rows
    assert again.passes > kept.passes


def constant(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(model(batch[0]) * 0.0, batch[1])


def test_a_checkpoint_that_is_not_there_is_one_clear_line() -> None:
    workload = mlp_workload()
    with pytest.raises(AutoprecError, match="must be readable") as caught:
        prepare_reference(Context(workload, CPU), captured(workload), checkpoint=Path("nowhere.pt"))
    assert "\n" not in str(caught.value)


def test_a_constant_loss_is_refused() -> None:
    workload = changed(mlp_workload(), loss_fn=constant)
    with pytest.raises(WorkloadError, match=r"its gradient is zero .* \(32 batches in a row"):
        measure_sensitivity(warmed_up(workload, captured(workload)))


def sometimes_kept(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return a loss that is 0 in most batches, as a hinge that all samples keep."""
    loss = F.mse_loss(model(batch[0]), batch[1])
    return loss if batch[1].sum() > 150.0 else F.relu(loss * 1e-9 - 1.0)


@pytest.mark.parametrize("method", Method)
def test_batches_without_a_gradient_are_passed_over_and_said(method: Method) -> None:
    workload = changed(mlp_workload(), loss_fn=sometimes_kept)
    reference = warmed_up(workload, captured(workload), warmup_steps=12)
    stream = list(islice(workload.train_batches(0), 12, 64))
    moving = [i for i, (_, y) in enumerate(stream) if y.sum() > 150.0]
    over = moving[1] - 1
    assert over > 0  # or this shows nothing
    found = measure_sensitivity(reference, method=method)
    assert f"after 12 steps {over} of the next {2 + over} batches" in " ".join(found.notes)
    wanted = [stream[i][0] for i in moving[:6]]  # two, and four for plans that they leave open
    taken = [x for x, _ in reference.longer.batches]
    assert all(torch.equal(a, b) for a, b in zip(taken, wanted, strict=True))
    assert all(0.0 < row.grad_error.mean < 1.0 for row in found.rows if row.option == TENSORWISE)


def test_another_models_spec_is_refused() -> None:
    with pytest.raises(AutoprecError, match="must be the captured one"):
        warmed_up(mlp_workload(), captured(token_workload()))


def test_checkpoints_start_where_they_were_saved(tmp_path: Path) -> None:
    workload = mlp_workload()
    spec = captured(workload)
    model = workload.build_model(seed=3)
    with torch.no_grad():
        model.get_parameter("first.weight").fill_(0.25)
    optimizer = workload.build_optimizer(model)
    for _ in range(2):
        workload.loss_fn(model, next(workload.train_batches(0))).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(whole, tmp_path / "whole.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    for name in ("whole.pt", "bare.pt"):
        reference = warmed_up(workload, spec, warmup_steps=1, checkpoint=tmp_path / name)
        moved = reference.model.get_parameter("first.weight") - model.get_parameter("first.weight")
        assert float(moved.detach().abs().max()) < 0.02
        assert reference.checkpoint.endswith(name)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"not a checkpoint", "weights_only=True"),
        ({"model": {"other": torch.ones(1)}}, "must fit the model"),
        ([1, 2], "must be a state dict"),
    ],
)
def test_broken_checkpoints_are_one_clear_line(tmp_path: Path, content: object, rule: str) -> None:
    path = tmp_path / "broken.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    workload = mlp_workload()
    with pytest.raises(RecordError, match=rule) as caught:
        warmed_up(workload, captured(workload), checkpoint=path)
    assert "\n" not in str(caught.value)


def test_the_random_state_of_the_process_is_not_moved() -> None:
    workload = token_workload(dropout=0.5)
    spec = captured(workload)
    before = torch.get_rng_state()
    reference = warmed_up(workload, spec)
    measure_sensitivity(reference)
    JointMeter(reference).measure(uniform(spec, TENSORWISE), BATCHES)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("offset", [0.0, 3.0, 12.0, 300.0])
def test_an_offset_is_told_from_spread_and_put_into_words(offset: float) -> None:
    plain = mlp_workload()

    def train_batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, y in plain.train_batches(seed):
            side = torch.ones(x.shape[-1])
            side[::2] = -1.0  # each channel has an offset of its own
            yield x + offset * side, y

    workload = changed(plain, train_batches=train_batches)
    found = measure_sensitivity(warmed_up(workload, captured(workload)))
    (row,) = (r for r in found.statistics if (r.name, r.operand) == ("first", Operand.INPUT))
    assert row.mean_over_std == pytest.approx(offset, rel=0.1, abs=0.2)  # inputs are N(0, 1)
    text = explain_statistics([row], recipe="")  # none, of which a repair was measured
    assert ("input: mean" in text) == (offset > 1.0)


def test_underflow_is_put_into_words() -> None:
    plain = mlp_workload()

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        scale = 10.0 ** -torch.arange(len(batch[0])).div(6.0)[:, None]  # tokens of any weight
        return F.mse_loss(model(batch[0]) * scale, batch[1] * scale)

    workload = changed(plain, loss_fn=loss_fn)
    found = measure_sensitivity(warmed_up(workload, captured(workload)))
    rows = [row for row in found.statistics if row.name == "first"]
    text = explain_statistics(rows, recipe="rowwise")
    assert "grad_output" in text
    assert "underflow under rowwise; rowwise_with_gw_hp" in text


def test_averaging_over_ranks_is_no_hook_at_a_gradient() -> None:
    layer = nn.Linear(4, 4, bias=False)
    GradientAverage(list(layer.parameters()), None, 2).watch()
    error = torch.ones(4, 4)
    with install_options(layer, {"": BF16_O2}, root=False):  # puts casts around hooks
        assert not has_hooks(layer.weight)
        layer.weight.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]  # torch's
        assert not after_hooks(layer.weight, error, at=error).any()


def _masked(mask: torch.Tensor) -> Any:  # Any: a hook, as torch calls it
    def hook(_: nn.Module, gradients: Any, *__: Any) -> Any:
        return (gradients[0] * mask,)

    return hook


AT_MODULES: dict[str, Callable[[Mlp, torch.Tensor], object]] = {  # where a part of a gradient stays
    "before a layer": lambda m, mask: m.second.register_full_backward_hook(_masked(mask[0])),
    "behind a layer": lambda m, mask: m.second.register_full_backward_pre_hook(_masked(mask[:, 0])),
    "behind all": lambda m, mask: m.register_full_backward_pre_hook(_masked(mask[:10, 1])),
}


def _hooked_mlp(kind: str) -> Mlp:
    """Return the Mlp, four fifths of whose second weight are kept still, by one of these kinds."""
    model = Mlp()
    weight, generator = model.second.weight, torch.Generator().manual_seed(3)
    mask = (torch.rand(weight.shape, generator=generator) > 0.8).float()
    model.head.register_full_backward_hook(lambda _m, got, _: None)  # one that looks
    if kind == "prune":
        prune.random_unstructured(model.second, "weight", 0.8)  # type: ignore[no-untyped-call]  # torch
    elif kind == "parametrize":
        parametrize.register_parametrization(model.second, "weight", Masked(mask))
    elif kind == "gradient":  # of half the size, too
        weight.register_hook(lambda gradient: gradient * mask / 2)  # type: ignore[no-untyped-call]  # torch
    elif kind == "held":
        weight.data *= mask

        def hold(parameter: torch.Tensor) -> None:
            parameter.grad = None if parameter.grad is None else parameter.grad * mask

        weight.register_post_accumulate_grad_hook(hold)  # type: ignore[no-untyped-call]  # torch's
    elif kind in AT_MODULES:
        AT_MODULES[kind](model, mask)
    return model


class Masked(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        mask = self.get_buffer("mask")
        return weight * mask.to(weight.dtype)


def measured_both_ways(workload: Workload) -> list[Sensitivity]:
    """Return the sensitivity to TENSORWISE, layer by layer and by probes."""
    spec = captured(workload)
    return [
        measure_sensitivity(
            warmed_up(workload, spec, warmup_steps=6), options=[TENSORWISE], method=method
        )
        for method in (Method.LAYERWISE, Method.SIGN_CODED)
    ]


class Following(nn.Module):
    """A network, and a frozen one of its shape that every call moves towards it."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = nn.Linear(32, 16), nn.Linear(32, 16)
        self.target.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for own, trained in zip(
                self.target.parameters(), self.online.parameters(), strict=True
            ):
                own.lerp_(trained, 0.1)
        return F.mse_loss(self.online(x), self.target(x.roll(1, 0)))


def test_a_network_that_follows_the_trained_one_is_the_same_in_every_pass() -> None:
    workload = changed(
        mlp_workload(), build_model=Following, loss_fn=lambda model, batch: model(batch[0][:, :32])
    )
    reference = warmed_up(workload, captured(workload))
    before = {name: p.clone() for name, p in reference.model.named_parameters()}
    assert reference.squared_error(0, reference.gradient(0)) == 0.0
    reference.put_back()
    for name, parameter in reference.model.named_parameters():
        assert torch.equal(parameter, before[name])


class SparseAndDouble(nn.Module):
    """A table with sparse gradients, and a head in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = (
            nn.EmbeddingBag(64, 32, mode="mean", sparse=True),
            nn.Linear(32, 32),
        )
        self.head = nn.Linear(32, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(F.gelu(self.inner(self.table(ids)))).double()
        return F.cross_entropy(logits, ids.sum(1) % 16)


class Apart(nn.Module):
    """A network whose layers act on its loss otherwise than by the gradients that come back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 16)
        self.teacher, self.cut = nn.Linear(32, 16).requires_grad_(False), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = x.clone().requires_grad_()
        # a step along a gradient, on the way to the loss
        (step,) = torch.autograd.grad(self.second(F.gelu(self.first(moved))).sum(), moved)
        with torch.no_grad():
            target = self.teacher(x + step).float()
        y = self.second(F.gelu(self.first(x)))
        return F.mse_loss(y, target + self.cut(x.roll(1, 0)).detach())


class FixedPoint(nn.Module):
    """A network that steps to a fixed point without gradients, and once more with them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(32, 32), nn.Linear(32, 32)
        self.after, self.head = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        driven, found = self.first(x), torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(8):
                found = torch.tanh(2.0 * self.inner(found) + driven)
        found = torch.tanh(2.0 * self.inner(found) + driven)
        return F.mse_loss(self.head(F.silu(self.after(found))).float(), x.roll(1, 0))


class Cached(nn.Linear):
    """Gives another shape where its cache is filled, as it is when the layer is run again."""

    def forward(self, x: torch.Tensor, cache: list[int]) -> torch.Tensor:  # type: ignore[override]
        cache.append(len(x))
        return super().forward(x if len(cache) == 1 else x[:1])


class HandedOn(nn.Module):
    """A network whose layers take more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 16), Cached(16, 16), nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.third(self.second(F.gelu(self.first(x)), [])).float(), x)


class Stateful(nn.Module):
    """A network that binds its state to a buffer in each step, in the dtype of its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(32, 16), nn.GRUCell(16, 16), nn.Linear(16, 32)
        self.state = nn.Buffer(torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.cell(F.gelu(self.first(x)), self.state.expand(len(x), 16))
        self.state = nn.Buffer(state.detach().mean(0))
        return F.mse_loss(self.last(state).float(), x)


class Spectral(nn.Module):
    """Complex weights between two linears, without a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 16)
        self.modes = nn.Parameter(torch.randn(17, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.fft.irfft(torch.fft.rfft(self.first(x).float()) * self.modes)
        return F.mse_loss(self.second(F.gelu(mixed)), x[:, 16:])


class Leaky(nn.Module):
    """A neuron that keeps its voltage from call to call, and the graph behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.full((32,), 0.9))
        self.voltage: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.voltage = x if self.voltage is None else self.beta * self.voltage + x
        return torch.tanh(self.voltage)


class Spiking(nn.Module):
    """A network that resets its neurons at the start of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.neuron, self.last = nn.Linear(32, 32), Leaky(), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.neuron.voltage = None
        for _ in range(3):
            y = self.last(self.neuron(self.first(x)))
        return F.mse_loss(y.float(), x)


def _of_inputs(build_model: Callable[[], nn.Module]) -> Workload:
    """Return a workload of a model that makes its loss of 32 inputs itself."""
    return changed(
        mlp_workload(),
        build_model=build_model,
        loss_fn=lambda model, batch: model(batch[0][:, :32]),
    )


def _hooked(kind: str) -> Workload:
    """Weight decay gives masked elements moments in Adam; their errors do not reach it."""
    return changed(
        mlp_workload(),
        build_model=lambda: _hooked_mlp(kind),
        build_optimizer=lambda model: torch.optim.Adam(model.parameters(), weight_decay=0.01),
    )


def _sparse_and_double() -> Workload:
    def batches(seed: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(64, (128, 3), generator=generator)

    return changed(
        mlp_workload(),
        build_model=SparseAndDouble,
        train_batches=batches,
        loss_fn=lambda model, ids: model(ids),
        build_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )


UNLIKE: dict[str, Callable[[], Workload]] = {  # networks that are no plain chain of layers
    **{k: partial(_hooked, k) for k in ("gradient", "held", "parametrize", "prune", *AT_MODULES)},
    "no_grad, detached, sampled": partial(_of_inputs, Apart),
    "a fixed point": partial(_of_inputs, FixedPoint),
    "complex": partial(_of_inputs, Spectral),
    "a cache": partial(_of_inputs, HandedOn),
    "a state": partial(_of_inputs, Stateful),
    "a layer with a state": partial(_of_inputs, Spiking),
    "sparse and double": _sparse_and_double,
}


@pytest.mark.filterwarnings("ignore:Full backward hook")  # of the whole model, whose input has none
@pytest.mark.parametrize("kind", UNLIKE)
def test_both_ways_measure_the_same_of_any_network(kind: str) -> None:
    exact, probed = measured_both_ways(UNLIKE[kind]())
    for one, other in zip(exact.rows, probed.rows, strict=True):
        assert 0.6 < other.grad_error.mean / one.grad_error.mean < 1.6, (one, other)
    assert max(row.grad_error.mean for row in exact.rows) < 0.03
    # hooks that hand back other gradients than derivatives: probes were off by 0.3 to 38 times
    assert (probed.method == Method.LAYERWISE) is (kind in AT_MODULES)


def test_complex_weights_count_with_both_parts() -> None:
    workload = _of_inputs(Spectral)
    reference = warmed_up(workload, captured(workload))
    weight, found = reference.model.get_parameter("modes"), reference.gradient(0).of
    reference.run(0)
    assert weight.grad is not None
    assert torch.equal(torch.view_as_complex(found[weight]), weight.grad)
    assert reference.preconditioner.name == "adam"  # of the state's own complex moments
    assert reference.preconditioner.weight(weight, at=found[weight]).shape == (17, 2)
