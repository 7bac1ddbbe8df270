"""What measuring sensitivity takes of memory: bars, predictions, and the smaller way."""

import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import autoprec
from autoprec.errors import DeviceError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.memory import (
    ModelSize,
    layer_groups,
    sensitivity_bar,
    sensitivity_bytes,
    step_bytes,
)
from autoprec.model.recording import Call, recorded_calls
from autoprec.profiler import parking
from autoprec.records import ModelSpec, ParameterSpec, Recipe, fp8_option
from autoprec.sensitivity import probes, room
from autoprec.sensitivity.local import list_cells
from autoprec.sensitivity.parked import InTurn, Parked, back
from autoprec.sensitivity.reference import prepare_reference
from autoprec.sensitivity.replay import differentiated_calls
from autoprec.sensitivity.tables import Method, make_table
from autoprec.workload.functions import Workload
from tests.memory_families import convolutions, decoder, family, mlp, tokens, values
from tests.models import Mlp, mlp_workload, token_workload
from tests.peaks import sensitivity_peak, tracked_peak, training_peak

CPU = torch.device("cpu")
DEEP = decoder(width=64, depth=2, batch=1, sequence=8)
WIDE = decoder(width=32, depth=2, batch=16)
TENSORWISE = fp8_option(Recipe.TENSORWISE)


class Bagged(nn.Module):
    """An embedding bag that holds nearly all parameters, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(4000, 32), nn.Linear(32, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.bag(tokens))  # type: ignore[no-any-return]  # a tensor


class Recurrent(nn.Module):
    """An LSTM, whose replay holds most of what training does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(150, 48), nn.Linear(48, 150)
        self.lstm = nn.LSTM(48, 48, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])  # type: ignore[no-any-return]  # a tensor


def next_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]  # a tensor


def bagged_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens), tokens[:, 0] % 8)


