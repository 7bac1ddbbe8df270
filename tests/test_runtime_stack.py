"""A plan inside the code that people have around their models."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import autoprec
from autoprec.errors import PlanMismatchError
from autoprec.records import BF16_O2, FP32, Option, Plan, Recipe, fp8_option
from tests.models import Mlp, TiedTokens, conv_workload, mlp_workload, token_workload
from tests.plans import plan_for

TENSORWISE = fp8_option(Recipe.TENSORWISE)
QUIET = pytest.mark.filterwarnings(  # torch's compiler uses what torch deprecates
    "ignore:.*torch.jit.script_method.*:DeprecationWarning"
)
QUIET_TRANSFORMERS = pytest.mark.filterwarnings(  # 5.24 deprecates what it calls itself
    "ignore:.*gradient_checkpointing.*:FutureWarning"
)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: int, call: Any = None
) -> list[float]:
    losses = []
    for x, y in itertools.islice(mlp_workload().train_batches(0), steps):
        optimizer.zero_grad()
        loss = F.mse_loss((call or model)(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def expected_losses(model: nn.Module, option: Option, steps: int) -> list[float]:
    own = copy.deepcopy(model)
    return train(*autoprec.apply(plan_for(own, option), own, sgd(own)), steps)


@pytest.mark.parametrize(
    "order", [*(pytest.param(o, marks=pytest.mark.slow) for o in ("before", "after")), "in place"]
)
def test_torch_compile_before_or_after_has_no_break_and_compiles_once(order: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()  # counts graphs, runs them eagerly
    model: Any = Mlp()
    compiled: Any = model
    optimizer = sgd(model)
    expected = expected_losses(model, TENSORWISE, 4)
    plan = plan_for(model, TENSORWISE)
    if order == "before":
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        compiled(torch.randn(48, 32))
        result, _ = autoprec.apply(plan, compiled, optimizer)
        assert result is compiled
    else:
        autoprec.apply(plan, model, optimizer)
    if order == "after":
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    if order == "in place":
        model.compile(backend=counter, fullgraph=True)
    counter.clear()
    assert train(compiled, optimizer, 4) == pytest.approx(expected, rel=1e-3)
    assert counter.frame_count == 1
    if order == "before":  # a switch is one graph more, and none on the way back
        model.first.fp8_active = False
        train(compiled, optimizer, 2)
        model.first.fp8_active = True
        train(compiled, optimizer, 2)
        assert counter.frame_count == 2
    autoprec.undo(compiled, optimizer)
    assert next(model.parameters()).dtype is torch.float32


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_compiled_block_inside_the_model_keeps_its_plain_name(order: str) -> None:
    torch._dynamo.reset()
    model = Mlp()
    optimizer = sgd(model)
    expected = expected_losses(model, TENSORWISE, 3)
    plan = plan_for(model, TENSORWISE)
    if order == "after":
        autoprec.apply(plan, model, optimizer)
    model.first = torch.compile(model.first, backend="eager")  # type: ignore[assignment]  # on purpose
    if order == "before":
        autoprec.apply(plan, model, optimizer)
    assert train(model, optimizer, 3) == pytest.approx(expected, rel=1e-3)
    assert [c.is_good for c in autoprec.verify_applied(model, torch.randn(48, 32))] == [True] * 4


def test_gradient_accumulation_compiles_once_and_gives_the_eager_losses() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = Mlp()
    optimizer = sgd(model)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    autoprec.apply(plan_for(model, TENSORWISE), model, optimizer)
    autoprec.apply(plan_for(other, TENSORWISE), other, other_optimizer)
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def accumulate(call: Any, stepped: torch.optim.Optimizer) -> list[float]:
        losses = []
        for step, (x, y) in enumerate(itertools.islice(mlp_workload().train_batches(0), 6)):
            loss = F.mse_loss(call(x), y) / 2
            torch.autograd.backward(loss)
            losses.append(loss.item())
            if step % 2:
                stepped.step()
                stepped.zero_grad()
        return losses

    expected = accumulate(other, other_optimizer)
    assert accumulate(compiled, optimizer) == pytest.approx(expected, rel=1e-3)
    assert counter.frame_count == 1


@QUIET
def test_a_compiled_optimizer_step_compiles_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = Mlp()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    autoprec.apply(plan_for(model), model, optimizer)
    train(model, optimizer, 1)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    expected = train(other, other_optimizer, 4)
    optimizer.step = torch.compile(optimizer.step, backend=counter)
    assert train(model, optimizer, 4) == pytest.approx(expected, rel=1e-3)
    assert counter.frame_count == 1


@pytest.mark.slow
@QUIET
def test_inductor_compiles_an_applied_model() -> None:
    torch._dynamo.reset()
    model = Mlp()
    optimizer = sgd(model)
    expected = expected_losses(model, TENSORWISE, 4)
    autoprec.apply(plan_for(model, TENSORWISE), model, optimizer)
    compiled = torch.compile(model, fullgraph=True)
    assert train(compiled, optimizer, 4) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("option", [BF16_O2, TENSORWISE], ids=str)
def test_activation_checkpointing_gives_the_same_losses(option: Option, reentrant: bool) -> None:
    model = Mlp()
    expected = expected_losses(model, option, 3)
    optimizer = sgd(model)
    autoprec.apply(plan_for(model, option), model, optimizer)

    def call(x: Tensor) -> Any:
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    assert train(model, optimizer, 3, call) == expected


class MixingBlock(nn.Module):
    """Checkpoints a function of its own, in which an FP32 table meets what the layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("table", torch.randn(48, 32))
        self.reentrant: bool | None = None

    def scores(self, x: Tensor) -> Any:
        query = self.query(x) * self.get_buffer("table")
        return query @ self.key(x).T

    def forward(self, x: Tensor) -> Any:
        if self.reentrant is None:
            return self.scores(x)
        return checkpoint(self.scores, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("option", [BF16_O2, TENSORWISE], ids=str)
def test_a_checkpointed_function_may_mix_dtypes(option: Option, reentrant: bool) -> None:
    model = MixingBlock()
    autoprec.apply(plan_for(model, option), model)
    x = torch.randn(48, 32, requires_grad=True)
    gradients = []
    for model.reentrant in (None, reentrant):
        model.zero_grad()
        torch.autograd.backward(model(x).square().mean())
        gradients.append([p.grad for p in model.parameters()])
        assert torch._C._len_torch_function_stack() == 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)
    assert all(check.is_good for check in autoprec.verify_applied(model, x))


