"""A layer on its own in one option, with the calls of a real step: what is timed and weighed.

`step` is forward and backward as the training step runs them: the option is installed by the same
`install_options`, inputs and output gradients are real, and gradients are asked for exactly where
the real step needs them. A 16-bit option takes and gives BF16, as between 16-bit layers; FP32 takes
and gives FP32; so casts at a layer's boundary are in neither.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from autoprec.device.timing import Clock, Function
from autoprec.errors import PlanMismatchError
from autoprec.model.recording import Call, output_tensors
from autoprec.profiler.compiling import reason_of
from autoprec.profiler.tracing import Operation, traced
from autoprec.records import Option
from autoprec.runtime import install_options
from autoprec.runtime.activations import cast_floating
from autoprec.runtime.classes import option_dtype

Outputs = tuple[list[Tensor], list[Tensor]]  # tensors to differentiate, and their gradients
MakeLayer = Callable[[], nn.Module]
FEASIBILITY_ERRORS = (RuntimeError, ValueError, AssertionError, PlanMismatchError)


@dataclass
class Candidate:
    """One option of one layer, ready to run."""

    option: Option
    layer: nn.Module
    calls: list[Call]
    compiled: Callable[..., Any] | None = None  # runs in the layer's place; Any: a layer's own
    inputs: list[Tensor] = field(default_factory=list)  # those that need a gradient
    parameters: list[nn.Parameter] = field(default_factory=list)  # trainable ones

    def forward(self) -> Outputs:
        """Run every call of a step; return the outputs that got a gradient, with it."""
        outputs: list[Tensor] = []
        gradients: list[Tensor] = []
        run = self.layer if self.compiled is None else self.compiled
        for call in self.calls:
            # Without a gradient there is no backward pass to keep anything for: of a checkpointed
            # layer's two forward passes only one keeps its activations.
            with torch.set_grad_enabled(any(g is not None for g in call.gradients)):
                for _ in range(call.count):
                    found = output_tensors(run(*call.args, **call.kwargs))
                    for tensor, gradient in zip(found, call.gradients, strict=False):
                        if gradient is not None:
                            outputs.append(tensor)
                            gradients.append(gradient)
        return outputs, gradients

    def step(self) -> None:
        """Run forward and backward."""
        self.differentiate(self.forward(), [*self.inputs, *self.parameters])

    def differentiate(
        self, made: Outputs, wanted: Sequence[Tensor], *, retain: bool = False
    ) -> None:
        """Run the backward pass to `wanted`; nothing when no gradient is asked for."""
        outputs, gradients = made
        if outputs and wanted:
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

    @contextmanager
    def weighing(self) -> Iterator[dict[int, int]]:
        """Fill a dict, by storage, with the bytes kept for backward, parameters left out."""
        own = {p.untyped_storage().data_ptr() for p in self.layer.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            # A view saves its storage, but an expanded one is far smaller than its elements, and a
            # slice of a large buffer far smaller than the buffer: the lesser of the two is its own.
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = min(storage.nbytes(), tensor.numel() * tensor.itemsize)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved


@dataclass
class Attempt:
    """One option of a layer, tried once: ready to be timed, or the reason why it is not."""

    option: Option
    candidate: Candidate | None = None  # None: it cannot run, or is not worth timing
    compiled: Candidate | None = None  # the same, compiled; None: eager
    infeasible: str = ""
    predicted_ms: float | None = None
    kernels: tuple[str, ...] = ()
    activation_bytes: int = 0

    @property
    def step(self) -> Function | None:
        """What is timed as a whole."""
        timed = self.compiled or self.candidate
        return None if timed is None else timed.step


def try_option(option: Option, calls: Sequence[Call], make_layer: MakeLayer) -> Attempt:
    """Run an option once under a trace, which proves what ran and warms it up."""
    try:
        candidate = make_candidate(make_layer, calls, option)
        with candidate.weighing() as saved:
            operations = candidate.trace_step()
    except FEASIBILITY_ERRORS as error:
        return Attempt(option, infeasible=reason_of(error))
    kernels = tuple(dict.fromkeys(f"{op.name} {op.dtype}".strip() for op in operations))
    return Attempt(option, candidate, kernels=kernels, activation_bytes=sum(saved.values()))


def make_candidate(make_layer: MakeLayer, calls: Sequence[Call], option: Option) -> Candidate:
    """Return a layer with `option` and its calls in the option's dtype."""
    dtype = option_dtype(option)
    layer = make_layer()
    install_options(layer, {"": option}, activation_dtype=dtype, root=False)

    def as_input(tensor: Tensor) -> Tensor:
        return cast_floating(tensor.detach(), dtype).requires_grad_(tensor.requires_grad)  # type: ignore[no-any-return]  # a tensor stays one

    own = [
        replace(
            call,
            args=tree_map_only(Tensor, as_input, call.args),
            kwargs=tree_map_only(Tensor, as_input, call.kwargs),
            gradients=[g if g is None else g.to(dtype) for g in call.gradients],
        )
        for call in calls
    ]
    leaves = [leaf for call in own for leaf in tree_leaves((call.args, call.kwargs))]
    return Candidate(
        option=option,
        layer=layer,
        calls=own,
        inputs=[t for t in leaves if isinstance(t, Tensor) and t.requires_grad],
        parameters=[p for p in layer.parameters() if p.requires_grad],
    )
