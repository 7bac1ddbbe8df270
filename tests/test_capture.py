from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import autoprec
from autoprec.device.fp8 import Fp8Support
from autoprec.errors import CaptureError, WorkloadError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.layers import find_layers, model_layers
from autoprec.model.meta import capture_on_meta
from autoprec.model.neighbours import NeighbourWatch
from autoprec.model.recording import Gradients, recorded_calls
from autoprec.predict import load_device_profile, predict_profile
from autoprec.records import (
    APPLICABLE_RECIPES,
    BF16_O2,
    FP32,
    Gemm,
    GemmShape,
    LayerKind,
    ModelSpec,
    Precision,
    Recipe,
    fp8_option,
)
from autoprec.report.remarks import profile_notes
from autoprec.report.runs import load_run
from autoprec.report.summary import summarise_run
from autoprec.runtime import uniform_plan, verify_applied
from autoprec.workload.functions import workload_from
from tests.models import TiedTokens, conv_workload, mlp_workload, token_workload
from tests.test_workload import workload_with

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens() -> ModelSpec:
    return capture_model(Context(token_workload(dropout=0.1), CPU))


def test_every_parameter_is_in_a_layer_or_listed(tokens: ModelSpec) -> None:
    model = TiedTokens()
    assert {p.name for p in tokens.parameters()} == {name for name, _ in model.named_parameters()}
    assert [p.name for p in tokens.uncovered] == ["class_token"]


def test_for_another_device_a_cpu_lists_what_it_only_emulates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with torch 2.11, whose CPU kernel has no row scales."""
    support = Fp8Support((Recipe.TENSORWISE,), "no row scales")
    monkeypatch.setattr("autoprec.model.capture.fp8_support", lambda _: support)
    context = Context(mlp_workload(), CPU)
    found = [
        {option.recipe for option in spec.layer("first").options if option.is_fp8}
        for spec in (
            capture_model(context),
            capture_model(context, target=load_device_profile("h100-sxm")),
        )
    ]
    assert found == [{Recipe.TENSORWISE}, set(APPLICABLE_RECIPES)]


def test_shapes_calls_and_tokens_are_those_of_the_step(tokens: ModelSpec) -> None:
    mix = tokens.layer("mix")
    assert str(mix.gemm) == "64x32x32"
    assert mix.calls_per_step == 1
    assert mix.calls[0].inputs[0].shape == (4, 16, 32)
    assert tokens.tokens_per_step == 64


def test_attention_is_one_layer_with_its_projection_inside(tokens: ModelSpec) -> None:
    assert tokens.layer("attention").kind is LayerKind.ATTENTION
    assert "attention.out_proj" not in tokens.names
    told = str(tokens.layer("attention").refusal(Precision.FP8_O1))
    assert "projections that are nn.Linear" in told


def test_tied_and_uncalled_layers_are_named(tokens: ModelSpec) -> None:
    assert tokens.layer("head").tied_to == "embedding"
    assert tokens.layer("head").parameters[0].shared_with == "embedding.weight"
    assert tokens.uncalled == ("unused",)
    assert "not called" in str(tokens.layer("unused").refusal(Precision.FP8_O1))


class FusedHead(nn.Module):
    """A model whose loss uses its head's weight, and not its head."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        self.mix = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 96, bias=False)
        self.adapter = nn.Linear(32, 32)
        if is_tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        mixed_BTC: Tensor = self.mix(self.embedding(ids_BT))
        return mixed_BTC


def fused_head(*, is_tied: bool, uses_head: bool = True) -> ModelSpec:
    def loss_fn(model: FusedHead, ids_BT: Tensor) -> Tensor:
        hidden_BTC: Tensor = model(ids_BT)
        if not uses_head:
            return hidden_BTC.square().mean()
        logits = nn.functional.linear(hidden_BTC.flatten(0, 1), model.lm_head.weight)
        return nn.functional.cross_entropy(logits, ids_BT.flatten())

    workload = workload_with(
        build_model=lambda: FusedHead(is_tied),
        train_batches=lambda seed: iter([torch.arange(32).reshape(2, 16)] * 4),
        loss_fn=loss_fn,
    )
    return capture_model(Context(workload, CPU))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_head_that_a_fused_loss_uses_is_told_from_one_that_nothing_uses(is_tied: bool) -> None:
    used = fused_head(is_tied=is_tied).layer("lm_head")
    assert used.is_used_uncalled
    assert "fused linear cross-entropy" in str(used.refusal(Precision.FP8_O1))
    spec = fused_head(is_tied=is_tied, uses_head=False)
    assert not spec.layer("lm_head").is_used_uncalled
    assert not spec.layer("adapter").is_used_uncalled
    assert "was not called" in str(spec.layer("adapter").refusal(Precision.FP8_O1))


