"""A plan under transformers.Trainer: the same run as a loop by hand, resumed or not."""

import functools
import math
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.optimization import get_linear_schedule_with_warmup

import autoprec
from autoprec.errors import PlanMismatchError
from autoprec.integrations.transformers import PrecisionPlanCallback, apply
from autoprec.records import FP32, Plan, Recipe, fp8_option
from autoprec.runtime.attach import ON_OPTIMIZER
from tests.accelerate_state import fresh_accelerate
from tests.models import Mlp
from tests.plans import plan_for
from tests.ranks import leave_group, start_ranks
from tests.runtime_training import exact, same, weights

__all__ = ["fresh_accelerate"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STEPS, BATCH, TOKENS, VOCABULARY = 6, 4, 16, 64
PATH = "model.layers.{}.mlp.{}_proj"
MIXED = {PATH.format(0, "up"): fp8_option(Recipe.TENSORWISE), PATH.format(1, "up"): FP32}


def _model(seed: int = 0, *, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


@functools.cache
def _plan() -> Plan:
    return plan_for(_model(), others=MIXED)


@functools.cache
def _rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (STEPS * BATCH, TOKENS), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


class InOrder(Trainer):  # type: ignore[misc]  # transformers ships no usable types
    """A Trainer that takes the rows in their order, as a subclass of a user would."""

    def _get_train_sampler(self, *_: Any) -> Any:  # Any: torch's sampler
        return torch.utils.data.SequentialSampler(_rows())


def _trainer(folder: Path, *, model: Any = None, **kwargs: Any) -> Trainer:
    given = {
        "callbacks": kwargs.pop("callbacks", None),
        "optimizers": kwargs.pop("optimizers", None),
    }
    settings = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    return InOrder(
        model=model or _model(),
        args=TrainingArguments(str(folder), **settings | kwargs),
        train_dataset=_rows(),
        **{name: value for name, value in given.items() if value is not None},
    )


def _losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def _by_hand(*, parts: int = 1) -> tuple[nn.Module, list[float]]:
    """Train as a Trainer does: AdamW, a linear schedule, gradients clipped to norm 1."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    autoprec.apply(_plan(), model, optimizer)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    losses = []
    for step in range(STEPS):
        rows = _rows()[step * BATCH : (step + 1) * BATCH]
        ids = torch.stack([row["input_ids"] for row in rows])
        count = BATCH * (TOKENS - 1)
        total = 0.0
        for part in ids.chunk(parts):
            loss = model.train()(part, labels=part, num_items_in_batch=torch.tensor(count)).loss
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return model, losses


class Loss(nn.Module):
    """Holds the model that it calls, as those of sentence-transformers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**inputs).loss
        return loss


def test_a_plan_for_the_loss_that_holds_the_model_is_applied_to_it(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.loss = Loss(trainer.model)
    trainer.compute_loss = lambda model, inputs, **_: trainer.loss(inputs)
    others = {f"model.{name}": option for name, option in MIXED.items()}
    apply(plan_for(trainer.loss, others=others), trainer)
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert ON_OPTIMIZER in vars(inner)
    _, expected = _by_hand()
    assert _losses(trainer) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, 1),
        ({"bf16": True}, 1),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, 1, marks=pytest.mark.slow
        ),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 2),
    ],
    ids=["plain", "bf16", "compiled", "accumulated"],
)
def test_a_trainer_runs_the_plan_as_a_loop_by_hand_does(
    tmp_path: Path, settings: dict[str, Any], parts: int
) -> None:
    trainer = apply(_plan(), _trainer(tmp_path, **settings))
    trainer.train()
    model, expected = _by_hand(parts=parts)
    assert _losses(trainer) == pytest.approx(expected, rel=1e-6)
    assert same(exact(trainer.model), exact(model))
    checks = autoprec.verify_applied(trainer.model, {"input_ids": torch.zeros(2, 8).long()})
    ran = {check.name: check.detail for check in checks}
    assert "_scaled_mm float8" in ran[PATH.format(0, "up")]
    assert "mm bfloat16" in ran[PATH.format(0, "down")]
    assert "mm float32" in ran[PATH.format(1, "up")]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd"])
def test_a_trainer_resumes_bit_for_bit(tmp_path: Path, optim: str) -> None:
    def train(seed: int, resumed: str | None = None) -> Trainer:
        model = _model(seed, dropout=0.1)
        trainer = _trainer(tmp_path, model=model, optim=optim, save_strategy="steps", save_steps=3)
        apply(_plan(), trainer, guard=autoprec.Guard)
        trainer.train(resume_from_checkpoint=resumed)
        return trainer

    whole = train(0)
    resumed = train(7, str(tmp_path / "checkpoint-3"))
    assert _losses(resumed) == _losses(whole)
    assert same(exact(resumed.model), exact(whole.model))
    assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    state = whole.state.stateful_callbacks["autoprec.Guard"]
    assert state["step"] == STEPS
    assert resumed.state.stateful_callbacks["autoprec.Guard"] == state


def test_what_a_trainer_saves_loads_without_autoprec(tmp_path: Path) -> None:
    trainer = apply(_plan(), _trainer(tmp_path))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert same(weights(loaded), [value.float() for value in weights(trainer.model)])


