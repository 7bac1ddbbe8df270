"""What two processes do to gather FP8 weights, and what each leaves for the tests to see."""

import copy
import io
import itertools
import logging
import math
from collections.abc import Callable, Mapping
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
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import autoprec
from autoprec.device.ranks import local_part
from autoprec.errors import PlanMismatchError
from autoprec.guard import Guard, Limits
from autoprec.records import BF16_O2, Gemm, Option, Recipe, fp8_option
from autoprec.runtime import attach_optimizer, check_applied
from autoprec.runtime.gathers import Fp8Shard
from tests.models import WIDTH, Mlp, mlp_workload
from tests.plans import plan_for

RANKS, STEPS, BATCH = 2, 3, 32  # 16 rows per rank, as FP8's grad_weight needs
TENSORWISE = fp8_option(Recipe.TENSORWISE)
MASKED = fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT)
BY_ROWS = fp8_option(Recipe.ROWWISE)
E4M3 = torch.float8_e4m3fn
SINGLES = ("first", "second", "")  # modules that get a gather of their own
Seen = dict[str, Any]
Trained = tuple[list[float], list[Tensor]]
BeforeStep = Callable[[nn.Module, int], None]


def planned(
    model: nn.Module, *, fp8: bool = True, others: Mapping[str, Option] | None = None
) -> Any:  # Any: the model
    """Apply a plan that is FP8 wherever it can be, with its weights gathered in FP8 or not."""
    plan = plan_for(model, TENSORWISE, others).model_copy(update={"fp8_all_gather": fp8})
    autoprec.apply(plan, model)
    return model


def sharded(model: Any, **settings: Any) -> Any:  # Any: what fully_shard takes
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in SINGLES:
        fully_shard(model.get_submodule(name), mesh=mesh, **settings)
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach_optimizer(model, optimizer)
    return optimizer


def whole(tensor: Any) -> Tensor:  # Any: a tensor or a DTensor
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rank: int,
    of: int = RANKS,
    before: BeforeStep = lambda model, step: None,
) -> Trained:
    """Return losses of this rank's share of every batch, and all gradients, then the masters."""
    losses, tensors = [], []
    share = slice(rank * BATCH // of, (rank + 1) * BATCH // of)
    batches = itertools.islice(mlp_workload().train_batches(0), STEPS)
    for step, (x, y) in enumerate(batches):
        before(model, step)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[:BATCH][share]), y[:BATCH][share])
        torch.autograd.backward(loss)
        tensors += [whole(parameter.grad) for parameter in model.parameters()]
        optimizer.step()
        losses.append(loss.item())
    states = optimizer.state_dict()["state"].values()
    return losses, [*tensors, *(whole(state["master_weight"]) for state in states)]


def is_same(first: Trained, second: Trained) -> bool:
    pairs = zip(first[1], second[1], strict=True)
    return first[0] == second[0] and all(torch.equal(a, b) for a, b in pairs)


def both_ways(
    rank: int,
    before: BeforeStep = lambda model, step: None,
    *,
    compiled: bool = False,
    **settings: Any,  # of fully_shard
) -> bool:
    """Whether training is bit for bit the same with FP8 (compiled or not) and BF16 gathers."""
    results = []
    for fp8 in (False, True):
        torch.manual_seed(0)
        model = sharded(planned(Mlp(), fp8=fp8), **settings)
        if compiled and fp8:
            model.second.compile(backend="aot_eager")
        results.append(train(model, adam(model), rank=rank, before=before))
    return is_same(*results)


def columns(parameter: nn.Parameter) -> Shard:
    return Shard(1 if parameter.dim() > 1 else 0)


def second_off_in_the_middle(model: Any, step: int) -> None:
    model.second.fp8_active = step not in (1, 2)


def second_off_at_first(model: Any, step: int) -> None:
    model.second.fp8_active = step > 1


class Gathers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the bytes that this rank gives to all-gathers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.sent: list[int] = []  # per all-gather

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in str(func):
            flat = torch.utils._pytree.tree_leaves(args[1])
            self.sent.append(sum(part.numel() * part.itemsize for part in flat))
        return func(*args, **(kwargs or {}))


def sent_bytes(model: Any) -> list[int]:
    """Return what one forward pass gathers, in its order."""
    with Gathers() as gathers, torch.no_grad():
        model(torch.randn(16, WIDTH))
    sent: list[int] = gathers.sent
    return sent


def bytes_seen() -> Seen:
    layers = {
        "all": None,
        "some": {"second": BY_ROWS},
        "none": {"first": MASKED, "second": BF16_O2},
    }
    seen: Seen = {}
    for case, others in layers.items():
        model = sharded(planned(Mlp(), others=others))
        seen[case] = sent_bytes(model)
        if case == "some":
            seen["checks"] = {
                c.name: c.detail for c in check_applied(model, torch.randn(16, WIDTH))
            }
    seen["bf16"] = sent_bytes(sharded(planned(Mlp(), fp8=False)))
    model = sharded(planned(Mlp()))
    model.second.fp8_active = False
    seen["off"] = sent_bytes(model)
    return seen


def weights_seen(model: Any, rank: int) -> Seen:
    """Return a weight as it is, and as it was gathered, in FP8 and in BF16."""
    if rank == 1:  # its rows alone hold the largest element
        with torch.no_grad():
            local_part(model.first.weight)[3, 5] = -3
    seen: Seen = {"weight": whole(model.first.weight)}
    model.first.unshard()
    gathered = model.first.weight
    seen |= {"bits": gathered._data.clone(), "scale": gathered._scale.clone()}
    seen["as_bf16"] = gathered.detach().clone()
    model.first.reshard()
    seen["freed"] = gathered._data.untyped_storage().size()
    model.first.fp8_active = False
    model.first.unshard()
    seen["moved"] = model.first.weight.detach().clone()
    model.first.reshard()
    seen["moved_freed"] = gathered.bf16.untyped_storage().size()
    model.first.fp8_active = True
    model.first.unshard()
    seen["back"] = model.first.weight._data.clone(), gathered.bf16.numel()
    model.first.reshard()
    return seen


