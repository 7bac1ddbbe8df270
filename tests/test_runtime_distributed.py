"""A plan under DDP and FSDP2, in two real processes that talk through gloo."""

import itertools
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import autoprec
from autoprec.errors import AutoprecError, PlanMismatchError, RecordError
from autoprec.model.layers import comes_from_plan
from autoprec.records import BF16_O2, FP32, Option, Phase, Plan, Recipe, fp8_option
from autoprec.runtime import attach_optimizer
from autoprec.runtime.layouts import sources_of
from autoprec.runtime.ranks import Answer, check_answers
from tests.models import BATCH, WIDTH, Mlp, mlp_workload
from tests.plans import plan_for
from tests.ranks import run_ranks

RANKS, STEPS = 2, 6
OPTIONS = (BF16_O2, fp8_option(Recipe.TENSORWISE))
Losses = list[float]


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2)  # which keeps no state


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, of: int) -> Losses:
    """Train on a rank's share of every batch; return the losses of the whole batch."""
    losses = []
    for x, y in itertools.islice(mlp_workload().train_batches(0), STEPS):
        share = slice(rank * BATCH // of, (rank + 1) * BATCH // of)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[share]), y[share])
        torch.autograd.backward(loss)
        optimizer.step()
        total = loss.detach().clone()
        if of > 1:
            dist.all_reduce(total)
        losses.append(total.item() / of)
    return losses


def _ddp(rank: int, option: Option) -> Losses:
    torch.manual_seed(rank)  # DDP gives rank 0's weights to all; the masters must follow
    model = Mlp()
    _, optimizer = autoprec.apply(plan_for(model, option), model, _adam(model))
    if rank == 0:
        model.load_state_dict(model.state_dict() | {"head.bias": torch.rand(10)})
        torch.manual_seed(0)
        model.load_state_dict(Mlp().state_dict())
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses = _train(wrapped, optimizer, rank, RANKS)
    with pytest.raises(PlanMismatchError, match="give its 'module'"):
        autoprec.undo(wrapped)
    gathered: list[Any] = [None] * RANKS
    masters = [p.detach() for p in autoprec.master_view(model).parameters()]
    dist.all_gather_object(gathered, masters)
    assert all(torch.equal(a, b) for a, b in zip(*gathered, strict=True))
    return losses


def _fsdp(rank: int, option: Option) -> Losses:
    torch.manual_seed(0)
    model = Mlp()
    autoprec.apply(plan_for(model, option), model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh)
    optimizer = _adam(model)
    attach_optimizer(model, optimizer)
    losses = _train(model, optimizer, rank, RANKS)
    with pytest.raises(PlanMismatchError, match="is sharded over ranks; save its state"):
        autoprec.undo(model, optimizer)
    masters = [s["master_weight"] for s in optimizer.state_dict()["state"].values()]
    assert all(isinstance(master, DTensor) and master.dtype is torch.float32 for master in masters)
    assert any(not torch.equal(m.to_local(), m.to_local().bfloat16().float()) for m in masters)
    return losses


def _train_each_option(folder: Path, run: Callable[[int, Option], Losses]) -> None:
    losses = [run(dist.get_rank(), option) for option in OPTIONS]
    if dist.get_rank() == 0:
        torch.save(losses, folder / "losses.pt")


@pytest.mark.parametrize("run", [_ddp, _fsdp], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(run: Callable[[int, Option], Losses], tmp_path: Path) -> None:
    run_ranks(partial(_train_each_option, run=run), tmp_path, ranks=RANKS)
    for option, losses in zip(OPTIONS, torch.load(tmp_path / "losses.pt"), strict=True):
        torch.manual_seed(0)
        model = Mlp()
        _, optimizer = autoprec.apply(plan_for(model, option), model, _adam(model))
        assert losses == pytest.approx(_train(model, optimizer, 0, 1), rel=5e-3)


# --- ranks that do not do the same -------------------------------------------------------------


class Wider(Mlp):
    """Another model on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)


def _untouched(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    return (
        {p.dtype for p in model.parameters()} == {torch.float32}
        and not any(comes_from_plan(type(module)) for module in model.modules())
        and not optimizer._optimizer_step_pre_hooks
    )


def _refusal(plan: Plan | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    with pytest.raises(AutoprecError) as caught:
        autoprec.apply(plan, model, optimizer)
    assert _untouched(model, optimizer)
    return str(caught.value)


def _disagree(folder: Path) -> None:
    """Apply on two ranks of which one differs in one thing; write what each of them raises."""
    rank = dist.get_rank()
    model = Mlp()
    optimizer = _adam(model)
    plan, other = plan_for(model), plan_for(model, others={"head": FP32})
    scheduled = plan.model_copy(update={"schedule": (Phase(start_step=9, fp8=True),)})
    wider = Wider()
    raised = {
        "plan": _refusal(other if rank else plan, model, optimizer),
        "schedule": _refusal(scheduled if rank else plan, model, optimizer),
        "file": _refusal(plan if rank else folder / "absent.json", model, optimizer),
        "model": _refusal(plan, *((wider, _adam(wider)) if rank else (model, optimizer))),
        "models": _refusal(
            *((plan_for(wider), wider, _adam(wider)) if rank else (plan, model, optimizer))
        ),
        "optimizer": _refusal(plan, model, _adam(Mlp()) if rank else optimizer),
    }
    groups = [dist.new_group([member]) for member in range(RANKS)]
    autoprec.apply(other if rank else plan, model, optimizer, group=groups[rank])
    autoprec.undo(model, optimizer)
    autoprec.apply(plan, model, optimizer)
    _train(nn.parallel.DistributedDataParallel(model), optimizer, rank, RANKS)
    (folder / f"{rank}.json").write_text(json.dumps(raised))


def test_when_one_rank_differs_all_ranks_stop_with_one_message(tmp_path: Path) -> None:
    run_ranks(_disagree, tmp_path, ranks=RANKS)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS))
    assert first == second
    same_plan = "every rank must have the same plan, but rank 1 of 2 got another"
    assert all(first[case].startswith(same_plan) for case in ("plan", "schedule", "models"))
    could_not = "every rank must apply the plan, but rank {} of 2 could not, so that none did: "
    assert first["file"].startswith(could_not.format(0) + "a plan file must be readable")
    assert first["model"].startswith(could_not.format(1) + "a plan must name every layer")
    assert "layer 'extra' is in the model only" in first["model"]
    assert first["optimizer"].startswith(could_not.format(1) + "the optimizer must be one")
    assert all(message.isprintable() for message in first.values())


@pytest.mark.parametrize(
    ("digests", "message"),
    [
        ("aaab", "rank 3 of 4 got another than the others (b, not a)"),
        ("baaa", "rank 0 of 4 got another than the others (b, not a)"),
        ("abcaa", "ranks 1, 2 of 5 got another than the others (b, not a)"),
        ("ab", "rank 1 of 2 got another than the others (b, not a)"),
        ("a" * 20 + "b" * 12, "ranks 20, 21, 22, 23, 24, 25, 26, 27 and 4 more of 32 got"),
    ],
)
def test_the_ranks_that_differ_are_named(digests: str, message: str) -> None:
    answers = [Answer(rank, digest=digest) for rank, digest in enumerate(digests)]
    with pytest.raises(PlanMismatchError, match=re.escape(message)):
        check_answers(answers)
    check_answers([Answer(rank, digest="a") for rank in range(4)])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("make", [_adam, _sgd])
def test_a_distributed_checkpoint_resumes_bit_for_bit(
    tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    model = Mlp()
    plan = plan_for(model, others={"norm": FP32})
    _, optimizer = autoprec.apply(plan, model, make(model))
    _train(model, optimizer, 0, 1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    expected = _train(model, optimizer, 0, 1)
    other = Mlp()
    _, other_optimizer = autoprec.apply(plan, other, make(other))
    model_state, optimizer_state = get_state_dict(other, other_optimizer)
    load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    set_state_dict(
        other, other_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )
    assert _train(other, other_optimizer, 0, 1) == expected


def _saved(*names: str, dtype: torch.dtype = torch.float32) -> dict[str, SimpleNamespace]:
    """Return what torch's metadata of a checkpoint says of tensors."""
    properties = SimpleNamespace(dtype=dtype)
    return {name: SimpleNamespace(properties=properties) for name in names}


def test_masters_are_read_from_the_weights_of_their_own_model() -> None:
    master = "optim.state.net.0.weight.master_weight"
    asked = dict.fromkeys(["model.net.0.weight", master], torch.zeros(1))
    plain = _saved("model.net.0.weight", "optim.state.net.0.weight.exp_avg")
    assert sources_of(asked, plain) == {master: "model.net.0.weight"}
    beside = plain | _saved("ema.net.0.weight")
    assert sources_of(asked, beside) == {master: "model.net.0.weight"}
    unclear = _saved("student.net.0.weight", "teacher.net.0.weight")
    with pytest.raises(RecordError, match=f"none that surely are these: {master}; load it before"):
        sources_of(asked, unclear)
    assert sources_of(asked, unclear, strict=False) == {}


def test_what_bf16_has_rounded_for_good_is_said(caplog: pytest.LogCaptureFixture) -> None:
    master, low = "optim.state.weight.master_weight", torch.bfloat16
    asked = {"model.weight": torch.zeros(1, dtype=low), master: torch.zeros(1)}
    assert sources_of(asked, _saved("model.weight", dtype=low)) == {master: "model.weight"}
    assert "no FP32 masters for optim.state.weight.master_weight: they start" in caplog.text
    caplog.clear()
    weights = _saved("student.weight", "teacher.weight", dtype=low)
    assert sources_of({"student.weight": torch.zeros(1)}, weights | _saved(master)) == {}
    assert "weights that it holds in BF16 are read as they are" in caplog.text