def test_a_layer_that_was_dropped_at_random_is_not_used_without_a_call() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x) if torch.rand(()) < 0.5 else x
            out: Tensor = self.head(x)
            return out

    batches = [torch.ones(16, 16)] * 4
    workload = workload_with(build_model=Dropped, train_batches=lambda seed: iter(batches))
    spec = capture_model(Context(workload, CPU))
    assert spec.uncalled
    assert not any(layer.is_used_uncalled for layer in spec.layers)


def test_dropout_is_seen_as_randomness_that_a_seed_repeats(tokens: ModelSpec) -> None:
    assert tokens.has_randomness
    assert tokens.is_deterministic
    assert not capture_model(Context(mlp_workload(), CPU)).has_randomness


def test_refusals_say_why() -> None:
    spec = capture_model(Context(mlp_workload(), CPU))
    assert any(option.is_fp8 for option in spec.layer("first").options)
    assert "N=10" in str(spec.layer("head").refusal(Precision.FP8_O1))
    conv = capture_model(Context(conv_workload(), CPU)).layer("conv")
    assert conv.refusal(Precision.FP8_O1) is not None
    assert conv.refusal(Precision.BF16_O2) is None


def slope_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x = batch[0].detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    loss: Tensor = slope.square().mean()
    return loss


def each_by_itself_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(torch.vmap(model)(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_layers_take_the_rows_of_all_sequences_of_a_jagged_tensor() -> None:
    def loss_fn(model: nn.Module, rows: Tensor) -> Tensor:
        x = torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 6, 16]))
        loss: Tensor = model(x).values().square().mean()
        return loss

    given = workload_with(
        build_model=lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
        train_batches=lambda seed: iter([torch.eye(16, 32)] * 4),
        loss_fn=loss_fn,
    )
    for layer in capture_model(Context(given, CPU)).layers:
        assert layer.tokens == (16,)
        assert any(option.is_fp8 for option in layer.options)


def adapted_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss after a step of its own, as meta learning has it."""

    def inner(values: dict[str, Any]) -> Tensor:  # Any: parameters, or what is made of them
        out = torch.func.functional_call(model, values, (batch[0],))
        return nn.functional.mse_loss(out, batch[1])

    values = dict(model.named_parameters())
    before, slopes = inner(values), torch.func.grad(inner)(values)
    return before + inner({n: value - 0.1 * slopes[n] for n, value in values.items()})


@pytest.mark.parametrize("is_meta", [False, True])
def test_gradients_by_torch_func_are_captured(is_meta: bool) -> None:
    """It refuses hooks at what autograd keeps, so how much that is is not known."""
    plain = mlp_workload()
    given = workload_with(
        loss_fn=adapted_loss, build_model=plain.build_model, train_batches=plain.train_batches
    )
    spec = capture_on_meta(given) if is_meta else capture_model(Context(given, CPU))
    assert spec.saved_bytes is None
    # one of them within the transform
    assert all(sum(call.count for call in layer.calls) == 3 for layer in spec.layers)


def test_a_layer_that_runs_without_gradients_alone_is_told_so() -> None:
    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                wanted: Tensor = self.teacher(x)
            return nn.functional.mse_loss(self.student(x), wanted)

    plain = mlp_workload()
    own: dict[str, Callable[..., Any]] = {
        "build_model": Taught,
        "loss_fn": lambda model, batch: model(batch[0]),
    }
    spec = capture_model(Context(replace(plain, _functions={**plain._functions, **own}), CPU))
    assert "no_grad" in str(spec.layer("teacher").refusal(Precision.FP8_O1))
    assert spec.layer("student").refusal(Precision.FP8_O1) is None


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (slope_loss, "differentiated again"),
        (each_by_itself_loss, "transform"),
        (adapted_loss, "transform"),
    ],
)
@pytest.mark.parametrize("is_second", [False, True])
def test_layers_that_fp8_could_not_run_in_say_so(
    loss_fn: Callable[..., Tensor], reason: str, is_second: bool
) -> None:
    """Also where a plain call of the same shapes came first, as a critic's on its data."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        before = nn.functional.mse_loss(model(batch[0]), batch[1]) if is_second else 0.0
        return before + loss_fn(model, batch)

    plain = mlp_workload()
    workload = replace(plain, _functions={**plain._functions, "loss_fn": loss})
    for layer in capture_model(Context(workload, CPU)).layers:
        assert reason in str(layer.refusal(Precision.FP8_O1))
        assert layer.refusal(Precision.BF16_O2) is None


