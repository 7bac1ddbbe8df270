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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


GradWeightKey = tuple[tuple[Operand, Cast], ...]  # the casts of the grad_weight GEMM; () is BF16
BF16_OUTPUT = Component(Gemm.OUTPUT)
BF16_GRAD_INPUT = Component(Gemm.GRAD_INPUT)


@dataclass(frozen=True)
class LocalErrors:
    """One layer's errors on one batch.

    `errors` holds a tensor per call, or the one of the weight. `parameter_errors` are the errors
    of the layer's trainable parameters' gradients.
    """

    errors: dict[Component, list[Tensor]]
    parameter_errors: dict[GradWeightKey, list[Tensor]]


def components_of(option: Option) -> dict[Gemm, tuple[Component, ...]]:
    """Return the sources of error of the two GEMMs whose error spreads; BF16 where kept so."""
    casts = gemm_casts(option)
    return {
        bf16.gemm: tuple(
            Component(bf16.gemm, operand, cast) for operand, cast in casts.get(bf16.gemm, ())
        )
        or (bf16,)
        for bf16 in (BF16_OUTPUT, BF16_GRAD_INPUT)
    }


def grad_weight_key(option: Option) -> GradWeightKey:
    """Return the casts of an option's grad_weight GEMM."""
    return gemm_casts(option).get(Gemm.GRAD_WEIGHT, ())


def parameter_only_errors(layer: nn.Module, gradients: Sequence[Tensor]) -> LocalErrors:
    """Return the errors in BF16 of a layer that is never called, only its parameters are used."""
    trainable = [p.detach() for p in layer.parameters() if p.requires_grad]
    return LocalErrors(
        errors={BF16_OUTPUT: [round_bf16(p) - p for p in trainable], BF16_GRAD_INPUT: []},
        parameter_errors={(): [round_bf16(g) - g for g in gradients]},
    )


def bf16_errors(exact: Replayed, rounded: Replayed) -> LocalErrors:
    """Return a layer's errors in BF16 from its replays in FP32 and in BF16."""
    outputs = [
        (b - a).to(KEEP)
        for one, other in zip(exact.outputs, rounded.outputs, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    input_gradients = [
        torch.zeros(()) if a is None or b is None else (b - a).to(KEEP)
        for one, other in zip(exact.input_gradients, rounded.input_gradients, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    pairs = zip(exact.parameter_gradients, rounded.parameter_gradients, strict=True)
    return LocalErrors(
        errors={BF16_OUTPUT: outputs, BF16_GRAD_INPUT: input_gradients},
        parameter_errors={(): [b - a for a, b in pairs]},
    )


def add_fp8_errors(
    found: LocalErrors,
    layer: nn.Linear,
    operands: Operands,
    exact: Replayed,
    options: Sequence[Option],
) -> None:
    """Add the errors of a linear's FP8 options; casts that options share are made once."""
    for option in options:
        casts = gemm_casts(option)
        # output and grad_input: the operand errors alone, the probes do the rest
        for gemm in (Gemm.OUTPUT, Gemm.GRAD_INPUT):
            for operand, cast in casts.get(gemm, ()):
                component = Component(gemm, operand, cast)
                if component not in found.errors:
                    found.errors[component] = operands.errors(operand, cast)
        # grad_weight: its error is where it ends, so it is multiplied out
        sides = casts.get(Gemm.GRAD_WEIGHT, ())
        if sides and layer.weight.requires_grad and sides not in found.parameter_errors:
            found.parameter_errors[sides] = _grad_weight_errors(operands, sides, layer, exact)


def _grad_weight_errors(
    operands: Operands, sides: Sides, layer: nn.Linear, exact: Replayed
) -> list[Tensor]:
    """Return the errors of weight and bias gradients (the latter is not a GEMM: none)."""
    left, right = (operands.cast(operand, cast) for operand, cast in sides)
    # grad_weight: [N, M] @ [M, K] -> [N, K], per call
    made = torch.stack([g.t() @ x for g, x in zip(left, right, strict=True)]).sum(0)
    trainable = [p for p in layer.parameters() if p.requires_grad]
    return [
        made - gradient if p is layer.weight else torch.zeros_like(gradient)
        for p, gradient in zip(trainable, exact.parameter_gradients, strict=True)
    ]
