"""One training step of an applied model -> the operations and dtypes that really ran, per layer.

A dispatch mode sees every ATen operation below autograd, torchao's subclasses taken apart. Each is
given to a layer:

    forward    the layer whose `forward` is running, or else the owner of a parameter among the
               operands: a tied head, or an embedding whose weight is sliced, is used functionally
    backward   autograd numbers its nodes in the order in which forward makes them, so a node whose
               number lies within a layer's forward call belongs to that layer

Only operations with a precision of their own are looked at (GEMMs, convolutions, fused attention
and recurrent kernels, norms, embeddings); the rest follows from the dtypes of activations. A
class with a forward of its own may compute in FP32 from BF16 storage, as routers of experts do:
what its author wrote stays, and the check says so. What a parametrization does to make a weight
(an orthogonal one factorizes in FP32) is not the layer's operation and is left out.

A layer is looked for under the plan's name, or where what wrapped it later put it: LoRA makes
`q_proj` to `q_proj.base_layer`, `torch.compile` of a block puts `_orig_mod` into the name.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from autoprec.device.random_state import random_state_kept
from autoprec.device.tracing import OperationTracer
from autoprec.errors import PlanMismatchError
from autoprec.model.layers import find_layers, plain_name, unwrapped
from autoprec.records import Check, Gemm, Option
from autoprec.runtime.activations import CASTABLE
from autoprec.runtime.classes import is_made_here, option_dtype, own_class
from autoprec.runtime.gathers import ON_LAYER, GatheredInFp8, gathered_dtype
from autoprec.runtime.install import KEEPS_FP32_PARAMETERS
from autoprec.runtime.masters import masters_of

aten = torch.ops.aten
GEMMS = {  # positions of the two operands
    aten.mm: (0, 1),
    aten.addmm: (1, 2),
    aten.bmm: (0, 1),
    aten.baddbmm: (1, 2),
    aten._scaled_mm: (0, 1),
}
_FIRST = (  # kernels whose precision is the dtype of their first operand
    "convolution convolution_backward embedding embedding_dense_backward _embedding_bag "
    "native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward "
    "native_batch_norm native_batch_norm_backward cudnn_batch_norm cudnn_batch_norm_backward "
    "_fused_rms_norm _fused_rms_norm_backward _native_multi_head_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward "
    "_scaled_dot_product_efficient_attention_backward "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward "
    "_scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention_for_cpu_backward _transformer_encoder_layer_fwd "
    "mkldnn_rnn_layer mkldnn_rnn_layer_backward _cudnn_rnn _cudnn_rnn_backward "
    "_thnn_fused_lstm_cell _thnn_fused_gru_cell"
)
OPERANDS = {  # of every operation with a precision of its own, those whose dtype it is
    **{getattr(aten, name): (0,) for name in _FIRST.split()},
    aten._scaled_dot_product_efficient_attention: (1,),
    **GEMMS,
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

    Example:
        >>> import torch, autoprec
        >>> from autoprec.runtime import uniform_plan
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> model, _ = autoprec.apply(uniform_plan(model, "bf16_o2"), model)
        >>> [check.detail for check in autoprec.verify_applied(model, torch.ones(4, 16))]
        ['bf16_o2: forward addmm bfloat16; backward grad_weight mm bfloat16']
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
    checks = []  # for each layer of the plan the first way in which it differs, if any
    for name, option in options.items():
        found = _present_name(name, layers, called)
        problem = f"should run {option.key}, but is not in the model any more"
        detail = ""
        if found is not None:
            layer, trace = layers[found], traces[found]
            answers = (question(layer, option, trace) for question in QUESTIONS)
            problem = next(itertools.chain.from_iterable(answers), "")
            detail = _detail(option, trace) + (_gather_detail(layer, option) if gathers else "")
        checks.append(Check(name=name, is_good=not problem, detail=problem or detail))
    return tuple(checks)


def trace_step(model: nn.Module, step: Step) -> dict[str, LayerTrace]:
    """Run `step` and the backward of what it returns; return what ran for each layer of the model.

    Compiled code hides its operations, so `torch.compile` is off inside.
    """
    recorder = _LayerRecorder(find_layers(model))
    with _left_as_it_was(model), torch.enable_grad(), recorder.hooked():
        torch.compiler.set_stance("force_eager")
        try:
            with OperationTracer(recorder.run):
                torch.autograd.backward(_loss(step()))
        finally:
            torch.compiler.set_stance("default")
    return recorder.traces


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


class _LayerRecorder:
    """Gives the operations that run to layers, as the module's docstring says."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
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

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: torch's
        """Run an operation, and note it if it has a precision of its own."""
        result = func(*args, **kwargs)
        seen = _describe(func.overloadpacket, args)
        if seen:
            self._note(seen, func.overloadpacket, args)
        return result

    def _note(self, seen: str, packet: Any, args: tuple[Any, ...]) -> None:
        # In a layer's forward: that layer's. A parametrization (None) belongs to none.
        if self.running:
            running = self.running[-1][0]
            if running is not None:
                self.traces[running].forward[seen] += 1
            return
        # In backward: the layer in whose forward autograd made the node.
        node = torch._C._current_autograd_node()
        if node is not None:
            owner = self._owner(node._sequence_nr())
            if owner is not None:
                name = _backward_name(seen, packet, args, self.layers[owner])
                self.traces[owner].backward[name] += 1
            return
        # Between layers: the layer whose parameter is among the operands.
        operands = (value for value in args if isinstance(value, Tensor))
        owners = (self.owners.get(value.untyped_storage().data_ptr()) for value in operands)
        owner = next((name for name in owners if name is not None), None)
        if owner is not None:
            self.traces[owner].functional[seen] += 1

    def _owner(self, number: int) -> str | None:
        if number > NO_NODE:
            return None
        return next((name for low, high, name in self.nodes if low <= number < high), None)


