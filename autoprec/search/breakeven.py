"""Linears that FP8 does not make faster on a predicted device -> from how many tokens on it would.

Asked of the cost model per shape and recipe, with the shapes of one device under `--parallel`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprec.costmodel import (
    break_even_tokens,
    break_even_width,
    load_device_profile,
    parse_parallel,
)
from autoprec.costmodel.parallel import Parallel, shard_gemm
from autoprec.errors import DeviceError
from autoprec.records import Basis, GemmShape, LayerKind, Option, Profile
from autoprec.records.devices import DeviceProfile
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
    try:
        device = load_device_profile(profile.device.name)
    except DeviceError:  # a user's own profile, given by its path, which the record does not keep
        return [f"from what size FP8 would pay on {profile.device.name} needs its profile by name"]
    is_compiled = profile.device.compile_mode != "eager"
    said = [_sentence(found, device, compiled=is_compiled) for found in losing[:MOST_SHAPES]]
    more = len(losing) - len(said)
    rest = f"; and {more} more {'shape' if more == 1 else 'shapes'}" if more else ""
    return [f"where FP8 does not pay on {device.title} it would from: {'; '.join(said)}{rest}"]


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


def _sentence(losing: _Losing, device: DeviceProfile, *, compiled: bool) -> str:
    found: dict[int, str] = {}
    for option in losing.options:
        if option.recipe is None or option.gemms_hp:
            continue
        tokens = break_even_tokens(
            device, losing.gemm.K, losing.gemm.N, recipe=option.recipe, compiled=compiled
        )
        if tokens is not None:
            found.setdefault(tokens, option.recipe.value)
    more = f" and {len(losing.names) - 1} more" if len(losing.names) > 1 else ""
    what = f"{losing.names[0]}{more} (K={losing.gemm.K} N={losing.gemm.N})"
    if not found:
        return f"{what}: no number of tokens{_width(losing, device, compiled=compiled)}"
    tokens = min(found)
    return f"{what}: {tokens} tokens a step with {found[tokens]}, here {losing.gemm.M}"


def _width(losing: _Losing, device: DeviceProfile, *, compiled: bool) -> str:
    recipes = dict.fromkeys(o.recipe for o in losing.options if o.recipe and not o.gemms_hp)
    M = losing.gemm.M
    widths = [break_even_width(device, M, recipe=r, compiled=compiled) for r in recipes if r]
    known = [width for width in widths if width is not None]
    return f" (at {M} tokens, width K=N={min(known)} would)" if known else ""
