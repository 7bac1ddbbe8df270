"""From what the probes showed to a table's rows: what each is, how sure, and of what parts."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from autoprec.common.recipes import Gemm
from autoprec.records.sensitivity import Estimate, LayerSensitivity
from autoprec.sensitivity.casts import staying_casts
from autoprec.sensitivity.doubts import scatter
from autoprec.sensitivity.estimates import DIVERGED, ratio_estimate
from autoprec.sensitivity.kinks import Key
from autoprec.sensitivity.local import Cell, components_of
from autoprec.sensitivity.probes import BatchProbe

# Of what is added: what probes make of kinks is too high by up to 1.6 (see kinks.py), and a choice
# that few tokens change is off by 2 to 3 on any two batches.
KINK_DOUBT, CHOICE_DOUBT = 0.5, 1.0


def make_rows(probes: Sequence[BatchProbe], cells: Sequence[Cell]) -> tuple[LayerSensitivity, ...]:
    """Return one row per cell, from what the probes showed.

    Per batch, an option's d'Pd is the sum over its components of sum_k z_k^2 (mean over probes,
    that of output corrected for kinks) plus what stays in the layer's own parameters. Its standard
    error has three parts: the scatter over batches and their codes, the probes' own noise if groups
    have nothing to do with each other, Var(z_k^2) = 2/3 E z_k^4, and a part of what kinks add.
    Where the response has few dimensions, groups do have, and two codes may agree by chance in a
    row: no row's is taken to be below the mean of all, relative to the row.
    """
    rows = []
    for name, option in cells:
        spreading = {
            gemm: [(name, component) for component in components]
            for gemm, components in components_of(option).items()
        }
        casts = staying_casts(option)
        staying = [probe.parameter_errors[name].get(casts, 0.0) for probe in probes]
        # what each square counts: kinks change that of an output's errors
        factors = dict.fromkeys(chain.from_iterable(spreading.values()), 1.0)
        if probes[0].steps is not None:
            output = spreading[Gemm.OUTPUT]
            square = _mean_square(probes, output)
            factors |= dict.fromkeys(output, probes[0].steps.correction(output, square))
        total = estimate(probes, factors, staying)
        own = math.fsum(staying) / math.fsum(probe.squared_norm for probe in probes)
        rows.append(
            LayerSensitivity(name=name, option=option, grad_error=total, staying=finite(own))
        )
    return _widened(rows, *added_shares(probes, rows))


def _widened(
    rows: Sequence[LayerSensitivity], kinks: Mapping[Cell, float], choices: Mapping[Cell, float]
) -> tuple[LayerSensitivity, ...]:
    """Return rows with what their own standard errors do not know: of kinks, and of other rows."""
    least = scatter([row for row in rows if row.option.is_fp8])
    found = []
    for row in rows:
        mean, stderr = row.grad_error.mean, row.grad_error.stderr
        if stderr is not None and mean < DIVERGED:
            stderr = mean * math.hypot(
                max(stderr / mean if mean > 0.0 else 0.0, least),
                KINK_DOUBT * kinks.get(row.cell, 0.0),
                CHOICE_DOUBT * choices.get(row.cell, 0.0),
            )
            row = row.model_copy(update={"grad_error": Estimate(mean=mean, stderr=stderr)})
        found.append(row)
    return tuple(found)


def added_shares(
    probes: Sequence[BatchProbe], rows: Sequence[LayerSensitivity]
) -> tuple[dict[Cell, float], dict[Cell, float]]:
    """Return the shares of each row that kinks and choices add; empty where there are none."""
    steps = probes[0].steps
    kinks = _shares(probes, rows, steps.added) if steps and steps.are_kinked else {}
    choices = _shares(probes, rows, steps.chosen) if steps and steps.jumps > 0.0 else {}
    return kinks, choices


def _shares(
    probes: Sequence[BatchProbe],
    rows: Sequence[LayerSensitivity],
    added: Callable[[Sequence[Key], float], float],
) -> dict[Cell, float]:
    """Return the part of each row that something adds to its errors of output."""
    found, scale = {}, probes[0].squared_norm
    for row in rows:
        keys = [(row.name, component) for component in components_of(row.option)[Gemm.OUTPUT]]
        if row.grad_error.mean > 0.0:
            share = added(keys, _mean_square(probes, keys)) / scale / row.grad_error.mean
            found[row.cell] = min(share, 1.0)
    return found


def finite(error: float) -> float:
    """Return an error that stays in a layer, 0 where it is not known: it is not finite."""
    return error if math.isfinite(error) else 0.0


def _mean_square(probes: Sequence[BatchProbe], keys: Sequence[Key]) -> float:
    """Return the mean over batches of the squares of these components."""
    return math.fsum(probe.squares[key] for probe in probes for key in keys) / len(probes)


def estimate(
    probes: Sequence[BatchProbe], factors: Mapping[Key, float], plus: Sequence[float]
) -> Estimate:
    """Return the gradient error of a layer's components, with both parts of its standard error."""
    scale = [probe.squared_norm for probe in probes]
    sums = [math.fsum(probe.squares[k] * f for k, f in factors.items()) for probe in probes]
    values = [s + p for s, p in zip(sums, plus, strict=True)]
    found = ratio_estimate(values, scale)  # its standard error: the scatter over batches
    if found.stderr is None or found.mean >= DIVERGED:
        return found
    # the probes' own noise: Var(sum_k z_k^2) over as many independent codes as were drawn
    codes = probes[0].probes * len(probes)
    fourth = [math.fsum(probe.fourths[k] * f * f for k, f in factors.items()) for probe in probes]
    variance = 2 / 3 * math.fsum(fourth) / len(fourth) / codes
    noise = math.sqrt(variance) / (math.fsum(scale) / len(scale))
    return Estimate(mean=found.mean, stderr=math.hypot(found.stderr, noise))
