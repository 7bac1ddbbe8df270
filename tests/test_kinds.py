"""Linears of users and libraries: which are, which only look so; in them FP8 is what it is."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.pytorch_utils import Conv1D

import autoprec
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.kinds import is_linear, is_transposed, layer_kind, linear_refusal
from autoprec.records import LayerKind, Option, Recipe, Sensitivity, fp8_option
from autoprec.runtime import uniform_plan
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from autoprec.workload.functions import Workload
from tests.models import BATCH, WIDTH, Mlp, mlp_workload
from tests.plans import plan_for
from tests.test_sensitivity_measure import changed

FP8 = [fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE)]


class Casting(nn.Linear):
    """As those of trainers that keep FP32 weights and have no autocast."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's own name
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Multiplying(nn.Linear):
    """As transformers' Falcon."""

    def forward(self, hidden: Tensor) -> Tensor:
        product = hidden @ self.weight.T
        return product if self.bias is None else product + self.bias


class FromScratch(nn.Module):
    """As in courses: no bias, sizes of its own names, einsum."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 0.5


class Adapted(nn.Linear):
    """LoRA, whose product is zero at first."""

    def __init__(self, K: int, N: int) -> None:
        super().__init__(K, N)
        self.a = nn.Parameter(torch.randn(4, K))
        self.b = nn.Parameter(torch.zeros(N, 4))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + input @ self.a.t() @ self.b.t()


class Dropping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.dropout(super().forward(input), 0.1, self.training)


class InFp32(nn.Linear):
    """A router's: its author wants FP32."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input.float(), self.weight.float(), self.bias.float())


class Keeping(nn.Linear):
    """Keeps what it saw."""

    seen: Any = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self.seen = input
        return super().forward(input)


class WithoutGradient(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, self.weight.detach() * 1.0 + 0.0 * self.weight, self.bias)


class Reversing(nn.Linear):
    """Right for square weights of equal halves alone."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input.flip(-1), self.weight, self.bias)


class Clipping(nn.Linear):
    """As BinaryConnect; most weights are within."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, self.weight.clamp(-100, 100), self.bias)


class Pruning(nn.Linear):
    """Without what is small, straight through."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        weight = self.weight
        kept = weight * (weight.abs() > 1e-4)
        return F.linear(input, weight + (kept - weight).detach(), self.bias)


class MaxNorm(nn.Linear):
    """As EEGNet, which writes into its weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 1.0)
        return super().forward(input)


class Rarely(nn.Linear):
    """Skipped once in a thousand calls."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        is_skipped = self.training and random.random() < 1e-3
        return super().forward(input) * (0 if is_skipped else 1)


class Logging(nn.Linear):
    def __init__(self, K: int, N: int) -> None:
        super().__init__(K, N)
        self.log: list[Tensor] = []

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self.log.append(input)
        return super().forward(input)


class Marking(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        vars(self.weight)["seen"] = input
        return super().forward(input)


class Summing(nn.Linear):
    """Its output is that of all ranks together."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        y = super().forward(input)
        dist.all_reduce(y)
        return y


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32))

    def forward(self, rows: Tensor) -> Tensor:
        return self.weight[rows]


OWN: list[Callable[[int, int], nn.Module]] = [
    Casting,
    lambda K, N: Casting(K, N, bias=False),
    Multiplying,
    FromScratch,
    lambda K, N: Conv1D(N, K),
]


@pytest.mark.parametrize("make", OWN)
@pytest.mark.parametrize("sizes", [(32, 16), (16, 16)])
def test_what_computes_a_linear_is_one(
    make: Callable[[int, int], nn.Module], sizes: tuple[int, int]
) -> None:
    module = make(*sizes)
    state = torch.get_rng_state()
    assert layer_kind(module) is LayerKind.LINEAR
    assert linear_refusal(module) == ""
    assert is_transposed(module) is isinstance(module, Conv1D)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert linear_refusal(make(*sizes)) == ""


DOES_MORE = [
    *(Scaled, Adapted, Dropping, InFp32, Keeping, WithoutGradient, Reversing),
    *(Clipping, Pruning, MaxNorm, Rarely, Logging, Marking),
]


@pytest.mark.parametrize("cls", DOES_MORE)
def test_a_forward_that_does_more_keeps_fp8_out(cls: type[nn.Linear]) -> None:
    module, state = cls(16, 16), random.getstate()
    assert "does more than nn.Linear's" in linear_refusal(module)
    assert layer_kind(module) is LayerKind.LINEAR
    assert random.getstate() == state
    assert not getattr(module, "log", None)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_of_other_numbers_keep_fp8_out(dtype: torch.dtype) -> None:
    module = nn.Linear(16, 16, bias=False)
    module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    assert "FP8 is for weights in FP32" in linear_refusal(module)


