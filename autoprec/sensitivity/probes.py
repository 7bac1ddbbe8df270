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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor, nn

from autoprec.common.text import short_digest
from autoprec.device.random_state import seeded
from autoprec.device.ranks import (
    check_same,
    local_part,
    mean_over_ranks,
    sum_over_ranks,
    whole,
    whole_like,
    world_size,
)
from autoprec.device.tf32 import tf32_off
from autoprec.model.kinds import is_linear, linear_refusal
from autoprec.model.layers import layer_named
from autoprec.model.local_copy import WHOLE, Split, is_divided, local_copy
from autoprec.model.memory import chunk_elements, layer_groups
from autoprec.model.recording import Call
from autoprec.records import Gemm, OperandStatistics, Option
from autoprec.sensitivity.casts import Sides, round_bf16
from autoprec.sensitivity.choices import Choices, recorded_choices
from autoprec.sensitivity.kinks import Key, TwoSteps
from autoprec.sensitivity.linear import SPREADING, Linear
from autoprec.sensitivity.local import (
    BF16_GRAD_INPUT,
    BF16_OUTPUT,
    Cell,
    Component,
    Norm,
    by_channel,
    components_of,
    fp8_options,
    replayed_errors,
)
from autoprec.sensitivity.moves import (
    FINER,
    Moved,
    Pass,
    run_freely,
    run_from_choices,
    run_moved,
)
from autoprec.sensitivity.parked import back, floating_shapes
from autoprec.sensitivity.reach import recorded_reach
from autoprec.sensitivity.reference import Reference, ReferenceGradient, gradient_of
from autoprec.sensitivity.replay import (
    OtherwiseAloneError,
    Watched,
    differentiated_calls,
    floating_inputs,
)

BF16_PARTS = (BF16_OUTPUT, BF16_GRAD_INPUT)

SomeTensors = Sequence[Tensor | None]  # None where no gradient came back


@dataclass
class BatchProbe:
    """What one batch showed of every layer; `squares` and `fourths` are means over its probes."""

    squared_norm: float  # g'Pg of the reference gradient
    probes: int
    # sum_k z_k^2 over the groups: d'Pd
    squares: dict[Key, float] = field(default_factory=dict)
    # sum_k z_k^4, for the probes' own noise
    fourths: dict[Key, float] = field(default_factory=dict)
    # d'Pd of what stays in a layer's parameters
    parameter_errors: dict[str, dict[Sides, float]] = field(default_factory=dict)
    # the operands' ranges; of the first batch only
    statistics: list[OperandStatistics] = field(default_factory=list)
    # layers that act on the loss otherwise than by what is seen here, too (see replay.Watched), or
    # whose calls' shapes changed with the weights
    unseen: set[str] = field(default_factory=set)
    # the first probe at two steps; of the first batch only
    steps: TwoSteps | None = None
    # what other choices than the reference's add to |P^(1/2) D|^2, of every probe
    jumps: list[float] = field(default_factory=list)

    def add(self, key: Key, z: Tensor) -> None:
        """Add the products of one probe."""
        squares = z.double().square()
        self.squares[key] = self.squares.get(key, 0.0) + _square(z) / self.probes
        fourth = float(squares.square().sum()) / self.probes
        self.fourths[key] = self.fourths.get(key, 0.0) + fourth


def probe_batches(reference: Reference, cells: Sequence[Cell], *, probes: int) -> list[BatchProbe]:
    """Probe every batch; costs per batch and group of layers one pass and `probes` more.

    The first batch is run once more at a finer step, and probed there where that shows kinks; of a
    model with choices every probe is run once more, with choices of its own.

    All layers of the spec are measured in BF16, and linears in the FP8 options of their `cells`.
    What goes through the layers of one group is held at a time, in two passes.
    """
    named, progress = _grouped_layers(reference), reference.context.progress
    options = fp8_options(cells)
    total, found = len(reference.batches) * len(named), []
    for index in range(len(reference.batches)):
        probed = BatchProbe(0.0, probes)
        for place, layers in enumerate(named):
            progress("sensitivity: probes", index * len(named) + place, total)
            _probe_group(reference, index, layers, options, probed)
        found.append(probed)
        reference.passes += 2 * probes  # two replays of every layer: about two passes
    progress("sensitivity: probes", total, total)
    jumps = [jump for probed in found for jump in probed.jumps]
    if found[0].steps is not None and jumps:  # few choices change in any one of them
        mean = max(math.fsum(jumps) / len(jumps), 0.0)
        found[0].steps = replace(found[0].steps, jumps=mean)
    return found


