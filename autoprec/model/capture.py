"""One real training step -> ModelSpec: every layer, its shapes, and what precision it can take.

A layer is a module that owns parameters and can take a precision of its own: a leaf module, or one
whose children only make sense inside it (`nn.MultiheadAttention`, a parametrized one). Parameters
that a container holds beside its children (a class token) belong to no layer and are listed as
uncovered.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoprec.device.fp8 import EVERY_RECIPE, Fp8Support, fp8_support
from autoprec.device.random_state import random_state_kept, seed_generators
from autoprec.device.ranks import (
    local_part,
    share,
    sum_over_ranks,
    world_size,
)
from autoprec.device.tf32 import cudnn_allows_tf32, matmul_allows_tf32
from autoprec.errors import CaptureError, WorkloadError
from autoprec.model.context import Context
from autoprec.model.kinds import layer_kind, linear_refusal, matrix_sizes, weight_of
from autoprec.model.layers import (
    ModelLayers,
    master_refusal,
    model_layers,
    type_name,
    wide_dims,
)
from autoprec.model.local_copy import computed_features
from autoprec.model.options import (
    HAS_EXPERTS,
    MULTIPLIED,
    NO_PLAIN_WEIGHT,
    USED_UNCALLED,
    WITHOUT_GRAD,
    layer_options,
    shape_refusal,
)
from autoprec.model.products import Products, products_outside
from autoprec.model.recording import Call
from autoprec.model.roles import attention_heads
from autoprec.model.saved import Saved, saved_for_backward
from autoprec.model.shapes import (
    SCANNED_BATCHES,
    call_inputs,
    joined_over_ranks,
    recorded_shapes,
    scan_shapes,
)
from autoprec.model.state import changed_since, find_moving, signatures
from autoprec.records.devices import DeviceProfile
from autoprec.records.model import (
    AsWritten,
    CallSpec,
    GemmShape,
    LayerKind,
    LayerSpec,
    ModelSpec,
    ParameterSpec,
    TensorSpec,
    fp8_option,
)
from autoprec.workload.functions import (
    Batch,
    UserCode,
    Workload,
    check_batches,
    check_loss,
    take_batches,
    tensors_in,
)
from autoprec.workload.optimizers import name_of, plain_parts, state_tensors, trained_by
from autoprec.workload.training import Training
from autoprec.workload.written import dtype_name

T = TypeVar("T")
log = logging.getLogger(__name__)
Inputs = tuple[TensorSpec, ...]  # of a call
NEEDS_NO_GRADIENT = (
    "the loss must depend on a parameter, but loss_fn's result needs no gradient; "
    "compute it from model(batch) without no_grad or detach"
)


@random_state_kept()
def capture_model(context: Context, *, target: DeviceProfile | None = None) -> ModelSpec:
    """Run one real step of the workload on the device and return what it showed.

    Costs four training steps (two of them show whether the step is deterministic), and a forward
    where parameters are not trained or forward sets attributes. With a `target` the plan is for
    another device: a CPU lists every recipe then, since it emulates them.

    Raises:
        CaptureError: no layer ran.
        WorkloadError: the user's functions break their contract, or the loss is not finite.
    """
    workload, seed, device = context.workload, context.seed, context.device
    check_batches(workload, seed=seed)
    model = workload.build_model(seed=seed).to(device)
    batches = take_batches(workload, seed=seed, count=SCANNED_BATCHES, device=device)
    context.progress("capture", 0, 3)
    before = signatures(model)
    first = run_step(context, model, batches[0])
    if find_moving(workload, model, batches[0], before):
        model = workload.build_model(seed=seed).to(device)
    again = partial(run_step, context, model, batches[0])  # seed and all: changes are the device's
    second, seen = observe_step(again, workload, model, batches)
    context.progress("capture", 2, 3)
    # for the optimizer's state and its hooks; with the draws of the step that was seen
    seed_generators(seed)
    before = signatures(model)
    Training(workload, model, seen.optimizer).step([batches[0]])
    untrained = {name for name, p in model.named_parameters() if not p.requires_grad}
    workload.written.moving |= untrained & changed_since(before, model)  # an average of others
    context.progress("capture", 3, 3)
    return make_spec(
        seen,
        workload,
        support=EVERY_RECIPE if target and device.type == "cpu" else fp8_support(device),
        device=str(device),
        has_randomness=first.used_randomness,
        is_deterministic=not sum_over_ranks([first.fingerprint != second.fingerprint])[0],
        loss=first.loss,
        batch_bytes=sum(p.nbytes for x in tensors_in(batches[0]) for p in plain_parts(x)),
    )


def observe_step(
    run: Callable[[], T], workload: Workload, model: nn.Module, batches: Sequence[Batch]
) -> tuple[T, "ObservedStep"]:
    """Run a step of the first batch that has run before, and forward of those of other shapes.

    Returns:
        The step's result, and what was seen; its optimizer has no state yet.
    """
    layers = model_layers(model)
    result, calls, products, saved = _run_seen(run, model, batches[0], layers)
    mix, scanned = scan_shapes(layers, lambda batch: workload.loss_fn(model, batch), batches)
    every = {name: [*own, *scanned[name]] for name, own in calls.items()}
    mix, tokens = joined_over_ranks(workload, mix, every)
    facts = {
        "mix": mix,
        "product_flops": products.flops,
        "saved_bytes": saved and saved.total,
        "backward_bytes": saved and saved.peak,
    }
    optimizer = workload.build_optimizer(model)
    return result, ObservedStep(model, layers, calls, tokens, optimizer, facts)


def _run_seen(
    run: Callable[[], T],
    model: nn.Module,
    batch: Batch,
    layers: ModelLayers,
    *,
    weighs: bool = True,
) -> tuple[T, dict[str, list[Call]], Products, Saved | None]:
    """Run a step that has run before; return its result, and what was seen of it.

    These are its layers' calls, the products outside of them, and what autograd kept for backward:
    None where it takes no hooks, which `torch.func.grad` and its like refuse.
    """
    try:
        with (
            saved_for_backward(model, batch) if weighs else nullcontext() as saved,
            recorded_shapes(layers) as calls,
            products_outside(layers.modules) as products,
        ):
            return run(), calls, products, saved
    except WorkloadError:  # the user's own would have come before
        if not weighs:
            raise
    return _run_seen(run, model, batch, layers, weighs=False)


def said_written(workload: Workload) -> AsWritten:
    """Return the user's own way to train, by the steps until now; what is undone is logged."""
    seen = workload.written
    autocast = seen.autocast or seen.script_autocast
    found = AsWritten(
        autocast="" if autocast is None else dtype_name(autocast),
        gathered="" if seen.gathered is None else dtype_name(seen.gathered),
        parameters=tuple(sorted(map(dtype_name, seen.dtypes))),
        is_compiled=seen.is_compiled or seen.script_compiles,
        allow_tf32=matmul_allows_tf32(),
        allow_tf32_conv=cudnn_allows_tf32(),
    )
    if found.parameters:
        log.warning(
            "the model is held in %s: numerics are measured with FP32 copies of its weights, which "
            "a plan's masters start from too; the step as written keeps them as they are, and the "
            "branch of the proof that trains so",
            " and ".join(found.parameters),
        )
    if found.autocast:
        log.info("loss_fn's autocast (%s) is left out but of the step as written", found.autocast)
    if found.gathered:
        log.info("FSDP's mp_policy (%s) is left out but of the step as written", found.gathered)
    return found


