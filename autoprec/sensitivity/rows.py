"""From what the probes showed to the rows of the table.

Per batch, an option's d'Pd is the sum over its components of sum_k z_k^2 (mean over probes) plus
what stays in the layer's own parameters. Its standard error has two parts: the scatter over
batches, and the probes' own noise, Var(z_k^2) = 2/3 E z_k^4, which batches that share a code share.
"""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from autoprec.records import Estimate, Gemm, LayerSensitivity, Option
from autoprec.sensitivity.estimates import DIVERGED_E, ratio_estimate
from autoprec.sensitivity.local import Component, components_of, grad_weight_key
from autoprec.sensitivity.probes import BatchShow

Key = tuple[str, Component]


def make_rows(
    shows: Sequence[BatchShow], cells: Sequence[tuple[str, Option]]
) -> tuple[LayerSensitivity, ...]:
    """Return one row per cell."""
    return tuple(_row(shows, name, option) for name, option in cells)


def _row(shows: Sequence[BatchShow], name: str, option: Option) -> LayerSensitivity:
    components = components_of(option)
    spreading = {
        gemm: [(name, component) for component in components[gemm]]
        for gemm in (Gemm.OUTPUT, Gemm.GRAD_INPUT)
    }
    key = (name, grad_weight_key(option))
    by_gemm = {gemm: _spreading(shows, keys) for gemm, keys in spreading.items()}
    scale = [show.squared for show in shows]
    staying = [show.parameter_errors.get(key, 0.0) for show in shows]
    by_gemm[Gemm.GRAD_WEIGHT] = ratio_estimate(staying, scale)
    keys = [k for keys in spreading.values() for k in keys]
    return LayerSensitivity(
        name=name,
        option=option,
        grad_error=_spreading(shows, keys, plus=staying),
        by_gemm=by_gemm,
    )


def _spreading(
    shows: Sequence[BatchShow], keys: Sequence[Key], *, plus: Sequence[float] | None = None
) -> Estimate:
    """Return the e of components, with both parts of its standard error."""
    scale = [show.squared for show in shows]
    sums = [_mean_power(show.products, keys, power=2) for show in shows]
    values = [s + p for s, p in zip(sums, plus or [0.0] * len(sums), strict=True)]
    found = ratio_estimate(values, scale)
    if found.stderr is None or found.mean >= DIVERGED_E:
        return found
    probes = max(len(show.products[key]) for show in shows for key in keys)
    codes = probes * math.ceil(len(shows) / 2)
    fourth = [_mean_power(show.products, keys, power=4) for show in shows]
    variance = 2 / 3 * math.fsum(fourth) / len(fourth) / codes
    noise = math.sqrt(variance) / (math.fsum(scale) / len(scale))
    return Estimate(mean=found.mean, stderr=math.hypot(found.stderr, noise))


def _mean_power(
    products: Mapping[Key, Sequence[Tensor]], keys: Sequence[Key], *, power: int
) -> float:
    return math.fsum(
        _mean([float(z.double().pow(power).sum()) for z in products[key]]) for key in keys
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
