"""What the sections of the page say, as rows of words and numbers."""

from collections.abc import Iterable
from dataclasses import dataclass

from autoprec.records import Conditions, DeviceFacts, Precision, StepTiming, Timing, Verdict
from autoprec.report.formats import (
    UNKNOWN,
    count_of,
    shown_bytes,
    shown_grad_error,
    shown_ms,
    shown_option,
    shown_ratio,
    shown_share,
    step_title,
)
from autoprec.report.runs import RunRecords
from autoprec.report.steps import Speedup, Step, predicted_and_measured
from autoprec.report.summary import Summary

VERDICT_WORDS = {
    Verdict.VERIFIED: "its loss gap is verified",
    Verdict.REFUTED: "but its loss gap is refuted",
    Verdict.INCONCLUSIVE: "its loss gap is not decided yet",
    Verdict.NOT_RUN: "its loss gap is not verified",
}


@dataclass(frozen=True)
class Card:
    """One figure of the summary: what it is, its value, its interval or origin, its basis."""

    title: str
    value: str
    beside: str
    basis: str
    kind: str = ""


def headline(run: RunRecords, found: Summary) -> str:
    """Return the result in one sentence."""
    if run.plan is None:
        return "No plan yet: this page shows what was measured so far"
    speedups = [
        f"{shown_ratio(found.speedups[label].value)} over {step_title(label)}"
        for label in ("fp32", "bf16_o2")
        if label in found.speedups
    ]
    words = VERDICT_WORDS[found.verdict]
    if not speedups:
        return f"A plan for {count_of(len(run.plan.layers), 'layer')}; {words}"
    return f"Step speedup {', '.join(speedups)}; {words}"


def summary_cards(run: RunRecords, found: Summary) -> list[Card]:
    """Return the figures that the page opens with, as far as they are known."""
    cards = [
        _speedup_card(f"Step speedup over {step_title(label)}", speedup)
        for label, speedup in found.speedups.items()
    ]
    if found.time_to_loss is not None:
        interval = _interval(found.time_to_loss)
        cards.append(
            Card(
                "Time-to-loss speedup over FP32",
                shown_ratio(found.time_to_loss.value),
                f"{interval}; step speedup / (1 + gradient error)".lstrip("; "),
                "predicted",
            )
        )
    return [*cards, *_loss_cards(run, found), *_memory_cards(run, found)]


def predicted_rows(run: RunRecords) -> list[tuple[str, str, str, str, str]]:
    """Return (step, predicted ms, measured ms, error, samples) where there are both."""
    return [
        (
            step_title(label),
            shown_ms(predicted),
            shown_ms(step.ms),
            shown_share((predicted - step.ms) / step.ms, sign=True) if step.ms else UNKNOWN,
            str(step.samples) if step.samples else UNKNOWN,
        )
        for label, (predicted, step) in predicted_and_measured(run).items()
    ]


def joint_rows(run: RunRecords) -> list[tuple[str, str, str, str]]:
    """Return (plan, sum of parts, measured at once, ratio) of the joint measurements."""
    rows = []
    for joint in run.sensitivity.joint if run.sensitivity else ():
        ratio = (
            joint.grad_error.mean / joint.predicted_grad_error
            if joint.predicted_grad_error
            else None
        )
        measured = shown_grad_error(joint.grad_error.mean, joint.grad_error.stderr)
        rows.append(
            (joint.label, shown_share(joint.predicted_grad_error), measured, shown_ratio(ratio))
        )
    return rows


def trial_rows(run: RunRecords) -> list[tuple[str, ...]]:
    """Return the trials of the study, fastest to the loss first."""
    trials = sorted(run.search.trials if run.search else (), key=lambda t: t.time_to_loss_ms)
    return [
        (
            str(trial.number),
            trial.source,
            shown_ms(trial.step_ms),
            f"{shown_share(trial.grad_error)} ({trial.grad_error_basis})",
            shown_ms(trial.time_to_loss_ms),
            ", ".join(
                f"{count} {precision}"
                for precision in Precision
                if (count := sum(o.precision is precision for o in trial.options))
            ),
            "yes" if trial.feasible else "no",
        )
        for trial in trials
    ]


