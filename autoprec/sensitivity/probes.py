"""The depth-free mode: all layers x options from a few sign-coded probes of the weights.

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
other, and the groups' squares are added: with z_k the product of group k, E sum_k z_k^2 = d'Pd
still, with thousands of degrees of freedom instead of one. Groups must keep together what is
coherent: all tokens of one input or gradient channel (underflow hits them alike), all of one row of
the weight. Cross terms between groups, operands and GEMMs are left out; measured, they scatter
around zero.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from autoprec.model.recording import Call
from autoprec.records import BF16_O2, Gemm, Operand, OperandStatistics, Option
from autoprec.runtime import install_options
from autoprec.sensitivity.casts import Sides
from autoprec.sensitivity.local import (
    BF16_GRAD_INPUT,
    BF16_OUTPUT,
    Cell,
    Component,
    LocalErrors,
    Operands,
    add_fp8_errors,
    bf16_errors,
    fp8_options,
    parameter_only_errors,
)
from autoprec.sensitivity.reference import Reference, ReferenceGradient, gradient_of, seeded
from autoprec.sensitivity.replay import differentiated_calls, floating_inputs, replay

STEP = 5e-3  # mean |weight change| over median |weight|; moves activations by about 0.2 %
CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)

Key = tuple[str, Component]  # a layer's name and one source of its error
SomeTensors = Sequence[Tensor | None]  # None where no gradient came back


@dataclass(frozen=True)
class BatchProbe:
    """What one batch showed of every layer; `squares` and `fourths` are means over its probes."""

    squared_norm: float  # g'Pg of the reference gradient
    probes: int
    squares: dict[Key, float]  # sum_k z_k^2 over the groups: d'Pd
    fourths: dict[Key, float]  # sum_k z_k^4, for the probes' own noise
    parameter_errors: dict[str, dict[Sides, float]]  # d'Pd of what stays in a layer's parameters
    statistics: tuple[OperandStatistics, ...]  # the operands' ranges; of the first batch only


@dataclass(frozen=True)
class _Pass:
    """The reference pass of one batch: what went through the layers, and the gradient."""

    reference: Reference
    index: int
    layers: dict[str, nn.Module]
    calls: dict[str, list[Call]]
    gradient: ReferenceGradient

    def squared_norm(self, errors: Mapping[Tensor, Tensor]) -> float:
        """Return d'Pd of errors by parameter; those that are not updated weigh nothing."""
        norm, gradients = self.reference.preconditioner.squared_norm, self.gradient.of
        return sum(norm(p, d, at=gradients[p]) for p, d in errors.items() if p in gradients)

    def own_gradients(self, layer: nn.Module) -> dict[Tensor, Tensor]:
        """Return the gradients of a layer's trainable parameters; zeros where not updated."""
        return {
            p: self.gradient.of[p].to(p.device)
            if p in self.gradient.of
            else torch.zeros_like(p, dtype=torch.float32)
            for p in layer.parameters()
            if p.requires_grad
        }