def test_the_guard_sees_gradients_before_they_are_clipped(tmp_path: Path) -> None:
    model = _model()
    events = tmp_path / "events.jsonl"
    poisoned = model.get_parameter(f"{PATH.format(1, 'down')}.weight")
    steps = []

    def poison(gradient: Tensor) -> Tensor:
        steps.append(gradient)
        return gradient * math.nan if len(steps) == 3 else gradient

    poisoned.register_hook(poison)
    trainer = _trainer(tmp_path, model=model)
    seen: list[Any] = []

    class Spy(autoprec.Guard):
        def step(self, loss: Tensor | float) -> bool:
            seen.append((float(loss), [p.grad.isfinite().all().item() for p in model.parameters()]))
            return super().step(loss)

    apply(_plan(), trainer, guard=functools.partial(Spy, events=events))
    trainer.train()
    assert [loss for loss, _ in seen] == pytest.approx(_losses(trainer))
    assert [len(finite) - sum(finite) for _, finite in seen] == [0, 0, 1, 0, 0, 0]
    assert events.read_text().count("not_finite") == 1
    assert all(weight.isfinite().all() for weight in exact(model))


def test_the_callback_alone_trains_and_resumes_with_an_optimizer_that_was_given(
    tmp_path: Path,
) -> None:
    def train(seed: int, resumed: str | None = None) -> Trainer:
        model = _model(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
        trainer = _trainer(
            tmp_path,
            model=model,
            callbacks=[PrecisionPlanCallback(_plan())],
            optimizers=(optimizer, None),
            save_strategy="steps",
            save_steps=3,
        )
        trainer.train(resume_from_checkpoint=resumed)
        return trainer

    whole = train(0)
    assert same(exact(whole.model), exact(_by_hand()[0]))
    resumed = train(7, str(tmp_path / "checkpoint-3"))
    assert same(exact(resumed.model), exact(whole.model))


def test_the_callback_alone_refuses_to_resume_with_masters_it_cannot_load(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        callback = PrecisionPlanCallback(_plan())
        return _trainer(tmp_path, callbacks=[callback], save_strategy="steps", save_steps=3)

    whole = trainer()
    whole.train()
    assert same(exact(whole.model), exact(_by_hand()[0]))
    with pytest.raises(PlanMismatchError, match=r"call autoprec.integrations.transformers.apply"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_second_train_goes_on_with_the_same_plan(tmp_path: Path) -> None:
    trainer = apply(_plan(), _trainer(tmp_path))
    trainer.train()
    trainer.args.max_steps = 2
    trainer.train()
    assert trainer.state.global_step == 2
    autoprec.undo(trainer.model, trainer.optimizer.optimizer)
    assert all(weight.dtype is torch.float32 for weight in weights(trainer.model))


def test_a_plan_for_another_model_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    before = weights(trainer.model)
    with pytest.raises(PlanMismatchError, match="a plan must name every layer") as caught:
        apply(plan_for(Mlp()), trainer, guard=autoprec.Guard)
    assert "\n" not in str(caught.value)
    assert type(trainer.model) is LlamaForCausalLM
    assert same(weights(trainer.model), before)
    assert trainer.optimizer is None
    assert "training_step" not in vars(trainer)


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_that_casts_the_model_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlanMismatchError, match=f"TrainingArguments has {name}=True; turn it off"):
        apply(_plan(), _trainer(tmp_path, **{name: True}))


def test_a_precision_of_the_trainers_own_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"  # which needs a GPU to be made
    with pytest.raises(PlanMismatchError, match=r"mixed_precision is 'fp16'.*fp16=False"):
        apply(_plan(), trainer)


def test_data_parallel_and_model_init_are_refused(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.args = SimpleNamespace(n_gpu=2)
    with pytest.raises(PlanMismatchError, match="DataParallel over 2 GPUs; start it with torchrun"):
        apply(_plan(), trainer)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(args=arguments, model_init=lambda: _model(), train_dataset=_rows())
    with pytest.raises(PlanMismatchError, match="model_init when training starts; give it model="):
        apply(_plan(), trainer)
    callback = PrecisionPlanCallback(_plan())
    trainer = Trainer(
        args=arguments, model_init=lambda: _model(), train_dataset=_rows(), callbacks=[callback]
    )
    with pytest.raises(PlanMismatchError, match="the Trainer has made another since"):
        trainer.train()


def _train_on_rank(rank: int, port: int, folder: str, resumed: str | None) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    trainer = _trainer(
        Path(folder),
        model=_model(rank),
        per_device_train_batch_size=BATCH // 2,
        save_strategy="steps",
        save_steps=3,
        ddp_backend="gloo",
    )
    apply(_plan(), trainer, guard=autoprec.Guard)
    trainer.train(resume_from_checkpoint=resumed)
    kind = type(trainer.model_wrapped).__name__
    torch.save((kind, _losses(trainer), exact(trainer.model)), f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_two_ranks_train_and_resume_alike(tmp_path: Path) -> None:
    results = []
    for resumed in (None, str(tmp_path / "checkpoint-3")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start_ranks(_train_on_rank, port, str(tmp_path), resumed, ranks=2)
        results += [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert results[0][0] == "DistributedDataParallel"
    assert all(same(result, results[0]) for result in results)
