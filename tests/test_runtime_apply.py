import copy
import functools
import logging
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprec
from autoprec.errors import PlanMismatchError, RecordError
from autoprec.records import BF16_O2, FP32, Plan, Recipe, fp8_option
from autoprec.runtime import attach_optimizer, install_options
from tests.models import ConvNet, Mlp, TiedTokens, mlp_workload
from tests.plans import plan_for

TENSORWISE = fp8_option(Recipe.TENSORWISE)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    x, y = next(mlp_workload().train_batches(seed))
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.item()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "values": {n: (p.dtype, p.detach().clone()) for n, p in model.named_parameters()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "load hooks": {n: len(m._load_state_dict_pre_hooks) for n, m in model.named_modules()},
        "optimizer": sorted(vars(optimizer)),
        "hooks": [len(vars(optimizer)[n]) for n in sorted(vars(optimizer)) if n.endswith("hooks")],
        "state": copy.deepcopy(optimizer.state_dict()),
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_a_plan_applies_from_its_file_and_runs(tmp_path: Path) -> None:
    model = Mlp()
    keys = list(model.state_dict())
    path = plan_for(model, TENSORWISE).save(tmp_path / "plan.json")
    same_model, optimizer = autoprec.apply(path, model, sgd(model))
    losses = [step(model, optimizer) for _ in range(10)]
    assert same_model is model
    assert losses[-1] < losses[0]
    assert list(model.state_dict()) == keys
    assert "fp8_o1:tensorwise" in repr(model)


def test_apply_then_undo_is_exact_and_leaves_nothing() -> None:
    model = TiedTokens()
    optimizer = sgd(model)
    before = everything(model, optimizer)
    autoprec.apply(plan_for(model, TENSORWISE), model, optimizer)
    assert model.class_token.dtype is torch.bfloat16
    autoprec.undo(model, optimizer)
    assert equal(everything(model, optimizer), before)


def test_undo_gives_the_trained_masters_and_the_moments() -> None:
    model = Mlp()
    _, optimizer = autoprec.apply(plan_for(model), model, sgd(model))
    for _ in range(3):
        step(model, optimizer)
    masters = {n: p.detach().clone() for n, p in autoprec.master_view(model).named_parameters()}
    moments = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    autoprec.undo(model, optimizer)
    assert equal(dict(model.named_parameters()), masters)
    assert equal([state["momentum_buffer"] for state in optimizer.state.values()], moments)
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.values())
    step(model, optimizer)
    assert "master_weight" not in optimizer.state_dict()["state"][0]


def test_undo_after_install_options_and_attach_works_without_apply() -> None:
    model = ConvNet()
    optimizer = sgd(model)
    before = everything(model, optimizer)
    install_options(model, {"conv": BF16_O2, "norm": BF16_O2, "head": TENSORWISE})
    attach_optimizer(model, optimizer)
    autoprec.undo(model, optimizer)
    assert equal(everything(model, optimizer), before)