def probe_batches(reference: Reference, cells: Sequence[Cell], *, probes: int) -> list[BatchProbe]:
    """Probe every batch; costs per batch one pass, two replays and `probes` more passes.

    All layers of the spec are measured in BF16, and linears in the FP8 options of their `cells`.
    """
    layers = {name: reference.model.get_submodule(name) for name in reference.spec.names}
    progress = reference.context.progress
    total = len(reference.batches) * (1 + probes)
    found = []
    for index in range(len(reference.batches)):
        progress("sensitivity: probes", index * (1 + probes), total)
        # run it now, kept or not, so that the calls are seen
        with differentiated_calls(layers) as calls:
            gradient = reference.run_gradient(index)
        step = _Pass(reference, index, layers, calls, gradient)
        errors, statistics = _local_errors(step, fp8_options(cells))
        products: dict[Key, list[Tensor]] = {}
        for probe in range(probes):
            progress("sensitivity: probes", index * (1 + probes) + 1 + probe, total)
            # the same signs serve two batches in turn
            for key, z in _run_probe(step, errors, code=(index // 2) * probes + probe):
                products.setdefault(key, []).append(z)
        squares, fourths = (
            {
                key: math.fsum(float(z.double().pow(power).sum()) for z in every) / probes
                for key, every in products.items()
            }
            for power in (2, 4)
        )
        staying = {name: local.parameter_errors for name, local in errors.items()}
        norm = gradient.squared_norm
        found.append(BatchProbe(norm, probes, squares, fourths, staying, tuple(statistics)))
    progress("sensitivity: probes", total, total)
    return found


def _local_errors(
    step: _Pass, options: Mapping[str, Sequence[Option]]
) -> tuple[dict[str, LocalErrors], list[OperandStatistics]]:
    """Replay every layer in FP32 and in BF16, and work out its FP8 errors."""
    reference, calls = step.reference, step.calls
    reference.passes += 2  # a replay is about a pass
    seed = reference.context.seed * 104_729 + step.index
    # a layer whose parameters are used without a call (an attention's out_proj) has no replay
    found = {
        name: parameter_only_errors(step.own_gradients(layer), step.squared_norm)
        for name, layer in step.layers.items()
        if not calls[name]
    }
    called = {name: layer for name, layer in step.layers.items() if calls[name]}
    # BF16: what a layer makes of the reference's inputs and output gradients in either precision
    with seeded(seed, reference.context.device):
        exact = {name: replay(layer, calls[name], seed=seed) for name, layer in called.items()}
        bf16 = dict.fromkeys(called, BF16_O2)
        with install_options(reference.model, bf16, activation_dtype=torch.float32, root=False):
            for name, layer in called.items():
                rounded = replay(layer, calls[name], seed=seed)
                found[name] = bf16_errors(exact[name], rounded, step.squared_norm)
    # FP8: the casts' errors, by plain arithmetic on the same inputs and gradients
    statistics: list[OperandStatistics] = []
    for name, fp8 in options.items():
        layer = step.layers[name]
        if name in called and isinstance(layer, nn.Linear):
            operands = Operands(layer, calls[name], reference.history.get(name, {}))
            add_fp8_errors(found[name], operands, fp8, exact[name], step.squared_norm)
            if step.index == 0:
                statistics += operands.statistics(name, fp8)
    return found, statistics


def _run_probe(
    step: _Pass, errors: Mapping[str, LocalErrors], *, code: int
) -> Iterator[tuple[Key, Tensor]]:
    """Move the weights along sign code number `code`, run, and yield every layer's products z."""
    size = _step_size(step)
    with differentiated_calls(step.layers) as moved, _moved_weights(step, size, code=code):
        step.reference.run(step.index)
    for name, layer in step.layers.items():
        pairs = list(zip(step.calls[name], moved.pop(name), strict=True))
        if pairs:
            products = _products(layer, pairs, errors[name])
        else:
            products = _by_row(step.own_gradients(layer), errors[name])
        for component, z in products.items():
            yield (name, component), z.cpu() / size  # changes over t are derivatives


def _step_size(step: _Pass) -> float:
    """Return t such that t P^(1/2) u changes weights by STEP of their usual size.

    The usual size is a tensor's median: a few outlier rows must not make the step of all the others
    so large that nothing is linear any more.
    """
    weight = scale = 0.0
    for parameter, g in step.gradient.of.items():
        weight += float(parameter.detach().abs().median()) * parameter.numel()
        moved = step.reference.preconditioner.apply(parameter, torch.ones_like(g), at=g)
        scale += float(moved.sum(dtype=torch.float64))
    return STEP * weight / scale


@contextmanager
def _moved_weights(step: _Pass, size: float, *, code: int) -> Iterator[None]:
    """Add t P^(1/2) u to the weights inside; u is drawn anew from the code and the place."""
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for place, parameter in enumerate(step.reference.model.parameters()):
            if (at := step.gradient.of.get(parameter)) is None:
                continue
            saved.append((parameter, parameter.data))
            seed = (step.reference.context.seed * 7907 + code) * 1_000_003 + place
            generator = torch.Generator(parameter.device).manual_seed(seed)
            signs = torch.empty(parameter.shape, dtype=torch.int8, device=parameter.device)
            signs.random_(0, 2, generator=generator).mul_(2).sub_(1)
            move = step.reference.preconditioner.apply(parameter, signs.float(), at=at)
            parameter.data = parameter.data + size * move
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data


def _products(
    layer: nn.Module, pairs: Sequence[tuple[Call, Call]], local: LocalErrors
) -> dict[Component, Tensor]:
    """Return z per group for every component of a layer's errors, from calls before and after."""
    errors = local.errors
    gradients = [g for call, _ in pairs for g in call.gradients]
    inputs = [x for call, _ in pairs for x in floating_inputs(call)]
    # v: the change of the output gradient; c: the change of the input
    v = _changes(gradients, [g for _, moved in pairs for g in moved.gradients])
    c = _changes(inputs, [x for _, moved in pairs for x in floating_inputs(moved)])
    # any layer in BF16: <v, Dy> and <c, Dgx>
    found = {
        BF16_OUTPUT: _by_channel(layer, v, errors[BF16_OUTPUT]),
        BF16_GRAD_INPUT: _by_channel(layer, c, errors[BF16_GRAD_INPUT]),
    }
    casts = [component for component in errors if component.cast is not None]
    if not casts or not isinstance(layer, nn.Linear):
        return found
    # a linear in FP8: the factor of each operand's error, per call; of the weight's, over all calls
    weight_NK = layer.weight.detach()
    x_MK, c_MK = (_rows(tensors, layer.in_features) for tensors in (inputs, c))
    g_MN, v_MN = (_rows(tensors, layer.out_features) for tensors in (gradients, v))
    factors: dict[tuple[Gemm, Operand | None], list[Tensor]] = {
        (Gemm.OUTPUT, Operand.INPUT): [v @ weight_NK for v in v_MN],  # [M, N] @ [N, K] -> [M, K]
        (Gemm.GRAD_INPUT, Operand.GRAD_OUTPUT): [c @ weight_NK.t() for c in c_MK],  # -> [M, N]
        (Gemm.OUTPUT, Operand.WEIGHT): [  # v' x: [N, M] @ [M, K] -> [N, K]
            reduce(torch.add, [v.t() @ x for v, x in zip(v_MN, x_MK, strict=True)])
        ],
        (Gemm.GRAD_INPUT, Operand.WEIGHT): [  # g' c: [N, M] @ [M, K] -> [N, K]
            reduce(torch.add, [g.t() @ c for g, c in zip(g_MN, c_MK, strict=True)])
        ],
    }
    # its four products, each summed over tokens or a row of the weight
    for component in casts:
        key = (component.gemm, component.operand)
        dim = 1 if key == (Gemm.OUTPUT, Operand.WEIGHT) else 0
        pairs_of_calls = zip(factors[key], errors[component], strict=True)
        found[component] = reduce(torch.add, [(a * b).sum(dim) for a, b in pairs_of_calls])
    return found


def _by_row(gradients: Mapping[Tensor, Tensor], local: LocalErrors) -> dict[Component, Tensor]:
    """Return z per row of each parameter, for a layer whose parameters are used without a call."""
    rows = []
    for (parameter, g), error in zip(gradients.items(), local.errors[BF16_OUTPUT], strict=True):
        product = (gradient_of(parameter) - g) * error
        rows.append(product.reshape(len(g), -1).sum(1) if g.dim() else product.reshape(1))
    z = torch.cat(rows) if rows else torch.zeros(1)
    return {BF16_OUTPUT: z, BF16_GRAD_INPUT: torch.zeros(1)}


def _rows(tensors: SomeTensors, features: int) -> list[Tensor]:
    return [t.reshape(-1, features) for t in tensors if t is not None]


def _changes(before: SomeTensors, after: SomeTensors) -> list[Tensor | None]:
    return [
        None if a is None or b is None else (b - a).float()
        for a, b in zip(before, after, strict=True)
    ]


def _by_channel(layer: nn.Module, changes: SomeTensors, errors: Sequence[Tensor]) -> Tensor:
    """Return the products of changes and errors, summed over all but the channels."""
    totals: dict[int, Tensor] = {}
    for change, error in zip(changes, errors, strict=True):
        if change is None or error.shape != change.shape or change.dim() == 0:
            continue
        is_second = isinstance(layer, CHANNELS_SECOND) and change.dim() > 2
        product = (change * error).movedim(1 if is_second else -1, 0)
        part = product.reshape(len(product), -1).sum(1)
        totals[len(part)] = totals.get(len(part), 0.0) + part
    return torch.cat(list(totals.values())) if totals else torch.zeros(1)
