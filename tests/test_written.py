"""How the user trains (autocast, 16-bit parameters, compiled) is noted, and left out of FP32."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoprec.integrations.launch import Script, record_workload
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.meta import capture_on_meta
from autoprec.records import AsWritten, ModelSpec
from autoprec.workload.functions import Workload, workload_from
from autoprec.workload.training import Training
from autoprec.workload.written import Written, is_compiled, no_autocast
from tests.constant_clock import CPU
from tests.launch_scripts import HEAD, LOOP, own_main, write_script
from tests.models import WIDTH, Mlp, mlp_workload

__all__ = ["own_main"]
BASE = mlp_workload()


def workload(
    build_model: Callable[[], nn.Module] = Mlp,
    loss_fn: Callable[[nn.Module, Any], Tensor] = BASE.loss_fn,
) -> Workload:
    functions = {"train_batches": BASE.train_batches, "build_model": build_model}
    return workload_from({**functions, "loss_fn": loss_fn})


def captured(given: Workload) -> ModelSpec:
    return capture_model(Context(given, CPU))


def input_dtypes(spec: ModelSpec) -> set[str]:
    return {t.dtype for layer in spec.layers for call in layer.calls for t in call.inputs}


def test_the_tf32_that_the_user_s_process_allows_is_noted() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allows in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            written = captured(workload()).as_written
            assert written
            assert (written.allow_tf32, written.allow_tf32_conv) == (allows, True)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_autocast_of_loss_fn_is_noted_and_left_out_of_fp32() -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.mse_loss(model(batch[0]), batch[1])

    given = workload(loss_fn=loss_fn)
    spec = captured(given)
    assert spec.as_written == AsWritten(autocast="bfloat16")
    assert input_dtypes(spec) == {"float32"}
    model, batch = given.build_model(), next(given.train_batches(0))
    plain = F.mse_loss(model(batch[0]), batch[1])
    assert torch.equal(given.loss_fn(model, batch), plain)
    assert not torch.equal(given.written_loss(model, batch), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as the profiler's own: it stays
        assert torch.is_autocast_enabled("cpu")


class Checkpointed(nn.Module):
    """A layer that backward computes again, under an autocast of its own or none."""

    def __init__(self, seen: list[bool], *, reentrant: bool, autocast: bool) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(8, 8), seen
        self.reentrant, self.autocast = reentrant, autocast

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
                self.seen.append(torch.is_autocast_enabled("cpu"))
                y: Tensor = self.layer(x)
            return y.float()

        found: Tensor = checkpoint(run, x, use_reentrant=self.reentrant)
        return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_again_as_forward_did(reentrant: bool) -> None:
    """Without the user's autocast in FP32, and under the profiler's own, which it does not know."""
    for autocast in (True, False):
        seen: list[bool] = []
        model = Checkpointed(seen, reentrant=reentrant, autocast=autocast)
        x = torch.ones(4, 8, requires_grad=True)
        given = workload(loss_fn=lambda model, x: model(x).square().mean())
        Training(given, model, torch.optim.SGD(model.parameters())).step([x])
        assert seen == [False, False]
        seen.clear()
        own = torch.autocast("cpu", dtype=torch.bfloat16)
        with no_autocast(written := Written(), besides=own):
            with own:
                loss = model(x).square().mean()
            loss.backward()
        assert seen == [True, True]
        assert written.autocast is (torch.bfloat16 if autocast else None)


def test_an_autocast_that_is_switched_off_stays_off_and_one_of_the_process_is_seen() -> None:
    seen: list[bool] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        with torch.autocast("cpu", enabled=False):
            seen.append(torch.is_autocast_enabled("cpu"))
            return F.mse_loss(model(batch[0]), batch[1])

    given = workload(loss_fn=loss_fn)
    model, batch = given.build_model(), next(given.train_batches(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given.written_loss(model, batch)
        given.loss_fn(model, batch)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [True, False, False, False]
    assert given.written.autocast is torch.bfloat16


def test_16_bit_parameters_are_fp32_ones_in_fp32_stages_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0].bfloat16()).float(), batch[1])  # it feeds BF16

    given = workload(lambda: Mlp().bfloat16(), loss_fn)
    spec = captured(given)
    assert spec.as_written == AsWritten(parameters=("bfloat16",))
    assert input_dtypes(spec) == {"float32"}
    assert {p.dtype for p in spec.parameters()} == {"float32"}
    assert "the model is held in bfloat16" in caplog.text
    written, plain = given.written_model(seed=3), given.build_model(seed=3)
    pairs = list(zip(plain.parameters(), written.parameters(), strict=True))
    assert all(w.dtype is torch.bfloat16 and torch.equal(p, w.float()) for p, w in pairs)


def test_16_bit_parameters_are_fp32_ones_on_meta_too() -> None:
    given = workload(
        lambda: nn.Linear(WIDTH, 10, dtype=torch.bfloat16),
        lambda model, batch: F.mse_loss(model(batch[0].bfloat16()).float(), batch[1]),
    )
    spec = capture_on_meta(given)
    assert {p.dtype for p in spec.parameters()} == input_dtypes(spec) == {"float32"}
    assert spec.as_written == AsWritten(parameters=("bfloat16",))


def compiled() -> nn.Module:
    return torch.compile(Mlp(), backend="eager")  # type: ignore[return-value]  # a module


def compiled_in_place() -> nn.Module:
    model = Mlp()
    model.compile(backend="eager")
    return model


def compiled_in_part() -> nn.Module:
    model = Mlp()
    model.first = torch.compile(model.first, backend="eager")  # type: ignore[assignment]  # a module
    return model


def compiled_on_the_object() -> nn.Module:
    model = Mlp()
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


BUILDERS = [compiled, compiled_in_place, compiled_in_part, compiled_on_the_object]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build_model", BUILDERS)
def test_a_model_that_its_user_compiles_is_captured_like_any_other(
    build_model: Callable[[], nn.Module],
) -> None:
    spec = captured(workload(build_model))
    assert spec.as_written == AsWritten(is_compiled=True)
    assert spec.names == ("first", "second", "norm", "head")
    assert spec.uncalled == ()
    assert not is_compiled(workload(build_model).build_model())
    plain = captured(workload())
    assert plain.as_written == AsWritten()
    assert plain.as_written.is_fp32
    assert spec.structure == plain.structure


@pytest.mark.usefixtures("own_main")
@pytest.mark.parametrize("what", ["model", "model.forward"])
def test_a_scripts_autocast_and_compiling_are_those_of_the_step_as_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    caplog.set_level(logging.ERROR)
    loop = LOOP.replace(
        "    loss = F.cross_entropy(model(x), y)\n",
        "    with torch.autocast('cpu', dtype=torch.bfloat16):\n"
        "        loss = F.cross_entropy(model(x), y)\n",
    )
    compile_it = f"{what} = torch.compile({what}, backend='eager')\n"
    script = Script(write_script(tmp_path, HEAD + compile_it + loop), ("99",))
    given = record_workload(script, steps=8)
    spec = captured(given)
    assert spec.as_written == AsWritten(autocast="bfloat16", is_compiled=True)
    assert input_dtypes(spec) == {"float32"}
    model, batch = given.build_model(), next(given.train_batches(0))
    losses = []
    for run in (given.loss_fn, given.written_loss):
        torch.manual_seed(0)
        losses.append(float(run(model, batch).detach()))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