@pytest.mark.parametrize(
    "loss_fn", [slope_loss, pytest.param(each_by_itself_loss, marks=pytest.mark.slow)]
)
def test_losses_made_of_gradients_or_in_transforms_are_tuned_and_verified(
    loss_fn: Callable[..., Tensor], tmp_path: Path
) -> None:
    """The loss is evaluated without gradients, which the first cannot be."""
    functions = {**mlp_workload()._functions, "loss_fn": loss_fn}
    few: dict[str, Any] = {"trials": 0, "warmup_steps": 4, "branch_steps": 4, "seeds": "2:2"}
    run = autoprec.tune(functions, out=tmp_path, loss_tolerance="50%", **few)
    assert run.verification
    assert all(branch.eval_losses for branch in run.verification.branches)


def test_a_gradient_of_a_gradient_is_not_promised_to_compile(tmp_path: Path) -> None:
    """torch.compile has none: the advice to compile would end the user's training."""
    functions = {**mlp_workload()._functions, "loss_fn": slope_loss}
    some: dict[str, Any] = {"target": "h100-sxm", "verify": False, "trials": 0, "warmup_steps": 2}
    autoprec.tune(functions, out=tmp_path, **some)
    found = summarise_run(load_run(tmp_path))
    assert "no gradient of a gradient" in found.compile_answer
    assert not found.compile_advice
    assert found.run.plan
    assert found.run.plan.fingerprint.compile_mode == "eager"
    with pytest.raises(WorkloadError, match=r"--compile .* \(create_graph=True\); leave it out"):
        autoprec.tune(functions, out=tmp_path / "compiled", compile=True, **some)


def test_short_last_batch_counts_for_fp8() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y

    workload = workload_with(
        build_model=Model,
        train_batches=lambda seed: iter([torch.ones(32, 32), torch.ones(7, 32)]),
    )
    layer = capture_model(Context(workload, CPU)).layer("linear")
    assert layer.tokens == (7, 32)
    options = [option for option in layer.options if option.is_fp8]
    assert options
    assert not any("grad_weight" not in o.key and "gw_hp" not in o.key for o in options)


def test_optimizer_state_is_measured() -> None:
    spec = capture_model(Context(mlp_workload(), CPU))
    assert spec.optimizer == "AdamW"
    assert spec.optimizer_state_numel_ratio == pytest.approx(2.0)


def test_frozen_layers_are_marked() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        model[0].requires_grad_(False)
        return model

    workload = workload_with(
        build_model=build, train_batches=lambda seed: iter([torch.ones(16, 32)])
    )
    spec = capture_model(Context(workload, CPU))
    assert [layer.is_frozen for layer in spec.layers] == [True, False]
    assert not spec.layer("1").calls[0].inputs[0].requires_grad


def test_loss_without_gradient_is_refused() -> None:
    workload = workload_with(loss_fn=lambda model, batch: model(batch).sum().detach())
    with pytest.raises(CaptureError, match="needs no gradient"):
        capture_model(Context(workload, CPU))


def test_nan_loss_is_refused() -> None:
    workload = workload_with(loss_fn=lambda model, batch: model(batch).sum() * float("nan"))
    with pytest.raises(WorkloadError, match="must be finite, but it is nan"):
        capture_model(Context(workload, CPU))


def test_structure_ignores_values_and_dtype_but_not_shapes() -> None:
    assert model_layers(TiedTokens()).structure == model_layers(TiedTokens().bfloat16()).structure
    other = TiedTokens()
    other.mix = nn.Linear(32, 32, bias=False)
    assert model_layers(other).structure != model_layers(TiedTokens()).structure


def test_parametrized_modules_are_one_layer() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)))
    assert list(find_layers(model)) == ["0"]


def test_parameter_lists_belong_to_no_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_module("scales", nn.ParameterList([nn.Parameter(torch.ones(4))]))
    assert list(find_layers(model)) == ["0"]
    assert list(model_layers(model).uncovered) == ["scales.0"]


def test_chains_of_ties_point_at_the_first_layer() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    model[1].weight = model[2].weight = model[0].weight
    assert model_layers(model).ties == {"1": "0", "2": "0"}


