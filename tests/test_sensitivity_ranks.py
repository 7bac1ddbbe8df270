"""Probes and ranges on two ranks: divided layers, and batches of their own."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from autoprec.device.ranks import rank
from autoprec.errors import WorkloadError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.local_copy import local_copy
from autoprec.model.memory import probing_bytes
from autoprec.model.parallel import parallel_workload
from autoprec.records import Estimate, Gemm, LayerSensitivity, Option, Recipe, fp8_option
from autoprec.sensitivity import room, tables
from autoprec.sensitivity.batching import measure_batch_effect
from autoprec.sensitivity.casts import gemm_casts
from autoprec.sensitivity.choices import recorded_choices
from autoprec.sensitivity.estimates import ratio_estimate
from autoprec.sensitivity.local import Cell, components_of, list_cells
from autoprec.sensitivity.probes import BatchProbe, operand_statistics, probe_batches
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.sensitivity.replay import differentiated_calls, replay
from autoprec.sensitivity.rows import estimate, make_rows
from autoprec.workload.functions import Workload
from tests.rank_workloads import (
    loss_fn,
    shallow,
    shard_blocks,
    train_batches,
    workload,
    workload_of,
)
from tests.ranks import run_ranks

RANKS = 2
TIES = 5e-3  # of a few hundred roundings to BF16 one falls to the other side: sums in another order
CPU = torch.device("cpu")
OPTIONS = [fp8_option(recipe) for recipe in (Recipe.TENSORWISE, Recipe.ROWWISE)]
UP, DOWN = ("blocks.0.up", "blocks.1.up"), ("blocks.0.down", "blocks.1.down")
# Results that are sums of two ranks' parts, each rounded to BF16 before: other numbers in BF16.
PARTIAL = {(name, Gemm.GRAD_INPUT) for name in UP} | {(name, Gemm.OUTPUT) for name in DOWN}
IN_SEQUENCE = {  # tokens of their own: gradients of weights that all ranks have are such sums too
    *PARTIAL - {("blocks.1.up", Gemm.GRAD_INPUT)},
    *((f"blocks.{number}.norm", Gemm.GRAD_WEIGHT) for number in range(2)),
    *(("blocks.1.up", Gemm.GRAD_WEIGHT), ("head", Gemm.GRAD_INPUT)),
}


def _mesh(device_type: str) -> Any:  # Any: a DeviceMesh, and so below
    return init_device_mesh(device_type, (RANKS,), mesh_dim_names=("tp",))


def _split(model: nn.Module, mesh: Any) -> nn.Module:
    for block in model.get_submodule("blocks").children():
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def _split_tokens(model: nn.Module, mesh: Any) -> nn.Module:
    """Divide tokens between the layers that are divided; the second `up` is whole and has both."""
    rows = RowwiseParallel(output_layouts=Shard(1))
    plan = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)), "down": rows}
    down = RowwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1))
    first, second = model.get_submodule("blocks").children()
    parallelize_module(first, mesh, plan)
    parallelize_module(second, mesh, plan | {"up": SequenceParallel(), "down": down})
    embed = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return parallelize_module(model, mesh, {"embed": embed, "head": head})


WAYS: dict[str, tuple[Callable[..., Any], set[Any]]] = {  # and what is rounded in parts
    "tp": (_split, PARTIAL),
    "tokens": (_split_tokens, IN_SEQUENCE),
}
OWN_BATCHES: dict[str, dict[str, Callable[..., Any]]] = {
    "ddp": {},
    "fsdp": {"parallelize": shard_blocks},
}


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer that does not make a change of an update's sign of rounding noise."""
    return torch.optim.SGD(model.parameters(), lr=0.5)


def _adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters())


def _muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])


BY_MATRIX = {"adafactor": _adafactor, "muon": _muon}  # whose P of an element depends on the others


ONE_BLOCK: dict[str, Callable[..., Any]] = {"build_model": shallow, "build_optimizer": _sgd}


def _plain(**more: Callable[..., Any]) -> Workload:
    return workload(**ONE_BLOCK | more)


def _joined(ranks: int, **more: Callable[..., Any]) -> Workload:
    return workload_of(ranks, **ONE_BLOCK | more)


def _measured(given: Workload, *, batches: int = 2) -> tuple[Reference, list[Cell]]:
    context = Context(parallel_workload(given, CPU), CPU, 3)
    spec = capture_model(context)
    reference = prepare_reference(context, spec, warmup_steps=2, batches=batches)
    return reference, list_cells(spec, OPTIONS)