def test_a_recomputation_that_fails_leaves_no_mode_behind() -> None:
    model, x = MixingBlock(), torch.randn(48, 32)
    model.reentrant = False
    autoprec.apply(plan_for(model), model)
    loss = model(x).square().mean()
    model.register_buffer("table", torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        torch.autograd.backward(loss)
    assert torch._C._len_torch_function_stack() == 0


def test_autocast_around_the_step_changes_nothing() -> None:
    model = Mlp()
    expected = expected_losses(model, TENSORWISE, 3)
    optimizer = sgd(model)
    autoprec.apply(plan_for(model, TENSORWISE), model, optimizer)

    def call(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    assert train(model, optimizer, 3, call) == expected


@pytest.mark.parametrize("option", [FP32, BF16_O2, TENSORWISE], ids=str)
def test_ties_class_tokens_dropout_and_unused_layers_train(option: Option) -> None:
    workload = token_workload(dropout=0.1)
    model = TiedTokens(dropout=0.1)
    plan = plan_for(model, option, {"embedding": BF16_O2} if option.is_fp8 else None)
    _, optimizer = autoprec.apply(plan, model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for batch in itertools.islice(workload.train_batches(0), 25):
        optimizer.zero_grad()
        loss = workload.loss_fn(model, batch)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert model.head.weight is model.embedding.weight
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert model.class_token.dtype is (torch.float32 if option is FP32 else torch.bfloat16)
    autoprec.undo(model, optimizer)
    assert model.class_token.abs().sum() > 0


def test_batch_norm_trains_and_evaluates() -> None:
    workload = conv_workload()
    model = workload.build_model()
    batch = next(workload.train_batches(0))
    _, optimizer = autoprec.apply(plan_for(model), model, sgd(model))
    for _ in range(3):
        torch.autograd.backward(workload.loss_fn(model, batch))
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        in_bf16 = model(batch[0])
    view = autoprec.master_view(model)
    assert in_bf16.dtype is torch.float32
    assert torch.allclose(in_bf16, view(batch[0]), rtol=0.1, atol=0.05)
    assert torch.equal(view.get_buffer("norm.running_mean"), model.get_buffer("norm.running_mean"))


def test_frozen_weights_get_no_gradient_and_no_state() -> None:
    model = Mlp()
    model.first.requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    autoprec.apply(plan_for(model, TENSORWISE), model, optimizer)
    before = model.first.weight.detach().clone()
    train(model, optimizer, 3)
    assert torch.equal(model.first.weight, before)
    assert model.first.weight.grad is None
    assert all(check.is_good for check in autoprec.verify_applied(model, torch.randn(48, 32)))


def test_hooks_and_parametrizations_of_the_user_keep_working() -> None:
    model: Any = Mlp()
    nn.utils.parametrizations.weight_norm(model.second)
    seen: list[torch.dtype] = []
    model.first.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    model.first.weight.register_hook(lambda grad: seen.append(grad.dtype))
    model.head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.dtype))
    model.second.register_full_backward_hook(lambda _m, _i, out: seen.append(out[0].dtype))
    model.norm.register_full_backward_pre_hook(lambda _m, out: seen.append(out[0].dtype))
    plan = plan_for(model)
    _, optimizer = autoprec.apply(plan, model, sgd(model))
    losses = train(model, optimizer, 4)
    assert len(seen) == 20
    assert set(seen) == {torch.bfloat16}
    assert losses[-1] < losses[0]
    autoprec.undo(model, optimizer)
    assert nn.utils.parametrize.is_parametrized(model.second)


@pytest.mark.parametrize("option", [BF16_O2, TENSORWISE])
@pytest.mark.parametrize("place", ["first", "second", "norm", "0"])
def test_hooks_at_modules_may_return_fp32_gradients(place: str, option: Option) -> None:
    """An FP32 mask, at layers and at the model in a parent, before and after its backward."""
    masks = {size: (torch.rand(size) > 0.5).float() for size in (10, 32, 64)}

    def halved(_: nn.Module, gradients: Any, *__: Any) -> Any:
        return tuple(None if g is None else g * masks[g.shape[-1]] for g in gradients)

    def gradients(*, is_planned: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Mlp(), nn.Identity())
        at = model if place == "0" else model[0]
        at.get_submodule(place).register_full_backward_hook(halved)
        at.get_submodule(place).register_full_backward_pre_hook(halved)
        if is_planned:
            autoprec.apply(plan_for(model, option), model)
        x = torch.randn(48, 32, requires_grad=True)
        torch.autograd.backward(model(x).square().mean())
        return [p.grad.float() for p in (x, *model.parameters()) if p.grad is not None]

    pairs = list(zip(gradients(is_planned=False), gradients(is_planned=True), strict=True))
    off = [float((found - plain).norm() / plain.norm()) for plain, found in pairs]
    assert max(off) < 0.2, off


def test_experts_with_3d_weights_are_one_layer() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 32, 32) / 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eij->bj", x, self.weight)

    model = nn.Sequential(nn.Linear(32, 32), Experts(), nn.Linear(32, 10))
    _, optimizer = autoprec.apply(plan_for(model, TENSORWISE), model, sgd(model))
    train(model, optimizer, 2)
    checks = autoprec.verify_applied(model, torch.randn(16, 32))
    assert "bmm bfloat16" in checks[1].detail


