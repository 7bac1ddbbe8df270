"""The common ground of every measurement: warmed-up weights, batches, reference gradients.

The model is trained for a few FP32 steps with the user's own optimizer (from the start, or from a
checkpoint), which gives the optimizer its state and the loss curve its slope. From then on weights,
batches and buffers stay as they are; every pass of a batch draws the same random numbers, so two
passes share their dropout masks and differ in precision only.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from autoprec.common.progress import NOW, report_nothing
from autoprec.common.recipes import APPLICABLE_RECIPES, Precision
from autoprec.common.text import first_and_more
from autoprec.device.memory import free_bytes
from autoprec.device.random_state import random_state_kept, seeded
from autoprec.device.ranks import (
    largest_over_ranks,
    local_part,
    placed_as,
    sum_over_ranks,
)
from autoprec.device.tf32 import tf32_off
from autoprec.errors import CaptureError, WorkloadError
from autoprec.model.context import Context
from autoprec.model.layers import model_layers
from autoprec.model.state import kept_state, put_back_state
from autoprec.records.model import ModelSpec, Option
from autoprec.records.sensitivity import Estimate, StepError
from autoprec.runtime import install_options
from autoprec.runtime.checkpoint import Checkpoint, read_checkpoint
from autoprec.sensitivity.estimates import Squares
from autoprec.sensitivity.gemm import casts_in_parts, fast_gemms
from autoprec.sensitivity.parked import InTurn
from autoprec.sensitivity.preconditioner import Preconditioner, read_preconditioner
from autoprec.sensitivity.reach import Reach
from autoprec.sensitivity.real import real_view
from autoprec.sensitivity.room import plan_groups
from autoprec.sensitivity.warm_up import OnWarm, WarmUp, read_or_trained, restore, train_steps
from autoprec.workload.functions import Batch, NoGradientError, check_loss, move_batch
from autoprec.workload.training import Training

KEPT_SHARE = 0.5  # of the host's free memory: reference gradients up to this are not run again
UNKNOWN_FREE_BYTES = 8 * 2**30  # taken to be free where the system does not say
DEFAULT_BATCHES = 2  # a pair has a standard error
MORE_BATCHES = 4  # beside them
MOST_TRIES = 32  # batches drawn for one with a gradient; a hinge may be 0 on many
DEFAULT_WARMUP_STEPS = 50  # an error after 10 tells less of one after 300 (docs/convergence.md)
EARLY_STEPS = 10  # where errors are measured besides, to see how they grow

Key = TypeVar("Key", bound=Hashable)
logger = logging.getLogger(__name__)


class ReferenceGradient(NamedTuple):
    """The reference gradient g of one batch: FP32 by parameter, and its norm g'Pg.

    Of a parameter that ranks hold parts of, `of` has this rank's part; the norm is that of all.
    """

    of: dict[Tensor, Tensor]
    squared_norm: float
    loss: float


@dataclass
class Reference:
    """The warmed-up model and all that measuring against it needs."""

    context: Context
    spec: ModelSpec  # as captured; its layers' options are what can be measured
    model: nn.Module  # warmed up, FP32
    batches: InTurn[Batch]  # those that gradients are compared on, where they were made
    preconditioner: Preconditioner
    # of the batches that were run, where they are not too large to keep
    gradients: InTurn[ReferenceGradient]
    buffers: dict[str, Tensor]  # the model's after the warm-up; every pass starts from them
    stream: Iterator[Batch] = field(default_factory=lambda: iter(()))  # the batches after those
    loss_curve: tuple[tuple[int, float], ...] = ()  # (step, loss) of the warm-up
    checkpoint: str = ""  # where the warm-up started; "" for fresh weights
    step_s: float = 1.0  # the median time of a warm-up step
    spent_s: float = 0.0  # what preparing took
    groups: int = 1  # of layers, of which one at a time is probed
    is_parked: bool = False  # what a group's reference pass recorded waits away from the device
    passes: int = 0  # forward and backward passes so far, the warm-up left out
    early: tuple[StepError, ...] = ()  # measured in the warm-up
    passed_over: int = 0  # batches without a gradient, drawn before those to measure on
    schedule_steps: int | None = None  # of the user's schedule, where it has an end
    # parameters to which a gradient comes in parts, by backwards within backward: what reentrant
    # checkpoints share, and reversible layers
    in_parts: set[Tensor] = field(default_factory=set)
    reach: Reach = field(default_factory=Reach)  # of its layers, once a pass recorded it

    @cached_property
    def longer(self) -> "Reference":
        """This reference on more batches, for plans that these leave open; drawn when asked for."""
        more = replace(self, batches=InTurn(self.batches, self.context.device))
        more.take(MORE_BATCHES)
        return more

    def take(self, wanted: int) -> None:
        """Add the stream's next batches that have a gradient, which is kept if not too big.

        Raises:
            NoGradientError: many batches in a row have none.
        """
        for index in range(len(self.batches), len(self.batches) + wanted):
            for tried in range(1, MOST_TRIES + 1):
                self.batches[index] = next(self.stream)
                try:
                    self.run_gradient(index)
                    break
                except NoGradientError as error:  # ranks have the same sum, so all go on or none
                    if tried == MOST_TRIES:
                        said = f"{error} ({tried} batches in a row are so)"
                        raise NoGradientError(said) from None
                    self.passed_over += 1
        self.put_back()

    @property
    def digest(self) -> str:
        """16 hex digits of weights and buffers, and of the batches gradients are compared on."""
        found = hashlib.sha256()
        for leaf in tree_leaves([dict(self.model.state_dict()), list(self.longer.batches)]):
            if isinstance(leaf, Tensor):
                numbers = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8)
                found.update(numbers.numpy().tobytes())
        return found.hexdigest()[:16]

    def run(
        self,
        index: int,
        *,
        keep: Collection[Tensor] | None = None,
        see: Callable[[Tensor], None] = lambda _: None,
        begin_backward: Callable[[], None] = lambda: None,
        also: Sequence[tuple[GradientEdge, Tensor]] = (),
    ) -> Tensor:
        """Run forward and backward of a batch in the model as it stands; return its loss.

        Gradients are left on the model; with `keep` those of other parameters are dropped as they
        arrive, once `see` was called with the parameter; those that come in parts stay, too.
        `begin_backward` is called once the loss is there. Of what is in `also` by then, backward
        begins with these gradients too. Buffers and generators are put back first. FP32 is FP32
        here: with cuDNN's TF32 every convolution would have an error too.
        """
        self.passes += 1
        parameters = self.model.parameters() if keep is not None else ()
        kept = self.in_parts.union(keep or ())
        dropped = [p for p in parameters if p.requires_grad and p not in kept]

        def drop(parameter: Tensor) -> None:
            see(parameter)
            parameter.grad = None

        self.put_back()
        with (
            _hooked(dropped, drop),
            seeded(self.context.seed * 7919 + index),
            tf32_off(),
        ):
            batch = move_batch(self.batches[index], self.context.device)
            loss: Tensor = self.context.workload.loss_fn(self.model, batch)
            del batch  # of which a pass in 16 bits has a copy
            begin_backward()
            with self.context.workload.plainly():
                roots, gradients = zip((loss, None), *also, strict=True)
                torch.autograd.backward(roots, gradients)
        return loss

    def put_back(self) -> None:
        """Give the model the buffers and followers of the warm-up, and no gradients."""
        self.model.zero_grad(set_to_none=True)
        put_back_state(self.model, self.buffers)

    def gradient(self, index: int) -> ReferenceGradient:
        """Return the reference gradient of a batch, from an earlier run where it was kept."""
        return self.gradients[index] if index in self.gradients else self.run_gradient(index)

    def run_gradient(
        self, index: int, begin_backward: Callable[[], None] = lambda: None
    ) -> ReferenceGradient:
        """Run the reference on a batch, and keep its gradient if that is not too big.

        Raises:
            WorkloadError: the loss is not finite, or no gradient reaches the parameters.
        """
        arrived: Counter[Tensor] = Counter()  # how often a gradient arrives at each parameter
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with _hooked(trained, lambda p: arrived.update([p])):
            loss = self.run(index, begin_backward=begin_backward)
        self.in_parts.update(p for p, count in arrived.items() if count > 1)
        check_loss(loss, where=f"on measured batch {index}")
        updated = self.preconditioner.rules
        found: dict[Tensor, Tensor] = {
            p: gradient_of(p) for p in self.model.parameters() if p in updated
        }
        norm = self.preconditioner.squared_norm
        (squared,) = sum_over_ranks([sum(norm(p, g, at=g) for p, g in found.items())])
        if not squared > 0.0:
            is_zero = squared == 0.0
            what, error = ("zero", NoGradientError) if is_zero else ("not finite", WorkloadError)
            raise error(
                f"the loss must depend on the weights, but on measured batch {index} its gradient "
                f"is {what} in every parameter that the optimizer updates; check loss_fn and "
                "build_optimizer"
            )
        size = sum(g.numel() * g.element_size() for g in found.values())
        free = free_bytes(torch.device("cpu")) or UNKNOWN_FREE_BYTES
        is_too_large = size * len(self.batches) > KEPT_SHARE * free
        if not any(largest_over_ranks([float(is_too_large)])):  # all keep it, or none
            on_host = {p: g.to("cpu") for p, g in found.items()}
            self.gradients[index] = ReferenceGradient(on_host, squared, float(loss.detach()))
        return ReferenceGradient(found, squared, float(loss.detach()))

    def squared_error(self, index: int, held: ReferenceGradient | None) -> float:
        """Run the model as it stands on a batch; return d'Pd with d = gradient - reference's.

        The reference's is `held` or kept. Of several ranks it is this one's share of d'Pd.
        """
        self.run(index)
        reference = held or self.gradients[index]
        norm = self.preconditioner.squared_norm
        return sum(norm(p, gradient_of(p), at=g, less=g) for p, g in reference.of.items())

    def measure_errors(
        self,
        settings: Mapping[Key, Callable[[], AbstractContextManager[object]]],
        *,
        batches: int,
        stage: str = "",
    ) -> dict[Key, Estimate]:
        """Return the gradient error of the model as it stands inside each setting's context.

        Costs a pass per batch and setting, and one per batch whose gradient was not kept. The first
        `batches` are taken, or all if there are fewer; progress is reported as `stage`.
        """
        first = range(min(batches, len(self.batches)))
        found = self._measure_squares(settings, first, stage)
        return {key: squares.estimate for key, squares in found.items()}

    def _measure_squares(
        self,
        settings: Mapping[Key, Callable[[], AbstractContextManager[object]]],
        batches: Sequence[int],
        stage: str = "",
    ) -> dict[Key, Squares]:
        progress = self.context.progress if stage else report_nothing
        squared: dict[Key, list[float]] = {key: [] for key in settings}
        scale: list[float] = []
        total = len(batches) * len(settings)
        for done, index in enumerate(batches):
            gradient = self.gradient(index)
            scale.append(gradient.squared_norm)
            held = None if index in self.gradients else gradient  # read after each pass
            del gradient
            for count, (key, installed) in enumerate(settings.items()):
                NOW.measures = _shown(key)
                progress(stage, done * len(settings) + count, total)
                with fast_gemms(), casts_in_parts(), installed():
                    squared[key].append(self.squared_error(index, held))
        NOW.measures = ""
        progress(stage, total, total)
        # one reduction for all layers and options
        summed = iter(sum_over_ranks([value for each in squared.values() for value in each]))
        squared = {key: [next(summed) for _ in each] for key, each in squared.items()}
        return {key: Squares(squared[key], scale) for key in settings}

    def measure_joint(
        self,
        options: Mapping[str, Option],
        *,
        batches: Sequence[int],
        fp32_outputs: Collection[str] = (),
    ) -> Squares:
        """Return the gradient error of the model in these options, all at once, by batch."""
        is_16_bit = any(o.precision is not Precision.FP32 for o in options.values())
        uncovered = [p.name for p in self.spec.uncovered] if is_16_bit else []
        installed = partial(
            install_options, self.model, options, uncovered=uncovered, fp32_outputs=fp32_outputs
        )
        return self._measure_squares({"joint": installed}, batches)["joint"]

    @random_state_kept()
    def measure_step(self, step: int) -> tuple[StepError, ...]:
        """Return the error of FP8 wherever it goes at this step; none if no layer takes it.

        Nor where no batch has a gradient.
        """
        options = fp8_everywhere(self.spec)
        if not any(option.is_fp8 for option in options.values()):
            return ()
        try:
            found = self.measure_joint(options, batches=range(len(self.batches)))
        except NoGradientError:
            return ()
        return (StepError(step=step, grad_error=found.estimate),)


def _shown(key: object) -> str:
    """Return in words what is measured: `head in fp32`, and how many more with it."""
    if not isinstance(key, tuple):
        return str(key)
    is_group = isinstance(key[0], tuple)
    return first_and_more(map(_shown, key), most=1) if is_group else " in ".join(map(str, key))


def fp8_everywhere(spec: ModelSpec) -> dict[str, Option]:
    """Return FP8 wherever it goes, each layer in the first recipe that it can run; else BF16 O2."""
    fp8 = {x.name: [o for o in x.options if o.recipe in APPLICABLE_RECIPES] for x in spec.layers}
    return {name: next(iter(fp8[name]), other) for name, other in spec.bf16_options.items()}


@random_state_kept()
def prepare_reference(
    context: Context,
    spec: ModelSpec,
    *,
    checkpoint: Path | None = None,
    batches: int = DEFAULT_BATCHES,
    warmup_steps: int = DEFAULT_WARMUP_STEPS,
    kept: Path | None = None,
    on_warm: OnWarm | None = None,
) -> Reference:
    """Train the FP32 reference for `warmup_steps` and take the next `batches` to measure on.

    `spec` is the captured model, `checkpoint` a state dict to start from instead of fresh weights.
    `kept` is a file from which the trained reference is read, and to which it is written where
    there is none. `on_warm` is given a reference that was trained here, and its losses.

    Raises:
        WorkloadError: a loss is not finite, or many batches have no gradient.
        CaptureError: the workload's model is not the one that `spec` describes.
        RecordError: the checkpoint is unreadable or of another model.
        DeviceError: it takes more memory than it may.
    """
    started = time.perf_counter()
    groups, is_parked = plan_groups(context, spec)
    start = None if checkpoint is None else read_checkpoint(checkpoint)
    train = partial(_trained, context, spec, start, batches=batches)
    made = read_or_trained(context, kept, train, on_warm, steps=warmup_steps)
    reference = replace(
        _measuring(context, spec, made.training, InTurn((), context.device)),
        stream=made.stream,
        loss_curve=made.curve,
        checkpoint=str(checkpoint or ""),
        step_s=made.step_s,
        groups=groups,
        is_parked=is_parked,
        early=made.early,
        schedule_steps=made.training.schedule.length if made.training.schedule else None,
    )
    reference.take(batches)
    reference.spent_s = time.perf_counter() - started
    return reference


def _trained(
    context: Context, spec: ModelSpec, start: Checkpoint | None, *, batches: int, steps: int
) -> WarmUp:
    """Train a reference; on the way FP8's error is measured on the batches of the next steps."""
    training = restore(context, start, warmup_steps=steps)
    stream = context.workload.train_batches(context.seed)
    early: tuple[StepError, ...] = ()
    with seeded(context.seed), tf32_off():
        numbers = range(1, steps + 1)
        first, last = numbers[:EARLY_STEPS], numbers[EARLY_STEPS:]
        train = partial(train_steps, training, context, of=steps, stage="sensitivity")
        curve, step_s = train(stream, first)
        if len(last) >= batches:
            drawn = InTurn(islice(stream, batches), context.device)
            now = _measuring(context, spec, training, drawn)
            early = now.measure_step(EARLY_STEPS)
            now.put_back()  # the model stays as it is
            stream = _after(drawn, stream)
            del drawn, now
        if last:
            later, step_s = train(stream, last)
            curve = (*curve, *later)
    return WarmUp(training, stream, curve, step_s, early)