def test_record_round_trips(tokens: ModelSpec) -> None:
    assert ModelSpec.from_json(tokens.to_json()) == tokens


def test_a_loss_made_of_gradients_is_captured_on_batches_of_several_shapes() -> None:
    workload = workload_with(
        build_model=lambda: nn.Linear(16, 16),
        train_batches=lambda seed: ([torch.ones(rows, 16)] for rows in (32, 28, 32)),
        loss_fn=slope_loss,
    )
    for spec in (capture_model(Context(workload, CPU)), capture_on_meta(workload)):
        assert {each.tokens for each in spec.mix} == {32, 28}


def test_the_mix_of_shapes_that_batches_have_is_captured_and_said() -> None:
    lengths = [8, 8, 7, 12] * 4

    class Pads:
        build_model = staticmethod(lambda: nn.Sequential(nn.Linear(16, 16)))
        train_batches = staticmethod(lambda seed: (torch.ones(4, n, 16) for n in lengths))
        loss_fn = staticmethod(lambda model, batch: model(batch).sum())

    workload = workload_from(Pads)
    for spec in (capture_model(Context(workload, CPU)), capture_on_meta(workload)):
        assert [(each.tokens, each.batches) for each in spec.mix] == [(32, 8), (28, 4), (48, 4)]
        assert spec.layer("0").gemm == GemmShape(M=48, K=16, N=16)
        profile = predict_profile(
            spec, load_device_profile("h100-sxm"), options=[fp8_option(Recipe.TENSORWISE)]
        )
        (note,) = (text for text in profile_notes(profile) if text.startswith("batches differ"))
        assert (
            "of the first 16, M (tokens of the largest linear) is 32 in 8, 28 in 4, 48 in 4" in note
        )
        assert "of layers and steps are those of the first one's 32, 0.91 of the mean" in note
        assert (
            "4 of them have an M that is no multiple of 16, so that FP8 layers keep grad_w" in note
        )
        fp8 = [option for option in profile.model.layer("0").options if option.is_fp8]
        assert fp8 == [fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT)]


def test_an_optimizer_that_wants_a_closure_is_refused_in_one_line() -> None:
    plain = mlp_workload()
    names = ("build_model", "train_batches", "loss_fn")
    functions = {name: getattr(plain, name) for name in names}
    workload = workload_from(
        functions | {"build_optimizer": lambda model: torch.optim.LBFGS(model.parameters())}
    )
    with pytest.raises(WorkloadError, match="LBFGS must call the closure that it is given once"):
        capture_model(Context(workload, torch.device("cpu")))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_graph_among_the_batch_is_multiplied_and_weighed() -> None:
    """What a step keeps of it for backward are indices and values, which have the storages."""
    graph, x = torch.eye(16).to_sparse_csr(), torch.ones(16, 16)
    workload = workload_with(
        build_model=lambda: nn.Linear(16, 16),
        train_batches=lambda seed: iter([(graph, x)] * 4),
        loss_fn=lambda model, batch: (batch[0] @ model(batch[1])).square().mean(),
    )
    spec = capture_model(Context(workload, CPU))
    indices_and_values = 17 * 8 + 16 * 8 + 16 * 4
    assert spec.batch_bytes == indices_and_values + x.nbytes


@pytest.mark.parametrize("place", [0, 1])
def test_parameters_in_float64_are_refused_with_the_way_out(place: int) -> None:
    def build_model() -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[place].double()
        return model

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        assert isinstance(model, nn.Sequential)
        for layer in model:
            batch = layer(batch.to(next(layer.parameters()).dtype))
        return batch.square().mean()

    functions = {
        "build_model": build_model,
        "train_batches": lambda seed: iter(torch.ones(8, 4, 16)),
        "loss_fn": loss_fn,
    }
    with pytest.raises(
        WorkloadError, match=f"in float64, .* are {place}.weight, {place}.bias; make"
    ):
        capture_model(Context(workload_from(functions), CPU))


