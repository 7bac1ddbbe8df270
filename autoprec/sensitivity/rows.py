"""From what the probes showed to the rows of the table.

Per batch, an option's d'Pd is the sum over its components of sum_k z_k^2 (mean over probes) plus
what stays in the layer's own parameters. Its standard error has two parts: the scatter over
batches, and the probes' own noise, Var(z_k^2) = 2/3 E z_k^4, which batches that share a code share.
"""

import math
from collections.abc import Sequence
from itertools import chain

from autoprec.records import Estimate, Gemm, LayerSensitivity, Option
from autoprec.sensitivity.casts import gemm_casts
from autoprec.sensitivity.estimates import DIVERGED, ratio_estimate
from autoprec.sensitivity.local import Component, components_of
from autoprec.sensitivity.probes import BatchProbe


def make_rows(
    probes: Sequence[BatchProbe], cells: Sequence[tuple[str, Option]]
) -> tuple[LayerSensitivity, ...]:
    """Return one row per cell."""
    return tuple(_row(probes, name, option) for name, option in cells)


def _row(probes: Sequence[BatchProbe], name: str, option: Option) -> LayerSensitivity:
    spreading = components_of(option)
    key = (name, gemm_casts(option).get(Gemm.GRAD_WEIGHT, ()))
    staying = [probe.parameter_errors.get(key, 0.0) for probe in probes]
    by_gemm = {gemm: _estimate(probes, name, some) for gemm, some in spreading.items()}
    by_gemm[Gemm.GRAD_WEIGHT] = ratio_estimate(staying, [probe.squared_norm for probe in probes])
    every = list(chain.from_iterable(spreading.values()))
    grad_error = _estimate(probes, name, every, plus=staying)
    return LayerSensitivity(name=name, option=option, grad_error=grad_error, by_gemm=by_gemm)


def _estimate(
    probes: Sequence[BatchProbe],
    name: str,
    components: Sequence[Component],
    *,
    plus: Sequence[float] | None = None,
) -> Estimate:
    """Return the gradient error of a layer's components, with both parts of its standard error."""
    keys = [(name, component) for component in components]
    scale = [probe.squared_norm for probe in probes]
    sums = [_mean_power(probe, keys, power=2) for probe in probes]
    values = [s + p for s, p in zip(sums, plus or [0.0] * len(sums), strict=True)]
    found = ratio_estimate(values, scale)  # its standard error: the scatter over batches
    if found.stderr is None or found.mean >= DIVERGED:
        return found
    # the probes' own noise: Var(sum_k z_k^2) over as many independent codes as were drawn
    codes = max(len(probe.products[key]) for probe in probes for key in keys)
    codes *= math.ceil(len(probes) / 2)
    fourth = [_mean_power(probe, keys, power=4) for probe in probes]
    variance = 2 / 3 * math.fsum(fourth) / len(fourth) / codes
    noise = math.sqrt(variance) / (math.fsum(scale) / len(scale))
    return Estimate(mean=found.mean, stderr=math.hypot(found.stderr, noise))


def _mean_power(probe: BatchProbe, keys: Sequence[tuple[str, Component]], *, power: int) -> float:
    """Return the sum over components and groups of z^power, each the mean over the passes."""
    sums = []
    for key in keys:
        products = probe.products[key]
        powers = math.fsum(float(z.double().pow(power).sum()) for z in products)
        sums.append(powers / len(products))
    return math.fsum(sums)