@dataclass(frozen=True)
class StepResult:
    """One forward and backward: the loss, and a digest of loss and gradients."""

    loss: float
    fingerprint: str
    used_randomness: bool


def run_step(context: Context, model: nn.Module, batch: Batch) -> StepResult:
    """Run forward and backward of one batch with seeded generators; gradients stay on the model."""
    model.zero_grad(set_to_none=True)
    seed_generators(context.seed)
    before = _generator_states()
    loss = context.workload.loss_fn(model, batch)
    after = _generator_states()
    used_randomness = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    value = check_loss(loss, where="in the first step")
    if not loss.requires_grad:
        raise CaptureError(NEEDS_NO_GRADIENT)
    with UserCode("backward, once loss_fn has returned,", "gradients"), context.workload.plainly():
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own stub
    digest = hashlib.sha256(str(value).encode())
    for parameter in model.parameters():
        if parameter.grad is not None:
            own = local_part(parameter.grad.detach())
            own = torch.view_as_real(own) if own.is_complex() else own
            digest.update(own.double().sum().cpu().numpy().tobytes())
    return StepResult(value, digest.hexdigest(), used_randomness)


@dataclass(frozen=True)
class ObservedStep:
    """One training step as it was seen, beside the shapes of other batches and ranks."""

    model: nn.Module
    layers: ModelLayers
    calls: Mapping[str, Sequence[Call]]  # what every layer was called with, by name
    tokens: Mapping[str, list[int]]  # by layer every M, of all batches' and ranks' calls
    optimizer: torch.optim.Optimizer
    facts: Mapping[str, Any]  # Any: fields of the spec
    has_gradients: bool = True  # of this step; else made up, one for each trainable parameter


