"""The three operands of a linear on one batch: as they are, as FP8 makes them, and their ranges."""

import math
from collections.abc import Iterable, Sequence

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
        self._made: dict[tuple[Operand, Cast], list[Tensor]] = {}

    def cast(self, operand: Operand, cast: Cast) -> list[Tensor]:
        """Return the operand as FP8 has it, per call."""
        key = (operand, cast)
        if key not in self._made:
            amax = self.amax.get(operand)
            self._made[key] = [
                cast_operand(round_bf16(t), cast, amax=amax) for t in self.exact[operand]
            ]
        return self._made[key]

    def errors(self, operand: Operand, cast: Cast) -> list[Tensor]:
        """Return cast minus exact, per call."""
        pairs = zip(self.cast(operand, cast), self.exact[operand], strict=True)
        return [(made - exact).to(KEEP) for made, exact in pairs]

    def statistics(self, name: str, options: Sequence[Option]) -> list[OperandStatistics]:
        """Return the range of each operand, and what each option's recipe would do to it."""
        return [self._statistics(name, operand, options) for operand in Operand]

    def _statistics(
        self, name: str, operand: Operand, options: Sequence[Option]
    ) -> OperandStatistics:
        # channels are columns; those of a weight are its rows (outputs)
        dim = 1 if operand is Operand.WEIGHT else 0
        magnitudes = [t.abs() for t in self.exact[operand]]
        per_channel = torch.stack([t.amax(dim) for t in magnitudes]).amax(0)
        amax = float(per_channel.max())
        amin = min(_smallest(t) for t in magnitudes)
        outliers = (per_channel > OUTLIER_RATIO * float(per_channel.median())).nonzero().flatten()
        casts: dict[str, set[Cast]] = {}
        for option in options:
            for sides in gemm_casts(option).values():
                used = {cast for side, cast in sides if side is operand}
                casts.setdefault(str(option.recipe), set()).update(used)
        casts = {recipe: used for recipe, used in casts.items() if used}
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


def fp8_options(cells: Iterable[tuple[str, Option]]) -> dict[str, list[Option]]:
    """Return the FP8 options among cells by layer name; only names that have any."""
    found: dict[str, list[Option]] = {}
    for name, option in cells:
        if option.is_fp8:
            found.setdefault(name, []).append(option)
    return found


def operand_statistics(
    reference: Reference, cells: Iterable[tuple[str, Option]]
) -> list[OperandStatistics]:
    """Run the first batch and return the statistics of every linear with an FP8 option."""
    options, modules = fp8_options(cells), find_layers(reference.model)
    linears = {name: modules[name] for name in options}
    with differentiated_calls(linears) as calls:
        reference.run_gradient(0)
    found: list[OperandStatistics] = []
    for name, layer in linears.items():
        if isinstance(layer, nn.Linear) and calls[name]:
            operands = Operands(layer, calls[name], reference.history.get(name, {}))
            found.extend(operands.statistics(name, options[name]))
    return found


def _smallest(magnitudes: Tensor) -> float:
    """Return the smallest non-zero magnitude; 0.0 where all are zero."""
    smallest = float(torch.where(magnitudes > 0, magnitudes, torch.inf).min())
    return smallest if math.isfinite(smallest) else 0.0
