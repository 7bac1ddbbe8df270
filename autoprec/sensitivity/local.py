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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from autoprec.model.recording import Call
from autoprec.records import FP32, Gemm, ModelSpec, Operand, OperandStatistics, Option, Recipe
from autoprec.sensitivity.casts import Cast, Sides, cast_operand, gemm_casts, round_bf16, scale_of
from autoprec.sensitivity.delayed import Amax
from autoprec.sensitivity.reference import Reference
from autoprec.sensitivity.replay import Replayed, differentiated_calls, floating_inputs

KEEP = torch.bfloat16  # how errors are stored: 0.2 % off, a half of the memory
COUNTED_ROWS = 4  # one row in so many is counted for underflow and saturation
OUTLIER_RATIO = 10.0  # a channel's amax over the median channel's


@dataclass(frozen=True)
class Component:
    """One source of error. `cast` None is the whole layer in BF16 (`operand` is then None)."""

    gemm: Gemm
    operand: Operand | None = None
    cast: Cast | None = None


BF16_OUTPUT = Component(Gemm.OUTPUT)
BF16_GRAD_INPUT = Component(Gemm.GRAD_INPUT)
Cell = tuple[str, Option]  # a layer's name and an option of it other than FP32
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
    own = {p: rounded.parameter_gradients[p] - g for p, g in exact.parameter_gradients.items()}
    return LocalErrors(errors, {(): norm(own)})


class Operands:
    """x_MK and grad_output_MN per call, weight_NK; every cast is made once."""

    def __init__(self, layer: nn.Linear, calls: Sequence[Call], amax: Amax) -> None:
        """Take the operands out of a linear's recorded calls."""
        gradients = [g for call in calls for g in call.gradients if g is not None]
        self.amax = amax
        self.weight = layer.weight
        self.exact: dict[Operand, list[Tensor]] = {
            Operand.INPUT: [floating_inputs(c)[0].reshape(-1, layer.in_features) for c in calls],
            Operand.WEIGHT: [layer.weight.detach()],
            Operand.GRAD_OUTPUT: [g.reshape(-1, layer.out_features) for g in gradients],
        }
        self._made: dict[tuple[Operand, Cast], list[Tensor]] = {}

    def cast(self, operand: Operand, cast: Cast) -> list[Tensor]:
        """Return the operand as FP8 has it, per call."""
        key = (operand, cast)
        if key not in self._made:
            amax, rounded = self.amax.get(operand), map(round_bf16, self.exact[operand])
            self._made[key] = [cast_operand(t, cast, amax=amax) for t in rounded]
        return self._made[key]

    def errors(self, operand: Operand, cast: Cast) -> list[Tensor]:
        """Return cast minus exact, per call."""
        pairs = zip(self.cast(operand, cast), self.exact[operand], strict=True)
        return [(made - exact).to(KEEP) for made, exact in pairs]

    def statistics(self, name: str, options: Sequence[Option]) -> list[OperandStatistics]:
        """Return the range of each operand, and what each option's recipe would do to it."""
        return [self._range(name, operand, options) for operand in Operand]

    def _range(self, name: str, operand: Operand, options: Sequence[Option]) -> OperandStatistics:
        # channels are columns; those of a weight are its rows (outputs)
        dim = 1 if operand is Operand.WEIGHT else 0
        magnitudes = [t.abs() for t in self.exact[operand]]
        per_channel = torch.stack([t.amax(dim) for t in magnitudes]).amax(0)
        amax = float(per_channel.max())
        smallest = [float(torch.where(t > 0, t, torch.inf).min()) for t in magnitudes]
        amin = min(value if math.isfinite(value) else 0.0 for value in smallest)  # 0: all are zero
        outliers = (per_channel > OUTLIER_RATIO * float(per_channel.median())).nonzero().flatten()
        casts: dict[str, set[Cast]] = {}
        for option in options:
            for side, cast in chain.from_iterable(gemm_casts(option).values()):
                if side is operand:
                    casts.setdefault(str(option.recipe), set()).add(cast)
        return OperandStatistics(
            name=name,
            operand=operand,
            amax=amax,
            amin_nonzero=amin,
            dynamic_range_bits=math.log2(amax / amin) if amin > 0.0 else 0.0,
            underflow={k: max(self._underflow(operand, c) for c in v) for k, v in casts.items()},
            saturation={k: max(self._saturation(operand, c) for c in v) for k, v in casts.items()},
            outlier_channels=tuple(outliers.tolist()),
            channels=len(per_channel),
        )

    def _underflow(self, operand: Operand, cast: Cast) -> float:
        """Return the fraction of non-zero values that the cast makes zero."""
        there, left = (
            sum(int(t[::COUNTED_ROWS].count_nonzero()) for t in tensors)
            for tensors in (self.exact[operand], self.cast(operand, cast))
        )
        return 1.0 - left / there if there else 0.0

    def _saturation(self, operand: Operand, cast: Cast) -> float:
        """Return the fraction of values beyond the largest FP8 value; current scaling has none."""
        if not cast.is_delayed:
            return 0.0
        beyond = count = 0
        for exact in self.exact[operand]:
            scaled = exact[::COUNTED_ROWS] * scale_of(exact, cast, amax=self.amax.get(operand))
            beyond += int((scaled.abs() > torch.finfo(cast.dtype).max).sum())
            count += scaled.numel()
        return beyond / max(count, 1)


