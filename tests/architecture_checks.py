"""One architecture through its whole life under a plan: each way in which it can fail is a check.

Capture, a random valid plan, apply with AdamW, three training steps, proof of what ran, save and
load into a fresh model and optimizer, undo, plain FP32 again. Every stage is compared with what
cannot go wrong the same way: the FP32 loss, a bit-identical resume, the master weights.
"""

import io
import math
import random
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import autoprec
from autoprec.errors import PlanMismatchError, WorkloadError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.layers import comes_from_plan, type_name
from autoprec.records import BF16_O2, FP32, ModelSpec, Option, Plan
from autoprec.runtime.masters import ON_MODEL
from autoprec.workload.functions import Batch, Workload
from tests.plans import plan_for

STEPS = 3
CLOSE = 0.1  # of the FP32 loss: 16- and 8-bit rounding of tiny random models stays far below it
DEVICE = torch.device("cpu")


class CheckError(AssertionError):
    """A stage did something else than it must."""


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture: its layers, those in FP8, and `passed` or what refused it."""

    layers: int
    fp8_layers: int
    result: str


def try_architecture(workload: Workload, *, seed: int = 0) -> Outcome:
    """Take a workload through everything; a refusal by autoprec is an outcome.

    Raises:
        CheckError: a stage did something else than it must.
        WorkloadError: the model trains in FP32 and breaks under the plan.
    """
    try:
        spec = capture_model(Context(workload, DEVICE, seed=seed))
    except WorkloadError as problem:
        return Outcome(0, 0, f"does not train here: {problem}")
    plan = random_plan(spec, workload.build_model(seed=seed), seed=seed)
    fp8_layers = sum(layer.option.is_fp8 for layer in plan.layers)
    try:
        run_plan(workload, plan, seed=seed)
    except PlanMismatchError as refusal:
        return Outcome(len(spec.layers), fp8_layers, f"refused: {refusal}")
    return Outcome(len(spec.layers), fp8_layers, "passed")


def random_plan(spec: ModelSpec, model: nn.Module, *, seed: int) -> Plan:
    """Return a valid plan that draws every layer's option; FP8 in half of the eligible layers.

    Tied layers share one storage, so they are all FP32 or none is.
    """
    draw = random.Random(seed)
    chosen: dict[str, Option] = {}
    for layer in spec.layers:
        fp8 = [option for option in layer.options if option.is_fp8]
        options = fp8 if fp8 and draw.random() < 0.5 else [FP32, BF16_O2, BF16_O2]
        if layer.tied_to is not None:
            tied_fp32 = chosen[layer.tied_to] == FP32
            options = [FP32] if tied_fp32 else [option for option in options if option != FP32]
        chosen[layer.name] = draw.choice(options)
    return plan_for(model, others=chosen)


def run_plan(workload: Workload, plan: Plan, *, seed: int) -> None:
    """Apply the plan, train, prove, save, load and undo.

    Raises:
        CheckError: a stage did something else than it must.
    """
    batches = list(islice(workload.train_batches(seed), STEPS + 2))
    reference = workload.build_model(seed=seed)
    expected = _gradients(workload, reference, batches[0])
    model, optimizer = _applied(workload, plan, seed=seed)
    before = _masters(model)
    losses = [_step(workload, model, optimizer, batch) for batch in batches[:1]]
    _check(
        abs(losses[0] - expected.loss) <= CLOSE * abs(expected.loss),
        f"the first loss is {losses[0]:.4g}, in FP32 {expected.loss:.4g}",
    )
    _check_gradients(model, expected.names)
    losses += [_step(workload, model, optimizer, batch) for batch in batches[1:STEPS]]
    _check(all(map(math.isfinite, losses)), f"the losses are {losses}")
    _check_moved(before, _masters(model), names=expected.names)
    autoprec.verify_applied(model, batches[0], loss_fn=workload.loss_fn)
    _check_resume(workload, plan, model, optimizer, batches=batches[STEPS:], seed=seed)
    _check_undo(workload, model, optimizer, batches[0], seed=seed)


@dataclass(frozen=True)
class Gradients:
    """A loss, and the names of the parameters that it moves."""

    loss: float
    names: frozenset[str]


def _gradients(workload: Workload, model: nn.Module, batch: Batch) -> Gradients:
    torch.manual_seed(0)
    loss = workload.loss_fn(model.train(), batch)
    torch.autograd.backward(loss)
    names = (n for n, p in model.named_parameters() if p.grad is not None and p.grad.any())
    return Gradients(float(loss.detach()), frozenset(names))


def _applied(workload: Workload, plan: Plan, *, seed: int) -> tuple[nn.Module, Any]:
    model = workload.build_model(seed=seed).train()
    return autoprec.apply(plan, model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def _step(workload: Workload, model: nn.Module, optimizer: Any, batch: Batch) -> float:
    torch.manual_seed(0)
    optimizer.zero_grad()
    loss = workload.loss_fn(model, batch)
    torch.autograd.backward(loss)
    optimizer.step()
    return float(loss.detach())


def _masters(model: nn.Module) -> dict[str, Tensor]:
    view = autoprec.master_view(model)
    return {name: parameter.detach().clone() for name, parameter in view.named_parameters()}


def _check_gradients(model: nn.Module, names: frozenset[str]) -> None:
    lost = [n for n, p in model.named_parameters() if n in names and p.grad is None]
    _check(not lost, f"parameters have a gradient in FP32 only: {', '.join(lost)}")


def _check_moved(
    before: dict[str, Tensor], after: dict[str, Tensor], *, names: frozenset[str]
) -> None:
    still = [name for name in sorted(names) if torch.equal(before[name], after[name])]
    _check(not still, f"parameters did not move: {', '.join(still)}")
    wrong = [name for name, value in after.items() if value.dtype is not torch.float32]
    _check(not wrong, f"masters are not FP32: {', '.join(wrong)}")


def _check_resume(
    workload: Workload,
    plan: Plan,
    model: nn.Module,
    optimizer: Any,
    *,
    batches: list[Batch],
    seed: int,
) -> None:
    """Saved and loaded into a fresh model of other weights, training goes on bit for bit."""
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    plain_keys = list(workload.build_model(seed=seed).state_dict())
    _check(list(weights) == plain_keys, "the state dict has other keys than a plain model's")
    other, other_optimizer = _applied(workload, plan, seed=seed + 1)
    other.load_state_dict(weights)
    other_optimizer.load_state_dict(state)
    for batch in batches:
        ours = _step(workload, model, optimizer, batch)
        theirs = _step(workload, other, other_optimizer, batch)
        _check(ours == theirs, f"after loading, the loss is {theirs!r} instead of {ours!r}")


def _check_undo(
    workload: Workload, model: nn.Module, optimizer: Any, batch: Batch, *, seed: int
) -> None:
    """Undone, the model computes what a plain model with the master weights does."""
    masters = _masters(model)
    autoprec.undo(model, optimizer)
    plain = workload.build_model(seed=seed + 1).train()
    names = [type_name(module) for module in plain.modules()]
    _check([type_name(m) for m in model.modules()] == names, "undo left other classes")
    _check(not any(comes_from_plan(type(m)) for m in model.modules()), "undo left our classes")
    _check(all(ON_MODEL not in vars(m) for m in model.modules()), "undo left its attribute")
    wrong = [n for n, p in model.named_parameters() if not torch.equal(p, masters[n])]
    _check(not wrong, f"undo left other weights than the masters: {', '.join(wrong)}")
    plain.load_state_dict(model.state_dict())
    ours, theirs = (_gradients(workload, m, batch).loss for m in (model, plain))
    _check(ours == theirs, f"undone, the loss is {ours!r}; of a plain model {theirs!r}")
    _check(math.isfinite(_step(workload, model, optimizer, batch)), "undone, training diverges")


def _check(is_right: bool, problem: str) -> None:
    if not is_right:
        raise CheckError(problem)
