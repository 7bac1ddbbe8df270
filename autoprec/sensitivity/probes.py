"""The depth-free mode: e of every layer x option from a few sign-coded probes of the weights.

A layer's error Dy at its output changes the gradient g by d = J Dy, with J the derivative of g by
y. Its length is what we want, and for a random sign vector u over all weights E<u, P^(1/2) d>^2 is
d'Pd. The trick is to read the inner product from the other end. Derivatives commute,

    <u, P^(1/2) J Dy> = <J' P^(1/2) u, Dy>       J' s = d/dt (dL/dy) at weights w + t s

so ONE pass at w + t P^(1/2) u, compared with the reference pass, gives v = J' P^(1/2) u at the
output of every layer at once: the change of its output gradient over t. Whatever the number of
layers and options, <v, Dy> is then a product of what is known. An error Dgx in the gradient that a
layer hands down acts through the change of its input in the same pass; grad_weight errors stay
where they are and need no probe. Linears are taken apart further, down to the casts:

    output       <v, Dy>  = <v w, Dx> + <v' x, Dw>        Dy  = Dx w' + x Dw'
    grad_input   <c, Dgx> = <c w', Dg> + <g' c, Dw>       Dgx = Dg w + g Dw,  c the change of input

One probe alone gives each number a chi-square error of 140 %. But each product is a sum over
thousands of rounding errors, so it is split into groups whose errors have nothing to do with each
other, and the groups' squares are added: E sum_k z_k^2 = d'Pd still, with thousands of degrees of
freedom instead of one. Groups must keep together what is coherent: all tokens of one input or
gradient channel (underflow hits them alike), all of one row of the weight. Cross terms between
groups, operands and GEMMs are left out; measured, they scatter around zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from autoprec.common.progress import Progress
from autoprec.model.layers import find_layers
from autoprec.records import BF16_O2, Gemm, LayerSpec, Operand, OperandStatistics, Option
from autoprec.runtime import install_options
from autoprec.sensitivity.local import (
    BF16_GRAD_INPUT,
    BF16_OUTPUT,
    Component,
    GradWeightKey,
    LocalErrors,
    add_fp8_errors,
    bf16_errors,
    parameter_only_errors,
)
from autoprec.sensitivity.operands import Operands
from autoprec.sensitivity.reference import Baseline, Reference, seeded
from autoprec.sensitivity.replay import Call, Replayed, recorded_calls, replay

STEP = 5e-3  # mean |weight change| over median |weight|; moves activations by about 0.2 %
CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


@dataclass
class BatchShow:
    """What one batch showed: probe products per layer and component, and local sums.

    `products` has one list entry per probe, each the vector of the groups' z.
    `parameter_errors` are d'Pd of each layer's own parameters.
    """

    products: dict[tuple[str, Component], list[Tensor]] = field(default_factory=dict)
    parameter_errors: dict[tuple[str, GradWeightKey], float] = field(default_factory=dict)
    statistics: list[OperandStatistics] = field(default_factory=list)
    squared: float = 0.0


def probe_batches(
    reference: Reference,
    layers: Sequence[LayerSpec],
    options: Mapping[str, Sequence[Option]],
    *,
    probes: int,
    progress: Progress,
) -> list[BatchShow]:
    """Probe every batch; costs per batch one pass, two replays and `probes` more passes.

    Args:
        reference: the warmed-up model and its batches.
        layers: those to measure; each must have run.
        options: the FP8 options of each linear that has any, by name.
        probes: passes per batch.
        progress: told after each pass.
    """
    modules = find_layers(reference.model)
    chosen = {layer.name: modules[layer.name] for layer in layers}
    total = len(reference.batches) * (1 + probes)
    shows = []
    for index in range(len(reference.batches)):
        progress("sensitivity: probes", index * (1 + probes), total)
        show = BatchShow()
        reference.kept.pop(index, None)  # run it now, so that the calls are seen
        with recorded_calls(chosen) as calls:
            baseline = reference.baseline(index)
        show.squared = baseline.squared
        errors = _local_errors(reference, chosen, calls, baseline, options, show, index=index)
        _keep_parameter_errors(reference, chosen, baseline, errors, show)
        for probe in range(probes):
            progress("sensitivity: probes", index * (1 + probes) + 1 + probe, total)
            code = (index // 2) * probes + probe
            _run_probe(reference, chosen, calls, baseline, errors, show, index=index, code=code)
        shows.append(show)
    progress("sensitivity: probes", total, total)
    return shows


def _local_errors(
    reference: Reference,
    layers: Mapping[str, nn.Module],
    calls: Mapping[str, list[Call]],
    baseline: Baseline,
    options: Mapping[str, Sequence[Option]],
    show: BatchShow,
    *,
    index: int,
) -> dict[str, LocalErrors]:
    """Replay every layer in FP32 and in BF16, and work out its FP8 errors."""
    reference.passes += 2  # a replay is about a pass
    seed = reference.seed * 104_729 + index
    exact: dict[str, Replayed] = {}
    found: dict[str, LocalErrors] = {}
    called = {name: layer for name, layer in layers.items() if calls[name]}
    for name, layer in layers.items():
        if name not in called:
            gradients = own_gradients(reference, layer, baseline)
            found[name] = parameter_only_errors(layer, gradients)
    with seeded(seed, reference.device):
        for name, layer in called.items():
            exact[name] = replay(layer, calls[name], seed=seed)
        rounded_options = dict.fromkeys(called, BF16_O2)
        with install_options(
            reference.model, rounded_options, activation_dtype=torch.float32, root=False
        ):
            for name, layer in called.items():
                rounded = replay(layer, calls[name], seed=seed)
                found[name] = bf16_errors(exact[name], rounded)
    for name, fp8 in options.items():
        layer = layers[name]
        if fp8 and name in called and isinstance(layer, nn.Linear):
            operands = Operands(layer, calls[name], partial(reference.history.amax, name))
            add_fp8_errors(found[name], layer, operands, exact[name], fp8)
            if index == 0:
                show.statistics.extend(operands.statistics(name, fp8))
    return found


def own_gradients(reference: Reference, layer: nn.Module, baseline: Baseline) -> list[Tensor]:
    """Return a baseline's gradients of a layer's trainable parameters; zeros where not updated."""
    places = {id(parameter): place for place, parameter in reference.measured()}
    return [
        baseline.gradients[places[id(p)]].to(p.device)
        if id(p) in places
        else torch.zeros_like(p, dtype=torch.float32)
        for p in layer.parameters()
        if p.requires_grad
    ]


def _keep_parameter_errors(
    reference: Reference,
    layers: Mapping[str, nn.Module],
    baseline: Baseline,
    errors: Mapping[str, LocalErrors],
    show: BatchShow,
) -> None:
    """Weigh and sum up what stays in the layers' own parameters; the tensors are then let go."""
    places = {id(parameter): place for place, parameter in reference.measured()}
    for name, layer in layers.items():
        trainable = [p for p in layer.parameters() if p.requires_grad]
        for key, parts in errors[name].parameter_errors.items():
            squared = 0.0
            for parameter, part in zip(trainable, parts, strict=True):
                if id(parameter) in places:
                    place = places[id(parameter)]
                    weighted = reference.weigh(parameter, part, baseline.gradients[place])
                    squared += float(weighted.square().sum(dtype=torch.float64))
            show.parameter_errors[name, key] = squared
        errors[name].parameter_errors.clear()


