import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autoprec
from autoprec.device import fp8 as precision
from autoprec.device.fp8 import fp8_self_test, fp8_support
from autoprec.errors import PlanMismatchError, RecordError
from autoprec.records import (
    APPLICABLE_RECIPES,
    BF16_O2,
    FP32,
    Gemm,
    Option,
    Recipe,
    fp8_option,
    with_gemms_hp,
)
from autoprec.runtime import check_applied, trace_step
from autoprec.runtime.finite import FIRST
from autoprec.sensitivity.gemm import scaled_mm
from autoprec.tuning.plan_check import check_plan
from tests.models import WIDTH, Mlp, TiedTokens, conv_workload, mlp_workload, token_workload
from tests.plans import plan_for

TENSORWISE = fp8_option(Recipe.TENSORWISE)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "option", [FP32, BF16_O2, *with_gemms_hp(list(map(fp8_option, APPLICABLE_RECIPES)))], ids=str
)
def test_what_runs_is_the_plan_for_every_option(option: Option) -> None:
    workload = mlp_workload()
    model = workload.build_model()
    autoprec.apply(plan_for(model, option), model)
    batch = next(workload.train_batches(0))
    checks = autoprec.verify_applied(model, batch, loss_fn=workload.loss_fn)
    assert [check.name for check in checks] == ["first", "second", "norm", "head"]
    assert all(option.key in check.detail for check in checks[:2])


def test_the_gemms_of_an_fp8_layer_are_told_apart() -> None:
    workload = mlp_workload()
    model = workload.build_model()
    autoprec.apply(plan_for(model, fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT)), model)
    batch = next(workload.train_batches(0))
    trace = trace_step(model, lambda: workload.loss_fn(model, batch))["first"]
    assert dict(trace.forward) == {"_scaled_mm float8_e4m3fn": 1}
    assert dict(trace.backward) == {
        "grad_input _scaled_mm float8_e5m2xfloat8_e4m3fn": 1,
        "grad_weight mm bfloat16": 1,
    }


@pytest.mark.parametrize("option", [FP32, BF16_O2, TENSORWISE], ids=str)
def test_attention_embeddings_ties_convolutions_and_norms_are_proven(option: Option) -> None:
    for workload in (token_workload(dropout=0.1), conv_workload()):
        model = workload.build_model()
        plan = plan_for(model, option)
        autoprec.apply(plan, model)
        batch = next(workload.train_batches(0))
        checks = autoprec.verify_applied(model, batch, loss_fn=workload.loss_fn)
        assert {check.name for check in checks} == {layer.name for layer in plan.layers}


def test_every_layer_that_differs_is_named() -> None:
    workload = mlp_workload()
    model: Any = workload.build_model()
    autoprec.apply(plan_for(model, TENSORWISE), model)
    model.first.fp8_active = False
    model.head.weight.data = model.head.weight.data.half()
    batch = next(workload.train_batches(0))
    with pytest.raises(PlanMismatchError) as caught:
        autoprec.verify_applied(model, batch, loss_fn=workload.loss_fn)
    message = str(caught.value)
    assert "2 of 4 layers differ" in message
    assert "'first' should run fp8_o1:tensorwise, but ran addmm bfloat16" in message
    assert "'head' should store bfloat16 (bf16_o2), but has float16" in message
    assert "'second'" not in message


def test_a_layer_replaced_after_apply_is_found() -> None:
    workload = mlp_workload()
    model: Any = workload.build_model()
    autoprec.apply(plan_for(model), model)
    model.first.forward = lambda x: F.linear(x.float(), model.first.weight.float())
    checks = check_applied(model, next(workload.train_batches(0)), loss_fn=workload.loss_fn)
    assert [check.name for check in checks if not check.is_good] == ["first"]
    assert "ran mm float32" in checks[0].detail


class Router(nn.Module):
    """Computes in FP32 whatever its storage, as the routers of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


def test_what_a_layers_own_code_lifts_to_fp32_is_shown_not_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), Router())
    autoprec.apply(plan_for(model), model)
    checks = autoprec.verify_applied(model, torch.randn(48, 32))
    assert "bf16_o2: forward mm float32" in checks[1].detail


class Functional(nn.Module):
    """Uses the weights of its layers without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(48, 32)
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x + self.positions.weight[: len(x)], self.linear.weight, self.linear.bias)


