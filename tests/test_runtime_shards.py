"""Plans in models that are sharded already: FSDP2, tensor parallelism and both, in two processes.

The processes start once and leave what they saw in a file; the tests look at it. What they should
have seen is computed by one process that holds the whole model.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn

import autoprec
from autoprec.errors import AutoprecError
from autoprec.records import BF16_O2, FP32, Option, Recipe, fp8_option
from autoprec.runtime import install_options
from autoprec.runtime.shards import mixed_groups
from tests.models import Mlp, mlp_workload
from tests.plans import plan_for
from tests.ranks import leave_group

RANKS, STEPS, ROWS = 2, 4, 16  # rows of a batch on each rank
FP8 = fp8_option(Recipe.TENSORWISE)
LAYERS = ("first", "second", "norm", "head")
Options = Mapping[str, Option]
Seen = dict[str, Any]  # Any: what a case shows
Gradients = dict[str, Tensor]


def every(option: Option, **others: Option) -> dict[str, Option]:
    return dict.fromkeys(LAYERS, option) | others


SWITCHES: dict[str, tuple[Options, torch.dtype | None]] = {  # in this order, on one model
    "fp32": (every(FP32), None),
    "bf16": (every(BF16_O2), None),
    "fp32 norm in a block": (every(BF16_O2, first=FP8, norm=FP32), None),
    "one layer in fp32 activations": ({"second": FP8}, torch.float32),
    "fp8": (every(BF16_O2, first=FP8, second=FP8), None),
    "fp32 again": (every(FP32), None),
}
TRAINCASE = every(BF16_O2, first=FP8, norm=FP32)
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def seeded() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def fsdp(*, each: tuple[str, ...] = ("first", "second", ""), **settings: Any) -> Any:
    """Return a model that `fully_shard` has sharded; Any: FSDP's class, what it takes."""
    model = seeded()
    for name in each:
        fully_shard(model.get_submodule(name), **settings)
    return model


def split(model: Any, mesh: Any) -> Any:  # Any: a model; a DeviceMesh
    styles = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model, mesh, styles)
    return model


