"""The three operands of a linear on one batch: as they are, as FP8 makes them, and their ranges."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprec.model.layers import find_layers
from autoprec.model.recording import Call
from autoprec.records import Operand, OperandStatistics, Option
from autoprec.sensitivity.casts import Cast, cast_operand, gemm_casts, round_bf16, scale_of
from autoprec.sensitivity.delayed import Amax
from autoprec.sensitivity.reference import Reference
from autoprec.sensitivity.replay import differentiated_calls, floating_inputs

KEEP = torch.bfloat16  # how errors are stored: 0.2 % off, a half of the memory
COUNTED_ROWS = 4  # one row in so many is counted for underflow and saturation
OUTLIER_RATIO = 10.0  # a channel's amax over the median channel's


class Operands:
    """x_MK and grad_output_MN per call, weight_NK; every cast is made once."""

    def __init__(self, layer: nn.Linear, calls: Sequence[Call], amax: Amax) -> None:
        """Take the operands out of a linear's recorded calls."""
        gradients = [g for call in calls for g in call.gradients if g is not None]
        self.amax = amax
        self.exact: dict[Operand, list[Tensor]] = {
            Operand.INPUT: [floating_inputs(c)[0].reshape(-1, layer.in_features) for c in calls],
            Operand.WEIGHT: [layer.weight.detach()],
            Operand.GRAD_OUTPUT: [g.reshape(-1, layer.out_features) for g in gradients],
        }
        self._rounded: dict[Operand, list[Tensor]] = {}
        self._made: dict[tuple[Operand, Cast], list[Tensor]] = {}
        self._errors: dict[tuple[Operand, Cast], list[Tensor]] = {}

    def cast(self, operand: Operand, cast: Cast) -> list[Tensor]:
        """Return the operand as FP8 has it, per call."""
        key = (operand, cast)
        if key not in self._made:
            if operand not in self._rounded:
                self._rounded[operand] = [round_bf16(t) for t in self.exact[operand]]
            amax = self.amax(operand)
            self._made[key] = [cast_operand(t, cast, amax=amax) for t in self._rounded[operand]]
        return self._made[key]

    def errors(self, operand: Operand, cast: Cast) -> list[Tensor]:
        """Return cast minus exact, per call."""
        key = (operand, cast)
        if key not in self._errors:
            pairs = zip(self.cast(operand, cast), self.exact[operand], strict=True)
            self._errors[key] = [(made - exact).to(KEEP) for made, exact in pairs]
        return self._errors[key]

    def statistics(self, name: str, options: Sequence[Option]) -> list[OperandStatistics]:
        """Return the range of each operand, and what each option's recipe would do to it."""
        return [self._statistics(name, operand, options) for operand in Operand]

    def _statistics(
        self, name: str, operand: Operand, options: Sequence[Option]
    ) -> OperandStatistics:
        tensors = self.exact[operand]
        channels = torch.stack([t.abs().amax(0 if _is_wide(operand) else 1) for t in tensors])
        per_channel = channels.amax(0)
        amax, amin = float(per_channel.max()), min(_smallest(t) for t in tensors)
        median = float(per_channel.median())
        outliers = (per_channel > OUTLIER_RATIO * median).nonzero().flatten().tolist()
        casts: dict[str, set[Cast]] = {}
        for option in options:
            if option.recipe is not None:
                used = {
                    c for sides in gemm_casts(option).values() for o, c in sides if o is operand
                }
                casts.setdefault(option.recipe.value, set()).update(used)
        return OperandStatistics(
            name=name,
            operand=operand,
            amax=amax,
            amin_nonzero=amin,
            dynamic_range_bits=math.log2(amax / amin) if amin > 0.0 else 0.0,
            underflow={
                k: max(self._underflow(operand, c) for c in v) for k, v in casts.items() if v
            },
            saturation={
                k: max(self._saturation(operand, c) for c in v) for k, v in casts.items() if v
            },
            outlier_channels=tuple(outliers),
            channels=len(per_channel),
        )

    def _underflow(self, operand: Operand, cast: Cast) -> float:
        """Return the fraction of non-zero values that the cast makes zero."""
        there = sum(int(t[::COUNTED_ROWS].count_nonzero()) for t in self.exact[operand])
        left = sum(int(t[::COUNTED_ROWS].count_nonzero()) for t in self.cast(operand, cast))
        return 1.0 - left / there if there else 0.0

    def _saturation(self, operand: Operand, cast: Cast) -> float:
        """Return the fraction of values beyond the largest FP8 value; current scaling has none."""
        if not cast.is_delayed:
            return 0.0
        beyond = count = 0
        for exact in self.exact[operand]:
            scale = scale_of(exact, cast, amax=self.amax(operand))
            counted = exact[::COUNTED_ROWS] * scale
            beyond += int((counted.abs() > torch.finfo(cast.dtype).max).sum())
            count += counted.numel()
        return beyond / max(count, 1)


def operand_statistics(
    reference: Reference, options: Mapping[str, Sequence[Option]]
) -> list[OperandStatistics]:
    """Run the first batch and return the statistics of every linear named in `options`."""
    modules = find_layers(reference.model)
    linears = {name: modules[name] for name in options}
    with differentiated_calls(linears) as calls:
        reference.run_gradient(0)
    found: list[OperandStatistics] = []
    for name, layer in linears.items():
        if isinstance(layer, nn.Linear) and calls[name]:
            operands = Operands(layer, calls[name], reference.amax_history(name))
            found.extend(operands.statistics(name, options[name]))
    return found


def _is_wide(operand: Operand) -> bool:
    """Whether the operand's channels are its columns; a weight's are its rows (outputs)."""
    return operand is not Operand.WEIGHT


def _smallest(tensor: Tensor) -> float:
    magnitudes = tensor.abs()
    nonzero = torch.where(magnitudes > 0, magnitudes, torch.inf).min()
    return float(nonzero) if bool(torch.isfinite(nonzero)) else 0.0
