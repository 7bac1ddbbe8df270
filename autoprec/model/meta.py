"""One training step without storage -> ModelSpec, for a model that does not fit here.

Parameters, batches and gradients are meta tensors: they have shapes and nothing else, so a model of
any size is captured in the memory of its module tree. Nothing is computed, hence no loss, and
whether two steps agree bit for bit is not known. Shapes alone decide what can run in FP8; the
target's profile has the last word (`predict`).

What a batch has of integers keeps its values (`known.py`): masks and labels decide shapes.

The meta tensors are `FakeTensor`s: transformers looks at values of plain meta tensors (is a batch
packed?), which fails, and does not at those of fake ones.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from autoprec.common.progress import Progress, report_nothing
from autoprec.common.text import first_line
from autoprec.device.fp8 import EVERY_RECIPE
from autoprec.device.random_state import random_state_kept
from autoprec.device.tracing import PLAIN_TENSORS, OperationTracer
from autoprec.errors import CaptureError, WorkloadError
from autoprec.model import capture
from autoprec.model.known import KnownLists, KnownValues
from autoprec.model.shapes import SCANNED_BATCHES
from autoprec.records import ModelSpec
from autoprec.workload.functions import (
    Batch,
    Workload,
    check_batches,
    move_batch,
    take_batches,
    tensors_in,
)

logger = logging.getLogger(__name__)

META = torch.device("meta")
GROUPED_IN_FP32 = "Expected inputs of BF16"  # what torch's grouped GEMM says on meta tensors
LOOKED_AT_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
    NotImplementedError,
)


@random_state_kept()
def capture_on_meta(
    workload: Workload, *, seed: int = 0, progress: Progress = report_nothing
) -> ModelSpec:
    """Run one step of `workload` on meta tensors and return what it showed.

    `build_model`, `loss_fn` and `build_optimizer` run under `torch.device("meta")`; batches are
    made as always and then moved there.

    Raises:
        CaptureError: no layer ran, or the user's code looks at values.
        WorkloadError: the user's functions break their contract.
    """
    check_batches(workload, seed=seed)
    drawn = take_batches(workload, seed=seed, count=SCANNED_BATCHES)
    progress("capture on meta", 0, 3)
    with _without_storage() as values:
        with fake_tensor.unset_fake_temporarily():  # `Module.to` cannot take fake parameters
            model = workload.build_model(seed=seed)
        model = _moved_to_meta(model)
        batches = [_batch_on_meta(batch, values) for batch in drawn]
        with _seeded_noted() as seeded:
            workload.loss_fn(model, batches[0])
        progress("capture on meta", 1, 3)
        run = partial(_run_step, workload, model, batches[0])
        has_gradients, seen = capture.observe_step(run, workload, model, batches)
        progress("capture on meta", 2, 3)
    # The optimizer's count of steps is real outside: Adam reads it as a number (torch 2.11).
    _step_optimizer(seen.optimizer)
    progress("capture on meta", 3, 3)
    return capture.make_spec(
        replace(seen, has_gradients=has_gradients),
        workload,
        support=EVERY_RECIPE,  # shapes decide
        device=str(META),
        has_randomness=any(seeded),
        is_deterministic=False,  # not known, as the loss
        loss=None,
    )


def _moved_to_meta(model: nn.Module) -> nn.Module:
    """Replace what was made on a device of its own choice; shared parameters stay shared.

    `Module.to` swaps fake parameters in place, which weak references to them forbid.
    """
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that ids stay taken

    def on_meta(tensor: Tensor) -> Tensor:
        if nn.parameter.is_lazy(tensor):
            return tensor
        if id(tensor) not in moved:
            copy = torch.empty_like(tensor, device=META)
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
            moved[id(tensor)] = tensor, copy
        return moved[id(tensor)][1]

    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)  # Any: either
        for held in stores:
            for name, tensor in held.items():
                held[name] = None if tensor is None else on_meta(tensor)
    return model


def _batch_on_meta(batch: Batch, values: KnownValues) -> Batch:
    """Move a batch; a copy to another device is contiguous, so views get their strides back."""
    moved = move_batch(batch, META)
    for own, copy in zip(tensors_in(batch), tensors_in(moved), strict=True):
        if copy.stride() != own.stride():
            strided = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=META)
            copy.set_(strided)  # type: ignore[call-overload]  # torch's stub lacks tensors
        values.keep(copy, own)
    return moved


def _run_step(workload: Workload, model: nn.Module, batch: Batch) -> bool:
    """Return whether the backward runs on meta; else every parameter is given a gradient."""
    loss = workload.loss_fn(model, batch)
    if not loss.requires_grad:
        raise CaptureError(capture.NEEDS_NO_GRADIENT)
    try:
        with workload.plainly():
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own stub
    except (RuntimeError, *LOOKED_AT_VALUES) as error:
        logger.warning(
            "the backward does not run on meta tensors (%s): all trainable parameters are taken "
            "to have a gradient",
            first_line(error),
        )
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        return False
    return True


def _step_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, whose size is asked for."""
    try:
        optimizer.step()
    except (RuntimeError, *LOOKED_AT_VALUES) as error:
        raise CaptureError(
            f"with --meta the optimizer must step on meta tensors, but {type(optimizer).__name__} "
            f"raised: {first_line(error)}; leave build_optimizer out (AdamW is then assumed)"
        ) from error


@contextmanager
def _seeded_noted() -> Iterator[list[bool]]:
    """Give a list that has, for each operator inside, whether it draws random numbers."""
    seeded: list[bool] = []

    def note(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: torch's
        seeded.append(torch.Tag.nondeterministic_seeded in func.tags)
        return func(*args, **kwargs)

    with OperationTracer(note, plain=(*PLAIN_TENSORS, fake_tensor.FakeTensor)):
        yield seeded


@contextmanager
def _with_autocast() -> Iterator[None]:
    """Take an autocast for the device of a tensor (`x.device.type`); torch has none of meta."""
    init = torch.autocast.__init__

    def init_for_cpu(
        self: torch.autocast, device_type: str, *args: Any, **kwargs: Any
    ) -> None:  # Any: torch's own
        init(self, "cpu" if device_type == META.type else device_type, *args, **kwargs)

    torch.autocast.__init__ = init_for_cpu  # type: ignore[method-assign]  # for a while
    try:
        yield
    finally:
        torch.autocast.__init__ = init  # type: ignore[method-assign]  # as it was


@contextmanager
def _without_storage() -> Iterator[KnownValues]:
    """Make every tensor a fake one on meta, and say what to do where code wants values."""
    its_log = logging.getLogger("torch._subclasses.fake_tensor")  # it logs the traceback as well
    level = its_log.level
    its_log.setLevel(logging.CRITICAL)
    try:
        with (
            fake_tensor.FakeTensorMode(allow_non_fake_inputs=True),
            META,
            _with_autocast(),
            KnownValues() as values,
            KnownLists(values),
        ):
            yield values
    except WorkloadError as error:
        cause = error.__cause__
        looked_at_values = isinstance(cause, LOOKED_AT_VALUES) or "meta" in str(cause).lower()
        if looked_at_values:
            rule = "nothing is computed, so model and loss must not look at values"
        elif GROUPED_IN_FP32 in str(cause):
            rule = "experts must not run as grouped GEMMs, which take BF16 alone there"
        else:
            raise
        raise CaptureError(
            f"with --meta {rule}, but {error}; take values from the batch's shapes, build experts "
            "of transformers with experts_implementation='batched_mm', or capture without --meta"
        ) from error
    finally:
        its_log.setLevel(level)