def _probe_group(
    reference: Reference,
    index: int,
    layers: dict[str, nn.Module],
    options: Mapping[str, Sequence[Option]],
    probed: BatchProbe,
) -> None:
    """Add to what a batch showed what it shows of some layers; nothing recorded outlives this."""
    watched = {name: layer_named(reference.model, name) for name in reference.spec.names}
    batch, chunk = reference.batches[index], chunk_elements(reference.spec)
    recording = differentiated_calls(layers, is_parked=reference.is_parked)
    told = {} if reference.reach.makers else watched  # once of a run
    with recording as found, recorded_choices(watched) as choices, recorded_reach(told) as reach:
        gradient = _reference_pass(reference, index, found)
    reference.reach = reach if told else reference.reach
    probed.squared_norm = gradient.squared_norm
    probed.unseen |= found.unseen | choices.constant
    step = Pass(reference, index, layers, found.calls, choices, gradient, chunk, batch)
    is_chosen = bool(choices.indices) and not probed.squares  # once, with the first group
    for probe in range(probed.probes):
        # signs of its own for each batch: what one code exaggerates, it does in all rows at once
        code = index * probed.probes + probe
        is_first = probe == index == 0
        moved = run_moved(step, code=code, are_changes=is_first or is_chosen)
        products = _products_of(step, moved, options, probed, is_first=probe == 0)
        for key, z in products.items():
            probed.add(key, z)
        if is_first:
            probed.steps = _at_two_steps(step, options, probed, moved, products, code=code)
        if is_chosen:
            probed.jumps.append(math.fsum(run_freely(step, code=code)) - math.fsum(moved.changes))
    # one reduction for all layers and options
    own = {name: probed.parameter_errors[name] for name in layers}
    summed = iter(sum_over_ranks([value for errors in own.values() for value in errors.values()]))
    for name, errors in own.items():
        probed.parameter_errors[name] = {sides: next(summed) for sides in errors}


def _at_two_steps(
    step: Pass,
    options: Mapping[str, Sequence[Option]],
    probed: BatchProbe,
    moved: Moved,
    products: Mapping[Key, Tensor],
    *,
    code: int,
) -> TwoSteps:
    """Return what these layers showed at two steps, beside those before; pass again where needed.

    The first group tells whether there are kinks or choices at all.
    """
    found = probed.steps
    own = {key: (_square(z), _square(z)) for key, z in products.items()}
    if found is None or found.are_kinked:
        finer = run_moved(step, code=code, are_changes=True, times=FINER)
        if found is None:
            missed, are_followed = min(moved.missed, finer.missed), step.choices.followed > 0
            related = step.reference.reach.related(step.reference.model, step.reference.spec.names)
            changes = moved.beside(finer)
            found = TwoSteps(FINER, {}, changes, related, are_followed=are_followed, missed=missed)
            if step.choices.indices:
                found = replace(found, choices=step.choices.behind(moved.at_choices))
        if found.are_kinked:
            fine = _products_of(step, finer, options, probed, is_first=False)
            own |= {key: (_square(z), _square(products[key])) for key, z in fine.items()}
            step.reference.passes += 1  # the outputs' products take about as long
    if moved.at_choices and (signs := run_from_choices(step, moved, code=code)):
        reached = _products_of(step, signs, options, probed, is_first=False)
        found.reached.update((key, _square(z)) for key, z in reached.items())
        step.reference.passes += 1
    found.products.update(own)
    return found