def _numbers(given: Workload) -> dict[str, Any]:  # Any: JSON values
    reference, cells = _measured(given)
    reference.groups = 2  # by memory it is what a rank holds that decides
    probes = probe_batches(reference, cells, probes=1)
    passes = reference.passes
    ranges = {f"{each.name} {each.operand}": each for each in probes[0].statistics}
    assert list(ranges.values()) == operand_statistics(reference, cells)[0]
    return {
        "passes": passes,
        "rows": [
            (name, option.key, gemm, value.mean)
            for name, option in cells
            for gemm, value in _by_gemm(probes, name, option).items()
        ],
        "ranges": {name: json.loads(each.model_dump_json()) for name, each in ranges.items()},
    }


def _by_gemm(probes: list[BatchProbe], name: str, option: Option) -> dict[Gemm, Estimate]:
    """Return the parts of a row, without what kinks change."""
    spreading = components_of(option).items()
    nothing, scale = [0.0] * len(probes), [probe.squared_norm for probe in probes]
    found = {
        gemm: estimate(probes, {(name, one): 1.0 for one in components}, nothing)
        for gemm, components in spreading
    }
    sides = gemm_casts(option).get(Gemm.GRAD_WEIGHT, ())
    staying = [probe.parameter_errors[name].get(sides, 0.0) for probe in probes]
    return found | {Gemm.GRAD_WEIGHT: ratio_estimate(staying, scale)}


def _rows(
    reference: Reference, cells: list[Cell]
) -> list[tuple[LayerSensitivity, dict[Gemm, Estimate]]]:
    probes = probe_batches(reference, cells, probes=1)
    parts = [_by_gemm(probes, *cell) for cell in cells]
    return list(zip(make_rows(probes, cells), parts, strict=True))


def _rows_or_refusal(given: Workload) -> list[LayerSensitivity] | str:
    try:
        return [row for row, _ in _rows(*_measured(given, batches=4))]
    except WorkloadError as error:
        return str(error)


def _effect(reference: Reference) -> list[float]:
    """Return what a batch of all ranks has in common with others: of the error, the gradient."""
    options = {**reference.spec.bf16_options, **dict.fromkeys((UP[0], DOWN[0]), OPTIONS[1])}
    found = measure_batch_effect(reference, options, tokens=10**4)
    parts = (found.systematic, found.gradient)
    return [found.batch_tokens, *(x for e in parts for x in (e.mean, e.stderr or 0.0))]


def _rows_of_a_full_rank(
    reference: Reference, cells: list[Cell]
) -> tuple[int, list[LayerSensitivity]]:
    """Return groups and rows where rank 1 has memory for a few layers at a time."""
    limit = room.MARGIN * probing_bytes(reference.spec, groups=3)
    reference.groups = 1
    with mock.patch.object(room, "can_take", lambda _, size: rank() == 0 or size <= limit):
        probes = tables._probed(reference, cells, probes=1)
    return reference.groups, list(make_rows(probes, cells))


def _divided(way: str) -> dict[str, Any]:  # Any: JSON values
    split, _ = WAYS[way]
    return _numbers(workload(parallelize=split, build_mesh=_mesh, build_optimizer=_sgd))


def _measure_split(folder: Path) -> None:
    reference, _ = _measured(_plain(parallelize=_split, build_mesh=_mesh), batches=4)
    found = [_divided("tp"), _effect(reference)]
    (folder / f"{rank()}.json").write_text(json.dumps(found))


