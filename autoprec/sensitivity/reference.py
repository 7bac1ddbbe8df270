"""The common ground of every measurement: warmed-up weights, batches, reference gradients.

The model is trained for a few FP32 steps with the user's own optimizer (from the start, or from a
checkpoint), which gives the optimizer its state and the loss curve its slope. From then on weights,
batches and buffers stay as they are; every pass of a batch draws the same random numbers, so two
passes share their dropout masks and differ in precision only.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from autoprec.common.progress import Progress, report_nothing
from autoprec.errors import CaptureError, WorkloadError
from autoprec.model.layers import find_layers, model_structure
from autoprec.records import ModelSpec
from autoprec.runtime.checkpoint import load_state, read_checkpoint
from autoprec.sensitivity.history import AmaxHistory
from autoprec.sensitivity.preconditioner import Preconditioner, read_preconditioner
from autoprec.workload.functions import Batch, Workload, check_loss, move_batch

KEPT_BYTES = 4 * 2**30  # reference gradients up to this size are kept on the CPU, not run again
DEFAULT_BATCHES = 2  # a pair has a standard error
DEFAULT_WARMUP_STEPS = 10
FEWEST_BATCHES = 2  # one batch gives no standard error


@dataclass(frozen=True)
class Baseline:
    """The reference gradient g of one batch: FP32 by parameter place, and its squared norm g'Pg."""

    gradients: dict[int, Tensor]
    squared: float


