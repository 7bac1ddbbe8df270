"""Under torch.compile a plan's model is as many graphs as the plain one: the mode costs nothing."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import autoprec
from autoprec.records import BF16_O2, FP32, Option, Recipe, fp8_option
from autoprec.runtime.finite import leave_first_step
from tests.architecture_zoo import ARCHITECTURES
from tests.plans import plan_for

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of dynamo itself
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # dynamo does it, torch 2.13
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # this too
]
WIDTH, HEADS, TOKENS = 64, 4, 16


def rotated(x: Tensor) -> Tensor:
    """Rotate queries or keys by FP32 tables, as decoders do."""
    size = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[-2]), 1e4 ** -(torch.arange(0, size, 2) / size))
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Heads by `unflatten`, rotary positions, grouped keys, a mask in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([WIDTH, WIDTH // 2, WIDTH // 2], dim=-1)
        q = rotated(q.unflatten(-1, (HEADS, -1)).transpose(1, 2))
        k = rotated(nn.Unflatten(-1, (HEADS // 2, -1))(k).transpose(1, 2))
        v = torch.unflatten(v, -1, (HEADS // 2, -1)).transpose(1, 2)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        mask = torch.full((TOKENS, TOKENS), -math.inf).triu(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = torch.einsum("bhsd,bhtd->bhst", q, k).masked_fill(mask < 0, -1e4)
        y = y + scores.softmax(-1, dtype=torch.float32) @ v
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Norms, attention, and a gated network with writes by index."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        hidden = F.silu(gate) * value
        routed = torch.zeros_like(hidden).index_add_(0, torch.tensor([1, 0]), hidden)
        routed[:, 0] = hidden[:, 0].float()
        return x + self.down(routed)  # type: ignore[no-any-return]  # a tensor


class Decoder(nn.Module):
    """A block, and a loss within forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(WIDTH, 48)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), torch.arange(2 * TOKENS))


def graphs_of(model: nn.Module) -> int:
    """Return the graphs of one forward; a break is an error."""
    torch._dynamo.reset()
    found = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:  # Any: torch's own
        found.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    loss, expected = compiled(x), model(x)
    torch._dynamo.reset()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    return len(found)


@pytest.mark.parametrize(
    "option",
    [pytest.param(BF16_O2, marks=pytest.mark.slow), fp8_option(Recipe.TENSORWISE)],
    ids=str,
)
def test_a_plans_model_is_one_graph_as_the_plain_one(option: Option) -> None:
    model = Decoder()
    names = [name for name, _ in model.named_modules() if "norm" in name]
    autoprec.apply(plan_for(model, option, dict.fromkeys(names, FP32) | {"head": BF16_O2}), model)
    assert graphs_of(model) == 1


class Moved(nn.Module):
    """Calls `to` of a module within forward, as code does that follows its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.down.to(device=x.device)
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]  # a tensor


class Known(Moved):
    """A block of a class that dynamo was told to leave whole, as attention of diffusers is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]  # a tensor


class HasKnown(nn.Module):
    """A block of that class, among others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.known = nn.Linear(WIDTH, WIDTH), Known()

    def forward(self, x: Tensor) -> Tensor:
        return self.known(self.first(x))  # type: ignore[no-any-return]  # a tensor


class Broken(nn.Module):
    """Asks for a value within forward, by a slice: dynamo runs all of the function eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def sliced(self, x: Tensor, place: Tensor) -> Tensor:
        shift = (x * 2 + 1).exp()
        return shift[:, 4 - place : place + 4, :].unsqueeze(0) + x.mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.sliced(self.inner(x), torch.tensor(2)).relu()


class BrokenAround(Broken):
    """Calls its layer in the function that runs eagerly: torch.nn's own layers then do, too."""

    def sliced(self, x: Tensor, place: Tensor) -> Tensor:
        shift = (x * 2 + 1).exp()
        found: Tensor = self.inner(shift[:, 4 - place : place + 4, :]).unsqueeze(0)
        return found + x.mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.sliced(x, torch.tensor(2)).relu()