def test_a_view_is_plain_fp32_and_shares_the_masters() -> None:
    model = TiedTokens()
    autoprec.apply(plan_for(model), model)
    view: Any = autoprec.master_view(model)
    assert view.head.weight is view.embedding.weight
    assert {p.dtype for p in view.parameters()} == {torch.float32}
    assert list(view.state_dict()) == list(model.state_dict())
    optimizer = sgd(model)
    attach_optimizer(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = view.head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(view.head.weight, before - 1e-3)


def test_a_view_is_made_of_a_model_that_keeps_a_computed_tensor() -> None:
    model: Any = Mlp()
    autoprec.apply(plan_for(model), model)
    model.state = model(torch.randn(4, 32))
    view: Any = autoprec.master_view(model)
    assert torch.equal(view.state, model.state)
    assert not view.state.requires_grad


DIFFERENCES: dict[str, Any] = {
    "layer 'third' is in the plan only": lambda layers: [
        *layers,
        layers[0].model_copy(update={"name": "third"}),
    ],
    "layer 'head' is in the model only": lambda layers: layers[:-1],
    "layer 'first' has shapes 64x32, 64 in the model, 64x31, 64 in the plan": lambda layers: [
        layers[0].model_copy(update={"shapes": ((64, 31), (64,))}),
        *layers[1:],
    ],
    "layer 'first' is linear in the model, conv in the plan": lambda layers: [
        layers[0].model_copy(update={"kind": "conv"}),
        *layers[1:],
    ],
}


@pytest.mark.parametrize("message", DIFFERENCES)
def test_a_plan_for_another_model_says_what_differs_and_changes_nothing(message: str) -> None:
    model = Mlp()
    optimizer = sgd(model)
    plan = plan_for(model)
    edited = Plan.model_validate(
        {**dict(plan), "layers": tuple(DIFFERENCES[message](list(plan.layers)))}
    )
    before = everything(model, optimizer)
    with pytest.raises(PlanMismatchError, match=message) as caught:
        autoprec.apply(edited, model, optimizer)
    assert "\n" not in str(caught.value)
    assert equal(everything(model, optimizer), before)


def test_uncovered_parameters_must_agree() -> None:
    model = TiedTokens()
    plan = plan_for(model)
    edited = plan.model_copy(update={"uncovered": ("cls",)})
    with pytest.raises(PlanMismatchError, match=r"'cls' is in the plan only; .*'class_token'"):
        autoprec.apply(edited, model)


def test_tied_layers_that_disagree_are_refused_and_nothing_changes() -> None:
    model = TiedTokens()
    optimizer = sgd(model)
    before = everything(model, optimizer)
    with pytest.raises(PlanMismatchError, match="set both to fp32, or neither"):
        autoprec.apply(plan_for(model, others={"head": FP32}), model, optimizer)
    assert equal(everything(model, optimizer), before)


def test_fp8_on_sizes_it_cannot_take_is_refused_and_nothing_changes() -> None:
    model = Mlp()
    optimizer = sgd(model)
    before = everything(model, optimizer)
    with pytest.raises(PlanMismatchError, match=r"'head' cannot run fp8.*N=10.*set it to bf16_o2"):
        autoprec.apply(plan_for(model, others={"head": TENSORWISE}), model, optimizer)
    assert equal(everything(model, optimizer), before)


def test_a_wrong_optimizer_is_refused_and_nothing_changes() -> None:
    model, optimizer = Mlp(), sgd(Mlp())
    before = everything(model, optimizer)
    with pytest.raises(PlanMismatchError, match="trains no parameter of this model"):
        autoprec.apply(plan_for(model), model, optimizer)
    assert equal(everything(model, optimizer), before)


def test_moments_that_lost_their_bits_stop_apply_and_nothing_changes() -> None:
    model = Mlp()
    optimizer = sgd(model)
    step(model, optimizer)
    state = optimizer.state[model.head.bias]
    state["momentum_buffer"] = state["momentum_buffer"].bfloat16()
    before = everything(model, optimizer)
    with pytest.raises(PlanMismatchError, match="moments must be FP32"):
        autoprec.apply(plan_for(model), model, optimizer)
    assert equal(everything(model, optimizer), before)


def test_a_plan_is_applied_once_and_undone_once() -> None:
    model = Mlp()
    plan = plan_for(model)
    autoprec.apply(plan, model)
    with pytest.raises(PlanMismatchError, match=r"call autoprec\.undo"):
        autoprec.apply(plan, model)
    autoprec.undo(model)
    with pytest.raises(PlanMismatchError, match=r"call autoprec\.apply"):
        autoprec.undo(model)
    autoprec.apply(plan_for(model, TENSORWISE), model)


def test_a_plan_of_a_module_around_the_model_or_in_it_is_said_to_be_that() -> None:
    model = nn.ModuleDict({"net": nn.Sequential(Mlp(), nn.Linear(10, 16))})
    with pytest.raises(PlanMismatchError, match=r"of a module that holds this one as 'net': apply"):
        autoprec.apply(plan_for(model), model["net"])
    with pytest.raises(
        PlanMismatchError, match=r"but this plan is of its part 'net': apply it to that"
    ):
        autoprec.apply(plan_for(model["net"]), model)
    both = nn.ModuleDict({"head": nn.Linear(16, 4), "net": model["net"]})  # trained side by side
    with pytest.raises(PlanMismatchError, match=r"holds this one as 'net': .* \(an nn.ModuleDict"):
        autoprec.apply(plan_for(both), model["net"])
    with pytest.raises(PlanMismatchError, match="is of its part 'net'"):
        autoprec.apply(plan_for(model["net"]), both)


def test_wrapped_models_are_refused_with_the_way_out() -> None:
    model = Mlp()
    plan = plan_for(model)
    with pytest.raises(PlanMismatchError, match=r"DataParallel; call autoprec\.apply first"):
        autoprec.apply(plan, nn.DataParallel(model))
    autoprec.apply(plan, model)
    with pytest.raises(PlanMismatchError, match="give its 'module'"):
        autoprec.undo(nn.Sequential().append(nn.DataParallel(model))[0])


def test_a_lazy_model_is_refused_until_a_batch_gave_it_shapes() -> None:
    plan = plan_for(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), BF16_O2)
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(PlanMismatchError, match=r"none yet: 0\.weight, 0\.bias; run"):
        autoprec.apply(plan, model)
    model(torch.ones(2, 6))
    autoprec.apply(plan, model)
    assert model[0].weight.dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["", "first"])
def test_a_forward_set_on_the_object_that_would_hide_the_plan_is_refused(name: str) -> None:
    model = Mlp()
    module = model.get_submodule(name)
    under_autocast = torch.autocast("cpu", dtype=torch.bfloat16)(module.forward)
    vars(module)["forward"] = module.forward if name else under_autocast
    with pytest.raises(PlanMismatchError, match="has a forward of its own on the object"):
        autoprec.apply(plan_for(model), model)
    assert type(model) is Mlp