def test_a_weight_used_functionally_is_attributed_to_its_layer() -> None:
    model, x = Functional(), torch.randn(48, 32)
    autoprec.apply(plan_for(model), model)
    checks = autoprec.verify_applied(model, x)
    assert checks[0].detail == "bf16_o2: not called in this step"
    assert checks[1].detail == "bf16_o2: functional addmm bfloat16"
    autoprec.undo(model)
    autoprec.apply(plan_for(model, TENSORWISE), model)
    with pytest.raises(PlanMismatchError, match="its weight is used outside of its forward"):
        autoprec.verify_applied(model, x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_seen_through(reentrant: bool) -> None:
    class Checkpointed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(super().forward, x, use_reentrant=reentrant)
            return result

    model, x = Checkpointed(), torch.randn(48, 32, requires_grad=True)
    autoprec.apply(plan_for(model, TENSORWISE), model)
    checks = autoprec.verify_applied(model, x)
    assert "forward _scaled_mm" in checks[0].detail
    assert "backward" in checks[0].detail


def test_a_proof_leaves_the_run_as_it_was() -> None:
    workload = conv_workload()
    model: Any = workload.build_model()
    autoprec.apply(plan_for(model), model)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    state = torch.get_rng_state()
    autoprec.verify_applied(model, next(workload.train_batches(0)), loss_fn=workload.loss_fn)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert model.head.weight.grad.eq(1).all()
    assert model.head.bias.grad is None
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert not FIRST[model].outputs


def test_the_input_may_be_a_tensor_a_tuple_or_a_dict() -> None:
    model = Mlp()
    autoprec.apply(plan_for(model), model)
    for batch in (torch.randn(16, 32), (torch.randn(16, 32),), {"x": torch.randn(16, 32)}):
        assert autoprec.verify_applied(model, batch)


def test_a_model_without_a_plan_or_a_loss_is_refused() -> None:
    with pytest.raises(PlanMismatchError, match=r"call autoprec\.apply"):
        autoprec.verify_applied(Mlp(), torch.randn(16, 32))
    model = Mlp().requires_grad_(False)
    autoprec.apply(plan_for(model), model)
    with pytest.raises(PlanMismatchError, match="give loss_fn="):
        autoprec.verify_applied(model, torch.randn(16, 32))


def test_the_self_test_measures_every_recipe() -> None:
    checks = fp8_self_test(CPU)
    assert [check.name for check in checks] == [f"fp8 {recipe}" for recipe in APPLICABLE_RECIPES]
    assert all(check.is_good for check in checks)
    assert "grad_weight 0.0" in checks[0].detail
    assert "kernels alone: output 0.00" in checks[0].detail


@contextlib.contextmanager
def planted(fault: Callable[[Any], Tensor], gemm: Gemm) -> Iterator[None]:
    """Make `torch._scaled_mm` on the CPU wrong for one GEMM of the self-test's layer."""
    inner = {Gemm.OUTPUT: 64, Gemm.GRAD_INPUT: 48, Gemm.GRAD_WEIGHT: 32}[gemm]

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        given = SimpleNamespace(**(dict(zip(PARAMETERS, args, strict=False)) | kwargs))
        return fault(given) if given.a.shape[-1] == inner else scaled_mm(*args, **kwargs)

    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch's
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered")
        library.impl("_scaled_mm", kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


PARAMETERS = ("a", "b", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum")


def product(given: Any, **changes: Any) -> Tensor:  # Any: a kernel's arguments
    found = vars(given) | changes
    a, b, scale_a, scale_b = (found[name] for name in ("a", "b", "scale_a", "scale_b"))
    return scaled_mm(a, b, scale_a, scale_b, out_dtype=given.out_dtype)


FAULTS: dict[str, Callable[[Any], Tensor]] = {
    "row- for column-major": lambda g: product(g, b=g.b.t().contiguous().view(g.b.shape)),
    "the tail of the inner dimension": lambda g: product(g, a=g.a[:, :-16], b=g.b[:-16]),
    "the last row": lambda g: torch.cat([product(g)[:-1], torch.zeros_like(product(g)[-1:])]),
    "an FP8 output": lambda g: product(g).to(torch.float8_e5m2).to(g.out_dtype),
    "an FP32 output": lambda g: product(g).float(),
    "NaN": lambda g: product(g) * float("nan"),
    "two percent": lambda g: product(g) * 1.02,
}
SCALE_FAULTS: dict[str, Callable[[Any], Tensor]] = {
    "a scale applied twice": lambda g: product(g) * g.scale_a,
    "no scale": lambda g: product(g, scale_b=torch.ones_like(g.scale_b)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("gemm", list(Gemm))
def test_a_wrong_kernel_is_caught_with_the_name_of_its_recipe_and_gemm(
    gemm: Gemm, fault: str
) -> None:
    fp8_support(CPU)  # found before the kernel went bad, as by a process that started well
    with planted(FAULTS[fault], gemm):
        checks = fp8_self_test(CPU)
    for check in checks:
        unused = check.name == "fp8 rowwise_with_gw_hp" and gemm is Gemm.GRAD_WEIGHT
        assert check.is_good == unused, check
        assert unused or check.detail.startswith(f"its {gemm} kernel is wrong: off by ")
    assert all(check.is_good for check in fp8_self_test(CPU))


@pytest.mark.parametrize("fault", SCALE_FAULTS)
@pytest.mark.parametrize("gemm", list(Gemm))
def test_a_wrong_scale_is_caught(gemm: Gemm, fault: str) -> None:
    fp8_support(CPU)
    with planted(SCALE_FAULTS[fault], gemm):
        tensorwise = fp8_self_test(CPU)[0]
    assert tensorwise.detail.startswith(f"its {gemm} kernel is wrong: off by ")


def test_scales_of_the_wrong_rows_are_caught() -> None:
    """In the one GEMM whose row scales torchao leaves to the kernel."""
    fp8_support(CPU)
    with planted(lambda g: product(g, scale_a=g.scale_a.expand(32, 1).roll(1, 0)), Gemm.OUTPUT):
        tensorwise, *others = fp8_self_test(CPU)
    assert tensorwise.is_good
    assert all(check.detail.startswith("its output kernel is wrong: off by ") for check in others)


@pytest.mark.parametrize("gemm", [Gemm.OUTPUT, Gemm.GRAD_INPUT])
def test_a_wrong_cast_is_caught_though_the_kernels_are_right(
    gemm: Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cast whose scale is a row off: every kernel multiplies what it is given."""
    fp8_support(CPU)
    utils: Any = importlib.import_module("torchao.float8.float8_scaling_utils")
    right = utils.tensor_to_scale
    wanted = {Gemm.OUTPUT: (32, 64), Gemm.GRAD_INPUT: (32, 48)}[gemm]

    def wrong(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale: Tensor = right(x, *args, **kwargs)
        return scale * 64 if tuple(x.shape) == wanted else scale  # everything saturates

    monkeypatch.setattr(utils, "tensor_to_scale", wrong)
    check = fp8_self_test(CPU)[0]
    assert check.detail.startswith(f"its {gemm} is wrong: off by ")


def test_a_wrong_kernel_stops_check_and_apply_before_the_run(tmp_path: Path) -> None:
    path = plan_for(Mlp(), TENSORWISE).save(tmp_path / "plan.json")
    precision.tried_recipes.cache_clear()  # as in a process that starts with the bad kernel
    emulated = precision.emulates_gemms.set(False)  # see conftest: on torch 2.11 tests emulate
    try:
        with planted(SCALE_FAULTS["no scale"], Gemm.GRAD_INPUT):
            checked = check_plan(path, model="", target="cpu")
            with pytest.raises(PlanMismatchError, match="tensorwise: its grad_input kernel is"):
                autoprec.apply(path, Mlp())
    finally:
        precision.emulates_gemms.reset(emulated)
        precision.tried_recipes.cache_clear()
    assert not checked.is_good
    assert "tensorwise: its grad_input kernel is wrong" in checked.checks[-1].detail


@pytest.mark.parametrize("fault", ["returns too much", "gives up"])
def test_a_wrong_compiler_is_caught_though_its_kernels_are_right(fault: str) -> None:
    def backend(graph: Any, _: Any) -> Any:  # Any: torch's
        if fault == "gives up":
            raise ValueError("no")
        return lambda *args: tuple(output * 1.5 for output in graph(*args))

    torch._dynamo.reset()
    compiler = functools.partial(torch.compile, backend=backend)
    check = fp8_self_test(CPU, recipes=[Recipe.TENSORWISE], compiler=compiler)[0]
    assert check.name == "compiled fp8 tensorwise"
    assert not check.is_good
    assert check.detail.startswith(
        "did not run: " if fault == "gives up" else "its output is wrong: off by 0.5 "
    )
    good = functools.partial(torch.compile, backend="aot_eager")
    assert fp8_self_test(CPU, recipes=[Recipe.TENSORWISE], compiler=good)[0].is_good


MODEL = """
from tests.models import mlp_workload
workload = mlp_workload()
build_model, train_batches, loss_fn = (
    workload.build_model, workload.train_batches, workload.loss_fn
)
"""


def test_check_plan_fits_runs_and_tests_numerics(tmp_path: Path) -> None:
    (tmp_path / "mlp_model.py").write_text(MODEL)
    path = plan_for(Mlp(), TENSORWISE).save(tmp_path / "plan.json")
    checked = check_plan(path, model=str(tmp_path / "mlp_model.py"), target="cpu")
    assert checked.is_good
    assert [check.name for check in checked.checks] == [
        "file",
        "fits the model",
        *(f"runs: {name}" for name in ("first", "second", "norm", "head")),
        "fp8 tensorwise",
    ]
    assert checked.checks[0].detail == "4 layers: 2 fp8_o1, 2 bf16_o2"
    alone = check_plan(path, model="", target="cpu")
    assert [check.name for check in alone.checks] == ["file", "fp8 tensorwise"]


def test_check_plan_says_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "mlp_model.py").write_text(MODEL)
    path = plan_for(TiedTokens()).save(tmp_path / "plan.json")
    checked = check_plan(path, model=str(tmp_path / "mlp_model.py"), target="cpu")
    assert not checked.is_good
    assert "layer 'embedding' is in the plan only" in checked.checks[1].detail
    path.write_text("{")
    with pytest.raises(RecordError):
        check_plan(path, model="", target="cpu")


# --- experts, and what cannot be judged ----------------------------------------------------------


class Experts(nn.Module):
    """Two experts whose GEMMs run as one, or in an operator that nobody knows."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / WIDTH)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.to(self.weight.dtype), self.weight)


def grouped(x: Tensor, weight: Tensor) -> Tensor:
    half, size = len(x) // 2, len(x)
    return torch._grouped_mm(x, weight, offs=torch.tensor([half, size], dtype=torch.int32))


@torch.library.custom_op("autoprec_tests::experts", mutates_args=())
def unknown_kernel(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ones_like(x)


unknown_kernel.register_autograd(
    lambda context, gradient: (gradient, torch.ones_like(context.weight)),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "weight", inputs[1]),
)


@pytest.mark.parametrize(
    ("run", "expected", "is_judged"),
    [
        (grouped, "forward _grouped_mm bfloat16; backward _grouped_mm bfloat16", True),
        (
            lambda x, w: torch.cat([part @ w[0] for part in x.chunk(2)]),
            "forward mm bfloat16; backward mm bfloat16",
            True,
        ),
        (unknown_kernel, "not judged", False),
    ],
)
def test_experts_are_watched_or_said_not_to_be_judged(
    run: Callable[[Tensor, Tensor], Tensor], expected: str, is_judged: bool
) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Experts(run), nn.LayerNorm(WIDTH))
    autoprec.apply(plan_for(model), model)
    checks = {check.name: check for check in autoprec.verify_applied(model, torch.ones(8, WIDTH))}
    assert checks["1"].detail.startswith(f"bf16_o2: {expected}")
    assert checks["1"].is_judged == is_judged
    assert checks["0"].is_judged
    assert checks["2"].is_judged


class Routed(nn.Module):
    """A router and experts that the same module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.up = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / WIDTH)
        self.unused = nn.Parameter(torch.ones(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.up.dtype)
        out: Tensor = grouped(x, self.up) * self.router(x).max(-1, keepdim=True).values
        return out


def test_experts_that_no_layer_owns_are_watched_too() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Routed())
    autoprec.apply(plan_for(model), model)
    checks = {check.name: check for check in autoprec.verify_applied(model, torch.ones(8, WIDTH))}
    assert checks["1.up"].detail == "outside any layer: functional _grouped_mm bfloat16"
    assert checks["1.up"].is_judged
    assert not checks["1.unused"].is_judged
