"""A linear's errors in every option, and their products with what a probe changed: rows in chunks.

With x_MK, weight_NK and grad_MN of the reference pass, v and c the probe's change of the output
gradient and of the input (see probes.py), and D for "cast minus exact":

    output        v w, Dx   per input channel        v' x, Dw   per row of the weight
    grad_input    c w', Dg  per output channel       g' c, Dw   per column of the weight
    grad_weight   cast(g)' cast(x) - g' x            stays where it is

All are sums over tokens. So a chunk of tokens is cast, multiplied and forgotten: beside the
recorded x, g and theirs under the probe, only single tensors of the weight's size are ever made.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprec.device.ranks import local_part
from autoprec.model.kinds import bias_of, is_transposed, matrix_sizes, weight_matrix, weight_of
from autoprec.model.local_copy import WHOLE, Split
from autoprec.model.recording import Call
from autoprec.records import Gemm, Operand, OperandStatistics, Option
from autoprec.sensitivity.casts import (
    Cast,
    Sides,
    cast_scaled,
    gemm_casts,
    largest_of,
    round_bf16,
    scale_from,
    staying_casts,
)
from autoprec.sensitivity.local import (
    BF16_GRAD_INPUT,
    BF16_OUTPUT,
    Component,
    Norm,
    components_of,
    in_bf16,
)
from autoprec.sensitivity.replay import floating_inputs

COUNTED_ROWS = 4  # one row in so many is counted for underflow
SPREADING = (Gemm.OUTPUT, Gemm.GRAD_INPUT)  # the GEMMs whose error the rest of the model carries on
OUTLIER_RATIO = 10.0  # a channel's amax over the median channel's
OUTLIER_BINADES = 4  # the same of tokens: 4 binades up is 8x to 32x
LEAST_EXPONENT = -150  # of an FP32 value by `frexp`; the largest is 128


@dataclass
class Matrix:
    """One operand of one call, rows x columns, and its casts, some rows at a time."""

    exact: Tensor
    chunk: int  # rows
    axes: str = ""  # of M, N and K: what rows and columns are
    split: Split = WHOLE  # of the linear: ranks may have parts of the operand
    _scales: dict[Cast, Tensor] = field(default_factory=dict)

    def chunks(self) -> Iterator[slice]:
        """Yield the rows, a chunk at a time."""
        for start in range(0, len(self.exact), self.chunk):
            yield slice(start, start + self.chunk)

    def cast(self, cast: Cast, rows: slice) -> Tensor:
        """Return these rows as FP8 has them."""
        return cast_scaled(round_bf16(self.exact[rows]), cast, self.scale(cast, rows))

    def error(self, cast: Cast, rows: slice) -> Tensor:
        """Return cast minus exact of these rows."""
        return self.cast(cast, rows).sub_(self.exact[rows])

    def scale(self, cast: Cast, rows: slice) -> Tensor:
        """Return the scale of these rows: their own, or that of the whole matrix, of all ranks.

        DTensor reduces an amax over the ranks that have parts of the operand; so does this.
        """
        if cast not in self._scales:
            # rounding keeps the order of magnitudes: the largest of all, then rounded
            parts = [largest_of(self.exact[rows], cast) for rows in self.chunks()]
            largest = torch.cat(parts) if cast.dim == 1 else torch.stack(parts).amax(0)
            over = self.axes if cast.dim is None else self.axes[cast.dim : cast.dim + 1]
            largest = self.split.largest(round_bf16(largest), over=over)
            self._scales[cast] = scale_from(largest, cast)
        return self._scales[cast][rows] if cast.dim == 1 else self._scales[cast]

    def counted(self, rows: slice) -> slice:
        """Return the rows among these that are counted: the same ones of any number of parts."""
        first = self.split.first(self.axes[:1])
        return slice(rows.start + -(first + rows.start) % COUNTED_ROWS, rows.stop, COUNTED_ROWS)


@dataclass(frozen=True)
class ProbedCall:
    """One call of a linear: its operands in the reference pass, and both under a probe.

    Where none was run, both are those of the reference.
    """

    x: Matrix
    g: Matrix
    moved_x: Tensor
    moved_g: Tensor

    def change_of_input(self, rows: slice) -> Tensor:
        """Return c of these rows."""
        return self.moved_x[rows] - self.x.exact[rows]

    def change_of_gradient(self, rows: slice) -> Tensor:
        """Return v of these rows."""
        return self.moved_g[rows] - self.g.exact[rows]


class Linear:
    """A linear with its calls on one batch, in the reference pass and under a probe."""

    def __init__(
        self,
        layer: nn.Module,
        calls: Sequence[Call],
        options: Sequence[Option],
        *,
        moved: Sequence[Call] = (),
        split: Split = WHOLE,
        chunk: int,
    ) -> None:
        """Take the recorded calls; `options` are the FP8 ones, `chunk` is in elements.

        Of a linear that ranks divide, `layer` is this rank's part and `split` says which.
        """
        self.split = split.seen_in(floating_inputs(calls[0])[0]) if calls else split
        rows = max(chunk // sum(matrix_sizes(layer)) // COUNTED_ROWS, 1) * COUNTED_ROWS
        self.layer, self.options = layer, options
        # taken now: inside `in_bf16` the layer has others
        bias = bias_of(layer)
        self.weight_NK = weight_matrix(layer).detach().float()
        self.bias_N = None if bias is None else bias.detach().float()
        self.weight = Matrix(self.weight_NK, rows, "NK", self.split)
        pairs = zip(_operands(layer, calls), _operands(layer, moved or calls), strict=True)
        self.calls = [
            ProbedCall(
                Matrix(x, rows, "MK", self.split), Matrix(g, rows, "MN", self.split), *probed
            )
            for (x, g), probed in pairs
        ]

    def products(self, gemms: Sequence[Gemm] = SPREADING) -> dict[Component, Tensor]:
        """Return z per group for every component of these GEMMs' errors, of all ranks' parts."""
        found = self._bf16_products()
        parts = (components_of(option)[gemm] for option in self.options for gemm in gemms)
        casts = {c: c.cast for c in chain.from_iterable(parts) if c.cast is not None}
        for gemm in gemms:
            of_gemm = {c: cast for c, cast in casts.items() if c.gemm is gemm}
            of_weight = {c: k for c, k in of_gemm.items() if c.operand is Operand.WEIGHT}
            of_tokens = {c: k for c, k in of_gemm.items() if c.operand is not Operand.WEIGHT}
            found |= self._token_products(gemm, of_tokens)
            found |= self._weight_products(gemm, of_weight)
        return {c: self.split.whole(z, _group_axis(c)) for c, z in found.items()}

    def parameter_errors(self, norm: Norm) -> dict[Sides, float]:
        """Return d'Pd of what stays in the parameters, by the casts of grad_weight; () is BF16.

        `norm` takes errors of whole parameters. A bias's gradient is BF16 in all of them.
        """
        weight, bias = weight_of(self.layer), bias_of(self.layer)
        sides = dict.fromkeys(map(staying_casts, self.options))
        of_bias = 0.0
        if bias is not None and bias.requires_grad:
            of_bias = norm({bias: self.split.whole(self._bias_error(), "N", over="MN")})
        found = dict.fromkeys([(), *sides], of_bias)
        if not weight.requires_grad:
            return found
        exact = self._grad_weight(None)
        for pair in found:
            # cast minus exact, in place: both are of the weight's size
            error = self._grad_weight(pair).sub_(exact)
            error = self.split.whole(error, "NK")
            found[pair] += norm({weight: error.t() if is_transposed(self.layer) else error})
        return found

    def _bf16_products(self) -> dict[Component, Tensor]:
        """Return v, Dy and c, Dgx of the layer in BF16, from its replay against plain FP32."""
        layer, weight_NK, bias_N = self.layer, self.weight_NK, self.bias_N
        output, grad_input = map(weight_NK.new_zeros, weight_NK.shape)
        with in_bf16(layer), torch.enable_grad():
            for call in self.calls:
                for rows in call.x.chunks():
                    x, g = call.x.exact[rows], call.g.exact[rows]
                    leaf = x.detach().requires_grad_()
                    y = layer.forward(leaf)
                    (gx,) = torch.autograd.grad(y, leaf, g.to(y.dtype))
                    error = y.detach().float().sub_(F.linear(x, weight_NK, bias_N))
                    output += error.mul_(call.change_of_gradient(rows)).sum(0)
                    error = gx.float().sub_(g @ weight_NK)  # [M, N] @ [N, K] -> [M, K]
                    grad_input += error.mul_(call.change_of_input(rows)).sum(0)
        return {BF16_OUTPUT: output, BF16_GRAD_INPUT: grad_input}

    def _token_products(
        self, gemm: Gemm, wanted: Mapping[Component, Cast]
    ) -> dict[Component, Tensor]:
        """Return the products of the errors of x (output) or of g (grad_input), per channel."""
        found: dict[Component, Tensor] = {}
        for call in self.calls if wanted else ():
            for rows in call.x.chunks():
                if gemm is Gemm.OUTPUT:  # v w: [M, N] @ [N, K] -> [M, K]
                    factor, operand = call.change_of_gradient(rows) @ self.weight_NK, call.x
                else:  # c w': [M, K] @ [K, N] -> [M, N]
                    factor, operand = call.change_of_input(rows) @ self.weight_NK.t(), call.g
                for component, cast in wanted.items():
                    z = operand.error(cast, rows).mul_(factor).sum(0)
                    found[component] = found[component] + z if component in found else z
        return found

    def _weight_products(
        self, gemm: Gemm, wanted: Mapping[Component, Cast]
    ) -> dict[Component, Tensor]:
        """Return the products of the weight's errors, per row (output) or column (grad_input)."""
        found: dict[Component, Tensor] = {}
        if not wanted:
            return found
        factor_NK = torch.zeros_like(self.weight_NK)
        for call in self.calls:
            for rows in call.x.chunks():
                if gemm is Gemm.OUTPUT:  # v' x: [N, M] @ [M, K] -> [N, K]
                    factor_NK.addmm_(call.change_of_gradient(rows).t(), call.x.exact[rows])
                else:  # g' c: [N, M] @ [M, K] -> [N, K]
                    factor_NK.addmm_(call.g.exact[rows].t(), call.change_of_input(rows))
        dim = 1 if gemm is Gemm.OUTPUT else 0
        for component, cast in wanted.items():
            parts = [
                self.weight.error(cast, rows).mul_(factor_NK[rows]).sum(dim)
                for rows in self.weight.chunks()
            ]
            found[component] = torch.cat(parts) if dim else torch.stack(parts).sum(0)
        return found

    def _grad_weight(self, sides: Sides | None) -> Tensor:
        """Return g' x: exact (None), in BF16 (no sides), or with both sides cast to FP8."""
        total = torch.zeros_like(self.weight_NK)
        for call in self.calls:
            own = total if sides is None or sides else torch.zeros_like(total)
            for rows in call.x.chunks():
                if sides:
                    (_, left), (_, right) = sides
                    g, x = call.g.cast(left, rows), call.x.cast(right, rows)
                else:
                    g, x = call.g.exact[rows], call.x.exact[rows]
                    g, x = (g, x) if sides is None else (round_bf16(g), round_bf16(x))
                own.addmm_(g.t(), x)  # [N, M] @ [M, K] -> [N, K]
            if own is not total:  # a call in BF16 gives a BF16 gradient
                total += round_bf16(own)
        return total

    def _bias_error(self) -> Tensor:
        error: Tensor = self.weight_NK.new_zeros(len(self.weight_NK))
        for call in self.calls:
            rounded = sum(round_bf16(call.g.exact[rows]).sum(0) for rows in call.g.chunks())
            exact = sum(call.g.exact[rows].sum(0) for rows in call.g.chunks())
            error += round_bf16(torch.as_tensor(rounded)) - exact
        return error

    def statistics(self, name: str) -> list[OperandStatistics]:
        """Return the range of each operand, and what each option's recipe would do to it."""
        operands = {
            Operand.INPUT: [call.x for call in self.calls],
            Operand.WEIGHT: [self.weight],
            Operand.GRAD_OUTPUT: [call.g for call in self.calls],
        }
        # dicts and no sets: all ranks take the casts in one order
        casts: dict[Operand, dict[str, dict[Cast, None]]] = {operand: {} for operand in Operand}
        for option in self.options:
            for operand, cast in chain.from_iterable(gemm_casts(option).values()):
                casts[operand].setdefault(str(option.recipe), {})[cast] = None
        return [_range(name, operand, operands[operand], casts[operand]) for operand in Operand]