def _describe(packet: Any, args: tuple[Any, ...]) -> str:  # Any: torch's operation
    """Return `operation dtype`, or an empty string for what has no precision of its own."""
    dtypes = dict.fromkeys(args[position].dtype for position in OPERANDS.get(packet, ()))
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


def _stores_other(layer: nn.Module, option: Option, _: LayerTrace) -> Iterator[str]:
    """Say that parameters have another dtype than the option stores."""
    keeps_fp32 = isinstance(layer, KEEPS_FP32_PARAMETERS)
    wanted = torch.float32 if keeps_fp32 else option_dtype(option)
    found = {p.dtype for p in layer.parameters() if p.dtype in CASTABLE} - {wanted}
    if found:
        names = ", ".join(sorted(map(_dtype_name, found)))
        yield f"should store {_dtype_name(wanted)} ({option.key}), but has {names}"


def _is_used_outside(_: nn.Module, option: Option, trace: LayerTrace) -> Iterator[str]:
    """Say that an FP8 layer's weight is used where no FP8 can be."""
    if trace.functional and option.is_fp8:
        used = ", ".join(trace.functional)
        yield f"should run {option.key}, but its weight is used outside of its forward ({used})"


def _ran_other(layer: nn.Module, option: Option, trace: LayerTrace) -> Iterator[str]:
    """Say which operations ran in another dtype than the option's."""
    dtype = option_dtype(option)
    wrong = [seen for seen in trace.functional if not _is_dtype(seen, dtype)]
    own: list[tuple[str, tuple[Gemm, ...]]] = [(seen, (Gemm.OUTPUT,)) for seen in trace.forward]
    own += [(seen, _backward_gemms(seen)) for seen in trace.backward]
    may_be_fp32 = _has_own_forward(layer) and not option.is_fp8  # what its author wrote stays
    for seen, gemms in own:
        is_right = any(_fits(seen, gemm, option) for gemm in gemms)
        if not is_right and not (may_be_fp32 and _is_dtype(seen, torch.float32)):
            wrong.append(seen)
    if wrong:
        yield f"should run {option.key}, but ran {', '.join(dict.fromkeys(wrong))}"


def _ran_nothing(_: nn.Module, option: Option, trace: LayerTrace) -> Iterator[str]:
    """Say that an FP8 layer was called and no GEMM of it was seen."""
    if option.is_fp8 and trace.calls and not trace.forward:
        yield f"should run {option.key}, but no GEMM of it was seen"


QUESTIONS: tuple[Callable[[nn.Module, Option, LayerTrace], Iterator[str]], ...] = (
    _stores_other,
    _is_used_outside,
    _ran_other,
    _ran_nothing,
)


def _backward_gemms(seen: str) -> tuple[Gemm, ...]:
    """Return which GEMMs an operation of backward may be, see `_backward_name`."""
    known = tuple(gemm for gemm in Gemm if seen.startswith(gemm))
    return known or (Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT)


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
