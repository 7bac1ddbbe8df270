"""FP8 weights through FSDP2's all-gather, in two real processes that talk through gloo.

The two processes start once and leave what they saw in a file; the tests look at it.
"""

import copy
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import autoprec
from autoprec.device.torchao import import_torchao
from autoprec.runtime.gathers import Fp8Shard, GatheredInFp8
from autoprec.runtime.whole_weights import WholeWeight, whole_weight
from tests.fp8_gather_ranks import (
    BY_ROWS,
    E4M3,
    MASKED,
    RANKS,
    Seen,
    adam,
    is_same,
    planned,
    see_gathers,
    train,
)
from tests.models import WIDTH, Mlp
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(see_gathers, folder, ranks=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.slow
def test_training_is_bit_for_bit_that_with_bf16_gathers(ranks: list[Seen]) -> None:
    for seen in ranks:
        outcomes = {case: same for case, same in seen.items() if case.startswith("same")}
        assert len(outcomes) == 6
        assert outcomes == dict.fromkeys(outcomes, True)


@pytest.mark.slow
def test_two_processes_train_as_one(ranks: list[Seen]) -> None:
    torch.manual_seed(0)
    model = planned(Mlp(), fp8=False)
    alone = train(model, adam(model), rank=0, of=1)[0]
    together = [
        sum(losses) / RANKS for losses in zip(*(seen["sharded"] for seen in ranks), strict=True)
    ]
    assert together == pytest.approx(alone, rel=5e-3)
    assert alone[-1] < alone[0]


@pytest.mark.slow
def test_scale_and_bits_are_those_of_a_cast_of_the_whole_weight(ranks: list[Seen]) -> None:
    utils = import_torchao().float8_utils
    for seen in (rank["weights"] for rank in ranks):
        weight = seen["weight"]
        assert weight.shape == (64, WIDTH)
        assert weight.abs().argmax() == (32 + 3) * WIDTH + 5
        scale = utils.tensor_to_scale(weight, E4M3)
        assert seen["scale"].dtype is torch.float32
        assert torch.equal(seen["scale"], scale)
        bits = (weight.double() * scale.double()).clamp(-448, 448).float().to(E4M3)
        assert torch.equal(seen["bits"].view(torch.uint8), bits.view(torch.uint8))
        exact = bits.double() / scale.double()
        assert (seen["as_bf16"].double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.slow
def test_a_layer_switched_off_gathers_its_bf16_weight_and_frees_it(ranks: list[Seen]) -> None:
    for seen in (rank["weights"] for rank in ranks):
        assert torch.equal(seen["moved"], seen["weight"])
        assert not torch.equal(seen["as_bf16"], seen["weight"])
        assert seen["freed"] == seen["moved_freed"] == 0
        bits, bf16_elements = seen["back"]
        assert torch.equal(bits.view(torch.uint8), seen["bits"].view(torch.uint8))
        assert bf16_elements == 0


# --- what travels ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_weight_travels_as_one_byte_per_element(ranks: list[Seen]) -> None:
    elements = 64 * WIDTH // RANKS  # of each of the two weights, on one rank
    biases = {"first": 2 * 64 // RANKS, "second": 2 * WIDTH // RANKS}  # bytes: BF16 ones
    rest = 2 * (2 * WIDTH + 10 * WIDTH + 10) // RANKS
    one, two = (
        [elements + bias for bias in biases.values()],
        [2 * elements + b for b in biases.values()],
    )
    for seen in (rank["bytes"] for rank in ranks):
        assert seen["all"] == [rest, *one]
        assert seen["bf16"] == seen["none"] == [rest, *two]
        assert seen["some"] == [rest, one[0], two[1]]
        assert seen["off"] == [rest, *one, 2 * elements]


@pytest.mark.slow
def test_the_proof_says_how_each_fp8_weight_is_gathered(ranks: list[Seen]) -> None:
    for seen in ranks:
        checks = seen["bytes"]["checks"]
        assert checks["first"].endswith("; weight gathered in float8_e4m3fn")
        assert checks["second"].endswith("; weight gathered in bfloat16")
        assert "gathered" not in checks["head"]
        assert "_scaled_mm float8_e4m3fn" in checks["first"]


# --- checkpoints, guard, orders ----------------------------------------------------------------


@pytest.mark.slow
def test_checkpoints_hold_plain_weights_and_resume_bit_for_bit(ranks: list[Seen]) -> None:
    for seen in (rank["checkpoint"] for rank in ranks):
        assert seen["resumed"]
        assert b"autoprec" not in seen["file"]
        assert seen["full"].keys() == seen["loaded"].keys() == Mlp().state_dict().keys()
        for name, weight in seen["weights"].items():
            assert torch.equal(seen["loaded"][name], weight)
            if name in seen["full"]:
                assert type(seen["full"][name]) is Tensor
                assert torch.equal(seen["full"][name], weight)
        kinds, masters = zip(*seen["masters"], strict=True)
        assert set(kinds) == {"Tensor"}
        assert {master.dtype for master in masters} == {torch.float32}
        assert any(not torch.equal(m, m.bfloat16().float()) for m in masters)
    assert ranks[0]["checkpoint"]["gathers"] == ranks[0]["bytes"]["all"]


@pytest.mark.slow
def test_a_guard_moves_a_gathered_layer_to_bf16(ranks: list[Seen]) -> None:
    for with_bf16, with_fp8 in (seen[k] for k in ("guard", "guard of shards") for seen in ranks):
        assert with_fp8 == with_bf16
        assert with_fp8[1] == ["second"]


@pytest.mark.slow
def test_a_wrong_order_is_one_line(ranks: list[Seen]) -> None:
    for seen in (rank["orders"] for rank in ranks):
        assert "is sharded over ranks; save its state" in seen["undo"]
        assert "has param_dtype=torch.float32; leave param_dtype out" in seen["policy"]
        assert all(message.isprintable() for message in seen.values())


@pytest.mark.slow
def test_a_replaced_weight_keeps_its_bf16_gather_and_is_named_once(ranks: list[Seen]) -> None:
    for seen in ranks:
        (said,) = seen["warnings"]["said"]
        assert "the weights of 'second' are sharded as BF16" in said
        assert seen["warnings"]["bytes"] == seen["bytes"]["some"]


@pytest.mark.slow
def test_a_model_from_the_meta_device_gathers_fp8(ranks: list[Seen]) -> None:
    assert all(seen["meta"] for seen in ranks)


# --- one process -------------------------------------------------------------------------------


def test_without_fsdp_nothing_changes_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    results = []
    for fp8 in (False, True):
        torch.manual_seed(0)
        with caplog.at_level(logging.INFO):
            model = planned(Mlp(), fp8=fp8)
        results.append(train(model, adam(model), rank=0, of=1))
    assert is_same(*results)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "fully_shard will gather the weights of 2 layers in FP8; without it nothing is gathered"
    )
    assert all(type(value) is Tensor for value in model.state_dict().values())
    x = torch.randn(16, WIDTH)
    assert all("gathered" not in check.detail for check in autoprec.verify_applied(model, x))


class Shared(nn.Module):
    """Two linears of one weight, one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.own = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(self.second(self.first(x)))
        return y


def test_apply_names_the_fp8_layers_that_keep_bf16_gathers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        planned(Mlp(), others={"first": MASKED, "second": BY_ROWS})
        planned(Shared())
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("fully_shard will gather the weights of 0 layers in FP8")
    assert "'first' (grad_weight in BF16), 'second' (rowwise scales)" in first
    assert "of 1 layers" in second
    assert "'first' (its weight is shared), 'second' (its weight is shared)" in second


def test_a_copy_keeps_the_mark_and_undo_and_views_are_plain() -> None:
    model = planned(Mlp())
    assert type(model.first.weight) is GatheredInFp8
    assert type(copy.deepcopy(model).first.weight) is GatheredInFp8
    assert type(pickle.loads(pickle.dumps(model)).first.weight) is nn.Parameter
    view = autoprec.master_view(model)
    assert {type(parameter) for parameter in view.parameters()} == {nn.Parameter}
    autoprec.undo(model)
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    assert "gathers_fp8" not in vars(model.first) | vars(view.first)
    assert type(model.first.weight.new_zeros(2, 2)) is Tensor


@pytest.mark.slow
def test_torch_compile_takes_a_marked_model() -> None:
    torch.manual_seed(0)
    model = planned(Mlp())
    x = torch.randn(16, WIDTH)
    expected = model(x)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("rows", [4, 1, 0])
def test_every_rank_sends_as_many_rows_as_the_largest_shard_has(rows: int, tmp_path: Path) -> None:
    """Of 16 rows over 5 ranks four have 4 and one has none."""
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        mesh = SimpleNamespace(size=lambda: 5, get_group=lambda: None)
        layer = planned(nn.Sequential(nn.Linear(WIDTH, 16)))[0]
        shard: Any = Fp8Shard(torch.randn(rows, WIDTH, dtype=torch.bfloat16))
        policy, size = MixedPrecisionPolicy(), torch.Size((16, WIDTH))
        (bits,), sent = shard.fsdp_pre_all_gather(mesh, size, (WIDTH, 1), layer, policy)
    finally:
        dist.destroy_process_group()
    assert (bits.shape, bits.dtype) == ((4, WIDTH), E4M3)
    assert not bits[rows:].float().any()
    assert sent.scale.isfinite()


def gathered_weight() -> tuple[WholeWeight, Tensor]:
    """Return a weight as FSDP's hooks make it, and its elements in BF16."""
    layer = planned(nn.Sequential(nn.Linear(WIDTH, 16)))[0]
    weight = layer.weight.detach().clone()
    scale = import_torchao().float8_utils.tensor_to_scale(weight, E4M3)
    bits = (weight.float() * scale).to(E4M3)
    empty = bits.new_empty(0, dtype=torch.bfloat16)
    made = whole_weight(bits, scale, layer.linear_mm_config, bf16=empty)
    return made, (bits.float() / scale).bfloat16()


@pytest.mark.parametrize("has_bf16", [False, True])
def test_code_that_reads_a_gathered_weight_sees_bf16(has_bf16: bool) -> None:
    made, plain = gathered_weight()
    if has_bf16:
        plain = torch.randn_like(plain)
        made.bf16.resize_(plain.numel()).copy_(plain.view(-1))
    leaf, expected = nn.Parameter(made), nn.Parameter(plain)
    x = torch.randn(8, WIDTH, dtype=torch.bfloat16)
    for weight in (leaf, expected):
        y = F.linear(x, weight).sum() + (x @ weight.t()[:, :4]).sum() + weight[2].square().sum()
        torch.autograd.backward(y + F.embedding(torch.tensor([1, 3]), weight).sum())
    assert leaf.grad is not None
    assert expected.grad is not None
    assert torch.equal(leaf.grad, expected.grad)
    assert torch.equal(leaf.float(), expected.float())