def checkpoint_seen(rank: int, folder: Path) -> Seen:
    """Train, save, train on; load into a model with other weights and train on there."""
    torch.manual_seed(0)
    model = sharded(planned(Mlp()))
    optimizer = adam(model)
    train(model, optimizer, rank=rank)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")
    plain = io.BytesIO()
    torch.save(model.state_dict(), plain)
    seen: Seen = {"file": plain.getvalue(), "weights": {}}
    seen["weights"] = {n: whole(p) for n, p in model.named_parameters()}
    options = StateDictOptions(full_state_dict=True)
    seen["full"] = get_model_state_dict(model, options=options)
    masters = (state["master_weight"] for state in optimizer.state_dict()["state"].values())
    seen["masters"] = [(type(local_part(m)).__name__, whole(m)) for m in masters]
    expected = train(model, optimizer, rank=rank)
    torch.manual_seed(1)
    other = sharded(planned(Mlp()))
    other_optimizer = adam(other)
    model_state, optimizer_state = get_state_dict(other, other_optimizer)
    load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "dcp")
    set_state_dict(
        other, other_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )
    seen["resumed"] = is_same(train(other, other_optimizer, rank=rank), expected)
    loaded = sharded(planned(Mlp()))
    loaded.load_state_dict(torch.load(io.BytesIO(seen["file"]), weights_only=True))
    seen["loaded"] = {n: whole(p) for n, p in loaded.named_parameters()}
    seen["gathers"] = sent_bytes(loaded)
    return seen


def guarded(rank: int, *, fp8: bool, shard_first: bool = False) -> tuple[list[float], list[str]]:
    """Train with a NaN in step 2, which a guard skips and after which a layer runs in BF16."""
    torch.manual_seed(0)
    model = Mlp()
    plan = plan_for(model, TENSORWISE).model_copy(update={"fp8_all_gather": fp8})
    if shard_first:
        sharded(model)
    autoprec.apply(plan, model)
    if not shard_first:
        sharded(model)
    optimizer = adam(model)
    guard = Guard(model, optimizer, plan, limits=Limits(sample_every=2))
    losses = []
    for step, (x, y) in enumerate(itertools.islice(mlp_workload().train_batches(0), 6)):
        share = slice(16 * rank, 16 * rank + 16)
        loss = F.mse_loss(model(x[share]), y[share])
        torch.autograd.backward(loss)
        if step == 2 and rank == 1:
            gradient: Any = model.second.weight.grad
            local_part(gradient).fill_(math.nan)
        losses.append(loss.item())
        guard.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses, [*guard.in_bf16]


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(PlanMismatchError) as caught:
        call()
    return str(caught.value)


def orders_seen() -> Seen:
    good = sharded(planned(Mlp()))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    cast = sharded(planned(Mlp()), mp_policy=policy)
    return {
        "undo": error_of(lambda: autoprec.undo(good)),
        "policy": error_of(lambda: cast(torch.randn(16, WIDTH))),
    }


def warnings_seen() -> Seen:
    """Replace a weight between apply and fully_shard; return what is logged."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    vars(handler)["emit"] = records.append
    logger = logging.getLogger("autoprec.runtime.gathers")
    logger.addHandler(handler)
    model = planned(Mlp())
    model.second.weight = nn.Parameter(model.second.weight.detach().clone())
    adam(sharded(model))
    adam(sharded(planned(Mlp())))
    logger.removeHandler(handler)
    seen = {"said": [record.getMessage() for record in records]}
    return seen | {"bytes": sent_bytes(model)}


def from_meta() -> bool:
    """Apply on the meta device, shard, and fill the shards; compare with a model made whole."""
    source = Mlp()
    with torch.device("meta"):
        model = sharded(planned(Mlp()))
    model.to_empty(device="cpu")
    expected = sharded(planned(copy.deepcopy(source)))
    values = source.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = values[name].to(parameter.dtype)
            parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    adam(model)
    x = torch.randn(16, WIDTH)
    return torch.equal(model(x), expected(x)) and isinstance(
        local_part(model.first.weight), Fp8Shard
    )


def see_gathers(folder: Path) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = sharded(planned(Mlp()))
    seen: Seen = {
        "same": both_ways(rank),
        "same, sharded by columns": both_ways(rank, shard_placement_fn=columns),
        "same, kept after forward": both_ways(rank, reshard_after_forward=False),
        "same, compiled": both_ways(rank, second_off_in_the_middle, compiled=True),
        "same, switched off": both_ways(rank, second_off_in_the_middle),
        "same, switched on": both_ways(rank, second_off_at_first, shard_placement_fn=columns),
        "sharded": train(model, adam(model), rank=rank)[0],
        "bytes": bytes_seen(),
        "weights": weights_seen(model, rank),
        "checkpoint": checkpoint_seen(rank, folder),
        "guard": [guarded(rank, fp8=fp8) for fp8 in (False, True)],
        "guard of shards": [guarded(rank, fp8=x, shard_first=True) for x in (False, True)],
        "orders": orders_seen(),
        "warnings": warnings_seen(),
        "meta": from_meta(),
    }
    torch.save(seen, folder / f"{rank}.pt")
