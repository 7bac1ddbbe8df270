"""The stage: a warmed-up reference -> Sensitivity."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext

from autoprec.common.text import first_and_more, percent
from autoprec.common.versions import software_versions
from autoprec.device.random_state import random_state_kept
from autoprec.device.ranks import world_size
from autoprec.records.model import FP32, Option
from autoprec.records.sensitivity import (
    BatchEffect,
    Estimate,
    Island,
    JointMeasurement,
    Sensitivity,
    StepError,
    between_layers,
)
from autoprec.sensitivity.batching import measure_batch_effect
from autoprec.sensitivity.check import Checked, bf16_within, check_table, measure_bf16
from autoprec.sensitivity.estimates import DIVERGED
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.local import Cell, list_cells
from autoprec.sensitivity.reference import Reference, fp8_everywhere
from autoprec.sensitivity.repairs import with_shares
from autoprec.sensitivity.tables import Method, Table, make_table

LITTLE = 0.1  # of a gradient error; batches differ by more, and larger ones do not add up


@random_state_kept()
def measure_sensitivity(
    reference: Reference,
    *,
    options: Sequence[Option] | None = None,
    gemms_hp: bool = False,
    method: Method | None = None,
    run_tokens: int | None = None,
) -> Sensitivity:
    """Measure the gradient error of every layer x option, with standard errors.

    `options` are the FP8 options to measure (default: all that the spec's layers list), with
    `gemms_hp` also with GEMMs in BF16, `method` how (default: the cheaper one), and `run_tokens`
    those of an optimizer step of the planned run. Seed, model and these decide what is measured.
    """
    started = time.perf_counter()
    passes, spec = reference.passes, reference.spec
    cells = list_cells(spec, options, gemms_hp=gemms_hp)
    checked, activation_error, islands = _measure_table(reference, cells, method)
    table = checked.table
    statistics = with_shares(reference, table.rows, table.statistics)
    by_step = (*reference.early, *_error_now(reference, checked.joint, islands))
    batch_effect, floor = None, _measure_floor(reference)
    if run_tokens is not None and by_step:
        batch_effect = measure_batch_effect(reference, fp8_everywhere(spec), tokens=run_tokens)
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
        statistics=statistics,
        joint=checked.joint,
        table_check=checked.sentence,
        loss_curve=reference.loss_curve,
        software=software_versions(),
        notes=(*_notes(reference, table, floor), *_batch_notes(batch_effect)),
        by_step=by_step,
        batch_effect=batch_effect,
        schedule_steps=reference.schedule_steps,
    )


def _measure_table(
    reference: Reference, cells: Sequence[Cell], method: Method | None
) -> tuple[Checked, Estimate, tuple[Island, ...]]:
    """Measure the table and what plans pay beside it, and check their sum."""
    table, meter = make_table(reference, cells, method), JointMeter(reference)
    uniform = meter.measure_bf16()
    joint = uniform.estimate
    table = bf16_within(measure_bf16(reference, table, joint), joint)
    activation_error, islands = meter.measure_activations(table.rows, uniform)
    outside = between_layers(activation_error, islands)
    return check_table(meter, table, outside=outside), activation_error, islands


def _error_now(
    reference: Reference, joint: Sequence[JointMeasurement], islands: Sequence[Island]
) -> tuple[StepError, ...]:
    """Return the error of FP8 wherever it goes, from the table's check where that measured it.

    As the early one, with BF16 outside of layers: where FP32 there takes little, that is added.
    """
    step, plan = len(reference.loss_curve), tuple(fp8_everywhere(reference.spec).values())
    known = next((found.grad_error for found in joint if found.options == plan), None)
    outside = math.fsum(island.grad_error for island in islands if not island.names)
    if known is None or outside > LITTLE * known.mean:
        return reference.measure_step(step)
    error = known.model_copy(update={"mean": known.mean + outside})
    return (StepError(step=step, grad_error=error),)


def _measure_floor(reference: Reference) -> Estimate:
    """Return the error between two runs of the reference."""
    spec = reference.spec
    # nothing is run where the capture found that two runs agree bit for bit on this device
    if spec.is_deterministic and spec.device == str(reference.context.device):
        return Estimate(mean=0.0)
    return reference.measure_errors({"again": nullcontext}, batches=1)["again"]


def _notes(reference: Reference, table: Table, floor: Estimate) -> list[str]:
    notes = [reference.preconditioner.note] if reference.preconditioner.note else []
    if over := reference.passed_over:
        count, step = len(reference.batches) + over, len(reference.loss_curve)
        notes.append(
            f"after {step} steps {over} of the next {count} batches had no gradient (a loss that "
            "no weight changes, as a hinge at 0) and were passed over: gradient errors are those "
            "of the others"
        )
    if reference.context.workload.part.ranks < world_size():  # that share a batch
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
        notes.append(
            f"not finite, so set to {DIVERGED:g}: the gradient error of {first_and_more(rows)}"
        )
    if table.is_untold:
        notes.append(
            "the loss changes otherwise than its gradient says (a value that is detached, a hook, "
            "a straight-through estimator, a threshold), which probes take to be one: some rows "
            "were measured beside them"
        )
    if table.together:
        notes.append(
            "measured with their neighbours, as no gradient of the loss tells all that they do "
            "(no_grad, detached, differentiated again), so that single rows are a guess: "
            f"{first_and_more(table.together)}"
        )
    if table.refined:
        cells = [f"{name} {option.key}" for name, option in table.refined]
        notes.append(f"measured one by one after the probes: {first_and_more(cells)}")
    return notes


def _batch_notes(effect: BatchEffect | None) -> list[str]:
    if effect is None:
        return []
    at = f"at {effect.tokens} tokens per optimizer step"
    if effect.ratio is None:
        return [f"how large gradient errors are {at} is not known: {effect.reason}"]
    return [
        f"{at} gradient errors are taken to be {effect.ratio:.2g} times those of a batch of "
        f"{effect.batch_tokens}: {percent(effect.systematic.mean)} of the squared error and "
        f"{percent(effect.gradient.mean)} of the squared gradient are common to all batches"
    ]
