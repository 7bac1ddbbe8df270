"""One training step of an applied model -> the operations and dtypes that really ran, per layer.

A dispatch mode sees every ATen operation below autograd, torchao's subclasses taken apart. Each is
given to a layer:

    forward    the layer whose `forward` is running, or else the owner of a parameter among the
               operands: a tied head, or an embedding whose weight is sliced, is used functionally
    backward   autograd numbers its nodes in the order in which forward makes them, so a node whose
               number lies within a layer's forward call belongs to that layer

Only operations with a precision of their own are looked at (GEMMs, those of experts too,
convolutions, fused attention and recurrent kernels, norms, embeddings); the rest follows from the
dtypes of activations. A class with a forward of its own may compute in FP32 from BF16 storage, as
routers of experts do: what its author wrote stays, and the check says so. A layer with matrices in
which none of these ran (a kernel of somebody's own) is not judged. What a parametrization does to
make a weight (an orthogonal one factorizes in FP32) is not the layer's operation and is left out.

Stacked experts that no layer owns are watched as well, in forward.

A layer is looked for under the plan's name, or where what wrapped it later put it: LoRA makes
`q_proj` to `q_proj.base_layer`, `torch.compile` of a block puts `_orig_mod` into the name.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from autoprec.device.random_state import random_state_kept
from autoprec.device.tracing import OperationTracer
from autoprec.errors import PlanMismatchError
from autoprec.model.kinds import is_linear, matrix_sizes
from autoprec.model.layers import (
    comes_from_plan,
    find_layers,
    model_layers,
    own_class,
    unwrapped,
    wide_dims,
)
from autoprec.model.state import kept_state, put_back_state
from autoprec.records import Check, Gemm, Option
from autoprec.runtime.activations import CASTABLE, option_dtype
from autoprec.runtime.classes import keeps_weights
from autoprec.runtime.finite import forget_step
from autoprec.runtime.gathers import ON_LAYER, GatheredInFp8, gathered_dtype
from autoprec.runtime.install import KEEPS_FP32_PARAMETERS
from autoprec.runtime.masters import masters_of
from autoprec.runtime.shards import gathers_of, whole_again
from autoprec.workload.training import LossFn
from autoprec.workload.written import dtype_name

aten = torch.ops.aten
# Position of the first operand; the second is the next.
GEMMS = {aten.mm: 0, aten.addmm: 1, aten.bmm: 0, aten.baddbmm: 1, aten._scaled_mm: 0}
# Of experts, in one tensor of three dimensions; the FP8 ones where this torch has them.
GROUPED = {
    getattr(aten, name): 0
    for name in ("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2")
    if hasattr(aten, name)
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
    **{gemm: (first, first + 1) for gemm, first in (GEMMS | GROUPED).items()},
}
NOT_JUDGED = "not judged: none of the operations whose dtype is looked at ran in it"
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
        kinds = ("forward", "backward", "functional")
        parts = [f"{kind} {', '.join(seen)}" for kind in kinds if (seen := getattr(self, kind))]
        return "; ".join(parts) or "nothing with a precision of its own"


def verify_applied(
    model: nn.Module, batch: Any = None, *, loss_fn: LossFn | None = None
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
        One good check per layer, and per stack of matrices outside of layers, saying what ran;
        `is_judged` is False where that cannot be told.

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
    if wrong:  # all of them in one error: they often have one cause
        listed = "; ".join(f"{check.name!r} {check.detail}" for check in wrong)
        raise PlanMismatchError(
            f"what runs must be what the plan says, but {len(wrong)} of {len(checks)} layers "
            f"differ: {listed}; look for code that casts or replaces these layers"
        )
    return checks


def check_applied(
    model: nn.Module, batch: Any = None, *, loss_fn: LossFn | None = None
) -> tuple[Check, ...]:
    """Return the proof of `verify_applied` as one check per layer, good or not."""
    inner = unwrapped(model)
    options = masters_of(inner).options
    layers = find_layers(inner)
    whole_again(inner)
    gathers = gathers_of(inner)
    has_fp8_gathers = any(ON_LAYER in vars(layer) for layer in layers.values())

    def step() -> Any:
        if loss_fn is not None:
            return loss_fn(inner, batch)
        if isinstance(batch, dict):
            return inner(**batch)
        return inner(*batch) if isinstance(batch, list | tuple) else inner(batch)

    traces = trace_step(inner, step)
    called = {name for name, trace in traces.items() if trace.calls}
    checks = []  # for each layer of the plan the first way in which it differs, if any
    for name, option in options.items():
        found = _present_name(name, layers, called)
        problem = f"should run {option.key}, but is not in the model any more"
        detail, is_judged = "", True
        if found is not None:
            layer, trace = layers[found], traces[found]
            problem = _problem(layer, option, trace, gathers)
            is_judged = _is_judged(layer, trace)
            was_used = trace.calls or trace.functional
            seen = trace if was_used else "not called in this step"
            detail = f"{option.key}: {seen if is_judged else NOT_JUDGED}"
            dtype = gathered_dtype(layer, gathers) if has_fp8_gathers and option.is_fp8 else ""
            detail += f"; weight gathered in {dtype}" if dtype else ""
        check = Check(name=name, is_good=not problem, detail=problem or detail, is_judged=is_judged)
        checks.append(check)
    loose = (_loose_check(name, p, traces[name]) for name, p in _loose_stacks(inner).items())
    return (*checks, *loose)


def trace_step(model: nn.Module, step: Callable[[], Any]) -> dict[str, LayerTrace]:
    """Run `step` and the backward of what it returns; return what ran for each layer of the model.

    Compiled code hides its operations, so `torch.compile` is off inside. Any: what a model returns.
    """
    recorder = _LayerRecorder(find_layers(model), _loose_stacks(model))
    eager, tracer = torch.compiler.set_stance("force_eager"), OperationTracer(recorder.run)
    with eager, _left_as_it_was(model), torch.enable_grad(), recorder.hooked(), tracer:
        torch.autograd.backward(_loss(step()))
    return recorder.traces


def _loose_stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the stacked matrices that no layer owns, such as experts beside their router."""
    loose = model_layers(model).uncovered
    return {name: parameter for name, parameter in loose.items() if wide_dims(parameter) > 2}