def _run_probe(
    reference: Reference,
    layers: Mapping[str, nn.Module],
    calls: Mapping[str, list[Call]],
    baseline: Baseline,
    errors: Mapping[str, LocalErrors],
    show: BatchShow,
    *,
    index: int,
    code: int,
) -> None:
    """Move the weights along sign code number `code`, run, and take every layer's products."""
    step = _step_size(reference, baseline)
    with recorded_calls(layers) as moved, _moved_weights(reference, baseline, step, code=code):
        reference.run(index)
    for name, layer in layers.items():
        pairs = list(zip(calls[name], moved.pop(name), strict=True))
        if pairs:
            products = _products(layer, pairs, errors[name])
        else:
            changes = _parameter_changes(reference, layer, baseline)
            products = _parameter_products(changes, errors[name].errors[BF16_OUTPUT])
        for component, z in products.items():
            show.products.setdefault((name, component), []).append(z.cpu() / step)


def _step_size(reference: Reference, baseline: Baseline) -> float:
    """Return t such that t P^(1/2) u changes weights by STEP of their usual size.

    The usual size is a tensor's median: a few outlier rows must not make the step of all the others
    so large that nothing is linear any more.
    """
    weight = scale = 0.0
    for place, parameter in reference.measured():
        weight += float(parameter.detach().abs().median()) * parameter.numel()
        ones = torch.ones_like(baseline.gradients[place])
        weighted = reference.weigh(parameter, ones, baseline.gradients[place])
        scale += float(weighted.sum(dtype=torch.float64))
    return STEP * weight / scale


@contextmanager
def _moved_weights(
    reference: Reference, baseline: Baseline, step: float, *, code: int
) -> Iterator[None]:
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for place, parameter in reference.measured():
            saved.append((parameter, parameter.data))
            seed = (reference.seed * 7907 + code) * 1_000_003 + place
            generator = torch.Generator(parameter.device).manual_seed(seed)
            signs = torch.empty(parameter.shape, dtype=torch.int8, device=parameter.device)
            signs.random_(0, 2, generator=generator).mul_(2).sub_(1)
            move = reference.weigh(parameter, signs.float(), baseline.gradients[place])
            parameter.data = parameter.data + step * move
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data