def _after(drawn: InTurn[Batch], stream: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches that were drawn already, and then those of the stream."""
    yield from drawn
    del drawn  # and their memory
    yield from stream


def _measuring(
    context: Context, spec: ModelSpec, training: Training, batches: InTurn[Batch]
) -> Reference:
    """Return a training where it is now, to be measured on these batches."""
    _check_structure(training.model, spec)
    return Reference(
        context=context,
        spec=spec,
        model=training.model,
        batches=batches,
        gradients=InTurn((), context.device),
        preconditioner=read_preconditioner(training.optimizer, scale=training.clip_scale),
        buffers=kept_state(training.model),
    )


def _check_structure(model: nn.Module, spec: ModelSpec) -> None:
    """Check that a spec is this very model's: its layers are found by name."""
    structure = model_layers(model).structure
    if structure != spec.structure:
        raise CaptureError(
            f"the workload's model must be the captured one ({spec.structure}), but it is "
            f"{structure}; capture or profile it again"
        )


@contextmanager
def _hooked(parameters: Sequence[Tensor], arrived: Callable[[Tensor], None]) -> Iterator[None]:
    """Call a function inside with each parameter to which a gradient has come."""
    with ExitStack() as stack:
        for p in parameters:
            stack.enter_context(p.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]  # torch's own
        yield


def gradient_of(parameter: Tensor) -> Tensor:
    """Return this rank's part of the gradient, its real numbers in FP32; zeros where none came."""
    if parameter.grad is None:
        part = real_view(local_part(parameter.detach()))
        return torch.zeros_like(part, dtype=torch.float32)
    gradient = parameter.grad.detach()
    if gradient.layout is not torch.strided:  # an embedding's, made with sparse=True
        gradient = gradient.to_dense()
    return real_view(local_part(placed_as(parameter, gradient))).float()