def _range(
    name: str, operand: Operand, matrices: Sequence[Matrix], casts: dict[str, dict[Cast, None]]
) -> OperandStatistics:
    # channels are columns; those of a weight are its rows (outputs)
    dim = 1 if operand is Operand.WEIGHT else 0
    split, axes = matrices[0].split, matrices[0].axes
    pieces = [(m, rows) for m in matrices for rows in m.chunks()]
    parts = [m.exact[rows].abs().amax(dim) for m, rows in pieces]
    per_channel = torch.cat(parts) if dim else torch.stack(parts).amax(0)
    per_channel = split.largest(per_channel, over=axes[dim])
    per_channel = split.whole(per_channel, axes[1 - dim], over=axes[1 - dim])
    amax = float(per_channel.max())
    outliers = (per_channel > OUTLIER_RATIO * float(per_channel.median())).nonzero().flatten()
    return OperandStatistics(
        name=name,
        operand=operand,
        amax=amax,
        underflow={k: max(_underflow(matrices, c) for c in v) for k, v in casts.items()},
        outlier_channels=tuple(outliers.tolist()),
        channels=len(per_channel),
        mean_over_std=_mean_over_std([m.exact[rows] for m, rows in pieces], dim, split, axes),
        outlier_token_share=None if dim else _outlier_token_share(pieces, split, axes),
    )


