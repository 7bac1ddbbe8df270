"""The error that an option makes inside one layer, on the reference's own inputs and gradients.

With x_MK, weight_NK and grad_MN as the reference pass had them, and D for "cast minus exact":

    output        Dy  = Dx w' + x Dw'         carried on by the rest of the model
    grad_input    Dgx = Dg w  + g Dw          carried on by the layers before
    grad_weight   Dgw = cast(g)' cast(x) - g' x     stays where it is

The third is known here to the last bit. What the first two do to the gradient of the whole model is
for the probes to say (see probes.py), which need the operand errors Dx, Dw, Dg only; options share
them where their recipes cast alike. Errors of any other layer in BF16 are taken at its outputs,
input gradients and parameters instead, from a replay in BF16 against a replay in FP32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from autoprec.records import Gemm, Operand, Option
from autoprec.sensitivity.casts import Cast, Sides, gemm_casts, round_bf16
from autoprec.sensitivity.operands import KEEP, Operands
from autoprec.sensitivity.replay import Replayed


@dataclass(frozen=True)
class Component:
    """One source of error. `cast` None is the whole layer in BF16 (`operand` is then None)."""

    gemm: Gemm
    operand: Operand | None = None
    cast: Cast | None = None


BF16_OUTPUT = Component(Gemm.OUTPUT)
BF16_GRAD_INPUT = Component(Gemm.GRAD_INPUT)


Norm = Callable[[Mapping[Tensor, Tensor]], float]  # of errors by parameter: d'Pd


@dataclass(frozen=True)
class LocalErrors:
    """One layer's errors on one batch.

    `errors` holds a tensor per call, or the one of the weight. `parameter_errors` is d'Pd of the
    gradients of the layer's own parameters, by the casts of the grad_weight GEMM; () is BF16.
    """

    errors: dict[Component, list[Tensor]]
    parameter_errors: dict[Sides, float]


def components_of(option: Option) -> dict[Gemm, list[Component]]:
    """Return the sources of error of the two GEMMs whose error spreads; BF16 where kept so."""
    casts = gemm_casts(option)
    return {
        bf16.gemm: [Component(bf16.gemm, *side) for side in casts.get(bf16.gemm, ())] or [bf16]
        for bf16 in (BF16_OUTPUT, BF16_GRAD_INPUT)
    }


def parameter_only_errors(gradients: Mapping[Tensor, Tensor], norm: Norm) -> LocalErrors:
    """Return the BF16 errors of a layer whose parameters are used without calling it."""
    return LocalErrors(
        errors={BF16_OUTPUT: [round_bf16(p.detach()) - p.detach() for p in gradients]},
        parameter_errors={(): norm({p: round_bf16(g) - g for p, g in gradients.items()})},
    )


def bf16_errors(exact: Replayed, rounded: Replayed, norm: Norm) -> LocalErrors:
    """Return a layer's errors in BF16 from its replays in FP32 and in BF16."""
    outputs = zip(exact.outputs, rounded.outputs, strict=True)
    inputs = zip(exact.input_gradients, rounded.input_gradients, strict=True)
    errors = {
        BF16_OUTPUT: [(b - a).to(KEEP) for a, b in outputs],
        BF16_GRAD_INPUT: [
            torch.zeros(()) if a is None or b is None else (b - a).to(KEEP) for a, b in inputs
        ],
    }
    gradients = exact.parameter_gradients.items()
    own = {p: rounded.parameter_gradients[p] - g for p, g in gradients}
    return LocalErrors(errors, {(): norm(own)})


def add_fp8_errors(
    found: LocalErrors,
    operands: Operands,
    options: Sequence[Option],
    *,
    weight: Tensor,
    exact: Replayed,
    norm: Norm,
) -> None:
    """Add the errors of a linear's FP8 options; casts that options share are made once."""
    for option in options:
        # output and grad_input: the operand errors alone, the probes do the rest
        for component in chain.from_iterable(components_of(option).values()):
            if component.operand and component.cast and component not in found.errors:
                found.errors[component] = operands.errors(component.operand, component.cast)
        # grad_weight: its error is where it ends, so it is multiplied out (the bias is no GEMM's)
        sides = gemm_casts(option).get(Gemm.GRAD_WEIGHT, ())
        if weight.requires_grad and sides not in found.parameter_errors:
            left, right = (operands.cast(operand, cast) for operand, cast in sides)
            # [N, M] @ [M, K] -> [N, K], per call
            made = torch.stack([g.t() @ x for g, x in zip(left, right, strict=True)]).sum(0)
            error = made - exact.parameter_gradients[weight]
            found.parameter_errors[sides] = norm({weight: error})