def operand_statistics(
    reference: Reference, cells: Sequence[Cell]
) -> tuple[list[OperandStatistics], dict[tuple[str, Sides], float]]:
    """Run the first batch and return the statistics of every linear with an FP8 option.

    And its gradient error that stays in its own parameters, by the casts of grad_weight.
    """
    options, chunk = fp8_options(cells), chunk_elements(reference.spec)
    found: list[OperandStatistics] = []
    staying: dict[tuple[str, Sides], float] = {}
    for layers in _grouped_layers(reference):
        linears: dict[str, nn.Module] = {
            n: m for n, m in layers.items() if n in options and is_linear(m)
        }
        if not linears:
            continue
        with differentiated_calls(linears, is_parked=reference.is_parked) as watched:
            gradient = _reference_pass(reference, 0, watched)
        batch = reference.batches[0]
        step = Pass(reference, 0, linears, watched.calls, Choices(), gradient, chunk, batch)
        for name, linear in linears.items():
            if calls := [back(call) for call in watched.calls[name]]:
                run, split = _run_alone(reference, linear)
                if is_linear(run):
                    seen = Linear(run, calls, options[name], split=split, chunk=chunk)
                    found += seen.statistics(name)
                    with tf32_off():
                        errors = seen.parameter_errors(step.squared_norm(linear, run))
                    scale = gradient.squared_norm
                    staying |= {(name, casts): e / scale for casts, e in errors.items()}
    summed = sum_over_ranks([*staying.values()])
    return found, dict(zip(staying, summed, strict=True))


def _run_alone(
    reference: Reference, layer: nn.Module, *, called: bool = True
) -> tuple[nn.Module, Split]:
    """Return a layer, or its copy where ranks hold parts of it; a linear's is of this rank's part.

    What FSDP gathers is whole in a copy, of one layer at a time; others run on DTensors.
    """
    if not is_divided(layer):
        return layer, WHOLE
    is_plain = called and not linear_refusal(layer)
    return local_copy(reference.model, layer, placed=not is_plain)


def _grouped_layers(reference: Reference) -> list[dict[str, nn.Module]]:
    """Return the layers by name, in the groups whose tensors are held at a time."""
    return [
        {name: layer_named(reference.model, name) for name in names}
        for names in layer_groups(reference.spec, reference.groups)
    ]


def _reference_pass(reference: Reference, index: int, watched: Watched) -> ReferenceGradient:
    """Run the reference on a batch, so that its calls are seen; return its gradient."""
    if index not in reference.gradients:
        return reference.run_gradient(index, watched.begin_backward)
    reference.run(index, keep=(), begin_backward=watched.begin_backward)
    return reference.gradients[index]


def _products_of(
    step: Pass,
    moved: Moved,
    options: Mapping[str, Sequence[Option]],
    probed: BatchProbe,
    *,
    is_first: bool,
) -> dict[Key, Tensor]:
    """Return every layer's products z with what moving the weights changed.

    What stays in a layer's parameters, and the operands' ranges, come with a batch's first probe.
    A finer step shows the outputs' products only.
    """
    reference, seed = step.reference, step.reference.context.seed * 104_729 + step.index
    found: dict[Key, Tensor] = {}
    with seeded(seed), tf32_off():
        for name in step.layers:  # what is made of one layer is gone before the next comes back
            fp8 = options.get(name, ())
            products = _products_of_layer(
                step, name, moved, fp8, probed, is_first=is_first, seed=seed
            )
            for component, z in products.items():
                # changes over t are derivatives
                found[name, component] = whole(z).cpu() / moved.size
    reference.model.zero_grad(set_to_none=True)
    return _mean_products(found)


def _products_of_layer(
    step: Pass,
    name: str,
    moved: Moved,
    fp8: Sequence[Option],
    probed: BatchProbe,
    *,
    is_first: bool,
    seed: int,
) -> dict[Component, Tensor]:
    """Return one layer's products by component, each t times too large."""
    gemms = (Gemm.OUTPUT,) if moved.only_outputs else SPREADING
    layer, calls, after = step.layers[name], step.calls[name], moved.calls.pop(name)
    if not _are_alike(calls, after):
        probed.unseen.add(name)
        after = calls
    run, split = _run_alone(step.reference, layer, called=bool(calls))
    norm = step.squared_norm(layer, run)
    if not calls:
        products, errors = _uncalled_products(step, layer, run, norm)
        # called all the same (a pooler that no loss reads): its casts reach nothing
        casts = [components_of(option)[gemm] for option in fp8 for gemm in gemms]
        products = dict.fromkeys(chain.from_iterable(casts), torch.zeros(1)) | products
    elif not linear_refusal(run):
        x_and_g, probed_too = [back(call) for call in calls], [back(call) for call in after]
        linear = Linear(run, x_and_g, fp8, moved=probed_too, split=split, chunk=step.chunk)
        products = linear.products(gemms)
        errors = linear.parameter_errors(norm) if is_first else {}
        if is_first and step.index == 0 and fp8:
            probed.statistics += linear.statistics(name)
    else:
        try:
            if step.reference.spec.writes_into(name):  # alone, it would go on from its last state
                raise OtherwiseAloneError
            own, staying = replayed_errors(run, [back(call) for call in calls], norm, seed=seed)
            products, errors = _products(run, calls, after, own), {(): staying}
        except OtherwiseAloneError:
            probed.unseen.add(name)
            errors, products = {(): 0.0}, dict.fromkeys(BF16_PARTS, torch.zeros(1))
    if is_first:
        probed.parameter_errors[name] = errors
    return products