def add_fp8_errors(
    found: LocalErrors, operands: Operands, options: Sequence[Option], exact: Replayed, norm: Norm
) -> None:
    """Add the errors of a linear's FP8 options; casts that options share are made once."""
    for option in options:
        # output and grad_input: the operand errors alone, the probes do the rest
        for component in chain.from_iterable(components_of(option).values()):
            if component.operand and component.cast and component not in found.errors:
                found.errors[component] = operands.errors(component.operand, component.cast)
        # grad_weight: its error is where it ends, so it is multiplied out (the bias is no GEMM's)
        sides = gemm_casts(option).get(Gemm.GRAD_WEIGHT, ())
        if operands.weight.requires_grad and sides not in found.parameter_errors:
            left, right = (operands.cast(operand, cast) for operand, cast in sides)
            # [N, M] @ [M, K] -> [N, K], per call
            made = torch.stack([g.t() @ x for g, x in zip(left, right, strict=True)]).sum(0)
            error = made - exact.parameter_gradients[operands.weight]
            found.parameter_errors[sides] = norm({operands.weight: error})


def list_cells(spec: ModelSpec, options: Sequence[Option] | None) -> list[Cell]:
    """Return the cells to measure: every layer in each of its options but FP32.

    `options` limits the FP8 recipes; `delayed` is added to every layer that takes FP8 at all.
    """
    cells: list[Cell] = []
    recipes = None if options is None else {None, *(option.recipe for option in options)}
    for layer in spec.layers:
        chosen = [o for o in layer.options if recipes is None or o.recipe in recipes]
        if any(option.is_fp8 for option in layer.options):
            chosen += [o for o in options or () if o.recipe is Recipe.DELAYED and o not in chosen]
        cells += [(layer.name, option) for option in chosen if option != FP32]
    return cells


def fp8_options(cells: Iterable[Cell]) -> dict[str, list[Option]]:
    """Return the FP8 options among cells by layer name; only names that have any."""
    found: dict[str, list[Option]] = {}
    for name, option in cells:
        if option.is_fp8:
            found.setdefault(name, []).append(option)
    return found


def operand_statistics(reference: Reference, cells: Iterable[Cell]) -> list[OperandStatistics]:
    """Run the first batch and return the statistics of every linear with an FP8 option."""
    options = fp8_options(cells)
    linears = {name: reference.model.get_submodule(name) for name in options}
    with differentiated_calls(linears) as calls:
        reference.run_gradient(0)
    found: list[OperandStatistics] = []
    for name, layer in linears.items():
        if isinstance(layer, nn.Linear) and calls[name]:
            operands = Operands(layer, calls[name], reference.history.get(name, {}))
            found.extend(operands.statistics(name, options[name]))
    return found
