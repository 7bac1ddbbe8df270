"""A plan under Lightning: the same run as a loop by hand, in its Trainer and in Fabric."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

import autoprec
from autoprec.errors import PlanMismatchError
from autoprec.integrations.lightning import GuardCallback, PlanPrecision, setup
from autoprec.records import FP32, Plan, Recipe, fp8_option
from tests.models import Mlp, TiedTokens
from tests.plans import plan_for
from tests.runtime_training import batches, exact, same, weights

MIXED = {"second": fp8_option(Recipe.ROWWISE), "head": FP32}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),  # lightning 2.6, torch 2.13
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Module(L.LightningModule):
    """The Mlp as Lightning has it: a submodule, a training step, an optimizer made late."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Mlp()
        self.losses: list[float] = []
        self.poisoned_step = -1

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.model(x), y)
        self.losses.append(loss.item())
        return loss * float("nan") if self.global_step == self.poisoned_step else loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        assert self.model(batch[0]).dtype is torch.float32

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ByStep(Module):
    """Takes the batch that belongs to the step: after a resume Lightning's loader starts anew."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return super().training_step(list(itertools.islice(batches(), 6))[self.global_step], index)


def _mixed_plan() -> Plan:
    return plan_for(Mlp(), others=MIXED)


def _module(kind: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return kind()


def _data(parts: int = 1, *, steps: int = 6) -> DataLoader[Any]:
    rows = [(x, y) for x, y in itertools.islice(batches(), steps)]
    pairs = [p for x, y in rows for p in zip(x.chunk(parts), y.chunk(parts), strict=True)]
    return DataLoader(pairs, batch_size=None)  # type: ignore[arg-type]  # any sequence will do


def _trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "plugins": PlanPrecision(_mixed_plan(), inside="model"),
        "max_steps": 6,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**settings | kwargs)


def _by_hand(*, parts: int = 1, norm: float | None = None) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    autoprec.apply(_mixed_plan(), model, optimizer)
    losses = []
    for index, (x, y) in enumerate(_data(parts)):
        loss = F.mse_loss(model(x), y)
        torch.autograd.backward(loss / parts)
        losses.append(loss.item())
        if (index + 1) % parts == 0:
            if norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), norm)
            optimizer.step()
            optimizer.zero_grad()
    return model, losses


@pytest.mark.parametrize(
    ("settings", "parts", "norm"),
    [
        ({}, 1, None),
        ({"gradient_clip_val": 0.5}, 1, 0.5),
        ({"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}, 3, 0.5),
    ],
    ids=["plain", "clipped", "accumulated"],
)
def test_the_trainer_runs_the_plan_as_a_loop_by_hand_does(
    tmp_path: Path, settings: dict[str, Any], parts: int, norm: float | None
) -> None:
    module = _module()
    _trainer(tmp_path, **settings).fit(module, _data(parts))
    other, expected = _by_hand(parts=parts, norm=norm)
    assert module.losses == expected
    assert same(exact(module.model), exact(other))
    checks = autoprec.verify_applied(module.model, next(batches())[0])
    ran = {check.name: check.detail for check in checks}
    assert "_scaled_mm float8" in ran["second"]
    assert "addmm bfloat16" in ran["first"]
    assert "addmm float32" in ran["head"]


def test_a_fit_from_a_checkpoint_goes_on_bit_for_bit_with_its_guard(tmp_path: Path) -> None:
    def fit(module: Module, **kwargs: Any) -> GuardCallback:
        guard = GuardCallback()
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        trainer = _trainer(tmp_path, callbacks=[guard, saver], enable_checkpointing=True)
        trainer.fit(module, _data(steps=3), **kwargs)
        return guard

    whole, resumed = _module(ByStep), ByStep()
    guard = fit(whole)
    other_guard = fit(resumed, ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert resumed.losses == whole.losses[3:]
    assert same(exact(resumed.model), exact(whole.model))
    assert other_guard.steps.guard is not None
    assert other_guard.steps.guard.steps == 6
    assert other_guard.state_dict() == guard.state_dict()


def test_evaluation_runs_the_plan_before_and_after_a_fit(tmp_path: Path) -> None:
    module = _module()
    trainer = _trainer(tmp_path)
    trainer.validate(module, _data(), verbose=False)
    assert module.model.first.weight.dtype is torch.bfloat16
    trainer.fit(module, _data())
    trainer.validate(module, _data(), verbose=False)
    assert module.losses == _by_hand()[1]


def test_a_plan_for_the_whole_lightning_module_needs_no_inside(tmp_path: Path) -> None:
    module = _module()
    plan = plan_for(module)
    _trainer(tmp_path, plugins=PlanPrecision(plan)).fit(module, _data())
    assert all(weight.dtype is torch.bfloat16 for weight in weights(module))
    assert module.losses[-1] < module.losses[0]


def test_a_plan_for_another_model_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    module = _module()
    before = weights(module)
    trainer = _trainer(tmp_path, plugins=PlanPrecision(plan_for(TiedTokens()), inside="model"))
    with pytest.raises(PlanMismatchError, match="a plan must name every layer") as caught:
        trainer.fit(module, _data())
    assert "\n" not in str(caught.value)
    assert type(module.model) is Mlp
    assert same(weights(module), before)


def test_a_submodule_that_is_not_there_is_named(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, plugins=PlanPrecision(_mixed_plan(), inside="net"))
    with pytest.raises(PlanMismatchError, match="submodule of the Module, but it has no 'net'"):
        trainer.fit(_module(), _data())


def test_lightning_itself_refuses_a_precision_beside_the_plan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Received both `precision=bf16-mixed` and `plugins="):
        _trainer(tmp_path, precision="bf16-mixed")


def test_the_guard_skips_a_poisoned_step(tmp_path: Path) -> None:
    module = _module()
    module.poisoned_step = 2
    events = tmp_path / "events.jsonl"
    guard = GuardCallback(functools.partial(autoprec.Guard, events=events))
    _trainer(tmp_path, callbacks=[guard], gradient_clip_val=1.0).fit(module, _data())
    assert events.read_text().count("not_finite") == 1
    assert all(weight.isfinite().all() for weight in exact(module.model))


def test_a_guard_that_lightning_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanMismatchError, match=r"give it plugins=PlanPrecision\(plan\)"):
        _trainer(tmp_path, callbacks=[GuardCallback()], plugins=None).fit(_module(), _data())


def _fabric_run(fabric: L.Fabric, model: Any, optimizer: Any, rows: Iterator[Any]) -> list[float]:
    losses = []
    for x, y in rows:
        loss = F.mse_loss(model(x), y)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _fabric(seed: int, **kwargs: Any) -> tuple[L.Fabric, Any, Any]:
    fabric = L.Fabric(accelerator="cpu", devices=1, **kwargs)
    torch.manual_seed(seed)
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return fabric, *setup(fabric, _mixed_plan(), model, optimizer)


def test_fabric_runs_the_plan_as_a_loop_by_hand_does() -> None:
    fabric, model, optimizer = _fabric(0)
    losses = _fabric_run(fabric, model, optimizer, itertools.islice(batches(), 6))
    other, expected = _by_hand(norm=0.5)
    assert losses == expected
    assert same(exact(model.module), exact(other))
    autoprec.verify_applied(model.module, next(batches())[0])


def test_a_guard_watches_what_fabric_set_up() -> None:
    fabric, model, optimizer = _fabric(0)
    (x, y), before = next(batches()), exact(model.module)
    with autoprec.Guard(model.module, optimizer, _mixed_plan()) as guard:
        fabric.backward(F.mse_loss(model(x), y) * float("nan"))
        assert not guard.step(float("nan"))
        optimizer.step()
        assert same(exact(model.module), before)
        fabric.backward(loss := F.mse_loss(model(x), y))
        assert guard.step(loss)
        optimizer.step()
    assert not same(exact(model.module), before)


def test_what_fabric_saves_goes_on_bit_for_bit(tmp_path: Path) -> None:
    fabric, model, optimizer = _fabric(0)
    _fabric_run(fabric, model, optimizer, itertools.islice(batches(), 3))
    fabric.save(tmp_path / "last.ckpt", {"model": model, "optimizer": optimizer})
    losses = _fabric_run(fabric, model, optimizer, itertools.islice(batches(), 3, 6))
    fabric, other, other_optimizer = _fabric(7)
    fabric.load(tmp_path / "last.ckpt", {"model": other, "optimizer": other_optimizer})
    rows = itertools.islice(batches(), 3, 6)
    assert _fabric_run(fabric, other, other_optimizer, rows) == losses
    assert same(exact(other.module), exact(model.module))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_a_precision_of_fabrics_own_is_refused(precision: Any) -> None:
    with pytest.raises(PlanMismatchError, match=f"Fabric has precision='{precision}'"):
        _fabric(0, precision=precision)


def test_a_strategy_that_shards_is_refused(tmp_path: Path) -> None:
    message = "the ModelParallelStrategy replaces them; use DDP"
    strategy = FabricModelParallel(lambda module, _: module)
    with pytest.raises(PlanMismatchError, match=message):
        _fabric(0, strategy=strategy)
    module = _module()
    module.trainer = _trainer(tmp_path, strategy=ModelParallelStrategy(), plugins=None)
    with pytest.raises(PlanMismatchError, match=message):
        PlanPrecision(_mixed_plan(), inside="model").convert_module(module)
    assert type(module.model) is Mlp


def test_fabric_refuses_a_plan_for_another_model_and_nothing_changes() -> None:
    model = Mlp()
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fabric = L.Fabric(accelerator="cpu", devices=1)
    with pytest.raises(PlanMismatchError, match="a plan must name every layer"):
        setup(fabric, plan_for(TiedTokens()), model, optimizer)
    assert type(model) is Mlp
    assert same(weights(model), before)
