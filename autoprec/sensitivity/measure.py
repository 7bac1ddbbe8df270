"""The stage: a warmed-up reference -> Sensitivity; and whole assignments, all layers at once."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from autoprec.common.versions import software_versions
from autoprec.device.random_state import random_state_kept
from autoprec.errors import AutoprecError, PlanMismatchError
from autoprec.records import (
    APPLICABLE_RECIPES,
    BF16_O2,
    FP32,
    Estimate,
    Island,
    JointMeasurement,
    LayerSensitivity,
    Option,
    Precision,
    Recipe,
    Sensitivity,
)
from autoprec.runtime import install_options
from autoprec.sensitivity.islands import find_islands
from autoprec.sensitivity.local import list_cells
from autoprec.sensitivity.reference import DIVERGED, Reference
from autoprec.sensitivity.tables import Method, Table, make_table

JOINT_BATCHES = 2  # of these, for each assignment: the search measures a dozen
ACTIVATION_BATCHES = 1  # the activations' own error is far smaller than that of any FP8 plan


@random_state_kept()
def measure_sensitivity(
    reference: Reference, *, options: Sequence[Option] | None = None, method: Method | None = None
) -> Sensitivity:
    """Measure the gradient error of every layer x option, with standard errors.

    Args:
        reference: the warmed-up model; it carries the spec, whose options are the table's columns.
        options: the FP8 options to measure; default: all that the spec's layers list.
        method: how; default: the cheaper one.

    Raises:
        AutoprecError: delayed scaling is among the options, but the warm-up kept no history.
    """
    started = time.perf_counter()
    passes, spec = reference.passes, reference.spec
    cells = list_cells(spec, options)
    if not reference.history and any(option.recipe is Recipe.DELAYED for _, option in cells):
        raise AutoprecError(
            "delayed scaling needs the operands' magnitudes in the warm-up, but the reference was "
            "prepared without them; prepare it with `with_history`"
        )
    table = make_table(reference, cells, method)
    meter = JointMeter(reference)
    activation_error, islands = meter.measure_activations(table.rows)
    meter.fp32_outputs = tuple(name for island in islands for name in island.names)
    outside = activation_error.mean + sum(island.grad_error for island in islands)
    joint = measure_most_precise(meter, table.rows, outside=outside)
    floor = Estimate(mean=0.0)
    # nothing is run where the capture found that two runs agree bit for bit on this device
    if not (spec.is_deterministic and spec.device == str(reference.context.device)):
        floor = reference.measure_errors({"again": nullcontext}, batches=1)["again"]
    return Sensitivity(
        structure=spec.structure,
        reference=FP32,
        method=table.method,
        preconditioner=reference.preconditioner.name,
        batches=len(reference.batches),
        passes=reference.passes - passes,
        step_equivalents=(time.perf_counter() - started + reference.spent_s) / reference.step_s,
        warmup_steps=len(reference.loss_curve),
        checkpoint=reference.checkpoint,
        seed=reference.context.seed,
        rows=table.rows,
        activation_error=activation_error,
        islands=islands,
        floor=floor,
        statistics=table.statistics,
        joint=joint,
        loss_curve=reference.loss_curve,
        software=software_versions(),
        notes=tuple(_notes(reference, table, floor)),
    )


class JointMeter:
    """Measures whole assignments against one set of reference gradients, kept on the CPU.

    Costs one pass per batch for each new assignment and nothing for one seen before.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        batches: int = JOINT_BATCHES,
        fp32_outputs: Sequence[str] = (),
    ) -> None:
        """Take a reference that is warmed up, and how many of its batches to measure on.

        `fp32_outputs` are the layers of the sensitivity's islands.
        """
        self.reference = reference
        self.fp32_outputs = tuple(fp32_outputs)
        self.batches = batches
        self._measured: dict[tuple[tuple[Option, ...], int], Estimate] = {}
        # one set of gradients: those of the same batches are the same
        self._longer = replace(reference, batches=[*reference.batches, *reference.more])

    def measure(self, options: tuple[Option, ...], batches: int | None = None) -> Estimate:
        """Return the joint gradient error of `options`, in the order of the spec's layers.

        On so many batches, or on all that there are; by default on the meter's own.

        Raises:
            PlanMismatchError: not one option per layer, or a layer cannot run its option.
        """
        names = self.reference.spec.names
        if len(options) != len(names):
            raise PlanMismatchError(
                f"an assignment has one option per layer, {len(names)}, but {len(options)} came; "
                "give them in the order of the model spec"
            )
        batches = batches or self.batches
        if (options, batches) not in self._measured:
            by_name = dict(zip(names, options, strict=True))
            self._measured[options, batches] = self._measure(by_name, batches=batches)
        return self._measured[options, batches]

    def measure_activations(
        self, rows: Sequence[LayerSensitivity]
    ) -> tuple[Estimate, tuple[Island, ...]]:
        """Return the cost of uniform BF16 beyond its layers: the error of BF16 activations.

        With it come the islands where BF16 is too coarse, whose part is theirs.

        `rows` are measured with FP32 activations. Taken from the joint error of uniform BF16, the
        activations' part makes the table add up where most plans are, in deep models too: there,
        the errors of layers and activations are not independent (25 blocks: 40 % of the joint
        error of small subsets).
        """
        uniform = self.reference.spec.bf16_options
        joint = self._measure(uniform, batches=ACTIVATION_BATCHES)

        def with_fp32(names: Collection[str]) -> float:
            options = {**uniform, **dict.fromkeys(names, FP32)}
            return self._measure(options, batches=ACTIVATION_BATCHES, fp32_outputs=names).mean

        islands, left = find_islands(self.reference, rows, joint.mean, with_fp32)
        names = [name for island in islands for name in island.names]
        bf16 = [row for row in rows if row.option == BF16_O2 and row.name not in names]
        error = max(left - math.fsum(row.grad_error.mean for row in bf16), 0.0)
        return joint.model_copy(update={"mean": error}), islands

    @random_state_kept()
    def _measure(
        self,
        options: Mapping[str, Option],
        *,
        batches: int,
        fp32_outputs: Collection[str] | None = None,
    ) -> Estimate:
        is_longer = batches > len(self.reference.batches)
        reference = self._longer if is_longer else self.reference
        is_16_bit = any(o.precision is not Precision.FP32 for o in options.values())
        uncovered = [p.name for p in reference.spec.uncovered] if is_16_bit else []
        kept = self.fp32_outputs if fp32_outputs is None else fp32_outputs
        installed = partial(
            install_options, reference.model, options, uncovered=uncovered, fp32_outputs=kept
        )
        return reference.measure_errors({"joint": installed}, batches=batches)["joint"]


