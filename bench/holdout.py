"""Predictions for rows that the fit has not seen: sources left out, or random halves of one."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from datasheets import BY_NAME
from fitting import machine_from
from modelfit import (
    BEST_COVERED,
    Values,
    constants_of,
    fit_all,
    fit_device,
    fit_everything,
    make_profile,
)
from published import GRID_SOURCE, Kind, Observation, Shape
from trainings import Training

from autoprec.records.devices import Machine

START_ERRORS = {
    "gemm_error_low": -0.15,
    "gemm_error_high": 0.15,
    "speedup_error_low": -0.12,
    "speedup_error_high": 0.12,
    "time_error": 0.25,
    "step_error": 0.10,
}
HALVINGS = 5
ROUNDING = 1e-9
GEMM_KINDS = (Kind.GEMM, Kind.GEMMS)
TIME_KINDS = (Kind.BF16_US, Kind.FP8_US, Kind.BF16_LINEAR_US)


@dataclass(frozen=True)
class Held:
    """A row that was not fitted, with what was predicted for it."""

    source: str
    device: str
    label: str
    predicted: float
    actual: float

    @property
    def ratio(self) -> float:
        """Published over predicted."""
        return self.actual / self.predicted


def machines(rows: Sequence[Observation], devices: Iterable[str]) -> dict[str, Machine]:
    """Return these devices' machines as fitted to these rows."""
    fitted = fit_all(rows, devices)
    return {
        name: machine_from(constants_of(BY_NAME[name], values, START_ERRORS))
        for name, values in fitted.items()
    }


def leave_sources_out(
    rows: Sequence[Observation], kinds: Iterable[Kind], *, devices: Sequence[str] = (BEST_COVERED,)
) -> list[Held]:
    """Return predictions for rows of those kinds and devices, their whole source left out.

    The grid has scores of its own (`hold_out_grid`): it would outnumber the rest.
    """
    wanted = [
        row
        for row in rows
        if row.kind in tuple(kinds) and row.device in devices and row.source != GRID_SOURCE
    ]
    held = []
    for source in sorted({row.source for row in wanted}):
        left_out = [row for row in wanted if row.source == source]
        kept = [row for row in rows if row.source != source]
        fitted = machines(kept, {row.device for row in left_out})
        held += [_held(row, fitted[row.device]) for row in left_out]
    return held


def halve_source(rows: Sequence[Observation], source: str, kinds: Iterable[Kind]) -> list[Held]:
    """Return predictions for random halves of a source's rows, fitted to all other rows."""
    kinds = tuple(kinds)
    own = [row for row in rows if row.source == source and row.kind in kinds]
    held = []
    for seed in range(HALVINGS):
        shuffled = random.Random(seed).sample(own, len(own))
        left_out = shuffled[: len(own) // 2]
        cases = {_case(row) for row in left_out}
        fitted = machines(
            [
                row
                for row in rows
                if row not in left_out and not (row.kind in TIME_KINDS and _case(row) in cases)
            ],
            {row.device for row in left_out},
        )
        held += [_held(row, fitted[row.device]) for row in left_out]
    return held


def hold_out_grid(rows: Sequence[Observation], device: str) -> dict[str, list[Held]]:
    """Return predictions for a device's grid: fitted, and with parts of it or all of it held out.

    A slice is one value of a dimension, on every GEMM of the grid that has it.
    """
    sheet = BY_NAME[device]
    parent = fit_all(rows, [sheet.parent])[sheet.parent]
    own = [row for row in rows if row.device == device and row.source == GRID_SOURCE]
    others = [row for row in rows if row not in own]
    shapes = sorted({row.shapes[0] for row in own})
    half = set(random.Random(0).sample(shapes, len(shapes) // 2))
    parts = {"fitted": [], "whole device": [set(shapes)], "halves": [half, set(shapes) - half]}
    for axis, letter in enumerate("MKN"):
        sizes = sorted({shape[axis] for shape in shapes})
        parts[f"slices of {letter}"] = [{s for s in shapes if s[axis] == n} for n in sizes]

    def predicted(left_out: set[Shape]) -> list[Held]:
        kept = [row for row in own if row.shapes[0] not in left_out]
        values = fit_device(sheet, parent, [*others, *kept])
        machine = machine_from(constants_of(sheet, values, START_ERRORS))
        told = left_out or set(shapes)
        return [_held(row, machine) for row in own if row.shapes[0] in told]

    return {
        label: [held for part in left_out or [set()] for held in predicted(part)]
        for label, left_out in parts.items()
    }


def leave_training_sources_out(rows: Sequence[Observation], runs: Sequence[Training]) -> list[Held]:
    """Return predicted whole-training speedups, the runs of their source left out."""
    held = []
    for source in sorted({run.source for run in runs}):
        kept = [run for run in runs if run.source != source]
        left_out = [run for run in runs if run.source == source]
        known = [row for row in rows if row.source != source]
        fitted = fit_everything(known, kept, {run.device for run in left_out})
        held += [_held_run(run, fitted) for run in left_out]
    return held


def _case(row: Observation) -> tuple[object, ...]:
    """Return what a ratio shares with the two times that it was made of."""
    return row.source, row.shapes, row.recipe, row.is_fast


def _held(row: Observation, machine: Machine) -> Held:
    label = f"{row.kind} {row.recipe} {'x'.join(map(str, row.shapes[0]))}"
    return Held(row.source, row.device, label, row.predict(machine), row.value)


def _held_run(run: Training, fitted: Mapping[str, Values]) -> Held:
    sheet = BY_NAME[run.device]
    constants = constants_of(sheet, fitted[run.device], START_ERRORS)
    profile = make_profile(sheet, fitted[run.device], (), START_ERRORS)
    speedup, _ = run.predict(machine_from(constants), profile)
    return Held(run.source, run.device, str(run), speedup, run.speedup)


def absolute_errors(held: Sequence[Held]) -> dict[str, list[float]]:
    """Return how far off predictions are, by source."""
    groups: dict[str, list[float]] = {}
    for row in held:
        groups.setdefault(row.source, []).append(abs(row.predicted - row.actual))
    return groups


def covering(values: Mapping[str, Sequence[float]], share: float) -> float:
    """Return the width that covers at least `share` of the errors on one more source.

    Hierarchical conformal prediction (Lee, Barber and Willett 2023): sources count alike, and the
    one not seen counts as one that is never covered, so the level rises by (n + 1) / n.
    """
    level = share * (len(values) + 1) / len(values)
    weighted = sorted((value, 1 / len(group)) for group in values.values() for value in group)
    passed = 0.0
    for value, weight in weighted:
        passed += weight / len(values)
        if passed >= level - ROUNDING:
            return value
    return weighted[-1][0]


def quantile(values: Mapping[str, Sequence[float]], share: float) -> float:
    """Return a quantile of grouped values; a group (source) weighs the root of its size."""
    whole = sum(math.sqrt(len(group)) for group in values.values())
    weighted = sorted(
        (value, 1 / math.sqrt(len(group)) / whole) for group in values.values() for value in group
    )
    passed = 0.0
    for value, weight in weighted:
        passed += weight
        if passed >= share:
            return value
    return weighted[-1][0]
