"""Plans in models that are sharded already: FSDP2, tensor parallelism and both, in two processes.

The processes start once and leave what they saw in a file; the tests look at it. What they should
have seen is computed by one process that holds the whole model.
"""

import io
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import Optimizer

import autoprec
from autoprec.errors import AutoprecError
from autoprec.records import BF16_O2, FP32, Option, Recipe, fp8_option
from autoprec.runtime import install_options
from autoprec.runtime.sharded_state import load_shards, read_shards, shards_of, write_shards
from autoprec.runtime.shards import mixed_groups
from autoprec.workload.optimizers import in_turn
from tests.models import WIDTH, Mlp, mlp_workload
from tests.plans import plan_for
from tests.ranks import run_ranks

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
    shape = (data, dist.get_world_size() // data)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
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
    loss = F.mse_loss(model(part(batch[0], rank)).float(), part(batch[1], rank))
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


def trained(rank: int, *, gathers_fp8: bool = False, **settings: Any) -> Seen:  # Any: FSDP's
    """Shard, make the optimizer, apply, train, undo."""
    model = fsdp(**settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    others = {n: option for n, option in TRAINCASE.items() if option is not FP8}
    plan = plan_for(model, FP8, others).model_copy(update={"fp8_all_gather": gathers_fp8})
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("autoprec")
    logger.setLevel(logging.INFO)  # of a process of its own
    logger.addHandler(handler)
    autoprec.apply(plan, model, optimizer)
    logger.removeHandler(handler)
    seen: Seen = {"mixed": mixed_groups(model), "losses": [], "said": said.getvalue()}
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


def see_shards(folder: Path) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (RANKS,))
    seen: Seen = {
        "fsdp": switches(fsdp(), rank),
        "fsdp, bf16 policy": switches(fsdp(mp_policy=POLICY), rank),
        "fsdp, one group": switches(fsdp(each=("",)), rank),
        "tp": switches(split(seeded(), mesh), 0),
        "trained": trained(rank),
        "trained with a policy": trained(rank, mp_policy=POLICY),
        "trained with FP8 gathers": trained(rank, gathers_fp8=True),
        "low": error_of(apply_to_low),
        "mixed storage": error_of(apply_first),
        "mixed list": error_of(lambda: apply_first(together=True)),
        "odd": odd(rank),
        "accumulated": [accumulated(rank, compiled=compiled) for compiled in (False, True)],
        "view": error_of(view_of_shards),
        "carried": carried(rank, folder),
    }
    torch.save(seen, folder / f"{rank}.pt")


def see_meshes(folder: Path) -> None:
    rank = dist.get_rank()
    seen = {"fsdp x 1": switches(both(RANKS), rank), "1 x tp": switches(both(1), 0)}
    torch.save(seen, folder / f"{rank}.pt")


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(AutoprecError) as caught:
        call()
    return str(caught.value)


def apply_first(*, together: bool = False) -> None:
    """Apply, then shard a BF16 linear and an FP32 norm in one group, and run it."""
    model: Any = seeded()
    autoprec.apply(plan_for(model, others={"norm": FP32}), model)
    fully_shard([model.norm, model.head] if together else model.second)
    fully_shard(model)
    model(torch.ones(2, WIDTH))


def accumulated(rank: int, *, compiled: bool) -> Gradients:
    """Return the gradients of two micro-batches, of which FSDP reduces the sum."""
    model = fsdp(reshard_after_forward=False)
    others = {n: option for n, option in TRAINCASE.items() if option is not FP8}
    autoprec.apply(plan_for(model, FP8, others), model)
    if compiled:
        for layer in (model.first, model.second, model.norm):
            layer.compile(backend="aot_eager", fullgraph=layer is model.norm)
    for batch, is_last in zip(batches(), (False, True), strict=False):
        model.set_requires_gradient_sync(is_last)
        loss = F.mse_loss(model(part(batch[0], rank)), part(batch[1], rank))
        torch.autograd.backward(loss)
    return {n: whole(p.grad) for n, p in model.named_parameters()}


class Odd(nn.Module):
    """A tied head, a parameter outside of layers, a frozen layer and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, WIDTH)
        self.scale = nn.Parameter(torch.ones(3))  # of uneven shards
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)
        self.batch = nn.BatchNorm1d(WIDTH, track_running_stats=False)
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.batch(self.frozen(x)) * self.scale.sum()
        logits: Tensor = self.head(hidden)
        return logits


def odd(rank: int) -> tuple[float, Gradients]:
    torch.manual_seed(0)
    model: Any = Odd()
    fully_shard(model.frozen)
    fully_shard(model)
    autoprec.apply(plan_for(model), model)
    return step_of_odd(model, rank)


def step_of_odd(model: nn.Module, rank: int) -> tuple[float, Gradients]:
    x = torch.randn(2 * ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    loss = model(part(x, rank)).square().mean()
    torch.autograd.backward(loss)
    return loss.item(), {
        n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None
    }


def carried(rank: int, folder: Path) -> Seen:
    """Train a whole model and shards, each with an average beside it, and exchange checkpoints.

    Returns, by which of them saved, the exact weights and moments that were saved and read.
    """

    def exact(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        view = model if any(isinstance(p, DTensor) for p in model.parameters()) else None
        weights = (view or autoprec.master_view(model)).named_parameters()
        moments = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
        return {n: whole(p) for n, p in weights} | {f"{i}": whole(m) for i, m in enumerate(moments)}

    def made(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        plan = plan_for(model, FP8, {n: o for n, o in TRAINCASE.items() if o is not FP8})
        return autoprec.apply(plan, model, optimizer)

    pairs = {"whole": made(seeded()), "shards": made(fsdp())}
    before = {}
    for which, (model, optimizer) in pairs.items():
        for batch in itertools.islice(batches(), 2):
            step(model, 0, batch)
            optimizer.step()
        before[which] = exact(model, optimizer)
        weights, moments = get_state_dict(model, optimizer)
        content = {"model": weights, "ema": weights, "optimizer": moments}
        save(content, checkpoint_id=folder / which)
    seen: Seen = {}
    for which, other in ("whole", "shards"), ("shards", "whole"):
        model, optimizer = made(fsdp() if other == "shards" else seeded())
        weights, moments = get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": moments}, checkpoint_id=folder / which)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        seen[which] = before[which], exact(model, optimizer)
    return seen


def view_of_shards() -> None:
    model = fsdp()
    autoprec.apply(plan_for(model), model)
    autoprec.master_view(model)


def apply_to_low() -> None:
    model: Any = seeded().bfloat16()
    fully_shard(model)
    autoprec.apply(plan_for(model, others={"norm": FP32}), model)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    return seen_by(see_shards, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    return seen_by(see_meshes, tmp_path_factory.mktemp("meshes"))


def seen_by(body: Callable[[Path], None], folder: Path) -> list[Seen]:
    run_ranks(body, folder, ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


# --- options switched many times on one sharded model ------------------------------------------


@pytest.mark.parametrize("how", ["fsdp", "fsdp, bf16 policy", "fsdp, one group"])
def test_a_sharded_model_switches_to_the_numbers_of_a_whole_one(
    ranks: list[Seen], how: str
) -> None:
    _check_sharded(ranks, how)


@pytest.mark.slow  # the same on meshes of two dimensions, one of them of a single rank
def test_on_a_mesh_of_both_a_model_switches_to_the_numbers_of_a_whole_one(
    meshes: list[Seen],
) -> None:
    _check_sharded(meshes, "fsdp x 1")
    _check_split(meshes, "1 x tp")
    _check_left(meshes, "fsdp x 1", "1 x tp")


def _check_sharded(ranks: list[Seen], how: str) -> None:
    batch = next(batches())
    model = seeded()
    for case, (options, dtype) in SWITCHES.items():
        losses, gradients = alone(model, options, dtype, batch)
        for seen, expected in zip((rank[how] for rank in ranks), losses, strict=True):
            loss, found = seen[case]
            assert loss == expected, case
            assert found.keys() == gradients.keys()
            assert all(torch.equal(found[name], gradients[name]) for name in found), case


def test_a_split_model_switches_to_the_numbers_of_a_whole_one(ranks: list[Seen]) -> None:
    _check_split(ranks, "tp")


def _check_split(ranks: list[Seen], how: str) -> None:
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


def rank_of_four(folder: Path) -> None:
    rank = dist.get_rank()
    torch.save(switches(both(2), rank // 2), folder / f"{rank}.pt")


@pytest.mark.slow
def test_a_model_that_is_sharded_and_split_switches_over_four_ranks(tmp_path: Path) -> None:
    run_ranks(rank_of_four, tmp_path, ranks=4)
    batch = next(batches())
    model = seeded()
    for case, (options, dtype) in SWITCHES.items():
        losses, gradients = alone(model, options, dtype, batch)
        for rank in range(4):
            loss, found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)[case]
            assert loss == pytest.approx(losses[rank // 2], rel=5e-3), case
            for name, gradient in gradients.items():
                error = (found[name] - gradient).norm() / gradient.norm()
                assert error < (1e-5 if options == every(FP32) else 0.05), (case, name)


def test_shards_stay_fp32_and_nothing_is_left_behind(ranks: list[Seen]) -> None:
    _check_left(ranks, "fsdp", "fsdp, bf16 policy", "fsdp, one group", "tp")


def _check_left(ranks: list[Seen], *ways: str) -> None:
    for seen in ranks:
        for how in ways:
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


@pytest.mark.parametrize("how", ["trained", "trained with a policy", "trained with FP8 gathers"])
def test_a_plan_applied_to_shards_trains_bit_for_bit_as_one_process(
    ranks: list[Seen], how: str
) -> None:
    losses, weights = trained_alone()
    for seen, expected in zip((rank[how] for rank in ranks), losses, strict=True):
        assert seen["losses"] == expected
        assert all(torch.equal(seen["weights"][name], weights[name]) for name in weights)
        assert seen["undone"]
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


def test_whole_models_and_shards_read_all_bits_of_each_others_checkpoints(
    ranks: list[Seen],
) -> None:
    for seen in (rank["carried"] for rank in ranks):
        for before, after in seen.values():
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
        whole_ones = seen["whole"][0].values()  # which BF16 would not hold
        assert not all(torch.equal(value, value.bfloat16().float()) for value in whole_ones)


def test_the_proof_of_shards_says_what_ran(ranks: list[Seen]) -> None:
    for checks in (rank["trained"]["checks"] for rank in ranks):
        assert "_scaled_mm float8_e4m3fn" in checks["first"]
        assert "addmm bfloat16" in checks["second"]
        assert "native_layer_norm float32" in checks["norm"]


def test_fp8_weights_of_shards_are_gathered_in_fp8(ranks: list[Seen]) -> None:
    for seen in (rank["trained with FP8 gathers"] for rank in ranks):
        assert seen["checks"]["first"].endswith("weight gathered in float8_e4m3fn")
        assert {value.dtype for value in seen["saved"].values()} <= {torch.float32}
        assert "FSDP gathers the weights of 1 layers in FP8" in seen["said"]


def test_groups_of_both_dtypes_are_named_once_with_the_way_out(ranks: list[Seen]) -> None:
    for seen in (rank["trained"] for rank in ranks):
        assert seen["mixed"] == {"the root": ["norm.weight", "norm.bias"]}
        (line,) = (line for line in seen["said"].splitlines() if "FSDP's groups" in line)
        assert line.startswith("1 of FSDP's groups hold FP32 layers beside 16-bit ones: the root (")
        assert "norm.weight, norm.bias" in line
        assert "set these layers to bf16_o2, or fully_shard them" in line


def test_frozen_tied_and_uncovered_parameters_are_gathered_as_planned(ranks: list[Seen]) -> None:
    results = []
    for rank in range(RANKS):
        torch.manual_seed(0)
        model = Odd()
        autoprec.apply(plan_for(model), model)
        results.append(step_of_odd(model, rank))
    for seen, (loss, gradients) in zip((rank["odd"] for rank in ranks), results, strict=True):
        assert seen[0] == loss
        assert seen[1].keys() == gradients.keys()
    for name, found in ranks[0]["odd"][1].items():
        assert torch.equal(found, (results[0][1][name] + results[1][1][name]) / 2), name


def test_gradients_of_micro_batches_are_summed_in_fp32_in_groups_of_both_dtypes(
    ranks: list[Seen],
) -> None:
    model = seeded()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with install_options(model, TRAINCASE):
        parts = [
            step(model, rank, batch)[1]
            for rank in range(RANKS)
            for batch in itertools.islice(batches(), 2)
        ]
    for name in expected:  # each rank sums its own, then FSDP takes the mean
        one, two = parts[0][name] + parts[1][name], parts[2][name] + parts[3][name]
        expected[name] = (one + two) / 2
    for seen in (rank["accumulated"] for rank in ranks):
        for found in seen:
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shards_are_their_own_masters_so_there_is_no_view(ranks: list[Seen]) -> None:
    for seen in ranks:
        assert seen["view"].startswith("a view shares FP32 masters with a whole model")


# --- apply before fully_shard ------------------------------------------------------------------


def test_a_group_of_two_storage_dtypes_is_one_line_and_not_torchs_assertion(
    ranks: list[Seen],
) -> None:
    for seen in ranks:
        assert seen["mixed storage"].startswith("fully_shard takes parameters of one dtype")
        assert "that of the root has bfloat16 (first.weight, " in seen["mixed storage"]
        assert "float32 (norm.weight, norm.bias)" in seen["mixed storage"]
        assert "call fully_shard first and autoprec.apply after it" in seen["mixed storage"]
        assert "that of 'norm' has float32 (norm.weight, norm.bias)" in seen["mixed list"]
        assert all(seen[case].isprintable() for case in ("mixed storage", "mixed list"))


def test_shards_that_are_no_masters_are_refused(ranks: list[Seen]) -> None:
    for seen in ranks:
        assert "takes the FP32 shards of fully_shard for its masters" in seen["low"]
        assert "are bfloat16: first.weight" in seen["low"]
        assert seen["low"].isprintable()


def test_weights_without_an_optimizer_state_are_restored_with_the_others(tmp_path: Path) -> None:
    """Of plain SGD's and of unused weights there is none; torch refuses that if it is strict."""

    def start() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[0].unused = nn.Linear(16, 16)
        fully_shard(model)
        own = [p for name, p in model[0].named_parameters() if "unused" not in name]
        others = [*model[0].unused.parameters(), *model[1].parameters()]
        return model, in_turn([torch.optim.SGD(own, lr=0.1), torch.optim.AdamW(others, lr=0.1)])

    def train(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
        for _ in range(2):
            model(torch.ones(4, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [whole(parameter.detach()).clone() for parameter in model.parameters()]

    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
    )
    try:
        model, optimizer = start()
        train(model, optimizer)
        shards = shards_of(model, optimizer)
        write_shards(tmp_path / "shards", shards)
        undisturbed = train(model, optimizer)
        for checkpoint in (shards, read_shards(tmp_path / "shards", shards_of(*start()))):
            again = start()
            load_shards(checkpoint, *again)
            for ours, theirs in zip(train(*again), undisturbed, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        dist.destroy_process_group()
