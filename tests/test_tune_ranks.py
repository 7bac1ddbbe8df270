"""One tune on several ranks gives the numbers of one process, on every rank."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoprec.device.ranks import rank, world_size
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.parallel import parallel_workload
from autoprec.records import BF16_O2, ModelSpec, Recipe, fp8_option
from autoprec.sensitivity.measure import JointMeter, measure_sensitivity
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.sensitivity.tables import Method
from autoprec.workload.functions import Workload
from tests.rank_workloads import train_batches, workload, workload_of
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SEED = 3
WAYS: dict[str, dict[str, Any]] = {"ddp": {}}  # Any: functions of the contract


def _same_batches(seed: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """Yield every rank the same: only then do low precisions round one process's numbers."""
    del rank, world_size
    return train_batches(seed)


def _losses(given: Workload) -> list[float]:
    """Return the FP32 losses of a warm-up as this rank sees it."""
    context = Context(parallel_workload(given, CPU), CPU, SEED)
    spec = capture_model(context)
    return [spec.loss or 0.0, *(loss for _, loss in _reference(context, spec).loss_curve)]


def _numbers(given: Workload) -> dict[str, Any]:  # Any: JSON values
    """Return what capture and sensitivity find, as the tune on this rank would."""
    context = Context(parallel_workload(given, CPU), CPU, SEED)
    spec = capture_model(context)
    reference = _reference(context, spec)
    found = measure_sensitivity(
        reference, options=[fp8_option(Recipe.ROWWISE)], method=Method.LAYERWISE
    )
    uniform = JointMeter(reference).measure((BF16_O2,) * len(spec.layers))
    return {
        "spec": json.loads(spec.model_dump_json()),
        "rows": {f"{row.name} {row.option.key}": row.grad_error.mean for row in found.rows},
        "joint": uniform.mean,
    }


def _reference(context: Context, spec: ModelSpec) -> Reference:
    return prepare_reference(context, spec, warmup_steps=4)


def _measure(folder: Path) -> None:
    """Write this rank's numbers, with batches of its own and with those of all."""
    own = {name: _losses(workload(**way)) for name, way in WAYS.items()}
    same = {name: _numbers(workload(train_batches=_same_batches, **w)) for name, w in WAYS.items()}
    (folder / f"{rank()}.json").write_text(json.dumps([world_size(), own, same]))


def _compare(folder: Path, ranks: int) -> None:
    first, *others = (json.loads((folder / f"{each}.json").read_text()) for each in range(ranks))
    assert all(other == first for other in others)  # to the last bit
    size, own, same = first
    assert size == ranks
    losses, numbers = _losses(workload_of(ranks)), _numbers(workload())
    for way in WAYS:
        assert own[way] == pytest.approx(losses, rel=1e-5), way
        spec, expected = same[way]["spec"], numbers["spec"]
        assert spec.pop("loss") == pytest.approx(expected["loss"], rel=1e-5), way
        assert spec == {name: value for name, value in expected.items() if name != "loss"}, way
        assert same[way]["rows"] == pytest.approx(numbers["rows"], rel=1e-3), way
        assert same[way]["joint"] == pytest.approx(numbers["joint"], rel=1e-3), way


def test_two_ranks_measure_what_one_process_does(tmp_path: Path) -> None:
    run_ranks(_measure, tmp_path, ranks=2)
    _compare(tmp_path, 2)
