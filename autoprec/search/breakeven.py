"""Linears that FP8 does not make faster on a predicted device -> from how many tokens on it would.

The sizes are in the profile, asked of the constants that it was predicted with; here they are found
for the layers that lose, and put into words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprec.predict import parse_parallel
from autoprec.predict.breakeven import WIDE
from autoprec.predict.parallel import Parallel, shard_gemm
from autoprec.records import Basis, BreakEven, GemmShape, LayerKind, Option, Profile
from autoprec.search.costs import Costs, Price

MOST_SHAPES = 4  # in one note; the largest weights first


@dataclass(frozen=True)
class _Losing:
    """Layers of one shape for which every FP8 option takes longer than what they have."""

    gemm: GemmShape
    names: tuple[str, ...]
    options: tuple[Option, ...]


def break_even_notes(profile: Profile, costs: Costs, options: Sequence[Option]) -> list[str]:
    """Return what the plan's notes say of the size at which FP8 would pay."""
    if profile.basis is not Basis.PREDICTED:
        return []
    losing = _losing_shapes(profile, costs, options)
    if not losing:
        return []
    device = profile.device.name
    if not profile.break_evens:
        return [
            f"from what size FP8 would pay on {device} is not in this profile.json, which an older "
            "autoprec wrote; make the profile again"
        ]
    said = [_sentence(found, _break_evens(profile, found)) for found in losing[:MOST_SHAPES]]
    more = len(losing) - len(said)
    rest = f"; and {more} more {'shape' if more == 1 else 'shapes'}" if more else ""
    return [f"where FP8 does not pay on {device} it would from: {'; '.join(said)}{rest}"]


def _losing_shapes(profile: Profile, costs: Costs, options: Sequence[Option]) -> list[_Losing]:
    parallel = parse_parallel(profile.parallel) if profile.parallel else Parallel()
    shapes: dict[tuple[GemmShape, tuple[Option, ...]], list[str]] = {}
    for layer, prices, option in zip(costs.layers, costs.prices, options, strict=True):
        fp8 = tuple(o for o in prices if o.is_fp8)
        if layer.kind is LayerKind.LINEAR and layer.gemm and fp8 and _loses(prices, option):
            shapes.setdefault((shard_gemm(layer, parallel), fp8), []).append(layer.name)
    found = [_Losing(gemm, tuple(names), fp8) for (gemm, fp8), names in shapes.items()]
    return sorted(found, key=lambda losing: -losing.gemm.K * losing.gemm.N)


def _loses(prices: Mapping[Option, Price], option: Option) -> bool:
    best = min(price.ms for o, price in prices.items() if o.is_fp8)
    return not option.is_fp8 and best >= prices[option].flow_ms


def _break_evens(profile: Profile, losing: _Losing) -> list[BreakEven]:
    recipes = {option.recipe for option in losing.options}
    return [r for r in profile.break_evens if r.gemm == losing.gemm and r.recipe in recipes]


def _sentence(losing: _Losing, rows: Sequence[BreakEven]) -> str:
    more = f" and {len(losing.names) - 1} more" if len(losing.names) > 1 else ""
    what = f"{losing.names[0]}{more} (K={losing.gemm.K} N={losing.gemm.N})"
    enough = [(row.tokens, row.recipe) for row in rows if row.tokens is not None]
    if not enough:
        return f"{what}: no number of tokens {_elsewhere(losing.gemm.M, rows)}"
    tokens, recipe = min(enough)
    said = f"{what}: {tokens} tokens a step with {recipe}, here {losing.gemm.M}"
    if tokens > losing.gemm.M:
        return said
    return (
        f"{said}, by its own GEMMs and casts; what the step adds takes the gain (casts at its "
        "border, a gradient that it does not compute, recomputation, gathers)"
    )


def _elsewhere(M: int, rows: Sequence[BreakEven]) -> str:
    """Return which other size would pay: another width at these tokens, else a wide weight."""
    widths = [row.width for row in rows if row.width is not None]
    if widths:
        return f"(at {M} tokens, width K=N={min(widths)} would)"
    wide = [(row.wide.K, row.wide.M, row.recipe) for row in rows if row.wide is not None]
    if wide:
        size, tokens, recipe = min(wide)
        return (
            f"and at {M} tokens no width (K=N={size} would from {tokens} tokens a step with "
            f"{recipe})"
        )
    return f"and at {M} tokens no width: FP8 never gains here, nor at K=N={WIDE[-1]}"