def _loose_check(name: str, parameter: nn.Parameter, trace: LayerTrace) -> Check:
    """Return what ran with such a parameter in forward, which must be in its own dtype."""
    own, ran = f" {dtype_name(parameter.dtype)}", trace.functional
    return Check(
        name=name,
        is_good=all(seen.endswith(own) for seen in ran),
        detail=f"outside any layer: {trace if ran else NOT_JUDGED}",
        is_judged=bool(ran),
    )


def _present_name(planned: str, layers: Mapping[str, nn.Module], called: Set[str]) -> str | None:
    """Return the name that a planned layer has now, None if that cannot be told."""
    if planned in layers:
        return planned
    inside = [name for name in layers if name.startswith(f"{planned}.")]
    ours = [name for name in inside if comes_from_plan(type(layers[name]))]
    running = [name for name in ours if name in called] or ours  # PEFT keeps copies of a layer
    return running[0] if len(running) == 1 else None


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
    buffers = kept_state(model)
    model.zero_grad()
    try:
        with random_state_kept():
            yield
    finally:
        forget_step(model)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        put_back_state(model, buffers)


class _LayerRecorder:
    """Gives the operations that run to layers, as the module's docstring says."""

    def __init__(self, layers: Mapping[str, nn.Module], loose: Mapping[str, nn.Parameter]) -> None:
        self.layers = layers
        self.traces = {name: LayerTrace() for name in (*layers, *loose)}
        # In forward, with the first node of each; a parametrization (None) belongs to no layer.
        self.sizes = {n: matrix_sizes(layer) for n, layer in layers.items() if is_linear(layer)}
        self.running: list[tuple[str | None, int]] = []
        self.nodes: list[tuple[int, int, str | None]] = []  # numbers from, to (excluded), layer
        self.owners = {
            parameter.untyped_storage().data_ptr(): name
            for name, layer in reversed(list(layers.items()))
            for parameter in layer.parameters()
            if type(parameter) in (nn.Parameter, GatheredInFp8)
        }
        plain = {name: p for name, p in loose.items() if type(p) is nn.Parameter}
        self.owners |= {p.untyped_storage().data_ptr(): name for name, p in plain.items()}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Note when layers start and end while the context is open."""
        with contextlib.ExitStack() as handles:
            for name, layer in self.layers.items():
                inner = [part for part in layer.modules() if isinstance(part, ParametrizationList)]
                for module, owner in ((layer, name), *((part, None) for part in inner)):
                    start = functools.partial(self._start, owner)
                    handles.enter_context(module.register_forward_pre_hook(start))
                    handles.enter_context(module.register_forward_hook(self._end, always_call=True))
            yield

    def _start(self, name: str | None, *_: object) -> None:
        self.running.append((name, torch._C._autograd._get_sequence_nr()))
        if name is not None:
            self.traces[name].calls += 1

    def _end(self, *_: object) -> None:
        name, first = self.running.pop()
        self.nodes.append((first, torch._C._autograd._get_sequence_nr(), name))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # Any: torch's
        """Run an operation, and note it if it has a precision of its own."""
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in OPERANDS:
            dtypes = dict.fromkeys(args[position].dtype for position in OPERANDS[packet])
            name = packet._qualified_op_name.removeprefix("aten::")
            self._note(f"{name} {'x'.join(map(dtype_name, dtypes))}", packet, args)
        return result

    def _note(self, seen: str, packet: Any, args: tuple[Any, ...]) -> None:
        node = torch._C._current_autograd_node()
        if self.running:  # in a layer's forward: that layer's
            owner, _ = self.running[-1]
            counts = "forward"
        elif node is not None:  # in backward: the layer in whose forward autograd made the node
            number = node._sequence_nr()
            made_in = (name for low, high, name in self.nodes if low <= number < high)
            owner = next(made_in, None) if number <= NO_NODE else None
            counts = "backward"
        else:  # between layers: the layer whose parameter is among the operands
            stored = (x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor))
            owner = next((self.owners[at] for at in stored if at in self.owners), None)
            counts = "functional"
        if owner is not None:
            if counts == "backward":
                seen = _backward_name(seen, packet, args, self.sizes.get(owner))
            getattr(self.traces[owner], counts)[seen] += 1


def _backward_name(
    seen: str, packet: Any, args: tuple[Any, ...], sizes: tuple[int, int] | None
) -> str:
    """Return the name with the GEMM of a linear's backward that it was, by its result's shape."""
    if packet not in GEMMS or sizes is None:
        return seen
    first, second = (args[position] for position in OPERANDS[packet])
    rows, columns = first.shape[-2], second.shape[-1]
    tokens = first.shape[-1]  # the inner dimension of grad_weight, N of grad_input
    N, K = sizes
    if {rows, columns} == {N, K} and tokens not in (N, K):
        return f"{Gemm.GRAD_WEIGHT} {seen}"
    if columns == K and tokens == N and rows not in (N, K):
        return f"{Gemm.GRAD_INPUT} {seen}"
    return seen  # M, N and K are too alike to tell


def _is_judged(layer: nn.Module, trace: LayerTrace) -> bool:
    """Whether what ran in a layer was seen: something must, where it has a matrix and is called."""
    has_matrix = any(wide_dims(parameter) > 1 for parameter in layer.parameters())
    seen = trace.forward or trace.backward or trace.functional
    return bool(seen or not trace.calls or not has_matrix)


def _problem(
    layer: nn.Module,
    option: Option,
    trace: LayerTrace,
    gathers: Mapping[nn.Parameter, torch.dtype],
) -> str:
    """Return the first way in which a layer is not as its option says, or an empty string.

    A layer computes with what FSDP gathers of its parameters, in the dtypes `gathers`.
    """
    keeps_fp32 = isinstance(layer, KEEPS_FP32_PARAMETERS) or keeps_weights(layer)
    stored = torch.float32 if keeps_fp32 else option_dtype(option)
    dtypes = {gathers.get(p, p.dtype) for p in layer.parameters() if p.dtype in CASTABLE}
    others = dtypes - {stored}
    if others:
        names = ", ".join(sorted(map(dtype_name, others)))
        return f"should store {dtype_name(stored)} ({option.key}), but has {names}"
    reason = ""
    wrong = _wrong_operations(layer, option, trace)
    if option.is_fp8 and trace.functional:  # where no FP8 can be
        reason = f"its weight is used outside of its forward ({', '.join(trace.functional)})"
    elif wrong:
        reason = f"ran {', '.join(dict.fromkeys(wrong))}"
    elif option.is_fp8 and trace.calls and not trace.forward:
        reason = "no GEMM of it was seen"
    return reason and f"should run {option.key}, but {reason}"


def _wrong_operations(layer: nn.Module, option: Option, trace: LayerTrace) -> list[str]:
    """Return the operations that ran in another dtype than the option's."""
    plain = f" {dtype_name(option_dtype(option))}"
    wrong = [seen for seen in trace.functional if not seen.endswith(plain)]
    # Which GEMM of the layer each may be: of backward's either where its name cannot tell.
    ran: list[tuple[str, tuple[Gemm, ...]]] = [(seen, (Gemm.OUTPUT,)) for seen in trace.forward]
    for seen in trace.backward:
        known = tuple(gemm for gemm in Gemm if seen.startswith(gemm))
        ran.append((seen, known or (Gemm.GRAD_INPUT, Gemm.GRAD_WEIGHT)))
    # What the author of a class with a forward of its own computes in FP32 stays.
    own: str = own_class(layer).forward.__module__
    has_own_forward = "forward" not in vars(layer) and own.partition(".")[0] != "torch"
    may_be_fp32 = keeps_weights(layer) or (has_own_forward and not option.is_fp8)
    fp32 = " float32" if may_be_fp32 else plain
    for seen, gemms in ran:
        is_fp8, is_plain = "_scaled_mm float8" in seen, seen.endswith((plain, fp32))
        if not any(is_fp8 if gemm in option.fp8_gemms else is_plain for gemm in gemms):
            wrong.append(seen)
    return wrong