def _outlier_token_share(
    pieces: Sequence[tuple[Matrix, slice]], split: Split, axes: str
) -> float | None:
    """Return the share of tokens that are far larger than the median one, by the binade of amax.

    Counts per binade are summed over ranks, so that all have one median. None: all are zero.
    """
    largest = torch.cat([m.exact[rows].abs().amax(1) for m, rows in pieces])
    largest = split.largest(largest, over=axes[1])
    binades = torch.frexp(largest[largest > 0.0]).exponent.long() - LEAST_EXPONENT
    counts = torch.bincount(binades, minlength=128 - LEAST_EXPONENT + 1).double()
    below = split.whole(counts, "", over=axes[0]).cumsum(0)
    median = int((below < below[-1] / 2).sum())
    reached = below[min(median + OUTLIER_BINADES, len(below)) - 1]
    return float(1.0 - reached / below[-1]) if below[-1] > 0.0 else None


def _mean_over_std(pieces: Sequence[Tensor], dim: int, split: Split, axes: str) -> float | None:
    """Return how far values are from zero beside their spread, over all channels together."""
    moments = (torch.var_mean(piece, dim, correction=0) for piece in pieces)
    if dim:  # of a weight each piece has whole channels, of the others whole rows
        within, means = (torch.cat(each).double() for each in zip(*moments, strict=True))
    else:  # of all rows: the pieces' own variances, and that of their means, one piece at a time
        rows, within, means = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for piece, (variance, mean) in zip(pieces, moments, strict=True):
            rows += len(piece)
            share, apart = len(piece) / rows, mean.double() - means.to(mean.device)
            spread = variance.double() + (1.0 - share) * apart.square()
            within = (1.0 - share) * within.to(mean.device) + share * spread
            means = means.to(mean.device) + share * apart
    # over the parts of ranks alike: their means, and channels of their own
    channel, other = axes[1 - dim], axes[dim]
    count = pieces[0].shape[1] if dim else sum(len(piece) for piece in pieces)
    own = count / float(split.whole(within.new_tensor(float(count)), "", over=other))
    centre = split.whole(own * means, channel, over=other)
    within = split.whole(own * (within + (means - centre).square()), channel, over=other)
    sums = torch.stack([within.sum(), centre.square().sum()])
    variances, size = split.whole(sums, "", over=channel).tolist()
    return math.sqrt(size / variances) if variances > 0.0 else None


