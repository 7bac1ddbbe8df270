"""Faults of long runs, on a language model that trains on real text: survived, or refused."""

import argparse
import io
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import autoprec
from autoprec.common.files import PARTIAL
from autoprec.errors import AutoprecError, RecordError
from autoprec.guard import Limits
from autoprec.model.layers import comes_from_plan
from autoprec.records import BF16_O2, Gemm, Option, Plan, Recipe, fp8_option
from tests.models import Mlp
from tests.plans import plan_for
from tests.ranks import exit_code_of
from tests.runtime_training import exact, same, train

WIDTH, LENGTH, BATCH, HEADS, STEPS, WHEN = 32, 32, 4, 4, 80, 20
# torch's CPU runs these GEMMs fast, and e4m3 x e4m3 of all others a hundred times slower
FORWARD = fp8_option(Recipe.ROWWISE, Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT)
BACKWARD = fp8_option(Recipe.TENSORWISE, Gemm.OUTPUT)
Fault = Callable[[nn.Module, int], None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x))))
        return result


class CharLm(nn.Module):
    """A causal language model of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.positions(torch.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def lm_plan(model: nn.Module, option: Option = FORWARD) -> Plan:
    """Return a plan with FP8 forward in the MLPs and FP8 backward in attention, or one option."""
    attention = [n for n, _ in model.named_modules() if n.endswith(("qkv", "proj"))]
    return plan_for(model, option, dict.fromkeys(attention, BACKWARD) if option.is_fp8 else None)


def lm_loss(model: nn.Module, text: Tensor, generator: torch.Generator) -> Tensor:
    """Return the loss of one batch of random stretches of a text."""
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
    batch = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train_lm(
    seed: int, option: Option = FORWARD, *, fault: Fault = lambda model, step: None
) -> tuple[float, autoprec.Guard]:
    """Train on the text of a module of the standard library; return the loss on its last tenth."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes())).clamp(max=127)
    head, tail = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    torch.manual_seed(seed)
    model = CharLm()
    plan = lm_plan(model, option)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    autoprec.apply(plan, model, optimizer)
    schedule = CosineAnnealingLR(optimizer, STEPS)
    guard = autoprec.Guard(model, optimizer, plan, limits=Limits(sample_every=20))
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        loss = lm_loss(model, head, generator)
        torch.autograd.backward(loss)
        fault(model, step)
        guard.step(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    generator.manual_seed(7)
    with torch.no_grad():
        losses = [lm_loss(model, tail, generator).item() for _ in range(20)]
    return sum(losses) / len(losses), guard


# --- numbers that go wrong ---------------------------------------------------------------------


@pytest.mark.slow  # test_guard.py has smaller models
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_nan_in_one_gradient_costs_a_language_model_less_than_one_percent(seed: int) -> None:
    def poison(model: nn.Module, step: int) -> None:
        gradient = model.get_parameter("blocks.1.up.weight").grad
        if step == WHEN and gradient is not None:
            gradient[3, 5] = math.nan

    (clean, calm), (hurt, guard) = train_lm(seed), train_lm(seed, fault=poison)
    assert calm.in_bf16 == ()
    assert guard.in_bf16 == ("blocks.1.up", "blocks.1.down")  # which fed it its gradient
    assert clean < 3.0  # it learned: log(128) is 4.9
    assert hurt == pytest.approx(clean, rel=0.01)


@pytest.mark.slow
def test_a_layer_that_leaves_fp8s_range_in_training_moves_alone_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    scale = torch.ones(WIDTH)
    scale[WIDTH // 4 :] = 2.0**-20  # exact in BF16, flushed to zero by FP8

    def rescale(model: nn.Module, step: int) -> None:
        """Keep the function of one layer, but give most of its inputs another range."""
        up = model.get_submodule("blocks.0.up")
        if step == WHEN:
            up.register_forward_pre_hook(lambda _, inputs: (inputs[0] * scale.to(inputs[0].dtype),))
            with torch.no_grad():
                model.get_parameter("blocks.0.up.weight").div_(scale)

    (hurt, guard), (in_bf16, _) = train_lm(0, fault=rescale), train_lm(0, BF16_O2, fault=rescale)
    assert guard.in_bf16 == ("blocks.0.up",)
    assert guard.demoted["blocks.0.up"].since == WHEN + 20  # the next sampled step
    assert hurt == pytest.approx(in_bf16, rel=0.01)


# --- plans that were edited ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        (0, {"name": "frist"}, "layer 'frist' is in the plan only; layer 'first' is in the model"),
        (1, {"shapes": [[64, 32], [64]]}, "layer 'second' has shapes 32x64, 32 in the model, 64x"),
        (1, {"shapes": []}, "layer 'second' has shapes 32x64, 32 in the model, none in the plan"),
        (2, {"kind": "linear"}, "layer 'norm' is norm in the model, linear in the plan"),
        (2, {"precision": "fp8_o1", "recipe": "rowwise"}, "'norm' cannot run fp8_o1:rowwise: "),
        (3, {"precision": "fp8_o1", "recipe": "rowwise"}, "'head' cannot run .* N=10 is not a mul"),
        (0, {"precision": "fp8_o1", "recipe": "delayed"}, "'first' cannot run fp8_o1:delayed: "),
        (0, {"precision": "fp8_o1", "recipe": "mxfp8"}, "'first' cannot run fp8_o1:mxfp8: "),
        (3, None, "layer 'head' is in the model only"),
    ],
)
def test_a_plan_edited_to_the_wrong_layer_is_refused_by_name_and_changes_nothing(
    layer: int, change: dict[str, Any] | None, message: str
) -> None:
    model = Mlp()
    fields = json.loads(plan_for(model).to_json())
    if change is None:
        del fields["layers"][layer]
    else:
        fields["layers"][layer] |= change
    optimizer = torch.optim.AdamW(model.parameters())
    before = [(p, p.dtype, p.detach().clone()) for p in model.parameters()]
    with pytest.raises(AutoprecError, match=message):
        autoprec.apply(Plan.from_json(json.dumps(fields)), model, optimizer)
    for now, (parameter, dtype, value) in zip(model.parameters(), before, strict=True):
        assert now is parameter
        assert now.dtype is dtype
        assert torch.equal(now, value)
    assert not any(comes_from_plan(type(module)) for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


# --- kill -9 while a checkpoint is written -------------------------------------------------------

KILLED_SAVE, ALL_STEPS = 3, 6
POINTS = {"optimizer": 2, "bytes": 2, "fsync": 2, "replace": 2, "afterwards": 3}


def save_and_die(folder: Path) -> None:
    """Save at each step, and be killed at a point of the third save, or at any moment."""
    for point in POINTS:
        if not (pid := os.fork()):
            _die_in_a_save(folder, point)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    path = folder / "any.pt"
    for number in range(3):
        if not (pid := os.fork()):
            model, optimizer = _applied(seed=0)
            for step in itertools.count():
                train(model, optimizer, 1, first=step % 5)
                autoprec.save_checkpoint(path, model, optimizer, step=step + 1)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.2 + 0.0137 * number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        autoprec.load_checkpoint(path, *_applied(seed=0))


Function = Callable[..., Any]  # Any: what is patched takes and returns
IsDue = Callable[[], bool]


def _die_in_a_save(folder: Path, point: str) -> None:
    model, optimizer = _applied(seed=0)
    saves = 0
    _kill_at(point, optimizer, lambda: saves == KILLED_SAVE)
    for step in range(ALL_STEPS):
        train(model, optimizer, 1, first=step)
        saves += 1
        autoprec.save_checkpoint(folder / f"{point}.pt", model, optimizer, step=step + 1)
    os._exit(0)


def _kill_at(point: str, optimizer: torch.optim.Optimizer, is_due: IsDue) -> None:
    """End this process at a point of a save that is due."""
    match point:
        case "optimizer":
            optimizer.register_state_dict_pre_hook(_deadly(lambda _: None, is_due))
        case "bytes":
            torch.save = _torn(torch.save, is_due)
        case "fsync":
            os.fsync = _deadly(os.fsync, is_due)
        case "replace":
            os.replace = _deadly(os.replace, is_due)
        case "afterwards":
            os.replace = _deadly(os.replace, is_due, before=False)


def _deadly(function: Function, is_due: IsDue, *, before: bool = True) -> Function:
    def call(*args: Any, **kwargs: Any) -> Any:  # Any: what the function takes
        if is_due() and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if is_due():
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def _torn(save: Function, is_due: IsDue) -> Function:
    def call(content: object, file: Any) -> None:  # Any: a binary file
        whole = io.BytesIO()
        save(content, whole)
        data = whole.getvalue()
        file.write(data[: len(data) // 2] if is_due() else data)
        file.flush()
        if is_due():
            os.kill(os.getpid(), signal.SIGKILL)

    return call


def test_kill_9_at_any_moment_of_a_save_leaves_a_pair_that_resumes_bit_for_bit(
    tmp_path: Path,
) -> None:
    assert exit_code_of(save_and_die, tmp_path) == 0
    whole, whole_optimizer = _applied(seed=0)
    losses = train(whole, whole_optimizer, ALL_STEPS)
    for point, expected in POINTS.items():
        model, optimizer = _applied(seed=5)
        resumed = autoprec.load_checkpoint(tmp_path / f"{point}.pt", model, optimizer)
        assert (point, resumed["step"]) == (point, expected)
        rest = train(model, optimizer, ALL_STEPS - expected, first=expected)
        assert rest == losses[expected:]
        assert same(exact(model), exact(whole))
        assert same(optimizer.state_dict(), whole_optimizer.state_dict())
        autoprec.save_checkpoint(tmp_path / f"{point}.pt", model, optimizer)
        assert not list(tmp_path.glob(f".{point}.pt.*{PARTIAL}"))  # the next save cleans up


def _applied(*, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    return autoprec.apply(plan_for(model), model, optimizer)


def test_a_checkpoint_holds_the_guard_and_what_the_user_adds(tmp_path: Path) -> None:
    plan = plan_for(Mlp(), FORWARD)
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        autoprec.apply(plan, model, optimizer)
        runs.append((model, optimizer, autoprec.Guard(model, optimizer, plan)))
    (model, optimizer, guard), (other, other_optimizer, other_guard) = runs
    for step in range(3):
        guard.step(train(model, optimizer, 1, first=step)[0])
    wrapped: Any = torch.compile(model, backend="eager")  # its keys are not the plain ones
    extra = {"rng": torch.get_rng_state(), "lr": [0.1]}
    path = tmp_path / "run.pt"
    autoprec.save_checkpoint(path, wrapped, optimizer, guard=guard, step=3, extra=extra)
    resumed = autoprec.load_checkpoint(path, other, other_optimizer, guard=other_guard)
    assert resumed["step"] == other_guard.steps == 3
    assert same(resumed["extra"], extra)
    assert same(exact(other), exact(model))
    assert other_guard.state_dict() == guard.state_dict()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "value", [np.float64(0.5), np.arange(3), argparse.Namespace(lr=0.1), Path("data"), lambda: 1]
)
def test_what_could_not_be_loaded_again_is_not_saved(value: object, tmp_path: Path) -> None:
    model, optimizer = _applied(seed=0)
    path = tmp_path / "run.pt"
    autoprec.save_checkpoint(path, model, optimizer, step=1)
    with pytest.raises(RecordError, match=r"tensors and plain data, .* but \['extra'\]\['a'\] is"):
        autoprec.save_checkpoint(path, model, optimizer, step=2, extra={"a": value})
    other = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(RecordError, match="SGD trains no parameter of this model"):
        autoprec.save_checkpoint(path, model, other, step=2)
    assert autoprec.load_checkpoint(path, model, optimizer)["step"] == 1


def test_a_checkpoint_of_something_else_is_refused_in_one_line(tmp_path: Path) -> None:
    model, optimizer = _applied(seed=0)
    path = tmp_path / "run.pt"
    guard: Any = autoprec.Guard(model, optimizer, plan_for(model))
    for content, message in (
        (b"not a checkpoint", "must load with torch.load"),
        ({"model": {}}, "must be one of autoprec.save_checkpoint, but .* has no 'optimizer'"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(RecordError, match=message):
            autoprec.load_checkpoint(path, model, optimizer)
    autoprec.save_checkpoint(path, model, optimizer)
    with pytest.raises(RecordError, match="was saved without one; leave guard out"):
        autoprec.load_checkpoint(path, model, optimizer, guard=guard)
    with pytest.raises(RecordError, match="must fit the model"):
        autoprec.load_checkpoint(path, CharLm(), optimizer)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match="a checkpoint must"):
        autoprec.load_checkpoint(path, model, optimizer)
    with pytest.raises(RecordError, match="No such file"):
        autoprec.load_checkpoint(tmp_path / "absent.pt", model, optimizer)
    with pytest.raises(RecordError, match="must be writable"):
        autoprec.save_checkpoint(tmp_path / "absent" / "run.pt", model, optimizer)