def _mean_products(products: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """Return the products' means over ranks, as gradients are averaged: one reduction for all.

    Raises:
        DeviceError: the ranks ran different layers.
    """
    if world_size() == 1 or not products:
        return products
    sizes = [z.numel() for z in products.values()]
    names = [name for name, _ in products]
    check_same("layers in one step", short_digest(names, sizes))
    parts = mean_over_ranks(torch.cat([z.double().flatten() for z in products.values()]))
    return dict(zip(products, torch.split(parts, sizes), strict=True))


def _are_alike(calls: Sequence[Call], moved: Sequence[Call]) -> bool:
    """Whether a layer was called on the same shapes in both passes, so that rows can be compared.

    They differ where it depends on values, in another way than by a choice that is kept.
    """
    before, after = (
        [floating_shapes((call.args, call.kwargs)) for call in found] for found in (calls, moved)
    )
    return before == after


def _square(z: Tensor) -> float:
    return float(z.double().square().sum())


def _uncalled_products(
    step: Pass, layer: nn.Module, run: nn.Module, norm: Norm
) -> tuple[dict[Component, Tensor], dict[Sides, float]]:
    """Return z and d'Pd of a layer whose parameters are used without calling it."""
    pairs = list(zip(run.parameters(), layer.parameters(), strict=True))
    trained = [(own, p) for own, p in pairs if p.requires_grad and p.is_floating_point()]
    gradients: dict[Tensor, Tensor] = {}
    rows = []  # z of each row of each parameter
    for own, p in trained:
        g = step.gradient.of.get(p)
        before = torch.zeros_like(local_part(p.detach())) if g is None else g.to(p.device)
        gradients[own] = whole_like(p, before.float())  # zeros where it is not updated
        product = whole_like(p, gradient_of(p)) - gradients[own]
        product = product * whole(round_bf16(own.detach()) - own.detach())
        rows.append(product.flatten(1).sum(1) if product.dim() > 1 else product.reshape(-1))
    rounding = norm({p: round_bf16(g) - g for p, g in gradients.items()})
    z = torch.cat(rows) if rows else torch.zeros(1)
    return {BF16_OUTPUT: z, BF16_GRAD_INPUT: torch.zeros(1)}, {(): rounding}


def _products(
    layer: nn.Module,
    calls: Sequence[Call],
    after: Sequence[Call],
    errors: dict[Component, list[Tensor]],
) -> dict[Component, Tensor]:
    """Return z per group for a layer's errors in BF16, from calls before and after."""

    def products(component: Component, taken: Callable[[Call], SomeTensors]) -> Tensor:
        changes = (  # by the probe, of one call at a time
            None if a is None or b is None else (b - a).float()
            for call, moved in zip(calls, after, strict=True)
            for a, b in zip(taken(call), taken(moved), strict=True)
        )
        return by_channel(layer, changes, errors.pop(component))

    return {
        BF16_OUTPUT: products(BF16_OUTPUT, _gradients),  # <v, Dy>
        BF16_GRAD_INPUT: products(BF16_GRAD_INPUT, _inputs),  # <c, Dgx>
    }


def _gradients(call: Call) -> SomeTensors:
    """Return a call's output gradients on the device, and nothing else."""
    return back(replace(call, args=(), kwargs={})).gradients


def _inputs(call: Call) -> SomeTensors:
    """Return a call's floating inputs on the device, and nothing else."""
    return floating_inputs(back(replace(call, gradients=[])))