def _underflow(matrices: Sequence[Matrix], cast: Cast) -> float:
    """Return the fraction of non-zero values that the cast makes zero."""
    there = left = 0
    for matrix in matrices:
        for rows in map(matrix.counted, matrix.chunks()):
            there += int(matrix.exact[rows].count_nonzero())
            left += int(matrix.cast(cast, rows).count_nonzero())
    # over the ranks that have parts of the operand
    first = matrices[0]
    counts = torch.tensor([there, left], dtype=torch.float64, device=first.exact.device)
    there, left = map(round, first.split.whole(counts, "", over=first.axes).tolist())
    return 1.0 - left / there if there else 0.0


def _group_axis(component: Component) -> str:
    """Return the axis that a component's groups lie along."""
    of_weight = component.operand is Operand.WEIGHT
    if component.cast is None or of_weight:  # errors of a result, rows and columns of the weight
        return "N" if component.gemm is Gemm.OUTPUT else "K"
    return "K" if component.operand is Operand.INPUT else "N"


def _operands(layer: nn.Module, calls: Sequence[Call]) -> list[tuple[Tensor, Tensor]]:
    """Return x_MK and grad_MN of each call that a gradient came back to."""
    N, K = matrix_sizes(layer)
    return [
        (
            local_part(floating_inputs(call)[0]).float().reshape(-1, K),
            local_part(call.gradients[0]).float().reshape(-1, N),
        )
        for call in calls
        if call.gradients[0] is not None
    ]