def make_spec(
    seen: ObservedStep, workload: Workload, *, support: Fp8Support, **facts: Any
) -> ModelSpec:
    """Return the spec of the model of a workload's step.

    `support` are the FP8 recipes that run where the model shall run, `facts` fields of the spec.
    """
    if reason := master_refusal(seen.model):
        raise WorkloadError(reason)
    names: dict[int, str] = {}  # of parameters, where each came first
    multiplied = {seen.model.get_parameter(name) for name in workload.written.multiplied}
    layers = tuple(
        _layer_spec(name, seen, support, names=names, multiplied=multiplied) for name in seen.calls
    )
    if not any(layer.calls for layer in layers):
        raise CaptureError(
            "at least one layer must run in the training step, but none did; layers are modules "
            "that the model holds (in an nn.ModuleList, not a list) and that the step calls, and "
            "functions of their weights are no calls (torchrl's losses)"
        )
    return ModelSpec(
        layers=layers,
        uncovered=tuple(_parameter(n, p, names) for n, p in seen.layers.uncovered.items()),
        uncalled=tuple(layer.name for layer in layers if not layer.calls),
        structure=seen.layers.structure,
        tokens_per_step=max((layer.gemm.M for layer in layers if layer.gemm), default=0),
        optimizer=name_of(seen.optimizer),
        optimizer_state_numel_ratio=_state_ratio(seen.optimizer),
        as_written=said_written(workload),
        moving=tuple(sorted(workload.written.moving)),
        **seen.facts,
        **facts,
    )


def _layer_spec(
    name: str,
    seen: ObservedStep,
    support: Fp8Support,
    *,
    names: dict[int, str],
    multiplied: Collection[nn.Parameter],
) -> LayerSpec:
    layer, calls = seen.layers.modules[name], seen.calls[name]
    kind = layer_kind(layer)
    in_step = [call for call in calls if call.with_grad]
    trained, forward = _counted(calls)
    is_called = bool(in_step) and kind is LayerKind.LINEAR
    tokens, gemm, obstacle = seen.tokens.get(name, []) if is_called else [], None, ""
    if tokens:
        K, N = computed_features(seen.model, layer)
        gemm = GemmShape(M=tokens[-1], K=K, N=N)
        obstacle = _uneven(layer, gemm)
    is_used_uncalled = kind is LayerKind.LINEAR and not calls and _has_gradient(layer, seen)
    obstacle = USED_UNCALLED if is_used_uncalled else obstacle
    obstacle = _obstacle(layer, kind, calls, multiplied) or obstacle
    options, refusals = layer_options(
        kind=kind,
        gemm=gemm,
        tokens=tokens,
        fp8_options=[fp8_option(recipe) for recipe in support.recipes],
        obstacle=obstacle or (linear_refusal(layer) if kind is LayerKind.LINEAR else ""),
        unavailable=support.reason,
    )
    prefix = f"{name}." if name else ""
    spec = LayerSpec(
        name=name,
        kind=kind,
        type_name=type_name(layer),
        settings=layer.extra_repr(),
        parameters=tuple(_parameter(prefix + n, p, names) for n, p in layer.named_parameters()),
        gemm=gemm,
        tokens=tuple(tokens),
        calls=trained,
        forward_calls=forward,
        is_frozen=not any(parameter.requires_grad for parameter in layer.parameters()),
        tied_to=seen.layers.ties.get(name),
        options=options,
        refusals=refusals,
        output_elements=sum(call.output_elements * call.count for call in in_step),
        is_used_uncalled=is_used_uncalled,
        made_by=next((call.made_by for call in in_step if call.made_by), "") if gemm else "",
    )
    return spec.model_copy(update={"heads": attention_heads(seen.model, spec)})