def test_a_huggingface_gpt2_trains_generates_and_comes_back() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=32,
        vocab_size=64,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config)
    keys = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(3, 64, (2, 16))
    autoprec.apply(plan_for(model), model, optimizer)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    checks = autoprec.verify_applied(model, {"input_ids": tokens, "labels": tokens})
    assert (
        "forward addmm bfloat16"
        in {c.name: c.detail for c in checks}["transformer.h.0.attn.c_attn"]
    )
    model.eval()
    generated = model.generate(tokens[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 8)
    assert list(model.state_dict()) == keys
    autoprec.undo(model, optimizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=32, eos_token_id=2)
    return transformers.LlamaForCausalLM(config)


def llama_plan(model: nn.Module, option: Option) -> Plan:
    return plan_for(model, option, {"model.embed_tokens": BF16_O2})


def llama_losses(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    tokens = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@QUIET_TRANSFORMERS
def test_a_huggingface_llama_in_fp8_runs_its_plan_with_checkpointing_too() -> None:
    model, tokens = llama(), torch.randint(3, 64, (2, 16))
    plan = llama_plan(model, TENSORWISE)
    twins = {reentrant: copy.deepcopy(model) for reentrant in (True, False)}
    _, optimizer = autoprec.apply(plan, model, sgd(model))
    expected = llama_losses(model, optimizer, 2)
    checks = autoprec.verify_applied(model, {"input_ids": tokens, "labels": tokens})
    assert sum("_scaled_mm" in check.detail for check in checks) == plan.count(TENSORWISE.precision)
    for reentrant, twin in twins.items():
        twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
        twin.train()
        _, optimizer = autoprec.apply(plan, twin, sgd(twin))
        assert llama_losses(twin, optimizer, 2) == expected


@QUIET_TRANSFORMERS
@pytest.mark.slow
@pytest.mark.parametrize("recipe", [Recipe.TENSORWISE, Recipe.ROWWISE])
def test_generation_with_a_cache_in_fp8_gives_what_it_gives_without(recipe: Recipe) -> None:
    model = llama()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    autoprec.apply(llama_plan(model, fp8_option(recipe)), model, optimizer)
    llama_losses(model, optimizer, 8)
    model.eval()
    prompt = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(model.generate(prompt, use_cache=True, **settings), expected)
    static = model.generate(prompt, cache_implementation="static", **settings)
    assert torch.equal(static, expected)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}


def test_distributed_wrappers_are_refused_before_and_named() -> None:
    with pytest.raises(PlanMismatchError, match=r"call autoprec\.apply first"):
        autoprec.apply(plan_for(Mlp()), nn.DataParallel(Mlp()))
