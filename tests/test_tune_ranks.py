"""One tune on several ranks gives the numbers of one process, on every rank."""

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import autoprec
from autoprec.common.recipes import Precision
from autoprec.device.ranks import rank, world_size
from autoprec.errors import CaptureError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.parallel import parallel_workload
from autoprec.profiler import profile_model
from autoprec.records import BF16_O2, FP32, GemmShape, ModelSpec, Profile, Recipe, fp8_option
from autoprec.runtime.shards import gather_in_fp32
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.sensitivity.tables import Method
from autoprec.verification.branches import train_seed
from autoprec.verification.gate import open_session
from autoprec.verification.sequential import Terms
from autoprec.verification.session import Variant
from autoprec.workload.functions import Workload
from tests.rank_workloads import (
    CUT,
    ROWS,
    TOKENS,
    WIDTH,
    all_tp,
    shallow,
    shard_blocks,
    split_and_shard,
    split_tokens,
    train_batches,
    two_by_two,
    workload,
    workload_of,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")
SEED = 3
TERMS = Terms(seeds_min=2, seeds_max=2, warmup_steps=4, branch_steps=3)
Way = dict[str, Callable[..., Any]]  # Any: functions of the contract
LOW = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.float32)  # of the user's own
WAYS: dict[int, dict[str, Way]] = {  # by the number of ranks
    2: {"ddp": {}, "fsdp": {"parallelize": partial(shard_blocks, mp_policy=LOW)}},
    4: {
        "ddp": {},
        "fsdp": {"parallelize": shard_blocks},
        "fsdp x tp": {"parallelize": split_and_shard, "build_mesh": two_by_two},
    },
}
SHALLOW: Way = {"build_model": shallow}
MEASURED = ("fsdp", "fsdp x tp")  # ways whose sensitivity is compared