@dataclass
class Reference:
    """The warmed-up model and all that measuring against it needs.

    `step_s` is the median time of a warm-up step, `spent_s` what preparing took.
    """

    workload: Workload
    model: nn.Module
    device: torch.device
    seed: int
    batches: list[Batch]
    preconditioner: Preconditioner
    history: AmaxHistory
    loss_curve: tuple[tuple[int, float], ...]
    warmup_steps: int
    checkpoint: str
    step_s: float
    spent_s: float
    buffers: dict[str, Tensor]
    passes: int = 0
    kept: dict[int, Baseline] = field(default_factory=dict)

    def run(self, index: int) -> float:
        """Run forward and backward of a batch in the model as it stands; return its loss.

        Gradients are left on the model; buffers and random generators are put back first.
        """
        self.passes += 1
        self.model.zero_grad(set_to_none=True)
        for name, buffer in self.model.named_buffers():
            if name in self.buffers:
                buffer.copy_(self.buffers[name])
        with seeded(self.seed * 7919 + index, self.device):
            loss = self.workload.loss_fn(self.model, self.batches[index])
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own stub
        return float(loss.detach())

    def baseline(self, index: int) -> Baseline:
        """Return the reference gradient of a batch, run once and then kept if that is not too big.

        Raises:
            WorkloadError: the loss is not finite, or no gradient reaches the parameters.
        """
        if index in self.kept:
            return self.kept[index]
        found = self.run_baseline(index)
        size = sum(g.numel() * g.element_size() for g in found.gradients.values())
        if size * len(self.batches) <= KEPT_BYTES:
            cpu = {place: g.to("cpu") for place, g in found.gradients.items()}
            self.kept[index] = Baseline(cpu, found.squared)
        return found

    def run_baseline(self, index: int) -> Baseline:
        """Run the reference on a batch, whether it is kept or not."""
        loss = self.run(index)
        if loss != loss or abs(loss) == float("inf"):
            raise WorkloadError(
                f"the FP32 loss must be finite, but it is {loss} on measured batch {index}; "
                "lower the learning rate or look at the data"
            )
        gradients: dict[int, Tensor] = {}
        squared = 0.0
        for place, parameter in self.measured():
            gradient = _gradient(parameter)
            gradients[place] = gradient
            weighted = self.weigh(parameter, gradient, gradient)
            squared += float(weighted.square().sum(dtype=torch.float64))
        if not squared > 0.0:
            raise WorkloadError(
                f"the loss must depend on the weights, but on measured batch {index} its gradient "
                "is zero (or not finite) in every parameter that the optimizer updates; check "
                "loss_fn and build_optimizer"
            )
        return Baseline(gradients, squared)

    def squared_error(self, index: int, baseline: Baseline) -> float:
        """Run the model as it stands on a batch; return d'Pd with d = gradient - reference's."""
        self.run(index)
        squared = 0.0
        for place, parameter in self.measured():
            reference = baseline.gradients[place].to(parameter.device)
            weighted = self.weigh(parameter, _gradient(parameter) - reference, reference)
            squared += float(weighted.square().sum(dtype=torch.float64))
        return squared

    def measured(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the parameters that the optimizer updates, each with its place in the model."""
        for place, parameter in enumerate(self.model.parameters()):
            if self.preconditioner.covers(parameter):
                yield place, parameter

    def weigh(self, parameter: Tensor, gradient: Tensor, reference: Tensor) -> Tensor:
        """Return P^(1/2) times `gradient`, with P at the reference gradient."""
        weight = self.preconditioner.weight(parameter, reference.to(gradient.device))
        return gradient if weight is None else gradient * weight


def prepare_reference(
    workload: Workload,
    spec: ModelSpec,
    *,
    device: torch.device,
    batches: int = DEFAULT_BATCHES,
    warmup_steps: int = DEFAULT_WARMUP_STEPS,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress = report_nothing,
) -> Reference:
    """Train the FP32 reference for `warmup_steps` and take the next `batches` to measure on.

    Raises:
        WorkloadError: too few batches or steps, or a loss that is not finite.
        CaptureError: the workload's model is not the one that `spec` describes.
        RecordError: the checkpoint is unreadable or of another model.
    """
    if batches < FEWEST_BATCHES or warmup_steps < 1:
        raise WorkloadError(
            f"sensitivity needs at least {FEWEST_BATCHES} batches and 1 warm-up step, but got "
            f"{batches} and {warmup_steps}; ask for more"
        )
    started = time.perf_counter()
    model = workload.build_model(seed=seed).to(device)
    start = None if checkpoint is None else read_checkpoint(checkpoint)
    if start is not None:
        load_state(model, start.model, what="model")
    model.train()
    optimizer = workload.build_optimizer(model)
    if start is not None and start.optimizer is not None:
        load_state(optimizer, start.optimizer, what="optimizer")
    stream = workload.train_batches(seed)
    warmup = [move_batch(batch, device) for batch in islice(stream, warmup_steps)]
    history = AmaxHistory()
    with seeded(seed, device), history.watching(find_layers(model)):
        curve, step_s = _warm_up(workload, model, optimizer, warmup, progress)
    if model_structure(model) != spec.structure:
        raise CaptureError(
            f"the workload's model must be the captured one ({spec.structure}), but it is "
            f"{model_structure(model)}; capture or profile it again"
        )
    return Reference(
        workload=workload,
        model=model,
        device=device,
        seed=seed,
        batches=[move_batch(batch, device) for batch in islice(stream, batches)],
        preconditioner=read_preconditioner(optimizer),
        history=history,
        loss_curve=curve,
        warmup_steps=warmup_steps,
        checkpoint="" if checkpoint is None else str(checkpoint),
        step_s=step_s,
        spent_s=time.perf_counter() - started,
        buffers={name: buffer.clone() for name, buffer in model.named_buffers()},
    )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators inside, and restore them on leaving."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _warm_up(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    progress: Progress,
) -> tuple[tuple[tuple[int, float], ...], float]:
    """Train and return the loss curve and the median time of a step in seconds."""
    curve: list[tuple[int, float]] = []
    times: list[float] = []
    for step, batch in enumerate(batches, start=1):
        progress("sensitivity: warm-up", step - 1, len(batches))
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = workload.loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own stub
        optimizer.step()
        curve.append((step, check_loss(loss, where=f"at warm-up step {step}")))
        times.append(time.perf_counter() - started)
    progress("sensitivity: warm-up", len(batches), len(batches))
    return tuple(curve), statistics.median(times[1:] or times)


def _gradient(parameter: Tensor) -> Tensor:
    """Return the gradient in FP32; zeros where none arrived."""
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=torch.float32)
    return parameter.grad.detach().float()
