"""A reference runs in FP32 whatever the process allows, and both of torch's interfaces get back."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprec.device.local import device_facts
from autoprec.device.tf32 import cudnn_allows_tf32, matmul_allows_tf32, tf32_off
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import BF16_O2
from autoprec.runtime import install_options
from autoprec.sensitivity.reference import prepare_reference
from autoprec.verification import Terms
from autoprec.verification.branches import train_branch
from autoprec.verification.gate import open_session
from autoprec.verification.session import REFERENCE, Variant
from autoprec.workload.functions import Workload, workload_from
from tests.models import mlp_workload

BACKENDS: Any = torch.backends  # Any: torch's stubs do not know the newer settings
FUNCTIONS = ("build_model", "train_batches", "loss_fn", "build_optimizer", "eval_batches")
NEWER = (
    BACKENDS,
    BACKENDS.cudnn,
    BACKENDS.cudnn.conv,
    BACKENDS.cudnn.rnn,
    BACKENDS.cuda.matmul,
    BACKENDS.mkldnn.matmul,
)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    before = [own.fp32_precision for own in NEWER]
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for own, precision in zip(NEWER, before, strict=True):
        own.fp32_precision = precision


def state() -> list[object]:
    """Return what both interfaces say; an older one that does not answer says so."""
    older = (
        torch.get_float32_matmul_precision,
        lambda: BACKENDS.cudnn.allow_tf32,
        lambda: BACKENDS.cuda.matmul.allow_tf32,
    )
    found: list[object] = [own.fp32_precision for own in NEWER]
    for ask in older:
        try:
            found.append(ask())
        except RuntimeError:
            found.append("closed")
    return found


def set_nothing() -> None: ...


def set_older() -> None:
    torch.set_float32_matmul_precision("medium")


def set_newer() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def set_one_of_cudnn() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"


def set_both() -> None:
    torch.set_float32_matmul_precision("high")
    BACKENDS.cuda.matmul.fp32_precision = "ieee"


def set_all_at_once() -> None:
    BACKENDS.fp32_precision = "tf32"


@pytest.mark.parametrize(
    "choose", [set_nothing, set_older, set_newer, set_one_of_cudnn, set_both, set_all_at_once]
)
def test_fp32_is_fp32_inside_and_every_setting_is_put_back(choose: Any) -> None:
    choose()
    before = state()
    with contextlib.suppress(KeyError), tf32_off():  # an error inside changes nothing
        assert not matmul_allows_tf32()
        assert not cudnn_allows_tf32()
        assert BACKENDS.cudnn.rnn.fp32_precision != "tf32"
        raise KeyError
    assert state() == before


def test_user_code_inside_can_still_read_the_older_interface() -> None:
    with tf32_off():
        assert not BACKENDS.cudnn.allow_tf32
        assert not BACKENDS.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"


def test_convolutions_are_a_fact_of_a_gpu_alone() -> None:
    assert cudnn_allows_tf32()  # torch's default
    assert device_facts(torch.device("cpu")).allow_tf32_conv is None


def watched(seen: list[bool]) -> Workload:
    """Return a workload whose loss notes whether a convolution would run in TF32."""
    own = mlp_workload()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(cudnn_allows_tf32())
        return own.loss_fn(model, batch)

    functions = {name: getattr(own, name) for name in FUNCTIONS}
    return workload_from(SimpleNamespace(**{**functions, "loss_fn": loss_fn}), name="watched")


def test_the_reference_of_sensitivity_is_in_fp32() -> None:
    seen: list[bool] = []
    context = Context(watched(seen), torch.device("cpu"))
    spec = capture_model(context)
    seen.clear()
    reference = prepare_reference(context, spec, warmup_steps=2)
    reference.measure_errors({"bf16": lambda: install_options(reference.model, {})}, batches=1)
    assert seen == [False] * 5  # two warm-up steps, two reference batches and the option


def test_the_reference_of_verification_is_in_fp32_and_the_plan_as_the_user_runs_it() -> None:
    seen: list[bool] = []
    terms = Terms(seeds_min=2, seeds_max=2, warmup_steps=2, branch_steps=3)
    context = Context(watched(seen), torch.device("cpu"))
    session = open_session(context, terms, loss_tolerance=0.05, spec=capture_model(context))
    plan = Variant(label="plan", options={"first": BF16_O2})
    for variant, allowed in ((REFERENCE, False), (plan, True)):
        seen.clear()
        train_branch(session, variant, seed=0)
        assert seen[:3] == [allowed] * 3
        assert not any(seen[3:])  # evaluation compares FP32 weights