def environment_rows(run: RunRecords) -> list[tuple[str, str]]:
    """Return the device, the software and the fingerprint, fact by fact."""
    rows: list[tuple[str, str]] = []
    if run.profile:
        rows += _device_rows(run.profile.device)
        model = run.profile.model
        rows += [
            ("tokens per step", f"{model.tokens_per_step:,}"),
            ("optimizer", model.optimizer),
            ("deterministic step", "yes" if model.is_deterministic else "no"),
            ("random forward (dropout)", "yes" if model.has_randomness else "no"),
        ]
    elif run.plan:
        made = run.plan.fingerprint
        rows += [("device", f"{made.device} {made.capability}".strip())]
        rows += [("tokens per step", f"{made.tokens_per_step:,}"), *made.software.items()]
    if run.plan:
        made = run.plan.fingerprint
        rows += [("model structure", made.structure), ("plan", run.plan.digest)]
        rows += [("parallel", made.parallel)] if made.parallel else []
        rows += [("kept by the user", ", ".join(run.plan.constraint.keep) or "nothing")]
    return rows


def condition_rows(run: RunRecords) -> list[tuple[str, ...]]:
    """Return clocks, power and temperature around each whole-step timing."""
    rows = []
    for where, steps in _timed_steps(run):
        for step in steps:
            timing, seen = step.timing, step.conditions
            counts = (f"{timing.samples}", f"{timing.rejected}")
            rows.append((where, step_title(step.label), *counts, _spread(timing), *_seen(seen)))
    return rows


def how_measured(run: RunRecords) -> list[str]:
    """Return sentences on how the numbers came about and what they cost."""
    said = []
    if run.profile:
        layers = [row.total for row in run.profile.layers if row.total]
        rejected = sum(timing.rejected for timing in layers)
        samples = sum(timing.samples for timing in layers)
        said.append(
            f"Layer times are {run.profile.basis}: {samples:,} samples kept and {rejected:,} "
            f"rejected over {count_of(len(layers), 'shape and option', 'shapes and options')}, "
            f"at a cost of {run.profile.step_equivalents:.1f} FP32 training steps"
        )
        if run.profile.compile_s:
            said.append(f"Compiling took {run.profile.compile_s:.1f} s, in no sample")
    said += _how_sensed(run)
    if run.search:
        said.append(
            f"The search measured {count_of(len(run.search.trials), 'whole plan')}, skipped "
            f"{run.search.duplicates_skipped} duplicates, seed {run.search.seed}, at a cost of "
            f"{run.search.step_equivalents:.1f} FP32 training steps"
        )
    if run.verification:
        proof = run.verification
        start = f"the checkpoint {proof.checkpoint}" if proof.checkpoint else "scratch"
        said.append(
            f"Verification branched from {start} after {proof.warmup_steps} warm-up steps, "
            f"{proof.branch_steps} annealed steps a branch, every branch evaluated in FP32 on the "
            "same held-out batches"
        )
    return said


def _speedup_card(title: str, speedup: Speedup) -> Card:
    return Card(
        title,
        shown_ratio(speedup.value),
        _interval(speedup),
        speedup.basis.value,
        _speedup_kind(speedup),
    )


def _speedup_kind(speedup: Speedup) -> str:
    """Return `good` or `bad` where the whole interval is on one side of 1."""
    if (speedup.value if speedup.low is None else speedup.low) > 1.0:
        return "good"
    return "bad" if (speedup.value if speedup.high is None else speedup.high) < 1.0 else ""


def _interval(speedup: Speedup) -> str:
    if speedup.low is None or speedup.high is None:
        return ""
    name = "95 % interval" if speedup.basis.value == "measured" else "interval"
    return f"{name} {shown_ratio(speedup.low)} to {shown_ratio(speedup.high)}"