def fused(self: Mlp, x: Tensor) -> Tensor:
    """Run the model, and a product of FP32 with what may be BF16."""
    product: Tensor = torch.ones(1, len(x)) @ self.first(x)
    return Mlp.forward(self, x) + product.mean()


@pytest.mark.parametrize("is_method", [True, False])
def test_a_forward_of_its_own_on_the_root_runs_under_the_plan(is_method: bool) -> None:
    """As if it were that of the root's class; copies run it on themselves where it is a method."""

    class Fused(Mlp):
        forward = fused

    x = next(mlp_workload().train_batches(0))[0]
    model = Mlp()
    own = types.MethodType(fused, model) if is_method else functools.partial(fused, model)
    vars(model)["forward"] = own
    alike = Fused()
    alike.load_state_dict(model.state_dict())
    optimizer, expected = sgd(model), autoprec.apply(plan_for(alike, TENSORWISE), alike)[0](x)
    before = everything(model, optimizer)
    autoprec.apply(plan_for(model, TENSORWISE), model, optimizer)
    assert torch.equal(model(x), expected)
    assert expected.dtype is torch.float32
    if is_method:
        other = copy.deepcopy(model)
        other(x).sum().backward()
        assert model.first.weight.grad is None
        assert other.first.weight.grad is not None
    autoprec.undo(model, optimizer)
    assert equal(everything(model, optimizer), before)
    assert vars(model)["forward"] == own


def test_undo_refuses_when_something_else_changed_a_class() -> None:
    model = Mlp()
    autoprec.apply(plan_for(model), model)
    model.first.__class__ = type("Sharded", (type(model.first),), {})
    with pytest.raises(PlanMismatchError, match="'first' is now a Sharded"):
        autoprec.undo(model)


def test_a_broken_file_is_a_record_error(tmp_path: Path) -> None:
    path = plan_for(Mlp()).save(tmp_path / "plan.json")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(RecordError, match="complete JSON"):
        autoprec.apply(path, Mlp())


def test_other_software_and_device_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp()
    plan = plan_for(model)
    made = plan.fingerprint.model_copy(
        update={"device": "NVIDIA H100", "software": {"torch": "2.1", "torchao": "0.1", "x": "1"}}
    )
    with caplog.at_level(logging.WARNING):
        autoprec.apply(plan.model_copy(update={"fingerprint": made}), model)
    assert len(caplog.records) == 1
    assert "(the plan: NVIDIA H100), torch" in caplog.text
    assert "(the plan: 0.1)" in caplog.text


def test_the_same_software_and_device_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="autoprec"):
        model = Mlp()
        autoprec.apply(plan_for(model), model)
    assert caplog.records == []


def test_frozen_parameters_keep_no_fp32_copy() -> None:
    model = Mlp()
    model.first.requires_grad_(False)
    frozen = model.first.weight.detach().clone()
    _, optimizer = autoprec.apply(plan_for(model), model, sgd(model))
    step(model, optimizer)
    autoprec.undo(model, optimizer)
    assert torch.equal(model.first.weight, frozen.bfloat16().float())
    assert not model.first.weight.requires_grad


def test_a_model_on_the_meta_device_takes_a_plan_and_is_filled_later() -> None:
    source = Mlp()
    with torch.device("meta"):
        model = Mlp()
    autoprec.apply(plan_for(model), model)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    optimizer = sgd(model)
    attach_optimizer(model, optimizer)
    before = dict(autoprec.master_view(model).named_parameters())
    assert equal(
        {n: p.bfloat16() for n, p in before.items()},
        {n: p.bfloat16() for n, p in source.named_parameters()},
    )
    step(model, optimizer)


def test_a_failure_in_the_middle_of_installing_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Mlp()
    optimizer = sgd(model)
    before = everything(model, optimizer)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("autoprec.runtime.install.container_class", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        autoprec.apply(plan_for(model), model, optimizer)
    assert equal(everything(model, optimizer), before)


def test_a_model_in_float64_is_refused() -> None:
    model = nn.Linear(16, 16).double()
    with pytest.raises(PlanMismatchError, match=r"in float64, .* are weight, bias; make"):
        autoprec.apply(plan_for(model), model)
    assert model.weight.dtype is torch.float64


def test_what_is_no_plan_and_what_is_no_model_is_one_line() -> None:
    model = Mlp()
    run = types.SimpleNamespace(plan=plan_for(model))
    for given, word in (((None, model), "a NoneType"), ((run, model), "a SimpleNamespace")):
        with pytest.raises(RecordError, match=f"a plan must be one, or the path .* is {word}"):
            autoprec.apply(*given)
    with pytest.raises(PlanMismatchError, match="Module, but this is a Plan"):
        autoprec.apply(model, plan_for(model))  # type: ignore[type-var, arg-type]  # swapped
