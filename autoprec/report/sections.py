"""The rows of words and numbers that the page and the terminal show, but for the layers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autoprec.records import (
    APPLICABLE_RECIPES,
    BF16_O2,
    Conditions,
    DeviceFacts,
    Sensitivity,
    Verification,
)
from autoprec.report import formats
from autoprec.report.formats import UNKNOWN, count_of, step_title
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import Speedup
from autoprec.report.summary import Summary
from autoprec.report.text_table import Table
from autoprec.sensitivity.gap import HORIZON_STEPS, predicted_loss_gap


@dataclass(frozen=True)
class Card:
    """One figure of the summary: what it is, its value, its interval or origin, its basis."""

    title: str
    value: str
    beside: str
    basis: str
    kind: str = ""


def summary_cards(found: Summary) -> list[Card]:
    """Return the figures that the page opens with, as far as they are known."""
    cards = []
    for label, speedup in found.speedups.items():
        title, basis = f"Step speedup over {step_title(label)}", speedup.basis.value
        name = "95 % interval" if basis == "measured" else "interval"
        beside = f"{name} {interval}" if (interval := _interval(speedup)) else ""
        value, kind = formats.ratio(speedup.value), _speedup_kind(speedup)
        cards.append(Card(title, value, beside, basis, kind))
    if found.time_to_loss is not None:
        interval = _interval(found.time_to_loss)
        beside = f"interval {interval}; " if interval else ""
        beside += "step speedup / (1 + gradient error)"
        value = formats.ratio(found.time_to_loss.value)
        cards.append(Card("Time-to-loss speedup over FP32", value, beside, "predicted"))
    return [*cards, *_loss_cards(found), *_memory_cards(found)]


def recipe_table(sensitivity: Sensitivity) -> Table:
    """Return what each FP8 recipe costs in convergence: FP8 wherever it goes, BF16 elsewhere."""
    rows = []
    for option in dict.fromkeys(row.option for row in sensitivity.rows):
        if not option.is_fp8 or option.gemms_hp:
            continue
        own = {row.name: row for row in sensitivity.rows if row.option == option}
        others = [r for r in sensitivity.rows if r.option == BF16_O2 and r.name not in own]
        parts = sum(max(row.grad_error.mean, 0.0) for row in (*own.values(), *others))
        grad_error = sensitivity.activation_error.mean + parts
        gap = predicted_loss_gap(sensitivity, grad_error, HORIZON_STEPS)
        is_applied = option.recipe in APPLICABLE_RECIPES
        title = formats.option(option)
        title += "" if is_applied else " (for comparison; no plan applies it)"
        shares = (formats.share(grad_error), formats.share(gap, sign=True))
        rows.append((title, str(len(own)), *shares))
    gap_title = f"predicted loss gap, {HORIZON_STEPS} steps"
    heads = ("recipe", "linears", "gradient error, sum of parts", gap_title)
    return Table(heads, rows, numbers=(1, 2, 3))


def environment_table(run: RunRecords) -> Table:
    """Return the device, the software and the fingerprint, fact by fact."""
    facts: dict[str, str] = {}
    made = run.plan.fingerprint if run.plan else None
    if run.profile:
        model, device = run.profile.model, run.profile.device
        facts = device_facts(device) | {
            "compile mode": device.compile_mode,
            "tokens per step": f"{model.tokens_per_step:,}",
            "optimizer": model.optimizer,
            "deterministic step": _yes(model.is_deterministic),
            "random forward (dropout)": _yes(model.has_randomness),
        }
    elif made:
        facts["device"] = f"{made.device} {made.capability}".strip()
        facts |= {"tokens per step": f"{made.tokens_per_step:,}", **made.software}
    if run.plan and made:
        facts |= {"model structure": made.structure, "plan": run.plan.digest}
        facts |= {"parallel": made.parallel} if made.parallel else {}
        facts["kept by the user"] = ", ".join(run.plan.constraint.keep) or "nothing"
    return fact_table(facts)


def fact_table(facts: Mapping[str, str]) -> Table:
    """Return facts one below the other."""
    return Table(("fact", "value"), list(facts.items()), widest=1)


def device_facts(device: DeviceFacts) -> dict[str, str]:
    """Return what a device is, fact by fact."""
    return {
        "device": f"{device.name} ({device.kind} {device.capability})",
        "memory": formats.size(device.memory_bytes),
        "driver": device.driver or UNKNOWN,
        "threads": str(device.threads),
        "TF32": "allowed" if device.allow_tf32 else "off",
        "FP8 recipes": ", ".join(device.fp8_recipes) or f"none: {device.fp8_reason}",
        **device.software,
    }


def condition_table(run: RunRecords) -> Table:
    """Return clocks, power and temperature around each whole-step timing."""
    heads = "stage|step|samples|rejected|spread p80-p20|SM clock|power|temperature|throttled"
    rows = []
    for where, record in (("profile", run.profile), ("verification", run.verification)):
        for step in record.steps if record else ():
            timing, title = step.timing, step_title(step.label)
            spread = (timing.p80_ms - timing.p20_ms) / (timing.median_ms or 1.0)
            counts = (f"{timing.samples}", f"{timing.rejected}")
            shown = formats.share(spread if timing.samples else None)
            rows.append((where, title, *counts, shown, *_condition_cells(step.conditions)))
    return Table(heads.split("|"), rows, numbers=range(2, 8))


def seed_gaps(verification: Verification, label: str) -> dict[int, float]:
    """Return the relative gap of each seed whose branch and reference were evaluated."""
    references = {b.seed: b.eval_loss for b in verification.branches if b.label == "reference"}
    return {
        branch.seed: (branch.eval_loss - reference) / abs(reference)
        for branch in verification.branches
        if branch.label == label
        and branch.eval_loss is not None
        and (reference := references.get(branch.seed))
    }


def how_measured(run: RunRecords) -> Iterator[str]:
    """Yield sentences on how the numbers came about and what they cost."""
    if run.profile:
        timings = [row.total for row in run.profile.layers if row.total]
        rejected = sum(timing.rejected for timing in timings)
        samples = sum(timing.samples for timing in timings)
        yield (
            f"Layer times are {run.profile.basis}: {samples:,} samples kept and {rejected:,} "
            f"rejected over {count_of(len(timings), 'shape and option', 'shapes and options')}, "
            f"at a cost of {run.profile.step_equivalents:.1f} FP32 training steps"
        )
        if run.profile.compile_s:
            yield f"Compiling took {run.profile.compile_s:.1f} s, in no sample"
    if record := run.sensitivity:
        yield (
            f"Sensitivity ({record.method.replace('_', ' ')}, P = {record.preconditioner}, against "
            f"{record.reference}) used {count_of(record.batches, 'batch', 'batches')} "
            f"after {record.warmup_steps} warm-up steps: {record.passes} passes, "
            f"{record.step_equivalents:.1f} FP32 training steps"
        )
        yield (
            "BF16 activations with all layers in FP32 have a gradient error of "
            f"{formats.share(record.activation_error.mean)}; two runs of the reference differ by "
            f"{formats.share(record.floor.mean)}"
        )
    if search := run.search:
        yield (
            f"The search measured {count_of(len(search.trials), 'whole plan')}, skipped "
            f"{search.duplicates_skipped} duplicates, seed {search.seed}, at a cost of "
            f"{search.step_equivalents:.1f} FP32 training steps"
        )
    if proof := run.verification:
        start = f"the checkpoint {proof.checkpoint}" if proof.checkpoint else "scratch"
        yield (
            f"Verification branched from {start} after {proof.warmup_steps} warm-up steps, "
            f"{proof.branch_steps} annealed steps a branch, every branch evaluated in FP32 on the "
            "same held-out batches"
        )


def _speedup_kind(speedup: Speedup) -> str:
    """Return `good` or `bad` where the whole interval is on one side of 1."""
    if (speedup.value if speedup.low is None else speedup.low) > 1.0:
        return "good"
    return "bad" if (speedup.value if speedup.high is None else speedup.high) < 1.0 else ""


def _interval(speedup: Speedup) -> str:
    return formats.interval(speedup.low, speedup.high, formats.ratio)


def _loss_cards(found: Summary) -> Iterator[Card]:
    if found.grad_error is not None:
        steps = formats.share(found.extra_steps, sign=True)
        beside = f"gradient error {formats.grad_error(found.grad_error)}"
        yield Card("Extra steps to the same loss", steps, beside, found.grad_error_basis.value)
    if found.gap is not None:
        mean, _, interval = formats.gap(found.gap).partition(" (")
        beside = f"{interval.rstrip(')')}; tolerance {formats.share(found.loss_tolerance)}"
        yield Card("Loss gap to FP32", mean, beside, "measured", found.verdict.value)


def _memory_cards(found: Summary) -> Iterator[Card]:
    plan, base = found.steps.get("plan"), found.steps.get("bf16_o2")
    peak, basis = plan.peak_bytes if plan else None, "measured"
    baseline, predicted = base.peak_bytes if base else None, found.run.plan
    if peak is None and baseline is not None and predicted and predicted.predicted:
        peak, basis = predicted.predicted.memory_bytes, "predicted"
    if peak is not None:
        beside = f"BF16 O2 {formats.size(baseline)}" if baseline is not None else ""
        yield Card("Peak memory of a step", formats.size(peak), beside, basis)


def _condition_cells(seen: Conditions | None) -> tuple[str, ...]:
    if seen is None:
        return (UNKNOWN,) * 4
    limit = "" if seen.power_limit_w is None else f" of {seen.power_limit_w:.0f} W"
    return (
        UNKNOWN if seen.sm_clock_mhz is None else f"{seen.sm_clock_mhz} MHz",
        UNKNOWN if seen.power_w is None else f"{seen.power_w:.0f}{limit}",
        UNKNOWN if seen.temperature_c is None else f"{seen.temperature_c} C",
        ", ".join(seen.throttle_reasons) or "none",
    )


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"
