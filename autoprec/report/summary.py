"""The result of a run in one value: what `tune --json` prints and the report opens with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.records import Basis, Estimate, LossGap, Precision, Verdict
from autoprec.report import formats
from autoprec.report.answers import fp8_answer, memory_answer, verdict_sentence
from autoprec.report.formats import count_of, step_title
from autoprec.report.layer_frame import layers_frame
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import BASELINES, Speedup, Step, plan_speedups, plan_steps

if TYPE_CHECKING:
    import pandas as pd

STEP_LABELS = ("plan", "fp32", "bf16_o2", "autocast_bf16")
VERDICT_WORDS = {
    Verdict.VERIFIED: "its loss gap is verified",
    Verdict.REFUTED: "but its loss gap is refuted",
    Verdict.INCONCLUSIVE: "its loss gap is not decided yet",
    Verdict.NOT_RUN: "its loss gap is not verified",
}


@dataclass(frozen=True)
class Summary:
    """What a run found. `extra_steps` are per step; `time_to_loss` is against FP32."""

    layers: "pd.DataFrame"
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

    @property
    def counted(self) -> str:
        """The layers in each precision, in words; "" without a plan."""
        counts = [f"{count} in {precision}" for precision, count in self.counts.items() if count]
        return f"{count_of(len(self.layers), 'layer')}: {', '.join(counts)}" if counts else ""

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        if not any(self.counts.values()):
            return "No plan yet: this page shows what was measured so far"
        speedups = [
            f"{formats.ratio(self.speedups[label].value)} over {step_title(label)}"
            for label in ("fp32", "bf16_o2")
            if label in self.speedups
        ]
        plan = f"A plan for {count_of(len(self.layers), 'layer')}"
        found = f"Step speedup {', '.join(speedups)}" if speedups else plan
        return f"{found}; {VERDICT_WORDS[self.verdict]}"


def summarise_run(run: RunRecords) -> Summary:
    """Return the summary of a run; parts that no stage made are None."""
    plan, speedups, grad_error = run.plan, plan_speedups(run), plan_grad_error(run)
    extra_steps = None if grad_error is None else max(grad_error.mean, 0.0)
    vs_fp32 = speedups.get("fp32")
    is_known = vs_fp32 is not None and extra_steps is not None
    proof = run.verification or (plan.certificate if plan else None)
    constraint = plan.constraint.loss_tolerance if plan else None
    return Summary(
        layers=layers_frame(run),
        counts={precision: plan.count(precision) if plan else 0 for precision in Precision},
        steps=plan_steps(run),
        speedups=speedups,
        grad_error=grad_error,
        grad_error_basis=plan.grad_error_basis if plan else Basis.UNKNOWN,
        extra_steps=extra_steps,
        time_to_loss=vs_fp32.discounted(extra_steps or 0.0) if is_known and vs_fp32 else None,
        verdict=proof.verdict if proof else Verdict.NOT_RUN,
        verdict_sentence=verdict_sentence(run),
        gap=proof.gap if proof else None,
        control_gap=run.verification.control_gap if run.verification else None,
        loss_tolerance=proof.loss_tolerance if proof else constraint,
        fp8_answer=fp8_answer(run),
        memory_answer=memory_answer(run),
    )


def plan_grad_error(run: RunRecords) -> Estimate | None:
    """Return the plan's gradient error, with its standard error where it was measured jointly."""
    if run.plan is None or run.plan.grad_error is None:
        return None
    for joint in run.sensitivity.joint if run.sensitivity else ():
        if joint.options == run.plan.options:
            return Estimate(mean=run.plan.grad_error, stderr=joint.grad_error.stderr)
    return Estimate(mean=run.plan.grad_error)


def summary_object(run: RunRecords, out: Path | str) -> dict[str, Any]:  # Any: JSON values
    """Return the one object that `tune --json` prints; what is not known is null."""
    found = summarise_run(run)
    steps, speedups, gap = found.steps, found.speedups, found.gap
    unknown_gap = {"mean": None, "low": None, "high": None, "confidence": None, "seeds": 0}
    return {
        "step_ms": {x: steps[x].ms if x in steps else None for x in STEP_LABELS},
        "step_basis": {x: steps[x].basis.value if x in steps else None for x in STEP_LABELS},
        "step_speedup": {
            f"vs_{x}": speedups[x].value if x in speedups else None for x in BASELINES
        },
        "step_speedup_interval": {f"vs_{x}": _interval(speedups.get(x)) for x in BASELINES},
        "grad_error": found.grad_error.mean if found.grad_error else None,
        "grad_error_basis": found.grad_error_basis.value,
        "extra_steps": found.extra_steps,
        "time_to_loss_speedup": found.time_to_loss.value if found.time_to_loss else None,
        "loss_gap": gap.model_dump() if gap else unknown_gap,
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


def _interval(speedup: Speedup | None) -> list[float] | None:
    if speedup is None or speedup.low is None or speedup.high is None:
        return None
    return [speedup.low, speedup.high]