def _same_batches(seed: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """Yield every rank the same: only then do low precisions round one process's numbers."""
    del rank, world_size
    return train_batches(seed)


def _losses(given: Workload, folder: Path) -> dict[str, list[float]]:
    """Return the losses of a warm-up and of branches from it, as this rank sees them."""
    context = Context(parallel_workload(given, CPU, in_fp32=gather_in_fp32), CPU, SEED)
    names = capture_model(context).names
    session = open_session(context, TERMS, loss_tolerance=0.1, state_dir=folder)
    variant = Variant("bf16", dict.fromkeys(names, BF16_O2))
    branches = train_seed(session, [variant], SEED)
    again = open_session(context, TERMS, loss_tolerance=0.1, state_dir=folder)  # reads its files
    assert again.checkpoint.eval_losses == session.checkpoint.eval_losses
    assert train_seed(again, [variant], SEED) == branches
    return {
        "warm-up": [*session.checkpoint.curve, *session.checkpoint.eval_losses],
        **{branch.label: [*branch.curve, *branch.eval_losses] for branch in branches},
    }


def _numbers(given: Workload, *, measured: bool) -> dict[str, Any]:  # Any: JSON values
    """Return what capture and sensitivity find, as the tune on this rank would."""
    context = Context(parallel_workload(given, CPU, in_fp32=gather_in_fp32), CPU, SEED)
    spec = capture_model(context)
    found = {"spec": json.loads(spec.model_dump_json())}
    if not measured:
        return found
    reference = _reference(context, spec)
    table = measure_sensitivity(
        reference, options=[fp8_option(Recipe.ROWWISE)], method=Method.LAYERWISE
    )
    probed = measure_sensitivity(
        reference, options=[fp8_option(Recipe.ROWWISE)], method=Method.SIGN_CODED
    )
    uniform = JointMeter(reference).measure((BF16_O2,) * len(spec.layers), 2)
    return {
        **found,
        "rows": {f"{row.name} {row.option.key}": row.grad_error.mean for row in table.rows},
        "probed": {f"{row.name} {row.option.key}": row.grad_error.mean for row in probed.rows},
        "ranges": {f"{each.name} {each.operand}": each.amax for each in probed.statistics},
        "joint": uniform.mean,
        "notes": [note for note in probed.notes if "tensor parallelism" in note],
    }


def _reference(context: Context, spec: ModelSpec) -> Reference:
    return prepare_reference(context, spec, warmup_steps=4)


def _measure(folder: Path) -> None:
    """Write this rank's numbers, with batches of its own and with those of all."""
    ways = WAYS[world_size()]
    own = {name: _losses(workload(**SHALLOW, **way), folder / name) for name, way in ways.items()}
    same = {
        name: _numbers(
            workload(**SHALLOW, train_batches=_same_batches, **way), measured=name in MEASURED
        )
        for name, way in ways.items()
    }
    if world_size() == 2:  # running statistics differ by rank, and a finished warm-up is read again
        _losses(workload(build_model=_normed), folder / "batch norm")
    (folder / f"{rank()}.json").write_text(json.dumps([own, same]))


def _normed() -> nn.Module:
    model = shallow()
    model.head = nn.Sequential(nn.BatchNorm1d(CUT), model.head)  # type: ignore[assignment]  # a user's
    return model


def _compare(folder: Path, ranks: int) -> None:
    """Compare every rank's numbers with each other, and with those of one process."""
    first, *others = (json.loads((folder / f"{each}.json").read_text()) for each in range(ranks))
    assert all(other == first for other in others)  # to the last bit
    own, same = first
    # ranks of one tensor-parallel group have the same batches
    parts = {way: ranks // 2 if "tp" in way else ranks for way in WAYS[ranks]}
    losses = {
        n: _losses(workload_of(n, **SHALLOW), folder / f"one of {n}") for n in set(parts.values())
    }
    numbers = _numbers(workload(**SHALLOW), measured=True)
    assert numbers.pop("notes") == []
    for way in WAYS[ranks]:
        for label, expected in losses[parts[way]].items():
            rel = 1e-5 if label != "bf16" else 1e-2  # BF16 rounds each rank's gradient
            assert own[way][label] == pytest.approx(expected, rel=rel), (way, label)
        _compare_specs(same[way].pop("spec"), numbers["spec"], way, parts[way])
        rel, found = 1e-3, same[way]
        assert len(found.pop("notes", [])) == ("tp" in way)
        if "tp" in way:
            assert found.pop("ranges") == pytest.approx(numbers["ranges"], rel=1e-5)
            fp8 = {cell: value for cell, value in found["probed"].items() if "fp8" in cell}
            whole = {cell: numbers["probed"][cell] for cell in fp8}
            assert fp8 == pytest.approx(whole, rel=1e-3)  # scales are those of all parts
            rel = 0.15  # a row-parallel layer rounds every rank's part to BF16 before the sum
        for kind, values in found.items():
            assert values == pytest.approx(numbers[kind], rel=rel), (way, kind)


def _compare_specs(
    found: dict[str, Any], expected: dict[str, Any], way: str, parts: int
) -> None:  # Any: JSON
    """Compare what was captured: all of it, but for what ranks divide."""
    loss = found.pop("loss")
    assert loss == pytest.approx(expected["loss"], rel=1e-5), way
    assert found["structure"] == expected["structure"], way
    gathered = "bfloat16" if (way, parts) == ("fsdp", 2) else ""  # noted, and left out
    assert found.pop("as_written") == {**expected["as_written"], "gathered": gathered}
    shards = {p["name"]: p.pop("shards") for layer in found["layers"] for p in layer["parameters"]}
    whole = 1 if way == "ddp" else parts
    split = 2 * parts if "tp" in way else whole  # what tensor parallelism divides as well
    assert (shards["embed.weight"], shards["blocks.0.up.weight"]) == (whole, split), way
    if "tp" not in way:
        left_out = ("loss", "as_written")
        one = copy.deepcopy({name: v for name, v in expected.items() if name not in left_out})
        for parameter in (p for layer in one["layers"] for p in layer["parameters"]):
            del parameter["shards"]
        assert found == one, way
        return
    gemms = {layer["name"]: layer["gemm"] for layer in found["layers"] if layer["gemm"]}
    M = ROWS * CUT
    assert gemms["blocks.0.up"] == {"M": M, "K": WIDTH, "N": WIDTH}
    assert gemms["blocks.0.down"] == {"M": M, "K": WIDTH, "N": WIDTH}
    assert gemms["head"] == {"M": M, "K": WIDTH, "N": TOKENS}


def test_two_ranks_measure_what_one_process_does(tmp_path: Path) -> None:
    run_ranks(_measure, tmp_path, ranks=2)
    _compare(tmp_path, 2)


@pytest.mark.slow
def test_four_ranks_measure_what_one_process_does(tmp_path: Path) -> None:
    run_ranks(_measure, tmp_path, ranks=4)
    _compare(tmp_path, 4)


class _Routed(nn.Module):
    """An expert that has one token on the first rank, and many on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        own = self.first(x)[: 1 if rank() == 0 else 32]
        out: Tensor = self.expert(own)
        return out


def _longer_on_others(seed: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """Yield 32 tokens, and on all ranks but the first 40 in every other batch."""
    del seed, world_size
    while True:
        yield torch.ones(32, 16)
        yield torch.ones(40 if rank else 32, 16)


def _tune_routed(folder: Path) -> None:
    functions = {
        "build_model": _Routed,
        "train_batches": _longer_on_others,
        "eval_batches": lambda: [torch.ones(32, 16)],
        "loss_fn": lambda model, batch: model(batch).float().square().mean(),
    }
    run = autoprec.tune(
        functions, out=folder / "out", trials=0, verify=False, recipes="tensorwise", warmup_steps=4
    )
    assert run.profile
    (folder / f"{rank()}").write_text(run.profile.model_dump_json())


@pytest.mark.slow
def test_ranks_whose_layers_have_other_numbers_of_tokens_wait_for_nobody(tmp_path: Path) -> None:
    run_ranks(_tune_routed, tmp_path, ranks=2)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


class Stages(nn.Module):
    """Two linears, of which each of two ranks calls its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(TOKENS, TOKENS) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.layers[rank()](F.one_hot(tokens, TOKENS).float())
        return logits


def _capture_uneven(folder: Path) -> None:
    """Write why a head of 31 classes is out of FP8, of which rank 0 has 16 and rank 1 has 15.

    And what ranks are told that have a stage of a pipeline each.
    """

    def uneven() -> nn.Module:
        model = shallow()
        model.head = nn.Linear(WIDTH, 31)
        return model

    def split_head(model: nn.Module, mesh: Any) -> nn.Module:  # Any: a DeviceMesh
        return parallelize_module(
            model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())}
        )

    given = workload(build_model=uneven, parallelize=split_head, build_mesh=all_tp)
    context = Context(parallel_workload(given, CPU, in_fp32=gather_in_fp32), CPU, SEED)
    head = capture_model(context).layer("head")
    assert not any(option.is_fp8 for option in head.options)
    staged = parallel_workload(workload(build_model=Stages), CPU, in_fp32=gather_in_fp32)
    with pytest.raises(CaptureError) as caught:
        capture_model(Context(staged, CPU, SEED))
    told = f"{head.refusal(Precision.FP8_O1)}\n{caught.value}"
    (folder / f"{rank()}").write_text(told)


