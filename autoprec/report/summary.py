"""The result of a run in one value: what `tune --json` prints and the report opens with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprec.records import Basis, Estimate, LossGap, Precision, Verdict
from autoprec.report.answers import fp8_answer, memory_answer, verdict_sentence
from autoprec.report.runs import RunRecords
from autoprec.report.steps import BASELINES, Speedup, Step, plan_speedups, plan_steps
from autoprec.report.table import LayerRow, layer_rows

STEP_LABELS = ("plan", "fp32", "bf16_o2", "autocast_bf16")


@dataclass(frozen=True)
class Summary:
    """What a run found. `extra_steps` are per step; `time_to_loss` is against FP32."""

    rows: tuple[LayerRow, ...]
    counts: Mapping[Precision, int]
    steps: Mapping[str, Step]
    speedups: Mapping[str, Speedup]
    grad_error: Estimate | None
    grad_error_basis: Basis
    extra_steps: float | None
    time_to_loss: Speedup | None
    verdict: Verdict
    verdict_sentence: str
    gap: LossGap | None
    control_gap: LossGap | None
    loss_tolerance: float | None
    fp8_answer: str
    memory_answer: str


def summarise_run(run: RunRecords) -> Summary:
    """Return the summary of a run; parts that no stage made are None."""
    rows, speedups = layer_rows(run), plan_speedups(run)
    grad_error = plan_grad_error(run)
    extra_steps = None if grad_error is None else max(grad_error.mean, 0.0)
    vs_fp32 = speedups.get("fp32")
    known = vs_fp32 is not None and extra_steps is not None
    verified, certificate = run.verification, run.plan.certificate if run.plan else None
    proof = verified or certificate
    constraint = run.plan.constraint.loss_tolerance if run.plan else None
    return Summary(
        rows=rows,
        counts={precision: _count(rows, precision) for precision in Precision},
        steps=plan_steps(run),
        speedups=speedups,
        grad_error=grad_error,
        grad_error_basis=run.plan.grad_error_basis if run.plan else Basis.UNKNOWN,
        extra_steps=extra_steps,
        time_to_loss=vs_fp32.discounted(extra_steps or 0.0) if known and vs_fp32 else None,
        verdict=proof.verdict if proof else Verdict.NOT_RUN,
        verdict_sentence=verdict_sentence(run),
        gap=proof.gap if proof else None,
        control_gap=verified.control_gap if verified else None,
        loss_tolerance=proof.loss_tolerance if proof else constraint,
        fp8_answer=fp8_answer(run),
        memory_answer=memory_answer(run),
    )


def plan_grad_error(run: RunRecords) -> Estimate | None:
    """Return the plan's e, with its standard error where the joint measurement is on record."""
    if run.plan is None or run.plan.grad_error is None:
        return None
    for joint in run.sensitivity.joint if run.sensitivity else ():
        if joint.options == run.plan.options:
            return Estimate(mean=run.plan.grad_error, stderr=joint.grad_error.stderr)
    return Estimate(mean=run.plan.grad_error)


def summary_object(run: RunRecords, out: Path | str) -> dict[str, Any]:  # Any: JSON values
    """Return the one object that `tune --json` prints; what is not known is null."""
    found = summarise_run(run)
    return {
        "step_ms": {label: _step_ms(found, label) for label in STEP_LABELS},
        "step_basis": {label: _step_basis(found, label) for label in STEP_LABELS},
        "step_speedup": {f"vs_{label}": _speedup(found, label) for label in BASELINES},
        "step_speedup_interval": {f"vs_{label}": _interval(found, label) for label in BASELINES},
        "grad_error": found.grad_error.mean if found.grad_error else None,
        "grad_error_basis": found.grad_error_basis.value,
        "extra_steps": found.extra_steps,
        "time_to_loss_speedup": found.time_to_loss.value if found.time_to_loss else None,
        "loss_gap": _gap_object(found.gap),
        "loss_tolerance": found.loss_tolerance,
        "verdict": found.verdict.value,
        "layers": {precision.value: count for precision, count in found.counts.items()},
        "fp8": found.fp8_answer,
        "memory": found.memory_answer,
        "out": str(out),
        "plan": str(Path(out) / "plan.json") if run.plan else None,
    }


def apply_line(out: Path | str | None) -> str:
    """Return the one line to paste."""
    path = json.dumps((Path(out or ".") / "plan.json").as_posix(), ensure_ascii=False)
    return f"model, optimizer = autoprec.apply({path}, model, optimizer)"


def _count(rows: tuple[LayerRow, ...], precision: Precision) -> int:
    return sum(row.option is not None and row.option.precision is precision for row in rows)


def _step_ms(found: Summary, label: str) -> float | None:
    return found.steps[label].ms if label in found.steps else None


def _step_basis(found: Summary, label: str) -> str | None:
    return found.steps[label].basis.value if label in found.steps else None


def _speedup(found: Summary, label: str) -> float | None:
    return found.speedups[label].value if label in found.speedups else None


def _interval(found: Summary, label: str) -> list[float] | None:
    speedup = found.speedups.get(label)
    if speedup is None or speedup.low is None or speedup.high is None:
        return None
    return [speedup.low, speedup.high]


def _gap_object(gap: LossGap | None) -> dict[str, float | int | None]:
    return {
        "mean": gap.mean if gap else None,
        "low": gap.low if gap else None,
        "high": gap.high if gap else None,
        "confidence": gap.confidence if gap else None,
        "seeds": gap.seeds if gap else 0,
    }