def _sometimes_kept(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return a loss that is 0 in most batches of a rank, as a hinge that all samples keep."""
    loss = loss_fn(model, batch)
    return loss if _moves(batch) else torch.relu(loss * 1e-9 - 1.0)


def _moves(batch: torch.Tensor) -> bool:
    return int(batch[0, 0]) < 2


def _measure(folder: Path) -> None:
    shallow = {name: _measured(_plain(**way), batches=4) for name, way in OWN_BATCHES.items()}
    own = {
        name: [
            (row.model_dump_json(), {gemm: part.model_dump_json() for gemm, part in parts.items()})
            for row, parts in _rows(*shallow[name])
        ]
        for name in OWN_BATCHES
    }
    groups, rows = _rows_of_a_full_rank(*shallow["fsdp"])
    full = [groups, [row.model_dump_json() for row in rows]]
    over = _measured(_plain(loss_fn=_sometimes_kept))[0].passed_over
    (folder / f"{rank()}.json").write_text(json.dumps([own, full, over]))


def _measure_harder(folder: Path) -> None:
    found = _divided("tokens")
    effects = {
        name: _effect(_measured(_plain(**way), batches=4)[0]) for name, way in OWN_BATCHES.items()
    }
    by_matrix = {
        f"{name} {way}": _rows_or_refusal(_plain(build_optimizer=make, **given))
        for name, make in BY_MATRIX.items()
        for way, given in OWN_BATCHES.items()
        if way == "fsdp"
    }
    dumped = {
        key: rows if isinstance(rows, str) else [row.model_dump_json() for row in rows]
        for key, rows in by_matrix.items()
    }
    (folder / f"{rank()}.json").write_text(json.dumps([found, effects, dumped]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return what both ranks found with batches of their own, and with a full one."""
    return _of_both(_measure, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def harder(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return what both ranks found of divided layers, larger batches and whole matrices."""
    return _of_both(_measure_harder, tmp_path_factory.mktemp("ranks"))


def _of_both(measure: Callable[[Path], None], folder: Path) -> list[Any]:
    run_ranks(measure, folder, ranks=RANKS)
    found, other = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS))
    assert found == other
    return list(found)


@pytest.mark.slow
def test_divided_layers_are_probed_as_whole_ones(harder: list[Any]) -> None:
    _compare_divided(harder[0], "tokens")


@pytest.mark.slow
def test_layers_divided_alone_are_probed_as_whole_ones(tmp_path: Path) -> None:
    found, effect = _of_both(_measure_split, tmp_path)
    _compare_divided(found, "tp")
    _compare_effect(effect, "tp", ranks=1)


def _compare_divided(found: dict[str, Any], way: str) -> None:
    _, partial = WAYS[way]
    one = json.loads(json.dumps(_numbers(workload(build_optimizer=_sgd))))
    assert found["passes"] == one["passes"]  # as many whatever the depth
    _compare_rows(found["rows"], one["rows"], partial, way)
    _compare_ranges(found["ranges"], one["ranges"], way)


def test_ranks_with_batches_of_their_own_measure_the_joined_batch(measured: list[Any]) -> None:
    """Two ranks' gradients are twice as large each, which rounds alike; their scales are theirs."""
    expected = _rows(*_measured(_joined(RANKS), batches=4))
    for way in OWN_BATCHES:
        for (text, parts), (whole, own) in zip(measured[0][way], expected, strict=True):
            row = LayerSensitivity.model_validate_json(text)
            assert (row.name, row.option) == (whole.name, whole.option)
            assert _deviation(row.grad_error, whole.grad_error) < 3, (way, row.name)
            for gemm, value in own.items():
                _compare_own(row, gemm, Estimate.model_validate_json(parts[gemm]), value)


def test_ranks_pass_over_batches_in_which_none_of_them_has_a_gradient(measured: list[Any]) -> None:
    stream = train_batches(3)
    batches = [_moves(next(stream)) for _ in range(128)]
    steps = [any(batches[i : i + RANKS]) for i in range(0, 128, RANKS)][2:]
    second = [step for step, moves in enumerate(steps) if moves][1]
    assert measured[2] == second - 1 > 0


@pytest.mark.slow
def test_optimizers_of_whole_matrices_weigh_shards_as_one_process_does(harder: list[Any]) -> None:
    """Adafactor's means over rows and columns, Muon's orthogonal update; or a refusal in a line."""
    found = dict(harder[2])
    refused = found.pop("adafactor fsdp")
    assert "torch's DTensor refused what Adafactor does" in refused
    assert "\n" not in refused
    for key, rows in found.items():
        make = BY_MATRIX[key.split()[0]]
        expected = _rows(*_measured(_joined(RANKS, build_optimizer=make), batches=4))
        for row, (whole, _) in zip(
            map(LayerSensitivity.model_validate_json, rows), expected, strict=True
        ):
            least = 0.7 if row.option.is_fp8 else 0.4  # two gradients rounded to BF16 alone
            assert least < row.grad_error.mean / whole.grad_error.mean < 1.4, (key, row.name)


@pytest.mark.slow
def test_larger_batches_are_foretold_of_the_batch_of_all_ranks(harder: list[Any]) -> None:
    for way in OWN_BATCHES:
        _compare_effect(harder[1][way], way, ranks=RANKS)


def _compare_effect(found: list[float], way: str, *, ranks: int) -> None:
    tokens, *shares = found
    expected = _effect(_measured(_joined(ranks), batches=4)[0])
    assert tokens == expected[0]
    assert shares[2:] == pytest.approx(expected[3:], rel=1e-2), way  # the gradient's
    # the error's: rounded alone, two gradients of half the tokens have another
    assert abs(shares[0] - expected[1]) < 3 * math.hypot(shares[1], expected[2]), way


def test_a_rank_without_the_memory_makes_all_probe_fewer_layers(measured: list[Any]) -> None:
    groups, rows = measured[1]
    assert groups == 4  # 1, 2, 4
    assert rows == [row for row, _ in measured[0]["fsdp"]]


def _deviation(one: Estimate, other: Estimate) -> float:
    """Return how far two estimates are apart, in standard errors of their difference."""
    return abs(one.mean - other.mean) / math.hypot(one.stderr or 0.0, other.stderr or 0.0)


def _compare_own(row: LayerSensitivity, gemm: Gemm, value: Estimate, whole: Estimate) -> None:
    """Compare one GEMM of ranks with batches of their own with that of the joined batch."""
    place = row.name, row.option.key, gemm
    if row.option.recipe is Recipe.TENSORWISE:  # the amax of a rank's own tokens
        assert _deviation(value, whole) < 3, place
    elif row.option.is_fp8 or gemm is not Gemm.GRAD_WEIGHT:  # row scales are powers of two
        rel = 1e-3 if row.option.is_fp8 else TIES
        assert value.mean == pytest.approx(whole.mean, rel=rel, abs=1e-15), place
    else:  # the mean of two gradients that were rounded to BF16 alone: half to all of the error
        least = 0.45 if row.name in (*UP, *DOWN, "head") else 0.1  # norms sum in BF16 as well
        assert least < value.mean / whole.mean < 1.0, place


def _compare_rows(found: list[Any], expected: list[Any], partial: set[Any], way: str) -> None:
    """Compare every GEMM of every row; only partial sums in BF16 may be other numbers."""
    own = {tuple(key): value for *key, value in found}
    whole = {tuple(key): value for *key, value in expected}
    lost = {key for key in whole if key not in own}  # half a head's outputs: no multiple of 16
    assert {name for name, *_ in lost} == ({"head"} if way == "tokens" else set())
    assert len(own) > 40
    for (name, option, gemm), value in own.items():
        if option == "bf16_o2" and (name, gemm) in partial:
            assert 1e-3 < abs(value / whole[name, option, gemm] - 1) < 0.9, (way, name, gemm)
        else:
            key = name, option, gemm
            rel = TIES if option == "bf16_o2" else 1e-3
            assert value == pytest.approx(whole[key], rel=rel, abs=1e-15), (way, *key)


def _compare_ranges(found: dict[str, Any], expected: dict[str, Any], way: str) -> None:
    """Compare whole records."""
    assert len(found) == (15 if way == "tp" else 12)
    for name, record in found.items():
        whole = expected[name]
        assert record.pop("amax") == pytest.approx(whole["amax"], rel=1e-5), (way, name)
        ratio = record.pop("mean_over_std")
        assert ratio == pytest.approx(whole["mean_over_std"], rel=1e-2), (way, name)
        if way == "tokens" and name.startswith("blocks.1.up"):  # other tokens of them are counted
            assert record.pop("underflow") == pytest.approx(whole["underflow"], abs=0.02), name
        assert record == {key: whole[key] for key in record}, (way, name)


def _replay_rows(_: Path) -> None:
    """Replay an embedding whose rows ranks divide, then run another one of its shape."""
    rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(16, 8), nn.Embedding(16, 8)])
    parallelize_module(model, _mesh("cpu"), {"0": rows, "1": rows})
    tokens = torch.arange(8).view(2, 4)
    with recorded_choices({}), differentiated_calls({"0": model[0]}) as watched:
        expected: Any = model[0](tokens)
        expected.square().sum().backward()
    copied = local_copy(model, model[0], placed=True)[0]
    found: Any = replay(copied, watched.calls["0"], seed=0)
    torch.testing.assert_close(found.outputs[0].to_local(), expected.detach())
    model[1](tokens + 8)  # whose mask DTensor keeps where the first one's was


def test_a_replayed_embedding_gives_its_mask_back(tmp_path: Path) -> None:
    run_ranks(_replay_rows, tmp_path, ranks=RANKS)