def _obstacle(
    layer: nn.Module, kind: LayerKind, calls: Sequence[Call], multiplied: Collection[nn.Parameter]
) -> str:
    """Return what the step does with a layer that keeps it out of FP8, if it does."""
    if any(parameter in multiplied for parameter in layer.parameters()):
        return MULTIPLIED
    if kind is LayerKind.OTHER and any(wide_dims(p) > 2 for p in layer.parameters()):
        return HAS_EXPERTS
    untrained = kind is LayerKind.LINEAR and calls and not any(call.with_grad for call in calls)
    return next(
        (call.obstacle for call in calls if call.obstacle), WITHOUT_GRAD if untrained else ""
    )


def _uneven(layer: nn.Module, gemm: GemmShape) -> str:
    """Return why FP8 is out where this rank's part of a divided weight alone could take it."""
    N, K = matrix_sizes(layer)
    whole = shape_refusal(K, N)
    fits = not shape_refusal(gemm.K, gemm.N)
    return f"{NO_PLAIN_WEIGHT}divided into unequal parts: {whole}" if whole and fits else ""


def _counted(calls: Sequence[Call]) -> tuple[tuple[CallSpec, ...], tuple[CallSpec, ...]]:
    """Return a step's calls with a backward, and those without, by their inputs.

    Of a call that checkpointing computes again within the backward, one of the two has one.
    """
    first, again, without = Counter[Inputs](), Counter[Inputs](), Counter[Inputs]()
    for call in calls:
        counts = without if not call.with_grad else again if call.in_backward else first
        counts[call_inputs(call)] += call.count
    counted = (first | again), without + (first & again)
    trained, forward = (
        tuple(CallSpec(inputs=inputs, count=count) for inputs, count in counts.items())
        for counts in counted
    )
    return trained, forward


def _has_gradient(layer: nn.Module, seen: ObservedStep) -> bool:
    """Return whether the step gave a linear's weight a gradient that no tied embedding explains.

    An embedding's gradient has a row for each token that was looked up, a head's one for each
    class. Where a batch holds as many tokens as there are classes, nothing can be told.
    """
    weight = weight_of(layer)
    gradient = weight.grad if seen.has_gradients else None
    others = [
        call
        for name, calls in seen.calls.items()
        for call in calls
        if call.with_grad and any(p is weight for p in seen.layers.modules[name].parameters())
    ]
    if gradient is None or not others:
        return gradient is not None
    if gradient.is_meta:
        return False
    looked_up = sum(math.prod(call_inputs(call)[0].shape) * call.count for call in others)
    return int(local_part(gradient).ne(0).any(dim=1).sum()) > looked_up


def _parameter(name: str, parameter: nn.Parameter, names: dict[int, str]) -> ParameterSpec:
    first = names.setdefault(id(parameter), name)
    return ParameterSpec(
        name=name,
        shape=tuple(parameter.shape),
        dtype=dtype_name(parameter.dtype),
        is_trainable=parameter.requires_grad,
        shared_with=None if first == name else first,
        shards=round(share(parameter) * world_size()),
    )


def _state_ratio(optimizer: torch.optim.Optimizer) -> float:
    """Return state elements per parameter element, scalars (step counters) left out."""
    state = sum(x.numel() * _share_of_fp32(x) for x in state_tensors(optimizer) if x.dim() > 0)
    parameters = sum(parameter.numel() for parameter in trained_by(optimizer))
    return float(state / max(parameters, 1))


def _share_of_fp32(tensor: Tensor) -> float:
    """Return the memory of a state over that of as many FP32 elements: less where it is quantised.

    A plain tensor counts as FP32, which it is once a plan stores the parameters in BF16.
    """
    own = local_part(tensor)
    parts = list(plain_parts(own))
    if parts[0] is own:
        return 1.0
    size = sum(part.numel() * part.element_size() for part in parts)
    return size / torch.float32.itemsize / max(own.numel(), 1)


def _generator_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return states