def both(data: int) -> Any:  # Any: FSDP's class
    """Return a model that is split and sharded, over a mesh of `data` x the other ranks."""
    mesh = init_device_mesh("cpu", (data, RANKS // data), mesh_dim_names=("dp", "tp"))
    model = split(seeded(), mesh["tp"])
    for name in ("first", "second", ""):
        fully_shard(model.get_submodule(name), mesh=mesh["dp"], mp_policy=POLICY)
    return model


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    return itertools.islice(mlp_workload().train_batches(0), STEPS)


def part(tensor: Tensor, rank: int) -> Tensor:
    return tensor[rank * ROWS : (rank + 1) * ROWS]


def whole(tensor: Any) -> Tensor:  # Any: a tensor or a DTensor
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone().float()


def step(model: nn.Module, rank: int, batch: tuple[Tensor, Tensor]) -> tuple[float, Gradients]:
    """Return the loss and the gradients of a rank's part of a batch."""
    model.zero_grad()
    loss = F.mse_loss(model(part(batch[0], rank)), part(batch[1], rank))
    torch.autograd.backward(loss)
    return loss.item(), {n: whole(p.grad) for n, p in model.named_parameters()}


def alone(model: nn.Module, options: Options, dtype: torch.dtype | None, batch: Any) -> Any:
    """Return what two ranks should see: each loss, and the mean of the gradients in FP32."""
    with install_options(model, options, activation_dtype=dtype):
        (one, first), (two, second) = (step(model, rank, batch) for rank in range(RANKS))
    return [one, two], {name: (first[name] + second[name]) / 2 for name in first}


def switches(model: nn.Module, rank: int) -> Seen:
    """Switch options in a sharded FP32 model; return every loss and gradient, and the dtypes."""
    batch = next(batches())
    shards = [*model.parameters()]
    seen: Seen = {}
    for case, (options, dtype) in SWITCHES.items():
        for shard in shards:
            shard.grad = None
        # Layers that an installation does not name stay as the one around it says.
        with install_options(model, every(FP32)), torch.no_grad():
            model(batch[0])  # leaves the root gathered
            with install_options(model, options, activation_dtype=dtype):
                model.eval()
                with torch.no_grad():
                    model(batch[0])
                model.train()
                model(batch[0])
                with torch.enable_grad():
                    seen[case] = step(model, rank, batch)
        seen[f"{case}, dtypes"] = {p.dtype for p in model.parameters()}
    seen["mixed after"] = mixed_groups(model)
    return seen


def trained(rank: int, **settings: Any) -> Seen:  # Any: of fully_shard
    """Shard, make the optimizer, apply, train, undo."""
    model = fsdp(**settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    others = {n: option for n, option in TRAINCASE.items() if option is not FP8}
    autoprec.apply(plan_for(model, FP8, others), model, optimizer)
    seen: Seen = {"mixed": mixed_groups(model), "losses": []}
    for batch in batches():
        seen["losses"].append(step(model, rank, batch)[0])
        optimizer.step()
    checks = autoprec.verify_applied(model, part(next(batches())[0], rank))
    seen["checks"] = {check.name: check.detail for check in checks}
    seen["weights"] = {n: whole(p) for n, p in model.named_parameters()}
    full = StateDictOptions(full_state_dict=True)
    seen["saved"] = get_model_state_dict(model, options=full)
    seen["state"] = {key for state in optimizer.state_dict()["state"].values() for key in state}
    autoprec.undo(model, optimizer)
    plain = fsdp(**settings)
    plain.load_state_dict(model.state_dict())
    seen["undone"] = step(plain, rank, next(batches()))[0] == step(model, rank, next(batches()))[0]
    return seen


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, init_method=store)
    mesh = init_device_mesh("cpu", (RANKS,))
    seen: Seen = {
        "fsdp": switches(fsdp(), rank),
        "fsdp, bf16 policy": switches(fsdp(mp_policy=POLICY), rank),
        "fsdp, one group": switches(fsdp(each=("",)), rank),
        "fsdp x 1": switches(both(RANKS), rank),
        "tp": switches(split(seeded(), mesh), 0),
        "1 x tp": switches(both(1), 0),
        "trained": trained(rank),
        "trained with a policy": trained(rank, mp_policy=POLICY),
        "low": error_of(apply_to_low),
    }
    torch.save(seen, Path(folder) / f"{rank}.pt")
    leave_group()


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(AutoprecError) as caught:
        call()
    return str(caught.value)


def apply_to_low() -> None:
    model: Any = seeded().bfloat16()
    fully_shard(model)
    autoprec.apply(plan_for(model, others={"norm": FP32}), model)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(rank_main, args=(str(folder),), nprocs=RANKS)  # type: ignore[no-untyped-call]  # torch's
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


# --- options switched many times on one sharded model ------------------------------------------


@pytest.mark.parametrize("how", ["fsdp", "fsdp, bf16 policy", "fsdp, one group", "fsdp x 1"])
def test_a_sharded_model_switches_to_the_numbers_of_a_whole_one(
    ranks: list[Seen], how: str
) -> None:
    batch = next(batches())
    model = seeded()
    for case, (options, dtype) in SWITCHES.items():
        losses, gradients = alone(model, options, dtype, batch)
        for seen, expected in zip((rank[how] for rank in ranks), losses, strict=True):
            loss, found = seen[case]
            assert loss == expected, case
            assert found.keys() == gradients.keys()
            assert all(torch.equal(found[name], gradients[name]) for name in found), case


@pytest.mark.parametrize("how", ["tp", "1 x tp"])
def test_a_split_model_switches_to_the_numbers_of_a_whole_one(ranks: list[Seen], how: str) -> None:
    batch = next(batches())
    model = seeded()
    for case, (options, dtype) in SWITCHES.items():
        with install_options(model, options, activation_dtype=dtype):
            expected, gradients = step(model, 0, batch)
        for seen in (rank[how] for rank in ranks):
            loss, found = seen[case]
            assert loss == pytest.approx(expected, rel=5e-3), case
            for name, gradient in gradients.items():
                error = (found[name] - gradient).norm() / gradient.norm()
                assert error < (1e-5 if "fp32" in case and options == every(FP32) else 0.05), case


def test_shards_stay_fp32_and_nothing_is_left_behind(ranks: list[Seen]) -> None:
    for seen in ranks:
        for how in ("fsdp", "fsdp, bf16 policy", "fsdp, one group", "fsdp x 1", "tp", "1 x tp"):
            dtypes = [value for case, value in seen[how].items() if case.endswith("dtypes")]
            assert dtypes == [{torch.float32}] * len(SWITCHES)
            assert seen[how]["mixed after"] == {}


# --- apply after fully_shard -------------------------------------------------------------------


def trained_alone() -> tuple[list[list[float]], dict[str, Tensor]]:
    """Return the losses of each rank and the weights in the end, of one process with FP32 masters.

    The masters are the parameters of a plain FP32 model, and options are put in for each gradient.
    """
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches():
        found, gradients = alone(model, TRAINCASE, None, batch)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
        losses.append(found)
    return [*map(list, zip(*losses, strict=True))], {
        n: p.detach().clone() for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("how", ["trained", "trained with a policy"])
def test_a_plan_applied_to_shards_trains_bit_for_bit_as_one_process(
    ranks: list[Seen], how: str
) -> None:
    losses, weights = trained_alone()
    for seen, expected in zip((rank[how] for rank in ranks), losses, strict=True):
        assert seen["losses"] == expected
        assert all(torch.equal(seen["weights"][name], weights[name]) for name in weights)
    assert losses[0][-1] < losses[0][0]


def test_checkpoints_of_shards_hold_fp32_under_plain_names(ranks: list[Seen]) -> None:
    plain = seeded().state_dict()
    for seen in (rank["trained"] for rank in ranks):
        assert seen["state"] == {"step", "exp_avg", "exp_avg_sq"}
        saved = seen["saved"] or ranks[0]["trained"]["saved"]
        assert saved.keys() == plain.keys()
        for name, value in saved.items():
            assert value.dtype is torch.float32
            assert torch.equal(value, seen["weights"][name])
        assert seen["undone"]


def test_the_proof_of_shards_says_what_ran(ranks: list[Seen]) -> None:
    for checks in (rank["trained"]["checks"] for rank in ranks):
        assert "_scaled_mm float8_e4m3fn" in checks["first"]
        assert "addmm bfloat16" in checks["second"]
        assert "native_layer_norm float32" in checks["norm"]


def test_groups_of_both_dtypes_are_known(ranks: list[Seen]) -> None:
    for seen in ranks:
        assert seen["trained"]["mixed"] == {"the root": ["norm.weight", "norm.bias"]}


def test_shards_that_are_no_masters_are_refused(ranks: list[Seen]) -> None:
    for seen in ranks:
        assert "takes the FP32 shards of fully_shard for its masters" in seen["low"]
        assert "are bfloat16: first.weight" in seen["low"]
        assert seen["low"].isprintable()
