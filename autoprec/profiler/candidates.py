"""A layer on its own in one option, with the calls of a real step: what is timed and weighed.

`step` is forward and backward as the training step runs them: the option is installed by the same
`install_options`, inputs and output gradients are real, and gradients are asked for exactly where
the real step needs them. A 16-bit option takes and gives BF16, as between 16-bit layers; FP32 takes
and gives FP32; so casts at a layer's boundary are in neither.

FP8 options that would take longer to time than training itself are predicted from a small layer.
Where a CPU has only a reference kernel for FP8 GEMMs (oneDNN 3.12 with AVX512-FP16 but no FP8
units: 900 times slower than FP32), the time of a small layer per multiply-add tells. On a GPU there
is FP8 where its units multiply it, and a microsecond that launching the small layer took longer
would be minutes at the size of a real one: there nothing is predicted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils._pytree import tree_leaves, tree_map_only

from autoprec.common.text import first_line
from autoprec.device.ranks import gathered, largest_over_ranks
from autoprec.device.timing import Clock, Function
from autoprec.device.tracing import Operation, traced
from autoprec.errors import PlanMismatchError
from autoprec.model.recording import Call, output_tensors
from autoprec.model.saved import saved_for_backward
from autoprec.profiler.compiling import Compilation
from autoprec.profiler.surrounded import Surrounded
from autoprec.records import FP32, Option
from autoprec.runtime import install_options
from autoprec.runtime.activations import cast_floating, option_dtype

Outputs = list[tuple[Tensor, Tensor]]  # tensors to differentiate, each with its gradient
MakeLayer = Callable[[], nn.Module]
FEASIBILITY_ERRORS = (RuntimeError, ValueError, AssertionError, PlanMismatchError)
# Times the FP32 layer; far from both that were seen: 1.2 where FP8 GEMMs have a kernel of their own
# (AVX512-BF16 CPU, torch 2.13.0), 900 with a reference kernel.
WORTH_TIMING = 6.0
WIDTH, ROWS, REPEATS = 64, (16, 144), 3  # of the small layer; few and more rows


@dataclass
class Candidate:
    """One option of one layer, ready to run."""

    option: Option
    layer: nn.Module
    calls: list[Call]
    compiled: Callable[..., Any] | None = None  # what `step` runs in its place; Any: a layer's own
    inputs: list[Tensor] = field(default_factory=list)  # those that need a gradient
    parameters: list[nn.Parameter] = field(default_factory=list)  # trainable ones

    def forward(self, run: Callable[..., Any] | None = None) -> Outputs:  # Any: a layer's own
        """Run every call of a step; return the outputs that got a gradient, with it."""
        made: Outputs = []
        run = self.layer if run is None else run
        for call in self.calls:
            # Without a gradient there is no backward pass to keep anything for: of a checkpointed
            # layer's two forward passes only one keeps its activations.
            with torch.set_grad_enabled(any(g is not None for g in call.gradients)):
                for _ in range(call.count):
                    found = output_tensors(run(*call.args, **call.kwargs))
                    pairs = zip(found, call.gradients, strict=False)
                    made += [(tensor, grad) for tensor, grad in pairs if grad is not None]
        return made

    def step(self) -> None:
        """Run forward and backward, compiled if the layer is."""
        self.differentiate(self.forward(self.compiled), [*self.inputs, *self.parameters])

    def differentiate(self, made: Outputs, wanted: Sequence[Tensor], retain: bool = False) -> None:
        """Run the backward pass to `wanted`; nothing when no gradient is asked for."""
        if made and wanted:
            outputs, gradients = zip(*made, strict=True)
            torch.autograd.grad(outputs, wanted, gradients, retain_graph=retain, allow_unused=True)

    def backward_to(self, wanted: Sequence[Tensor]) -> Function:
        """Return the backward pass to `wanted` alone, of a forward pass that is run here."""
        made = self.forward()
        return lambda: self.differentiate(made, wanted, retain=True)

    def trace_step(self, clock: Clock | None = None) -> list[Operation]:
        """Run forward and backward; return the operations, timed if there is a clock."""
        with traced(clock) as trace:
            made = self.forward()
            trace.is_backward = True
            self.differentiate(made, [*self.inputs, *self.parameters])
        return trace.operations


@dataclass
class Attempt:
    """One option of a layer, tried once: ready to be timed, or the reason why it is not."""

    option: Option
    candidate: Candidate | None = None  # None: it cannot run, or is not worth timing
    infeasible: str = ""
    unknown: str = ""  # why it has no time though it can run
    predicted_ms: float | None = None
    kernels: tuple[str, ...] = ()
    activation_bytes: int = 0
    surrounded: Candidate | None = None  # compiled between its neighbours
    note: str = ""  # why it is not compiled

    def leave_eager(self, note: str) -> None:
        """Run it as it is without compiling, for that reason."""
        self.note, self.surrounded = note, None
        if self.candidate is not None:
            self.candidate.compiled = None


def try_option(
    option: Option,
    calls: Sequence[Call],
    make_layer: MakeLayer,
    compilation: Compilation | None = None,
    *,
    between: Sequence[Call] | None = None,
) -> Attempt:
    """Run an option as it will be timed, and once under a trace, which proves what ran.

    What cannot run on one rank runs on none; what does not compile is left eager, with a note.
    `between` are the calls of the layer with its neighbours; an FP8 layer is compiled with them
    alone, a BF16 one with and without.
    """
    attempt = _try_here(option, calls, make_layer)
    reasons = [reason for reason in gathered(attempt.infeasible) if reason]
    if reasons:
        return Attempt(option, infeasible=reasons[0])
    candidate = attempt.candidate
    if compilation is None or candidate is None:
        return attempt
    # FP8 casts are fused with the neighbours; BF16 is timed both ways, to take their time off
    if between is not None and option != FP32:
        wide = surround(candidate, between)
        if not _compile(wide, compilation):
            attempt.surrounded = wide
    if attempt.surrounded is None or not option.is_fp8:
        attempt.note = _compile(candidate, compilation)
    return attempt


def _try_here(option: Option, calls: Sequence[Call], make_layer: MakeLayer) -> Attempt:
    try:
        candidate = make_candidate(make_layer, calls, option)
        with saved_for_backward(candidate.layer) as saved:
            operations = candidate.trace_step()
    except FEASIBILITY_ERRORS as error:
        return Attempt(option, infeasible=first_line(error))
    kernels = tuple(dict.fromkeys(f"{op.name} {op.dtype}".strip() for op in operations))
    return Attempt(option, candidate, kernels=kernels, activation_bytes=saved.own)


def _compile(candidate: Candidate, compilation: Compilation) -> str:
    """Compile a candidate; return why that fails on some rank, in one line, and leave it eager."""
    failure = ""
    try:
        candidate.compiled = compilation.compile_layer(candidate.layer)
        compilation.run_first(candidate.step)
    except (*FEASIBILITY_ERRORS, FailOnRecompileLimitHit) as error:
        failure = f"it does not compile ({first_line(error)})"
    failures = [failure for failure in gathered(failure) if failure]
    if failures:
        candidate.compiled = None
    return failures[0] if failures else ""


def make_candidate(make_layer: MakeLayer, calls: Sequence[Call], option: Option) -> Candidate:
    """Return a layer with `option` and its calls in the option's dtype."""
    dtype = option_dtype(option)
    layer = make_layer()
    install_options(layer, {"": option}, activation_dtype=dtype, root=False)
    return _with_calls(layer, calls, option)