class GivenNone(nn.Module):
    """A layer whose arguments are not all tensors, nor all there."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x, None, False, None)[0]
        return found


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(Moved, marks=pytest.mark.slow),
        pytest.param(HasKnown, marks=pytest.mark.slow),
        pytest.param(Broken, marks=pytest.mark.slow),
        BrokenAround,
        GivenNone,
    ],
)
def test_what_dynamo_finds_hard_is_no_harder_with_a_plan(kind: type[nn.Module]) -> None:
    torch.compiler.allow_in_graph(Known)  # type: ignore[no-untyped-call]  # torch's own
    x = torch.randn(2, TOKENS, WIDTH)
    counts = []
    for option in (None, BF16_O2):
        torch.manual_seed(0)
        model = kind()
        if option is not None:
            autoprec.apply(plan_for(model, option), model)
            leave_first_step(model)  # its hooks at layers are a graph each in the first step
        torch._dynamo.reset()
        counter = CompileCounter()
        with torch.no_grad():
            found = torch.compile(model, backend=counter)(x)
            counts.append((counter.frame_count, counter.op_count))
            torch._dynamo.reset()
            assert torch.allclose(found, model(x), rtol=1e-2, atol=1e-2)
    (graphs, operations), (planned, of_plan) = counts
    assert planned == graphs > 0
    assert of_plan >= operations


@pytest.mark.slow
def test_a_model_with_breaks_is_as_many_graphs_with_a_plan() -> None:
    """With torch 2.11 it has four, and a block was asked for its compiled call for ever."""
    kind = next(kind for kind in ARCHITECTURES if kind.name == "MT5ForConditionalGeneration")
    counts = []
    for option in (None, BF16_O2):
        model = kind.workload().build_model(seed=0)
        if option is not None:
            autoprec.apply(plan_for(model, option), model)
        torch._dynamo.reset()
        counter = CompileCounter()
        torch.compile(model, backend=counter)(**kind.make_batch(torch.Generator().manual_seed(0)))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[1] == counts[0] > 0


@pytest.mark.skipif(
    torch.__version__.startswith("2.11"), reason="plain ones are eager by .compile() there, too"
)
def test_a_layer_that_is_compiled_alone_is_a_graph() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    autoprec.apply(plan_for(model, BF16_O2), model)
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.compile(model[0], backend=counter)(torch.randn(4, WIDTH))
    torch._dynamo.reset()
    model[0].compile(backend=counter)
    model(torch.randn(4, WIDTH))
    torch._dynamo.reset()
    assert counter.frame_count == 2


class Mixing(nn.Module):
    """Mixes dtypes in what may be a checkpointed function."""

    def __init__(self, *, inside: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table, self.inside = nn.Buffer(torch.eye(WIDTH)), inside

    def part(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) @ self.table  # type: ignore[no-any-return]  # a tensor

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = (
            checkpoint(self.part, x, use_reentrant=False) if self.inside else self.part(x)
        )
        return x + found


def selected() -> Any:  # Any: torch's contexts
    """Keep what GEMMs give, and compute the rest again."""

    def policy(_: object, operation: object, *__: Any, **___: Any) -> CheckpointPolicy:
        is_gemm = operation is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if is_gemm else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]  # torch


WAYS: dict[str, Callable[[], nn.Module]] = {
    "a block": lambda: checkpoint_wrapper(Mixing()),
    "some of a block": lambda: checkpoint_wrapper(Mixing(), context_fn=selected),
    "a function": lambda: Mixing(inside=True),
}


def assert_equal(eager: list[Tensor | None], compiled: list[Tensor | None]) -> None:
    """Check that all gradients are there, and the same bit for bit."""
    for one, other in zip(eager, compiled, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["each block", "whole"]
)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_checkpointed_is_in_the_one_graph_and_computes_the_same(
    way: str, whole: bool
) -> None:
    """Dynamo asks the mode about a checkpoint, and a mode is off where it is asked."""
    gradients = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), WAYS[way]())
        autoprec.apply(plan_for(model, BF16_O2), model)
        counter = CompileCounterWithBackend("aot_eager")
        if is_compiled:
            (model if whole else model[1]).compile(backend=counter, fullgraph=True)
        model(torch.randn(4, WIDTH)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert counter.frame_count == 1
    assert_equal(*gradients)


class Outside(nn.Module):
    """Checkpoints its block, which is compiled by itself, from outside, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block = nn.Linear(WIDTH, WIDTH), Mixing()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found: Tensor = checkpoint(self.block, x, use_reentrant=False, context_fn=selected)
        return found


@pytest.mark.parametrize(
    "on_object",
    [
        pytest.param(False, marks=pytest.mark.slow, id="compile()"),
        pytest.param(True, id="its forward"),
    ],
)
def test_a_compiled_block_is_computed_again_as_it_was_computed(on_object: bool) -> None:
    """Compiled code cannot ask whether it is in backward, where no model is around it."""
    gradients = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        model, counter = Outside(), CompileCounterWithBackend("aot_eager")
        if is_compiled and on_object:
            model.block.forward = torch.compile(model.block.forward, backend=counter)  # type: ignore[method-assign]  # as some do
        own = vars(model.block).get("forward")
        autoprec.apply(plan_for(model, BF16_O2), model)
        if is_compiled and not on_object:
            model.block.compile(backend=counter)
        model(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert counter.frame_count == 1
    assert_equal(*gradients)
    autoprec.undo(model)
    assert vars(model.block).get("forward") is own


class Flexible(nn.Module):
    """FP32 queries and keys meet the values of a linear layer in `flex_attention`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.values, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (x, self.values(x)))
        y: Any = flex_attention(q, q, v, score_mod=lambda score, b, h, i, j: score + (i - j))
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # a tensor


@pytest.mark.slow
def test_flex_attention_gets_operands_of_one_dtype() -> None:
    """The inductor refuses others; torch 2.13 has no backward of it on a CPU."""
    found = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:  # Any: torch's own
        calls = [node for node in graph.graph.nodes if "flex_attention" in str(node.target)]
        operands = [operand for node in calls for operand in node.args[:3]]
        found.append({operand.meta["example_value"].dtype for operand in operands})
        return graph.forward

    torch._dynamo.reset()
    model = Flexible()
    autoprec.apply(plan_for(model, BF16_O2), model)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, TOKENS, WIDTH))
    assert found == [{torch.bfloat16}]
