"""A pass with the weights moved by t P^(1/2) u, and what that changed.

See probes.py for why, and kinks.py for the two steps t. The loss tells whether probes may be
believed: derivatives commute for the gradient of one function only. By the trapezoid rule

    L(w + s) - L(w) = <s, g(w) + g(w + s)> / 2 + O(t^3)        s = t P^(1/2) u

and where it does not hold, g is no gradient of L: a detached value, a hook, a straight-through
estimator, a backward of somebody's own.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from autoprec.device.ranks import (
    local_part,
    mean_over_ranks,
    part_like,
    sum_over_ranks,
    whole,
    world_size,
)
from autoprec.model.recording import Call
from autoprec.runtime.shards import whole_again
from autoprec.sensitivity.choices import Choice, Choices, kept_choices
from autoprec.sensitivity.hooks import after_hooks, direction_after_hooks, has_hooks
from autoprec.sensitivity.local import Norm
from autoprec.sensitivity.parked import InTurn
from autoprec.sensitivity.preconditioner import at_least_1d
from autoprec.sensitivity.real import real_view
from autoprec.sensitivity.reference import Reference, ReferenceGradient, gradient_of
from autoprec.sensitivity.replay import differentiated_calls
from autoprec.workload.functions import Batch

# Mean |weight change| over median |weight|. It moves activations by about 2 %, as much as FP8 does;
# a step FINER times smaller tells what kinks add.
STEP, FINER = 4e-2, 4.0
NOISE = 4 * torch.finfo(torch.float32).eps  # of a loss

Along = Callable[..., list[float]]


@dataclass(frozen=True)
class Pass:
    """The reference pass of one batch: what went through some layers, and the gradient."""

    reference: Reference
    index: int
    layers: dict[str, nn.Module]
    calls: dict[str, list[Call]]  # where they are parked, `back` brings them back
    choices: Choices
    gradient: ReferenceGradient
    chunk: int  # elements that a linear takes at a time
    batch: Batch  # held: what layers are called with may be of it, in every pass the same

    def squared_norm(self, layer: nn.Module, run: nn.Module) -> Norm:
        """Return the norm of a layer's errors, by the parameters of the module that was run for it.

        It is d'Pd with d their mean over ranks, and of it this rank's share. What is not updated
        weighs nothing.
        """
        owners: dict[Tensor, Tensor] = dict(zip(run.parameters(), layer.parameters(), strict=True))
        weigh, gradients = self.reference.preconditioner.squared_norm, self.gradient.of

        def norm(errors: Mapping[Tensor, Tensor]) -> float:
            updated = ((owners[p], d) for p, d in errors.items() if owners[p] in gradients)
            # the error as the optimizer sees it: after the parameter's own hooks
            return sum(
                weigh(p, after_hooks(p, part_like(p, mean_over_ranks(whole(d))), at=g), at=g)
                for p, d in updated
                for g in (gradients[p],)
            )

        return norm

    def uncalled(self) -> set[Tensor]:
        """Return the parameters of layers that are used uncalled (an attention's out_proj)."""
        layers = (layer for name, layer in self.layers.items() if not self.calls[name])
        return {parameter for layer in layers for parameter in layer.parameters()}


@dataclass(frozen=True)
class Moved:
    """What one moved pass showed.

    `calls` is what went through some layers, `size` is t, and `changes` has |P^(1/2) D|^2 with D
    the change of the gradient, by parameter in the order of the model's; zeros if not asked for.
    `missed` is the part of the loss's change, of those that are usual, that gradients do not tell.
    `at_choices` is, by place, the squared change of what choices compare, of those that it moved;
    infinite where no gradient comes back to that. With `only_outputs` it tells of errors of outputs
    alone.
    """

    calls: dict[str, list[Call]]
    size: float
    changes: list[float]
    missed: float
    at_choices: dict[int, float]
    only_outputs: bool

    def beside(self, finer: "Moved") -> list[tuple[float, float]]:
        """Return the changes over t^2 at both steps, (finer, own), times the own step's t^2."""
        scale = (self.size / finer.size) ** 2
        return [(f * scale, own) for f, own in zip(finer.changes, self.changes, strict=True)]


def run_moved(step: Pass, *, code: int, are_changes: bool, times: float = 1.0) -> Moved:
    """Run a batch with the weights moved along the signs of a code, at a step so much finer."""
    size = _step_size(step) / times
    at_choices = dict.fromkeys(step.choices.compared, 0.0)

    def compare(place: int, choice: Choice) -> None:
        # -inf where a mask forbids a choice
        change = (choice.x.detach() - step.choices.compared[place]).nan_to_num_(0.0)
        square = float(choice.less_mean(change).square().sum())
        at_choices[place] = square if square == 0.0 or choice.x.requires_grad else math.inf

    with (
        differentiated_calls(step.layers, is_parked=step.reference.is_parked) as watched,
        _moved_weights(step, size, code=code) as along,
        kept_choices(step.choices, compare),
    ):
        gradients = step.gradient.of if are_changes else {}
        changes, ends = _run(step, step.uncalled(), gradients, along, watched.begin_backward)
    missed = _missed(ends, usual=size * math.sqrt(step.gradient.squared_norm))
    squares = sum_over_ranks([*at_choices.values()]) if at_choices else []
    at_choices = {place: s for place, s in zip(at_choices, squares, strict=True) if s > 0.0}
    return Moved(watched.calls, size, changes, missed, at_choices, only_outputs=times != 1.0)


def run_from_choices(step: Pass, moved: Moved, *, code: int) -> Moved | None:
    """Run a batch with gradients of random signs s, beside the loss's, at what K choices compare.

    They change the gradient at a layer's output y by J' s, with J the derivative by y of what is
    compared, in parts of how far `moved` moved that. So <J' s, Dy>^2 is, in the mean over s, how
    far an error Dy moves choices beside that pass: the mean of squares over choices. None where no
    gradient comes back to what some choice compares.
    """
    if not all(map(math.isfinite, moved.at_choices.values())):
        return None
    data_ranks = step.reference.context.workload.part.ranks  # products are means over their batches
    each = data_ranks * world_size() / len(moved.at_choices)
    scales = {place: math.sqrt(each / square) for place, square in moved.at_choices.items()}
    generator = torch.Generator().manual_seed(step.reference.context.seed * 7907 + code)
    also: list[tuple[GradientEdge, Tensor]] = []

    def see(place: int, choice: Choice) -> None:
        if place in scales:
            x = choice.x
            signs = torch.empty(x.shape, dtype=torch.int8).random_(0, 2, generator=generator)
            signs = choice.less_mean(signs.to(x.device, torch.float32).mul_(2.0).sub_(1.0))
            also.append((get_gradient_edge(x), signs.mul_(scales[place]).to(x.dtype)))

    with (
        differentiated_calls(step.layers, is_parked=step.reference.is_parked) as watched,
        kept_choices(step.choices, see),
    ):
        step.reference.run(
            step.index, keep=step.uncalled(), begin_backward=watched.begin_backward, also=also
        )
    return Moved(watched.calls, 1.0, [], 0.0, {}, only_outputs=True)


def run_freely(step: Pass, *, code: int) -> list[float]:
    """Run a batch as `run_moved` does, with choices of its own; return `changes`."""
    with _moved_weights(step, _step_size(step), code=code):
        return _run(step, (), step.gradient.of)[0]


def _run(
    step: Pass,
    keep: Collection[Tensor],
    gradients: Mapping[Tensor, Tensor],
    along: Along = lambda *_: [0.0, 0.0],
    begin_backward: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Run the model as it stands; return |P^(1/2) D|^2 by parameter, D the change of gradients.

    And the slopes along the move and the losses, before it and after it. The gradients of `keep`
    stay on the model.
    """
    reference = step.reference
    weigh, found = reference.preconditioner.squared_norm, dict[Tensor, float]()
    slopes = [0.0, 0.0]

    def see(parameter: Tensor) -> None:
        if (at := gradients.get(parameter)) is not None:
            now = gradient_of(parameter)
            found[parameter] = weigh(parameter, now, at=at, less=at)
            slopes[:] = map(sum, zip(slopes, along(parameter, at, now), strict=True))

    # one process takes each gradient as it arrives; of several, their mean comes at the end
    keep = {*keep, *(reference.in_parts if world_size() == 1 else gradients)}
    loss = reference.run(step.index, keep=keep, see=see, begin_backward=begin_backward)
    for parameter in reference.model.parameters():  # in one order on all ranks, which a set has not
        if parameter in keep:
            see(parameter)
    own = [found.get(p, 0.0) for p in reference.model.parameters()]
    losses = [each / world_size() for each in (step.gradient.loss, float(loss.detach()))]
    found_by_all = sum_over_ranks([*own, *slopes, *losses])
    return found_by_all[:-4], found_by_all[-4:]


def _missed(ends: Sequence[float], usual: float) -> float:
    """Return what the slopes at both ends do not tell of a loss's change, in parts of a usual one.

    `ends` are slopes and losses, before and after.
    """
    before, after, *losses = ends
    missed = abs(losses[1] - losses[0] - (before + after) / 2)
    return max(missed - NOISE * abs(losses[0]), 0.0) / (abs(before) + abs(after) + usual)


def _step_size(step: Pass) -> float:
    """Return t such that t P^(1/2) u changes weights by STEP of their usual size.

    The usual size is a tensor's median: a few outlier rows must not make the step of all the others
    so large that nothing is linear any more. Of a pruned one it is that of what is left.
    """
    weight = scale = 0.0
    for parameter, g in step.gradient.of.items():
        sizes = real_view(whole(parameter.detach())).abs().flatten()
        sizes = sizes if float(sizes.median()) else sizes[sizes > 0]
        weight += float(sizes.median()) * len(sizes) if len(sizes) else 0.0
        scale += step.reference.preconditioner.total_weight(parameter, at=g)
    (scale,) = sum_over_ranks([scale])
    return STEP * weight / scale


@contextmanager
def _moved_weights(step: Pass, size: float, *, code: int) -> Iterator[Along]:
    """Add t P^(1/2) u to the weights inside; u is drawn anew from the code and the place.

    What it gives is this rank's share of the products of a parameter's move with gradients.
    """
    is_parked, preconditioner = step.reference.is_parked, step.reference.preconditioner
    before: dict[int, Tensor] | InTurn[Tensor] = {}
    if is_parked:
        before = InTurn((), step.reference.context.device)
    moved: dict[Tensor, tuple[int, Tensor]] = {}

    def along(parameter: Tensor, *gradients: Tensor) -> list[float]:
        number, data = moved[parameter]
        return preconditioner.products(parameter, data, before[number], gradients)

    whole_again(step.reference.model)
    try:
        for place, parameter in enumerate(step.reference.model.parameters()):
            if (at := step.gradient.of.get(parameter)) is None:
                continue
            # in place: FSDP gathers from the storage that it knows
            data = real_view(local_part(parameter.detach()))
            before[len(moved)] = data.to("cpu", copy=True) if is_parked else data.clone()
            moved[parameter] = len(moved), data
            seed = (step.reference.context.seed * 7907 + code) * 1_000_003 + place
            generator = torch.Generator(parameter.device).manual_seed(seed)
            # drawn for the whole tensor: of any number of ranks, each has its part of the same
            shape = real_view(parameter.detach()).shape
            signs = torch.empty(shape, dtype=torch.int8, device=parameter.device)
            signs = part_like(parameter, signs.random_(0, 2, generator=generator).mul_(2).sub_(1))
            if has_hooks(parameter):  # they see the whole
                move = preconditioner.weight(parameter, at=at).mul_(signs)
                data.add_(direction_after_hooks(parameter, move, at=at.to(data.device)), alpha=size)
                continue
            data, signs = at_least_1d(data), at_least_1d(signs)
            for rows, weight in preconditioner.weights(parameter, at=at):
                data[rows].add_(weight.mul_(signs[rows]), alpha=size)
        yield along
    finally:
        for number, data in moved.values():
            data.copy_(before[number])