def surround(candidate: Candidate, between: Sequence[Call]) -> Candidate:
    """Return a candidate's layer between its neighbours, run in the option's dtype as well."""
    return _with_calls(Surrounded(candidate.layer, between[0]), between, candidate.option)


def _with_calls(layer: nn.Module, calls: Sequence[Call], option: Option) -> Candidate:
    dtype = option_dtype(option)

    def as_input(tensor: Tensor) -> Tensor:
        return cast_floating(tensor.detach(), dtype).requires_grad_(tensor.requires_grad)  # type: ignore[no-any-return]  # a tensor stays one

    own = []
    for call in calls:
        args, kwargs = tree_map_only(Tensor, as_input, (call.args, call.kwargs))
        gradients = [g if g is None else g.to(dtype) for g in call.gradients]
        own.append(replace(call, args=args, kwargs=kwargs, gradients=gradients))
    leaves = tree_leaves([(call.args, call.kwargs) for call in own])
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return Candidate(option, layer, own, inputs=inputs, parameters=parameters)


@dataclass
class SlowFp8:
    """Finds the FP8 options of one device that are too slow to be timed."""

    device: torch.device
    clock: Clock
    seed: int = 0
    # ms per M * K * N, and beside it, of the small layer
    known: dict[Option, tuple[float, float, Attempt]] = field(default_factory=dict)

    def predict(self, option: Option, calls: Sequence[Call], *, fp32_ms: float) -> Attempt | None:
        """Return the option with a predicted time if that makes it not worth timing, else None."""
        if not option.is_fp8 or self.device.type == "cuda":
            return None
        if option not in self.known:
            self.known[option] = self._run_small(option)
        ms_per_mac, overhead_ms, small = self.known[option]
        (macs,) = largest_over_ranks([_linear_macs(calls)])  # an expert has tokens by the rank
        ms = ms_per_mac * macs
        if ms <= WORTH_TIMING * fp32_ms:
            return None
        return Attempt(option, predicted_ms=ms + overhead_ms, kernels=small.kernels)

    def _run_small(self, option: Option) -> tuple[float, float, Attempt]:
        """Time a small layer with few and with more rows; the difference has no overhead."""
        generator = torch.Generator().manual_seed(self.seed)
        elapsed: list[float] = []  # a reference kernel's grows with the rows, overhead does not
        small = Attempt(option)
        for rows in ROWS:
            x, gradient = (torch.randn(rows, WIDTH, generator=generator) for _ in "xg")
            call = Call((x.to(self.device).requires_grad_(),), {}, [gradient.to(self.device)])
            small = try_option(option, [call], lambda: nn.Linear(WIDTH, WIDTH, device=self.device))
            if small.candidate is None:
                return 0.0, 0.0, small  # the layer's own attempt will say why
            elapsed.append(min(self.clock.measure(small.candidate.step) for _ in range(REPEATS)))
        per_row = max(elapsed[1] - elapsed[0], 0.0) / (ROWS[1] - ROWS[0])
        return per_row / WIDTH**2, max(elapsed[0] - ROWS[0] * per_row, 0.0), small


def _linear_macs(calls: Sequence[Call]) -> float:
    """Return M * K * N of a linear's calls in one step."""
    total = 0.0
    for call in calls:
        gradient = next((g for g in call.gradients if g is not None), None)
        first = call.args[0] if call.args else next(iter(call.kwargs.values()))
        if isinstance(first, Tensor) and gradient is not None:
            total += call.count * float(first.numel()) * gradient.shape[-1]
    return total
