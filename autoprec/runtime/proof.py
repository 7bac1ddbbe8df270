"""One training step of an applied model -> the operations and dtypes that really ran, per layer.

A dispatch mode sees every ATen operation below autograd, torchao's subclasses taken apart. Each is
given to a layer:

    forward    the layer whose `forward` is running, or else the owner of a parameter among the
               operands: a tied head, or an embedding whose weight is sliced, is used functionally
    backward   autograd numbers its nodes in the order in which forward makes them, so a node whose
               number lies within a layer's forward call belongs to that layer

Only operations with a precision of their own are looked at (GEMMs, convolutions, fused attention
and recurrent kernels, norms, embeddings); what is elementwise follows from the dtypes that flow.
A class with a forward of its own may compute in FP32 from BF16 storage, as routers of experts do:
what its author wrote stays, and the check says so. What a parametrization does to make a weight
(an orthogonal one factorizes in FP32) is not the layer's operation and is left out.

A layer is looked for under the plan's name, or where what wrapped it later put it: LoRA makes
`q_proj` to `q_proj.base_layer`, `torch.compile` of a block puts `_orig_mod` into the name.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from autoprec.device.random_state import random_state_kept
from autoprec.errors import PlanMismatchError
from autoprec.model.layers import find_layers, plain_name, unwrapped
from autoprec.records import Check, Gemm, Option
from autoprec.runtime.casting import CASTABLE
from autoprec.runtime.classes import is_made_here, option_dtype, own_class
from autoprec.runtime.gathers import ON_LAYER, GatheredInFp8, gathered_dtype
from autoprec.runtime.install import KEEPS_FP32_PARAMETERS
from autoprec.runtime.masters import masters_of

aten = torch.ops.aten
GEMMS = {
    aten.mm: (0, 1),
    aten.addmm: (1, 2),
    aten.bmm: (0, 1),
    aten.baddbmm: (1, 2),
    aten._scaled_mm: (0, 1),
}  # positions of the two operands
KERNELS = {  # the operand whose dtype is the kernel's
    aten.convolution: 0,
    aten.convolution_backward: 0,
    aten.embedding: 0,
    aten.embedding_dense_backward: 0,
    aten._embedding_bag: 0,
    aten.native_layer_norm: 0,
    aten.native_layer_norm_backward: 0,
    aten.native_group_norm: 0,
    aten.native_group_norm_backward: 0,
    aten.native_batch_norm: 0,
    aten.native_batch_norm_backward: 0,
    aten.cudnn_batch_norm: 0,
    aten.cudnn_batch_norm_backward: 0,
    aten._fused_rms_norm: 0,
    aten._fused_rms_norm_backward: 0,
    aten._scaled_dot_product_flash_attention: 0,
    aten._scaled_dot_product_flash_attention_backward: 0,
    aten._scaled_dot_product_efficient_attention: 1,
    aten._scaled_dot_product_efficient_attention_backward: 0,
    aten._scaled_dot_product_cudnn_attention: 0,
    aten._scaled_dot_product_cudnn_attention_backward: 0,
    aten._scaled_dot_product_flash_attention_for_cpu: 0,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 0,
    aten._native_multi_head_attention: 0,
    aten._transformer_encoder_layer_fwd: 0,
    aten.mkldnn_rnn_layer: 0,
    aten.mkldnn_rnn_layer_backward: 0,
    aten._cudnn_rnn: 0,
    aten._cudnn_rnn_backward: 0,
    aten._thnn_fused_lstm_cell: 0,
    aten._thnn_fused_gru_cell: 0,
}
Step = Callable[[], Any]  # Any: a loss tensor, or whatever a model returns
NO_NODE = 2**62  # sequence numbers of nodes that forward did not make are above it


@dataclass
class LayerTrace:
    """What ran for one layer: per direction, how often each `operation dtype` was seen."""

    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    functional: Counter[str] = field(default_factory=Counter)  # with its weight, outside of it
    calls: int = 0

    def __str__(self) -> str:
        """Return e.g. `forward _scaled_mm float8_e4m3fn; backward mm bfloat16`."""
        parts = []
        for name in ("forward", "backward", "functional"):
            seen = getattr(self, name)
            if seen:
                parts.append(f"{name} {', '.join(seen)}")
        return "; ".join(parts) or "nothing with a precision of its own"


def verify_applied(
    model: nn.Module,
    batch: Any = None,  # Any: whatever the step needs
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[Check, ...]:
    """Run one step of an applied model and prove that what ran is what the plan says.

    Weights, gradients, buffers and random number generators are left as they were.

    Args:
        model: an applied model.
        batch: what `loss_fn` takes; without a `loss_fn`, the model's input: a tensor, a tuple of
            positional or a dict of keyword arguments.
        loss_fn: `loss_fn(model, batch) -> scalar`; default: the model's loss if it returns one, or
            the mean of its outputs.

    Returns:
        One good check per layer, saying what ran.

    Raises:
        PlanMismatchError: something else ran; the message names every layer concerned.
    """
    checks = check_applied(model, batch, loss_fn=loss_fn)
    wrong = [check for check in checks if not check.is_good]
    if wrong:
        raise PlanMismatchError(
            f"what runs must be what the plan says, but {len(wrong)} of {len(checks)} layers "
            "differ: "
            + "; ".join(f"{check.name!r} {check.detail}" for check in wrong)
            + "; look for code that casts or replaces these layers"
        )
    return checks


def check_applied(
    model: nn.Module,
    batch: Any = None,  # Any: see verify_applied
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[Check, ...]:
    """Return what `verify_applied` proves as one check per layer, good or not."""
    inner = unwrapped(model)
    options = masters_of(inner).options
    layers = find_layers(inner)
    gathers = any(ON_LAYER in vars(layer) for layer in layers.values())

    def step() -> Any:
        return loss_fn(inner, batch) if loss_fn is not None else _call(inner, batch)

    traces = trace_step(inner, step)
    called = {name for name, trace in traces.items() if trace.calls}
    checks = []
    for name, option in options.items():
        found = _present_name(name, layers, called)
        problem = f"should run {option.key}, but is not in the model any more"
        detail = ""
        if found is not None:
            layer, trace = layers[found], traces[found]
            problem = _storage_problem(layer, option) or _problem(layer, option, trace)
            detail = _detail(option, trace) + (_gather_detail(layer, option) if gathers else "")
        checks.append(Check(name=name, is_good=not problem, detail=problem or detail))
    return tuple(checks)


def trace_step(model: nn.Module, step: Step) -> dict[str, LayerTrace]:
    """Run `step` and the backward of what it returns; return what ran for each layer of the model.

    Compiled code hides its operations, so `torch.compile` is off inside.
    """
    tracer = _Tracer(find_layers(model))
    with _left_as_it_was(model), torch.enable_grad(), tracer.hooked():
        torch.compiler.set_stance("force_eager")
        try:
            with tracer:
                loss = _loss(step())
                torch.autograd.backward(loss)
        finally:
            torch.compiler.set_stance("default")
    return tracer.traces


def _present_name(planned: str, layers: Mapping[str, nn.Module], called: Set[str]) -> str | None:
    """Return the name that a planned layer has now, None if that cannot be told."""
    if planned in layers:
        return planned
    plain = {plain_name(name): name for name in layers}
    own = plain_name(planned)
    inside = [plain[name] for name in plain if name.startswith(f"{own}.")]
    ours = [name for name in inside if is_made_here(type(layers[name]))]
    running = [name for name in ours if name in called] or ours  # PEFT keeps copies of a layer
    return running[0] if len(running) == 1 else plain.get(own)


def _call(model: nn.Module, batch: Any) -> Any:  # Any: the model's own arguments and result
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def _loss(result: Any) -> Tensor:  # Any: what a model returns
    found = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if isinstance(found, Tensor):
        return found
    leaves = torch.utils._pytree.tree_leaves(result)
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not outputs:
        raise PlanMismatchError(
            "the step must give a loss that depends on a parameter, but its result needs no "
            "gradient; give loss_fn=, and a model with trainable parameters"
        )
    return torch.stack([output.float().mean() for output in outputs]).sum()


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put gradients, buffers and random number generators back at the end."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    for parameter in gradients:
        parameter.grad = None
    try:
        with random_state_kept():
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Sees operations and gives them to layers, as the module's docstring says."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.layers = layers
        self.traces = {name: LayerTrace() for name in layers}
        self.running: list[tuple[str | None, int]] = []  # in forward, and the first node of each
        self.nodes: list[tuple[int, int, str | None]] = []  # numbers from, to (excluded), layer
        self.owners = {
            parameter.untyped_storage().data_ptr(): name
            for name, layer in reversed(list(layers.items()))
            for parameter in layer.parameters()
            if type(parameter) in (nn.Parameter, GatheredInFp8)
        }

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Note when layers start and end while the context is open."""
        handles: list[RemovableHandle] = []
        for name, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(self._starter(name)))
            handles.append(layer.register_forward_hook(self._end, always_call=True))
            for part in layer.modules():
                if isinstance(part, ParametrizationList):
                    handles.append(part.register_forward_pre_hook(self._starter(None)))
                    handles.append(part.register_forward_hook(self._end, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _starter(self, name: str | None) -> Callable[..., None]:
        """Return a hook that starts a layer, or with None a parametrization, which is no layer."""

        def start(*_: object) -> None:
            self.running.append((name, torch._C._autograd._get_sequence_nr()))
            if name is not None:
                self.traces[name].calls += 1

        return start

    def _end(self, *_: object) -> None:
        name, first = self.running.pop()
        self.nodes.append((first, torch._C._autograd._get_sequence_nr(), name))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Note the operation; subclasses are asked to take theirs apart first."""
        if any(kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        seen = _describe(func.overloadpacket, args)
        if seen:
            self._note(seen, func.overloadpacket, args)
        return result

    def _note(self, seen: str, packet: Any, args: tuple[Any, ...]) -> None:
        if self.running:
            running = self.running[-1][0]
            if running is not None:
                self.traces[running].forward[seen] += 1
            return
        node = torch._C._current_autograd_node()
        if node is None:
            operands = (value for value in args if isinstance(value, Tensor))
            owners = (self.owners.get(value.untyped_storage().data_ptr()) for value in operands)
            owner = next((name for name in owners if name is not None), None)
            if owner is not None:
                self.traces[owner].functional[seen] += 1
            return
        owner = self._owner(node._sequence_nr())
        if owner is not None:
            trace = self.traces[owner]
            trace.backward[_backward_name(seen, packet, args, self.layers[owner])] += 1

    def _owner(self, number: int) -> str | None:
        if number > NO_NODE:
            return None
        return next((name for low, high, name in self.nodes if low <= number < high), None)


def _describe(packet: Any, args: tuple[Any, ...]) -> str:  # Any: torch's operation
    """Return `operation dtype`, or an empty string for what has no precision of its own."""
    positions = GEMMS.get(packet) or ((KERNELS[packet],) if packet in KERNELS else ())
    dtypes = dict.fromkeys(args[position].dtype for position in positions)
    name = packet._qualified_op_name.removeprefix("aten::")
    return f"{name} {'x'.join(map(_dtype_name, dtypes))}" if dtypes else ""


def _backward_name(seen: str, packet: Any, args: tuple[Any, ...], layer: nn.Module) -> str:
    """Return which GEMM of a linear's backward it was, by the shape of its result."""
    if packet not in GEMMS or not isinstance(layer, nn.Linear):
        return seen
    first, second = (args[position] for position in GEMMS[packet])
    rows, columns = first.shape[-2], second.shape[-1]
    tokens = first.shape[-1]  # the inner dimension of grad_weight, N of grad_input
    N, K = layer.out_features, layer.in_features
    if {rows, columns} == {N, K} and tokens not in (N, K):
        return f"{Gemm.GRAD_WEIGHT} {seen}"
    if columns == K and tokens == N and rows not in (N, K):
        return f"{Gemm.GRAD_INPUT} {seen}"
    return seen  # M, N and K are too alike to tell


def _storage_problem(layer: nn.Module, option: Option) -> str:
    keeps_fp32 = isinstance(layer, KEEPS_FP32_PARAMETERS)
    wanted = torch.float32 if keeps_fp32 else option_dtype(option)
    found = {p.dtype for p in layer.parameters() if p.dtype in CASTABLE} - {wanted}
    if not found:
        return ""
    names = ", ".join(sorted(map(_dtype_name, found)))
    return f"should store {_dtype_name(wanted)} ({option.key}), but has {names}"


def _problem(layer: nn.Module, option: Option, trace: LayerTrace) -> str:
    """Return how a trace differs from an option, or an empty string."""
    if trace.functional and option.is_fp8:
        return (
            f"should run {option.key}, but its weight is used outside of its forward "
            f"({', '.join(trace.functional)})"
        )
    lifts = _has_own_forward(layer) and not option.is_fp8
    forward, backward = (
        [seen for seen in direction if not (lifts and _is_dtype(seen, torch.float32))]
        for direction in (trace.forward, trace.backward)
    )
    wrong = [seen for seen in trace.functional if not _is_dtype(seen, option_dtype(option))]
    wrong += [seen for seen in forward if not _fits(seen, Gemm.OUTPUT, option)]
    for seen in backward:
        gemms = [gemm for gemm in Gemm if seen.startswith(gemm)]
        either = gemms or [Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT]
        if not any(_fits(seen, gemm, option) for gemm in either):
            wrong.append(seen)
    if wrong:
        return f"should run {option.key}, but ran {', '.join(dict.fromkeys(wrong))}"
    if option.is_fp8 and trace.calls and not trace.forward:
        return f"should run {option.key}, but no GEMM of it was seen"
    return ""


def _has_own_forward(layer: nn.Module) -> bool:
    """Whether the layer runs code of a class that is not torch's."""
    own: str = own_class(layer).forward.__module__
    return "forward" not in vars(layer) and own.partition(".")[0] != "torch"


def _fits(seen: str, gemm: Gemm, option: Option) -> bool:
    if not option.is_fp8:
        return _is_dtype(seen, option_dtype(option))
    if gemm not in option.fp8_gemms:
        return _is_dtype(seen, torch.bfloat16)
    return "_scaled_mm float8" in seen


def _is_dtype(seen: str, dtype: torch.dtype) -> bool:
    return seen.endswith(f" {_dtype_name(dtype)}")


def _detail(option: Option, trace: LayerTrace) -> str:
    if not trace.calls and not trace.functional:
        return f"{option.key}: not called in this step"
    return f"{option.key}: {trace}"


def _gather_detail(layer: nn.Module, option: Option) -> str:
    dtype = gathered_dtype(layer) if option.is_fp8 else ""
    return f"; weight gathered in {dtype}" if dtype else ""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