class _Gain(nn.Module):
    """A factor for each feature, in the shape that broadcasts over images: (1, 1, 1, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(1, 1, 1, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def test_sharded_parameters_of_one_wide_dimension_are_no_experts() -> None:
    """FSDP2 shards the first dimension, and a DTensor does not squeeze one that is sharded."""

    def sharded() -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 16), _Gain())
        fully_shard(model)
        return model

    workload = workload_from(
        {
            "build_model": sharded,
            "train_batches": lambda seed: iter(torch.ones(8, 2, 4, 4, 16)),
            "loss_fn": lambda model, batch: F.mse_loss(model(batch), batch),
        }
    )
    dist.init_process_group(
        "gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
    )
    try:
        spec = capture_model(Context(workload, CPU))
        model = sharded()
        autoprec.apply(uniform_plan(model, BF16_O2), model)
        checks = verify_applied(model, torch.randn(2, 4, 4, 16))
    finally:
        dist.destroy_process_group()
    assert spec.layer("1").options == (FP32, BF16_O2)
    assert [check.is_judged for check in checks] == [True, True]


class _Routed(nn.Module):
    """A model whose code holds its router in FP32, as the routers of Switch and NLLB are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.head = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.head = self.head.to(x.device)
        self.router = self.router.to(torch.float32)
        h = self.first(x)
        out: Tensor = self.head(h * self.router(h.float()).softmax(-1).to(h.dtype))
        return out


def test_what_the_models_own_code_converts_stays_in_fp32(tmp_path: Path) -> None:
    functions = {
        "build_model": _Routed,
        "train_batches": lambda seed: iter(torch.ones(64, 32, 16)),
        "loss_fn": lambda model, batch: F.mse_loss(model(batch).float(), batch),
    }
    spec = capture_model(Context(workload_from(functions), CPU))
    assert [layer.options[:2] for layer in spec.layers] == [
        (FP32, BF16_O2),
        (FP32,),
        (FP32, BF16_O2),
    ]
    assert "moves it" in str(spec.layer("router").refusal(Precision.BF16_O2))
    run = autoprec.tune(
        functions, out=tmp_path, keep=("first=bf16_o2",), trials=0, verify=False, target="h100-sxm"
    )
    assert run.plan
    assert [layer.option for layer in run.plan.layers][1] == FP32
    model = _Routed()
    optimizer = torch.optim.AdamW(model.parameters())
    _, optimizer = autoprec.apply(run.plan, model, optimizer)
    model(torch.ones(32, 16)).sum().backward()
    optimizer.step()


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:  # Any: autograd's context is untyped
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:  # Any: as above
        raise ValueError("no way back")


def test_a_backward_pass_that_fails_is_one_line() -> None:
    no_way_back: Any = _NoBackward.apply  # Any: torch's own has no types
    functions = {
        "build_model": lambda: nn.Linear(16, 16),
        "train_batches": lambda seed: iter(torch.ones(8, 4, 16)),
        "loss_fn": lambda model, batch: no_way_back(model(batch)).mean(),
    }
    wanted = "backward, once loss_fn has returned, must give gradients, but it raised ValueError"
    with pytest.raises(WorkloadError, match=f"{wanted} .*no way back"):
        capture_model(Context(workload_from(functions), CPU))


class _Gated(torch.autograd.Function):
    """Multiplies, and has no gradient for the gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:  # Any: as above
        ctx.save_for_backward(gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # Any: as above
        return gradients[0] * ctx.saved_tensors[0], None


def test_an_autograd_function_may_have_no_gradient_for_what_a_layer_gives() -> None:
    layers = {"value": nn.Linear(16, 16), "gate": nn.Linear(16, 16)}
    gated: Any = _Gated.apply  # Any: torch's own has no types
    x = torch.ones(4, 16)
    watch = NeighbourWatch()
    with recorded_calls(layers, watch=watch) as calls, watch:
        gate = torch.relu(layers["gate"](x))
        torch.autograd.backward(gated(layers["value"](x), gate).sum())
    (value,), (blind,) = calls["value"], calls["gate"]
    assert value.gradients[0] is not None
    assert blind.gradients == [None]
    assert blind.surroundings is not None
    assert blind.surroundings.behind is not None
    assert blind.surroundings.behind.gradient is None


class _WithScale(nn.Linear):
    def forward(self, input: Tensor) -> Any:  # noqa: A002  # as torch's
        return super().forward(input), self.weight.detach().abs().max()


def test_what_a_layer_gives_without_a_gradient_is_asked_for_none() -> None:
    layer = _WithScale(16, 16)
    with recorded_calls({"layer": layer}, gradients=Gradients.ALL) as calls:
        y, scale = layer(torch.ones(4, 16))
        torch.autograd.backward((y * (1.0 // scale)).sum())  # of which torch has no derivative
    (call,) = calls["layer"]
    assert call.gradients[0] is not None
    assert call.gradients[1] is None