def test_layers_that_ranks_divide_unevenly_and_pipelines_are_told(tmp_path: Path) -> None:
    run_ranks(_capture_uneven, tmp_path, ranks=2)
    why, stages = (tmp_path / "0").read_text().splitlines()
    assert stages == (tmp_path / "1").read_text().splitlines()[1]
    assert "rank 1 calls none of the layers that rank 0 calls; stages of a pipeline" in stages
    assert why == (
        "its weight is divided into unequal parts: N=31 is not a multiple of 16, which FP8 GEMMs "
        "need"
    )


def _profile(folder: Path, *, compiled: bool, **ways: Any) -> None:  # Any: the user's functions
    given = workload(**SHALLOW, **ways)
    context = Context(parallel_workload(given, CPU, in_fp32=gather_in_fp32), CPU, SEED)
    options = (FP32, BF16_O2)
    with torch._inductor.config.patch(compile_threads=1):  # a fork has no threads of its parent's
        profile = profile_model(context, capture_model(context), options=options, compiled=compiled)
    (folder / f"{rank()}").write_text(profile.model_dump_json())


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_divided_vocabulary_and_divided_tokens_are_timed_and_trained(
    tmp_path: Path, compiled: bool
) -> None:
    """torch 2.13 does not compile the mask of a divided vocabulary: eager steps go on behind it."""
    ways: dict[str, Any] = {"parallelize": split_tokens, "build_mesh": all_tp}
    run_ranks(partial(_profile, compiled=compiled, **ways), tmp_path, ranks=2)
    profile = Profile.model_validate_json((tmp_path / "0").read_text())
    assert not [(row.names, row.infeasible) for row in profile.layers if row.infeasible]
    gemms = {layer.name: layer.gemm for layer in profile.model.layers}
    assert gemms["blocks.0.down"] == GemmShape(M=ROWS * CUT, K=WIDTH, N=WIDTH)
    assert {"fp32", "bf16_o2"} <= {step.label for step in profile.steps}


@pytest.mark.slow
def test_sharded_models_are_timed_compiled(tmp_path: Path) -> None:
    run_ranks(partial(_profile, compiled=True, parallelize=shard_blocks), tmp_path, ranks=2)
    profile = Profile.model_validate_json((tmp_path / "0").read_text())
    assert not [(row.names, row.infeasible) for row in profile.layers if row.infeasible]
    assert {"fp32", "bf16_o2"} <= {step.label for step in profile.steps if step.is_compiled}
    assert not [(step.label, step.note) for step in profile.steps if step.note]