def test_trying_asks_no_other_rank(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert "does more than nn.Linear's" in linear_refusal(Summing(16, 16))
    finally:
        dist.destroy_process_group()


def test_a_sharded_linear_of_its_own_stays_one(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for plan_first in (False, True):
            model = nn.Sequential(Conv1D(16, 32))
            plan = uniform_plan(model, FP8[1])
            if plan_first:
                autoprec.apply(plan, model)
            fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
            if not plan_first:
                autoprec.apply(plan, model)
            assert layer_kind(model[0]) is LayerKind.LINEAR
            assert is_transposed(model[0])
            assert model(torch.randn(32, 32)).shape == (32, 16)
    finally:
        dist.destroy_process_group()


def test_trying_compiles_nothing() -> None:
    seen: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    class Compiled(nn.Linear):
        @torch.compile(backend=backend)
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return F.linear(input, self.weight, self.bias)

    assert linear_refusal(Compiled(16, 16)) == ""
    assert not seen


def test_attributes_that_no_forward_reads_may_be_anything() -> None:
    class Odd:
        def __hash__(self) -> int:
            raise ValueError

    module: Any = Casting(16, 16)
    module.odd = Odd()
    assert linear_refusal(module) == ""


def test_scripted_and_lazy_modules_are_no_linears_yet() -> None:
    class Lazy(nn.modules.lazy.LazyModuleMixin, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.UninitializedParameter()

    for module in (torch.jit.script(nn.Linear(16, 16)), Lazy()):
        assert "is no nn.Linear" in linear_refusal(module)


@pytest.mark.parametrize("module", [Table(), nn.Embedding(16, 32), nn.Bilinear(16, 16, 16)])
def test_what_has_a_matrix_is_no_linear_for_that(module: nn.Module) -> None:
    assert not is_linear(module)
    assert "is no nn.Linear" in linear_refusal(module)


def test_attributes_decide_anew() -> None:
    class Switched(nn.Linear):
        factor = 1.0

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input) * self.factor

    first, second = Switched(16, 16), Switched(16, 16)
    second.factor = 2.0
    assert not linear_refusal(first)
    assert linear_refusal(second)
    first.factor = 3.0
    assert linear_refusal(first)


def with_linears(make: Callable[[int, int], nn.Module]) -> tuple[Mlp, Mlp]:
    """Return a model of linears of another class, and one of torch's with the same weights."""
    torch.manual_seed(0)
    plain, own = Mlp(), Mlp()
    for name in ("first", "second"):
        linear: Any = getattr(plain, name)
        other: Any = make(linear.in_features, linear.out_features)
        weight = other.weight.detach()
        linear.weight.data.copy_(weight.t() if isinstance(other, Conv1D) else weight)
        if getattr(other, "bias", None) is None:
            linear.bias = None
        else:
            linear.bias.data.copy_(other.bias.data)
        setattr(own, name, other)
    for name in ("norm", "head"):
        getattr(own, name).load_state_dict(getattr(plain, name).state_dict())
    return own, plain


@pytest.mark.parametrize("make", OWN)
@pytest.mark.parametrize("option", FP8, ids=str)
def test_fp8_trains_as_in_torchs_own_linears(
    make: Callable[[int, int], nn.Module], option: Option
) -> None:
    losses = []
    for model in with_linears(make):
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        autoprec.apply(plan_for(model, option), model, optimizer)
        torch.manual_seed(1)
        x, target = torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,))
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        checks = autoprec.verify_applied(model, (x,))
        assert all(check.is_good for check in checks)
        assert sum("grad_weight _scaled_mm" in check.detail for check in checks) == 2
        assert model.state_dict().keys() == before.keys()
        autoprec.undo(model, optimizer)
        assert layer_kind(model.first) is LayerKind.LINEAR
    assert losses[:3] == pytest.approx(losses[3:], rel=2e-3)
    assert losses[2] < losses[0]


def _table(workload: Workload) -> Sensitivity:
    context = Context(workload, torch.device("cpu"))
    reference = prepare_reference(context, capture_model(context), warmup_steps=3)
    return measure_sensitivity(reference)


@pytest.mark.parametrize("make", [Multiplying, lambda K, N: Conv1D(N, K)], ids=["own", "Conv1D"])
def test_the_table_is_that_of_torchs_own_linears(make: Callable[[int, int], nn.Module]) -> None:
    own, plain = (
        _table(changed(mlp_workload(), build_model=lambda model=model: copy.deepcopy(model)))
        for model in with_linears(make)
    )
    rows = {(row.name, row.option): row.grad_error.mean for row in plain.rows}
    assert sum(option.is_fp8 for _, option in rows) > 2
    for row in own.rows:  # in BF16 they may round once more, before the bias
        rel = 0.05 if row.option.is_fp8 else 0.5
        assert row.grad_error.mean == pytest.approx(rows[row.name, row.option], rel=rel, abs=1e-9)
