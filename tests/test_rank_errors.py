"""What ranks are told, in one line on each of them, when a run of theirs cannot be."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import autoprec
from autoprec.errors import AutoprecError, SettingsError
from autoprec.model.parallel import parallel_workload
from autoprec.tuning.ranks import LAUNCHED_BY
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings
from tests.rank_workloads import FUNCTIONS, Decoder, shard_blocks, workload
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ROOT = Path(autoprec.__file__).parents[1]


def _forgetful(model: nn.Module, mesh: DeviceMesh) -> None:
    shard_blocks(model, mesh)


def _other_model(_: nn.Module, mesh: DeviceMesh) -> nn.Module:
    other = nn.Linear(4, 4)
    fully_shard(other, mesh=mesh)
    return other


def _another_alike(_: nn.Module, mesh: DeviceMesh) -> nn.Module:
    other = Decoder()
    shard_blocks(other, mesh)
    return other


def _only_blocks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    return model


def _unchanged(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return model


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {"head": ColwiseParallel()})


def _mesh(sizes: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Any]:  # Any: functions
    return {"build_mesh": lambda device: init_device_mesh(device, sizes, mesh_dim_names=names)}


def _tied() -> nn.Module:
    model = Decoder()
    model.head.weight = model.embed.weight
    return model


def _divide_tied(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {"embed": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel()}
    return parallelize_module(model, mesh, plan)


def _unseeded() -> nn.Module:
    torch.manual_seed(dist.get_rank())
    return Decoder()


CASES: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {  # Any: functions of the contract
    "no result": (
        {"parallelize": _forgetful},
        "parallelize(model, mesh) must return the model (end it with `return model`), but it "
        "returned NoneType",
    ),
    "another model": (
        {"parallelize": _other_model},
        "parallelize(model, mesh) must return the model that it was given, but 16 parameters "
        "differ, among them 'embed.weight' ([16, 32] before, absent after)",
    ),
    "another alike": (
        {"parallelize": _another_alike},
        "must return the model that it was given, but it returned another one with the same",
    ),
    "ties lost": (
        {"build_model": _tied, "parallelize": _divide_tied, **_mesh((2,), ("tp",))},
        "differ, among them 'head.weight' (absent before, [16, 32] after); parallelize_module "
        "divides tied weights apart: tie head.weight again behind it",
    ),
    "layers left": (
        {"parallelize": _only_blocks},
        "parallelize(model, mesh) must shard every layer, but it leaves 2 whole, whose gradients "
        "nothing averages: embed, head; end it with fully_shard",
    ),
    "nothing": (
        {"parallelize": _unchanged},
        "parallelize(model, mesh) must shard the model or wrap it, but it returned the model as "
        "it was; call fully_shard or parallelize_module in it, or leave it out",
    ),
    "parallel over data": (
        {"parallelize": _tensor_parallel},
        "ranks with batches of their own must hold a model together by fully_shard, but "
        "parallelize divides parameters over dp without it; give tensor parallelism a dimension",
    ),
    "too many": (
        _mesh((3,), ("dp",)),
        "build_mesh(device_type) must give a DeviceMesh, but it raised",
    ),
    "too few": (
        _mesh((1,), ("dp",)),
        "build_mesh() must give a mesh of all 2 ranks, but it has 1 = 1",
    ),
    "unknown dimension": (_mesh((2,), ("rows",)), "but build_mesh gave 'rows'"),
    "other weights": (
        {"build_model": _unseeded},
        "every rank must have the same initial weights (build_model must draw from torch's "
        "generator), but rank 1 of 2 got another than the others",
    ),
}


def _raised(run: Callable[[], object]) -> str:
    with pytest.raises(AutoprecError) as caught:
        run()
    return str(caught.value)


def _build(way: dict[str, Callable[..., Any]]) -> nn.Module:  # Any: as above
    return parallel_workload(workload(**way), CPU).build_model()


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return Decoder()


def _weighted(model: nn.Module, _: DeviceMesh) -> nn.Module:
    model.to_empty(device=CPU)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def _fail_in_every_way(folder: Path) -> None:
    told = {case: _raised(partial(_build, way)) for case, (way, _) in CASES.items()}
    # data parallel: by torch's own wrapper, and where only the weights are given here
    wrapped = {"parallelize": lambda model, _: nn.parallel.DistributedDataParallel(model)}
    assert isinstance(_build(wrapped), Decoder)
    assert isinstance(_build({"build_model": _on_meta, "parallelize": _weighted}), Decoder)
    out, own = folder / "out", dist.get_rank()
    told["seeds"] = _raised(lambda: autoprec.tune(FUNCTIONS, out=out, seed=own))
    model = folder / f"model{own}.py"
    lines = [f"# of rank {own}", "from tests.rank_workloads import loss_fn, train_batches"]
    model.write_text("\n".join([*lines, "from tests.rank_workloads import Decoder as build_model"]))
    link = folder / f"{own}" / "model.py"
    link.parent.mkdir()
    link.symlink_to(model)
    os.chdir(link.parent)
    told["files"] = _raised(lambda: autoprec.tune("model.py", out=out))
    told["workers"] = _raised(lambda: autoprec.tune("model.py", out=out, workers=2))
    (folder / f"{own}.json").write_text(json.dumps(told))


def test_every_rank_is_told_in_one_line(tmp_path: Path) -> None:
    run_ranks(_fail_in_every_way, tmp_path, ranks=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for case, (_, message) in CASES.items():
        assert message in first[case], case
    assert first["seeds"].startswith("every rank must have the same settings (--seed and the oth")
    assert first["files"].startswith("every rank must have the same text in model.py and what")
    assert "--workers" in first["workers"]
    assert all(message.isprintable() for message in first.values())


def test_a_script_is_recorded_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(LAUNCHED_BY, ("1", "8", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="by one process, but 8 were started; give torchrun"):
        Run(Settings.of(script="train.py", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


DYING = """
import itertools, os, signal
from tests.rank_workloads import Decoder as build_model, loss_fn, train_batches as batches
from tests.rank_workloads import shard_blocks
def parallelize(model, mesh):  # the other rank meets the loss in the user's code: a gather
    shard_blocks(model, mesh)
    return model
drawn = itertools.count()
def train_batches(seed):
    for batch in batches(seed):
        if next(drawn) == 42 and os.environ["RANK"] == "1":  # after the capture's
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
"""


@pytest.mark.slow
def test_when_a_rank_dies_the_others_stop_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(DYING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    base = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **own}
    command = [sys.executable, "-m", "autoprec", "profile", "model.py", "--out", "out"]
    ranks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = ranks[0].communicate(timeout=120)[1]
    ranks[1].communicate()
    errors = [line for line in told.splitlines() if line.startswith("autoprec: error")]
    assert ranks[0].returncode == 2, told
    assert len(errors) == 1, told
    assert errors[0].startswith("autoprec: error: every rank must run to its end, but another one")
    assert "Traceback" not in told