@pytest.fixture(autouse=True)
def every_byte_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the models here, which no device is too small for, as large ones."""
    monkeypatch.setattr(room, "SMALL", 0)


def test_a_small_model_is_probed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(mlp(width=32, depth=1, batch=1024, hidden=256), CPU)
    spec = capture_model(context)
    assert room.plan_groups(context, spec) != (1, False)
    monkeypatch.undo()
    assert room.plan_groups(context, spec) == (1, False)


def measured_peak(workload: Workload) -> tuple[ModelSize, int, int]:
    """Return the size of a model, the bytes that were predicted, and those of the whole stage."""
    context = Context(workload, CPU)
    spec = capture_model(context)
    reference, peak = sensitivity_peak(context, spec, steps=2)
    predicted = sensitivity_bytes(spec, groups=reference.groups, is_parked=reference.is_parked)
    return ModelSize.of(spec), predicted, peak.rise_bytes


def test_at_most_24_bytes_per_parameter_and_6_per_layer_io_element() -> None:
    """Two models of different shape give both slopes: peak = a * parameters + b * elements."""
    found = [measured_peak(workload) for workload in (DEEP, WIDE)]
    sizes = np.array([[size.parameters, size.elements] for size, _, _ in found])
    peaks = np.array([peak for _, _, peak in found])
    a, b = np.linalg.solve(sizes, peaks)
    assert 16.0 < a <= 24.0
    assert 3.3 < b <= 6.0
    for _, predicted, peak in found:
        assert predicted == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("workload", "tolerance"),
    [
        pytest.param(mlp(width=96, depth=6, batch=16), 0.15, marks=pytest.mark.slow),
        pytest.param(convolutions(width=16, depth=2, batch=16), 0.15, marks=pytest.mark.slow),
        (token_workload(), 0.3),  # so small that rows are not taken in parts
    ],
    ids=["mlp", "convolutions", "tied tokens"],
)
def test_the_peak_is_predicted(workload: Workload, tolerance: float) -> None:
    _, predicted, peak = measured_peak(workload)
    assert predicted == pytest.approx(peak, rel=tolerance)


@pytest.mark.parametrize(
    "workload",
    [
        pytest.param(mlp(width=64, depth=2, batch=512), marks=pytest.mark.slow),
        family(lambda: nn.Sequential(nn.Linear(512, 8)), values(512, 512), square),
        family(Bagged, tokens(4000, 64, 8), bagged_loss),
        pytest.param(family(Recurrent, tokens(150, 8, 12), next_loss), marks=pytest.mark.slow),
        pytest.param(
            family(
                lambda: nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 32)),
                values(512, 128),
                square,
            ),
            marks=pytest.mark.slow,
        ),
        family(
            lambda: nn.Sequential(nn.Conv1d(4, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Flatten()),
            values(16, 4, 64),
            square,
        ),
    ],
    ids=[
        "wide batch",
        "one linear",
        "embedding bag",
        "lstm",
        "large operands in FP8",
        "a norm that holds most",
    ],
)
def test_where_training_keeps_within_the_bar_so_does_sensitivity(workload: Workload) -> None:
    """Batches are a large part of shallow models, one parameter all of a bag of embeddings."""
    context = Context(workload, CPU)
    spec = capture_model(context)
    _, peak = sensitivity_peak(context, spec, steps=12)  # the early error too
    assert peak.rise_bytes <= max(sensitivity_bar(spec), 1.1 * training_peak(workload).rise_bytes)


@pytest.mark.slow
def test_a_model_of_few_wide_layers_parks_what_was_recorded() -> None:
    """Training alone is at the bar: no number of groups keeps within it."""
    workload = mlp(width=32, depth=1, batch=1024, hidden=256)
    spec = capture_model(Context(workload, CPU))
    with tracked_peak() as peak:
        reference = prepare_reference(Context(workload, CPU), spec, warmup_steps=2)
        training = peak.rise_bytes
        probes.probe_batches(reference, list_cells(spec, [TENSORWISE]), probes=1)
    assert reference.is_parked
    assert sensitivity_bytes(spec, groups=2) > sensitivity_bar(spec)
    assert peak.rise_bytes < 1.5 * training


def test_what_is_parked_comes_back_as_it_was() -> None:
    x, shared, own, data = (torch.randn(4, 6) for _ in range(4))
    y = shared.t()[1:5]
    calls = [Call((x, 3), {"mask": y}, [own]), Call((shared, data[:, :1]), {}, [None])]
    expected = [tensor.clone() for tensor in (y, shared, own, data[:, :1])]
    seen = [weakref.ref(each) for each in (own, data)]
    Parked().leave(calls)
    assert not isinstance(calls[0].args[0], torch.Tensor)
    del shared, y, own, data
    assert [each() for each in seen] == [None, None]
    first, second = map(back, calls)
    assert not isinstance(calls[0].args[0], torch.Tensor)
    assert first.args[0].data_ptr() == x.data_ptr()  # somebody else holds it
    returned = first.kwargs["mask"], second.args[0], first.gradients[0], second.args[1]
    assert all(map(torch.equal, expected, returned))
    assert returned[0].stride() == (1, 6)  # a view, as before
    assert returned[0].untyped_storage()._cdata == returned[1].untyped_storage()._cdata
    assert returned[3].untyped_storage().nbytes() == 4 * 4  # a small part of a tensor is alone
    assert second.gradients == [None]


def test_what_leaves_bit_by_bit_is_written_once() -> None:
    x, kept = torch.randn(4, 6), torch.randn(2)
    calls = [Call((x,), {}, [kept]), Call((x[1:], kept), {}, [])]
    parked = Parked()
    for _ in range(2):
        for call in calls:
            parked.leave([call])
    expected = x.clone()
    del x
    first, second = map(back, calls)
    assert torch.equal(first.args[0], expected)
    assert second.args[0].untyped_storage()._cdata == first.args[0].untyped_storage()._cdata
    assert second.args[1].data_ptr() == kept.data_ptr()
    # a gradient is added to in place, as autograd does where nobody has it, and is somebody's then
    passed = torch.ones(3)
    one, other = (Call((), {}, [passed]) for _ in range(2))
    parked.leave([one], passing="gradients")
    passed += 1
    parked.leave([other], passing="gradients")
    passed += 1
    gradients = [gradient for call in (one, other) for gradient in back(call).gradients]
    assert [None if g is None else float(g.sum()) for g in gradients] == [3.0, 6.0]
    # another gradient comes to one that left
    (before,) = calls[0].gradients
    assert before is not None
    calls[0].gradients[0] = before + kept
    parked.leave(calls)
    (total,) = back(calls[0]).gradients
    assert total is not None
    assert torch.equal(total, 2 * kept)


def test_what_cannot_be_written_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = Path("/dev/full").open("r+b")  # noqa: SIM115  # closed with its owner
    monkeypatch.setattr(parking, "TemporaryFile", lambda **_: full)
    x = torch.randn(3)
    call = Call((x,), {})
    Parked().leave([call])
    assert "No space left" in caplog.text
    assert back(call).args[0] is x


def test_one_value_is_in_memory_at_a_time() -> None:
    def drawn() -> Iterator[dict[str, torch.Tensor]]:
        for number in range(3):
            yield {"x": torch.full((1000,), float(number))}

    with tracked_peak() as peak:
        values = InTurn(drawn(), CPU)
        for _ in range(2):
            assert [float(values[n]["x"][0]) for n in range(3)] == [0.0, 1.0, 2.0]
    assert peak.rise_bytes < 2 * 4000
    held = values[0]["x"]
    assert float(values[1]["x"][0]) == 1.0
    assert values[0]["x"].data_ptr() == held.data_ptr()  # taken again, not read
    values[1] = values[0]
    assert len(values) == 3
    assert torch.equal(values[1]["x"], held)
    on_host = InTurn([torch.ones(1), torch.zeros(1)], torch.device("cuda"))
    assert all(a is b for a, b in zip(on_host, on_host, strict=True))


def test_packed_sequences_are_recorded_and_stay_where_they_are() -> None:
    """Their constructor takes tensors alone, and nothing that stands for one."""
    rnn = nn.GRU(4, 4)
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    with recorded_calls({"rnn": rnn}) as calls, recorded_calls({"rnn": rnn}, keep=_shape) as shapes:
        rnn(packed)
    assert shapes["rnn"][0].args[0][:2] == ((5, 4), (3,))
    Parked().leave(calls["rnn"])
    assert torch.equal(back(calls["rnn"][0]).args[0].data, packed.data)


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def test_neither_groups_nor_parking_change_a_number() -> None:
    workload = token_workload(dropout=0.5)
    spec = capture_model(Context(workload, CPU))
    cells = list_cells(spec, None)
    tables = []
    for groups, is_parked in ((1, False), (3, False), (2, True)):
        reference = prepare_reference(Context(workload, CPU), spec, warmup_steps=3)
        reference.groups, reference.is_parked = groups, is_parked
        tables.append(make_table(reference, cells, Method.SIGN_CODED))
    assert tables[0] == tables[1] == tables[2]


def spread(spec: ModelSpec, shards: int) -> ModelSpec:
    """Return a model whose parameters are each divided over so many ranks."""

    def divided(parameters: tuple[ParameterSpec, ...]) -> tuple[ParameterSpec, ...]:
        return tuple(each.model_copy(update={"shards": shards}) for each in parameters)

    layers = tuple(
        layer.model_copy(update={"parameters": divided(layer.parameters)}) for layer in spec.layers
    )
    return spec.model_copy(update={"layers": layers, "uncovered": divided(spec.uncovered)})


def test_what_a_rank_takes_falls_with_their_number() -> None:
    spec = capture_model(Context(DEEP, CPU))
    one, two, eight = (sensitivity_bytes(spread(spec, count)) for count in (1, 2, 8))
    assert one > 1.5 * two > 2.0 * eight
    assert step_bytes(spread(spec, 2)) < step_bytes(spec)


def test_groups_have_neighbours_of_alike_size() -> None:
    spec = capture_model(Context(DEEP, CPU))
    for count in (1, 2, 5, 1000):
        groups = layer_groups(spec, count)
        assert [name for names in groups for name in names] == list(spec.names)
        assert len(groups) == min(count, len(groups))


def test_the_limit_decides_how_many_layers_are_probed_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = capture_model(Context(WIDE, CPU))
    ample = Context(WIDE, CPU, memory_limit=2**30)
    with caplog.at_level(logging.INFO):
        assert prepare_reference(ample, spec, warmup_steps=1).groups == 1
    assert "sensitivity takes about" in caplog.text
    assert "in 1 groups" in caplog.text
    limit = round(1.1 * sensitivity_bytes(spec, groups=3)) + 1
    tight = Context(WIDE, CPU, memory_limit=limit)
    assert prepare_reference(tight, spec, warmup_steps=1).groups == 3
    with pytest.raises(DeviceError, match="--memory-limit") as caught:
        prepare_reference(Context(WIDE, CPU, memory_limit=2**20), spec)
    assert "\n" not in str(caught.value)


def test_a_full_device_means_smaller_groups_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workload = token_workload()
    spec = capture_model(Context(workload, CPU))
    reference = prepare_reference(Context(workload, CPU), spec, warmup_steps=3)
    reference.groups = 1
    cells = list_cells(spec, None)
    whole = make_table(reference, cells, Method.SIGN_CODED)
    weights = [parameter.clone() for parameter in reference.model.parameters()]
    recorded = differentiated_calls

    def full(layers: dict[str, torch.nn.Module], *, is_parked: bool) -> object:
        if len(layers) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recorded(layers, is_parked=is_parked)

    monkeypatch.setattr(probes, "differentiated_calls", full)
    assert make_table(reference, cells, Method.SIGN_CODED) == whole
    assert reference.groups > 1
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert all(map(torch.equal, weights, reference.model.parameters()))


def test_a_limit_below_all_ways_is_told_before_the_profile(tmp_path: Path) -> None:
    given = mlp_workload()
    functions = {"build_model": Mlp, "train_batches": given.train_batches, "loss_fn": given.loss_fn}
    out, word = tmp_path / "run", "but sensitivity takes about .* even with few layers at a time"
    with pytest.raises(DeviceError, match=word):
        autoprec.tune(functions, target="h100-sxm", memory_limit="20KiB", out=out)
    assert not (out / "profile.json").exists()
