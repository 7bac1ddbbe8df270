"""What ranks tell each other, in four real processes; alone, every function gives its input."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from autoprec.device import ranks
from autoprec.errors import AutoprecError, DeviceError, WorkloadError
from tests.ranks import run_ranks


def _whole_sum(tensor: Tensor) -> float:
    """Return the sum of all elements of a tensor that ranks may hold parts of."""
    own = ranks.share(tensor) * float(ranks.local_part(tensor).double().sum())
    return ranks.sum_over_ranks([own])[0]


def _raised(make: object) -> str:
    with pytest.raises(AutoprecError) as caught:
        ranks.made_on_first_rank(make)  # type: ignore[arg-type]  # a function
    return f"{type(caught.value).__name__}: {caught.value}"


def _fail() -> None:
    raise WorkloadError(f"rank {dist.get_rank()} cannot")


def _talk(folder: Path) -> None:
    own = ranks.rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = torch.arange(30.0).reshape(6, 5)  # 5 columns do not divide into two
    placements = [(Shard(0), Shard(0)), (Shard(0), Shard(1)), (Replicate(), Shard(1))]
    layouts = [x, distribute_tensor(x, mesh["tp"], [Shard(0)])]
    layouts += [distribute_tensor(x, mesh, each) for each in placements]
    with pytest.raises(DeviceError, match="still to be made"):
        ranks.share(DTensor.from_local(x, mesh, [Partial(), Replicate()]))
    with pytest.raises(DeviceError) as differ:
        ranks.check_same("seed", "seven" if own in (1, 3) else "nine")
    ranks.FAILURE_PATIENCE_S = 60.0
    ranks.check_all_failed("the step", RuntimeError("it does not compile"))  # all of them do
    ranks.FAILURE_PATIENCE_S = 0.2
    alone = ""
    if own == 2:  # the others, which did not fail, wait for it and are not asked
        with pytest.raises(DeviceError) as failed:
            ranks.check_all_failed("the step", torch.OutOfMemoryError("memory is full\nmore"))
        alone = str(failed.value)
    said = {
        "failed": ranks.gathered(alone)[2],
        "sums": [_whole_sum(layout) for layout in layouts],
        "largest": ranks.largest_over_ranks([float(own), -float(own)]),
        "mean": float(ranks.mean_over_ranks(torch.tensor(float(own)))),
        "gathered": ranks.gathered(own),
        "made": ranks.made_on_first_rank(lambda: f"by {dist.get_rank()}"),
        "raised": _raised(_fail),
        "differ": str(differ.value),
        "alone": [ranks.world_size(), ranks.rank() == dist.get_rank()],
    }
    ranks.check_same("seed", "nine")
    (folder / f"{own}.json").write_text(json.dumps(said))


def test_four_ranks_get_the_same_answers(tmp_path: Path) -> None:
    run_ranks(_talk, tmp_path, ranks=4)
    first, *others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4))
    assert all(other == first for other in others)
    assert first["sums"] == [435.0] * 5
    assert first["largest"] == [3.0, 0.0]
    assert first["mean"] == 1.5
    assert first["gathered"] == [0, 1, 2, 3]
    assert first["made"] == "by 0"
    assert first["raised"] == "WorkloadError: rank 0 cannot"
    assert first["differ"].startswith(
        "every rank must have the same seed, but ranks 1, 3 of 4 got another than the others "
        "(seven, not nine)"
    )
    assert first["alone"] == [4, True]
    assert first["failed"].startswith("every rank must do the step, or none, but 1 of 4 could not ")
    assert "(rank 2: " in first["failed"]
    assert "memory is full" in first["failed"]
    assert "\n" not in first["failed"]


def test_a_process_alone_keeps_its_values() -> None:
    x = torch.ones(3)
    assert (ranks.world_size(), ranks.rank(), ranks.share(x)) == (1, 0, 1.0)
    assert ranks.sum_over_ranks([1.5, 2.0]) == [1.5, 2.0]
    assert ranks.mean_over_ranks(x) is x
    assert ranks.local_part(x) is x
    assert ranks.made_on_first_rank(lambda: 7) == 7
    ranks.check_all_failed("the step", RuntimeError("alone, so all"))
    ranks.check_same("seed", "7")
    with pytest.raises(WorkloadError, match="cannot"):
        ranks.made_on_first_rank(lambda: (_ for _ in ()).throw(WorkloadError("cannot")))
