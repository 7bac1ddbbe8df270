"""`torchrun -m autoprec tune` closes the loop on a sharded model; ranks share its memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import autoprec
from autoprec.device.ranks import rank
from autoprec.model.context import Context
from autoprec.model.parallel import parallel_workload
from autoprec.records import BF16_O2
from autoprec.verification.branches import train_branch, warm_up
from autoprec.verification.sequential import Terms
from autoprec.verification.session import BranchStore, Session, Variant
from autoprec.workload.functions import workload_from
from tests.peaks import tracked_peak
from tests.ranks import run_ranks

ROOT = Path(autoprec.__file__).parents[1]
MODEL = """
from tests.rank_workloads import Decoder as build_model, build_optimizer, loss_fn, train_batches
from tests.rank_workloads import shard_blocks as parallelize
"""


@pytest.mark.slow
def test_a_sharded_model_is_tuned_once(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--out", "out", "--trials", "1", "--recipes", "rowwise", "--json"]
    options += ["--loss-tolerance", "2%"]  # far above the noise of so small a model
    done = subprocess.run(
        [*torchrun, "-m", "autoprec", "tune", "model.py", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("sensitivity: warm-up") == 1  # progress is one rank's
    told = json.loads(done.stdout)  # and so is what is printed: one object
    assert told
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"profile.json", "sensitivity.json", "search.json", "verification.json"} <= files
    assert any(path.is_dir() for path in (tmp_path / "out" / "branches").glob("warmup-*"))
    verification = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert verification["verdict"] == "verified"


class Tower(nn.Module):
    """Linears whose weights are nearly all that training holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = F.gelu(linear(x))
        return x


def _shard(model: nn.Module, mesh: object) -> nn.Module:
    for linear in model.get_submodule("linears").children():
        fully_shard(linear, mesh=mesh)  # type: ignore[call-overload]  # a mesh
    fully_shard(model, mesh=mesh)  # type: ignore[call-overload]  # a mesh
    return model


def _weigh_a_branch(folder: Path) -> None:
    workload = workload_from(
        {
            "build_model": Tower,
            "train_batches": lambda seed: iter(torch.randn(64, 4, 256)),
            "loss_fn": lambda model, batch: model(batch).square().mean(),
            **({"parallelize": _shard} if "fsdp" in folder.name else {}),
        }
    )
    device, terms = torch.device("cpu"), Terms(warmup_steps=2, branch_steps=2)
    context = Context(parallel_workload(workload, device), device)
    with tracked_peak() as peak:
        common = warm_up(context, [], steps=2, start=None)
        session = Session(context, terms, 0.1, [], common, BranchStore("", None), None, "")
        names = [f"linears.{number}" for number in range(8)]
        train_branch(session, Variant("bf16", dict.fromkeys(names, BF16_O2)), seed=1)
    (folder / f"{rank()}.txt").write_text(str(peak.peak_bytes))


@pytest.mark.slow
def test_memory_of_a_branch_falls_with_the_ranks(tmp_path: Path) -> None:
    peaks = {}
    for way, count in (("ddp", 2), ("fsdp", 2), ("fsdp", 4)):
        folder = tmp_path / f"{way}{count}"
        folder.mkdir()
        run_ranks(_weigh_a_branch, folder, ranks=count)
        peaks[way, count] = max(int((folder / f"{n}.txt").read_text()) for n in range(count))
    assert peaks["fsdp", 2] < 0.75 * peaks["ddp", 2]
    assert peaks["fsdp", 4] < 0.75 * peaks["fsdp", 2]