def _loss_cards(run: RunRecords, found: Summary) -> Iterable[Card]:
    if found.grad_error is not None:
        error = (
            f" +- {shown_share(found.grad_error.stderr)}"
            if found.grad_error.stderr is not None
            else ""
        )
        yield Card(
            "Extra steps to the same loss",
            shown_share(found.extra_steps, sign=True),
            f"gradient error {shown_share(found.grad_error.mean)}{error}",
            found.grad_error_basis.value,
        )
    if found.gap is not None:
        gap = found.gap
        yield Card(
            "Loss gap to FP32",
            shown_share(gap.mean, sign=True),
            f"{100 * gap.confidence:.0f} % interval {shown_share(gap.low, sign=True)} to "
            f"{shown_share(gap.high, sign=True)}, {count_of(gap.seeds, 'seed')}; tolerance "
            f"{shown_share(found.loss_tolerance)}",
            "measured",
            found.verdict.value,
        )


def _memory_cards(run: RunRecords, found: Summary) -> Iterable[Card]:
    steps = found.steps
    plan, base = steps.get("plan"), steps.get("bf16_o2")
    peak, baseline, basis = _peak(plan), _peak(base), "measured"
    if peak is None and baseline is not None and run.plan and run.plan.predicted:
        peak, basis = run.plan.predicted.memory_bytes, "predicted"
    if peak is not None:
        beside = f"BF16 O2 {shown_bytes(baseline)}" if baseline is not None else ""
        yield Card("Peak memory of a step", shown_bytes(peak), beside, basis)


def _peak(step: Step | None) -> int | None:
    return step.record.peak_bytes if step and step.record else None


def _device_rows(device: DeviceFacts) -> list[tuple[str, str]]:
    return [
        ("device", f"{device.name} ({device.kind} {device.capability})"),
        ("memory", shown_bytes(device.memory_bytes)),
        ("driver", device.driver or UNKNOWN),
        ("threads", str(device.threads)),
        ("TF32", "allowed" if device.allow_tf32 else "off"),
        ("compile mode", device.compile_mode),
        ("FP8 recipes", ", ".join(device.fp8_recipes) or f"none: {device.fp8_reason}"),
        *device.software.items(),
    ]


def _timed_steps(run: RunRecords) -> Iterable[tuple[str, tuple[StepTiming, ...]]]:
    if run.profile:
        yield "profile", run.profile.steps
    if run.verification:
        yield "verification", run.verification.steps


def _spread(timing: Timing) -> str:
    if not timing.samples:
        return UNKNOWN
    return shown_share((timing.p80_ms - timing.p20_ms) / (timing.median_ms or 1.0))


def _seen(seen: Conditions | None) -> tuple[str, ...]:
    if seen is None:
        return (UNKNOWN,) * 4
    throttled = ", ".join(seen.throttle_reasons) or "none"
    limit = "" if seen.power_limit_w is None else f" of {seen.power_limit_w:.0f} W"
    return (
        UNKNOWN if seen.sm_clock_mhz is None else f"{seen.sm_clock_mhz} MHz",
        UNKNOWN if seen.power_w is None else f"{seen.power_w:.0f}{limit}",
        UNKNOWN if seen.temperature_c is None else f"{seen.temperature_c} C",
        throttled,
    )


def _how_sensed(run: RunRecords) -> Iterable[str]:
    if run.sensitivity is None:
        return
    record = run.sensitivity
    method = record.method.replace("_", " ")
    yield (
        f"Sensitivity ({method}, P = {record.preconditioner}, against "
        f"{shown_option(record.reference)}) used {count_of(record.batches, 'batch', 'batches')} "
        f"after {record.warmup_steps} warm-up steps: {record.passes} passes, "
        f"{record.step_equivalents:.1f} FP32 training steps"
    )
    yield (
        "BF16 activations with all layers in FP32 have a gradient error of "
        f"{shown_share(record.activation_error.mean)}; two runs of the reference differ by "
        f"{shown_share(record.floor.mean)}"
    )