def measure_most_precise(
    meter: JointMeter, rows: Sequence[LayerSensitivity], *, outside: float
) -> tuple[JointMeasurement, ...]:
    """Measure FP8 wherever it goes, each layer in its most precise recipe, beside the sum of parts.

    It says how far the table adds up. Nothing is measured when no layer takes FP8.
    """
    fp8 = [row for row in rows if row.option.recipe in APPLICABLE_RECIPES]
    if not fp8:
        return ()
    ranked = sorted(fp8, key=lambda row: row.grad_error.mean)
    best = {row.name: row.option for row in reversed(ranked)}  # the most precise of each comes last
    table = {(row.name, row.option): row.grad_error.mean for row in rows}
    names = meter.reference.spec.names
    plan = tuple(best.get(name, BF16_O2) for name in names)
    parts = sum(table.get(cell, 0.0) for cell in zip(names, plan, strict=True))
    expected, measured = outside + parts, meter.measure(plan)
    joint = JointMeasurement(
        label="fp8_most_precise", options=plan, grad_error=measured, predicted_grad_error=expected
    )
    return (joint,)


def _notes(reference: Reference, table: Table, floor: Estimate) -> list[str]:
    notes = [reference.preconditioner.note] if reference.preconditioner.note else []
    if reference.splits_layers:
        notes.append(
            "tensor parallelism: each rank rounds its part of a sum to BF16, and so do the rows"
        )
    if floor.mean > 0.0:
        notes.append(
            "two runs of the reference differ: no gradient error below "
            f"{floor.mean:.1e} can be told from noise"
        )
    rows = [f"{r.name} {r.option.key}" for r in table.rows if r.grad_error.mean >= DIVERGED]
    if rows:
        notes.append(f"not finite, so set to {DIVERGED:g}: the gradient error of {', '.join(rows)}")
    if table.refined:
        cells = ", ".join(f"{name} {option.key}" for name, option in table.refined)
        notes.append(f"measured one by one after the probes: {cells}")
    if any(row.option.recipe is Recipe.DELAYED for row in table.rows):
        notes.append("delayed scaling is emulated, for comparison; no plan applies it")
    return notes