def _products(
    layer: nn.Module, pairs: Sequence[tuple[Call, Call]], errors: LocalErrors
) -> dict[Component, Tensor]:
    """Return z per group for every component of a layer's errors."""
    gradients = [g for call, _ in pairs for g in call.gradients]
    moved_gradients = [g for _, moved in pairs for g in moved.gradients]
    inputs = [x for call, _ in pairs for x in call.inputs]
    moved_inputs = [x for _, moved in pairs for x in moved.inputs]
    v = [_change(g, m) for g, m in zip(gradients, moved_gradients, strict=True)]
    c = [_change(x, m) for x, m in zip(inputs, moved_inputs, strict=True)]
    found = {
        BF16_OUTPUT: _by_channel(layer, v, errors.errors[BF16_OUTPUT]),
        BF16_GRAD_INPUT: _by_channel(layer, c, errors.errors[BF16_GRAD_INPUT]),
    }
    casts = [component for component in errors.errors if component.cast is not None]
    if casts and isinstance(layer, nn.Linear):
        known = _linear_sides(layer, inputs, gradients, v=v, c=c)
        for component in casts:
            found[component] = _linear_product(component, known, errors.errors[component])
    return found


def _parameter_changes(reference: Reference, layer: nn.Module, baseline: Baseline) -> list[Tensor]:
    moved = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for p in layer.parameters()
        if p.requires_grad
    ]
    own = own_gradients(reference, layer, baseline)
    return [m.float() - g for m, g in zip(moved, own, strict=True)]


def _parameter_products(
    changes: Sequence[Tensor], errors: Sequence[Tensor]
) -> dict[Component, Tensor]:
    """Return z per row of each parameter, for a layer whose parameters are used without a call."""
    rows = [
        (c * grad_error).reshape(len(c), -1).sum(1) if c.dim() else (c * grad_error).reshape(1)
        for c, grad_error in zip(changes, errors, strict=True)
    ]
    return {
        BF16_OUTPUT: torch.cat(rows) if rows else torch.zeros(1),
        BF16_GRAD_INPUT: torch.zeros(1),
    }


@dataclass(frozen=True)
class _LinearSides:
    """What the four kinds of a linear's operand errors are multiplied with, per call or summed."""

    by_input: list[Tensor]  # v w      [M, K]
    by_gradient: list[Tensor]  # c w'  [M, N]
    by_weight: Tensor  # v' x          [N, K]
    by_weight_backward: Tensor  # g' c [N, K]


def _linear_sides(
    layer: nn.Linear,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    *,
    v: Sequence[Tensor | None],
    c: Sequence[Tensor | None],
) -> _LinearSides:
    weight_NK = layer.weight.detach()
    x_MK, c_MK = (_rows(tensors, layer.in_features) for tensors in (inputs, c))
    g_MN, v_MN = (_rows(tensors, layer.out_features) for tensors in (gradients, v))
    return _LinearSides(
        by_input=[v @ weight_NK for v in v_MN],  # [M, N] @ [N, K] -> [M, K]
        by_gradient=[c @ weight_NK.t() for c in c_MK],  # [M, K] @ [K, N] -> [M, N]
        by_weight=_summed([v.t() @ x for v, x in zip(v_MN, x_MK, strict=True)]),
        by_weight_backward=_summed([g.t() @ c for g, c in zip(g_MN, c_MK, strict=True)]),
    )


def _rows(tensors: Sequence[Tensor | None], features: int) -> list[Tensor]:
    return [t.reshape(-1, features) for t in tensors if t is not None]


def _change(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    return None if before is None or after is None else (after - before).float()


def _linear_product(component: Component, sides: _LinearSides, errors: list[Tensor]) -> Tensor:
    is_output = component.gemm is Gemm.OUTPUT
    if component.operand is Operand.WEIGHT:
        if is_output:
            return (sides.by_weight * errors[0]).sum(1)  # per output channel
        return (sides.by_weight_backward * errors[0]).sum(0)  # per input channel
    others = sides.by_input if is_output else sides.by_gradient
    return _summed([(a * grad_error).sum(0) for a, grad_error in zip(others, errors, strict=True)])


def _by_channel(
    layer: nn.Module, changes: Sequence[Tensor | None], errors: Sequence[Tensor]
) -> Tensor:
    """Return the products of changes and errors, summed over all but the channels."""
    totals: dict[int, Tensor] = {}
    for change, error in zip(changes, errors, strict=True):
        if change is None or error.shape != change.shape or change.dim() == 0:
            continue
        is_second = isinstance(layer, CHANNELS_SECOND) and change.dim() > 2
        product = (change * error).movedim(1 if is_second else -1, 0)
        part = product.reshape(len(product), -1).sum(1)
        totals[len(part)] = totals[len(part)] + part if len(part) in totals else part
    return torch.cat(list(totals.values())) if totals else torch.zeros(1)


def _summed(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
