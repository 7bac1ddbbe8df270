"""What a run found: the numbers and sentences that `tune --json`, page and terminal share.

What to do, and whether FP8 pays, is `Answer`'s: every page renders that one object, and the plan's
notes on it are in no other list, so that a report cannot say two things.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprec.common.text import first_and_more
from autoprec.records import Basis, Estimate, Precision
from autoprec.records.cost import BASELINES, ENDED, StepTiming
from autoprec.records.verification import REFUTED
from autoprec.report import formats
from autoprec.report.answer import Answer, plan_note, predicted_without
from autoprec.report.formats import clean_text, count_of, step_title
from autoprec.report.layer_frame import layers_frame
from autoprec.report.promise import Promise
from autoprec.report.remarks import EAGER, run_remarks
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import Speedup, plan_speedups, plan_steps, profile_steps, title_of

if TYPE_CHECKING:
    import pandas as pd

FP8_PEAK_RATIO = 2.0  # FP8 against BF16 dense peak rate of tensor cores: H100, B200, MI300X sheets
LONGEST_LOG = 3.0  # of a time beyond which a loss curve tells nothing: 20 times BF16's


@dataclass(frozen=True)
class Summary:
    """What a run found. `extra_steps` are per step; `time_to_loss` is against FP32.

    `notes` say, sentence by sentence, what the numbers do not cover, and `left_out` which weights
    have no known time, and which no FP8 option.
    """

    run: RunRecords
    layers: "pd.DataFrame"
    counts: Mapping[Precision, int]
    steps: Mapping[str, StepTiming]
    speedups: Mapping[str, Speedup]
    ceiling: str
    grad_error: Estimate | None
    grad_error_basis: Basis
    extra_steps: float | None
    time_to_loss: Speedup | None
    promise: Promise
    bf16_sentence: str
    answer: Answer
    compile_answer: str
    memory_answer: str
    keep_answer: str
    bf16_answer: str  # where BF16 O2 is faster, and FP32 the plan, or what stays so in it
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def counted(self) -> str:
        """The layers in each option, in words; "" without a plan."""
        options = Counter(self.layers["option"].dropna().map(formats.option))
        counts = ", ".join(f"{count} in {option}" for option, count in options.most_common())
        return f"{count_of(len(self.layers), 'layer')}: {counts}" if counts else ""

    @property
    def is_held_back(self) -> bool:
        """Whether, as far as is known, the search would choose another plan without --keep."""
        plan, search = self.run.plan, self.run.search
        is_same = search and search.free and search.free.options == search.exact.options
        return bool(plan and plan.constraint.keep) and not is_same

    @property
    def peak_memory(self) -> tuple[int | None, int | None, Basis]:
        """The peak bytes of the plan's step and of BF16 O2's, and the basis of the plan's.

        It is the model's where it was not measured but BF16 O2's is known, to compare it with.
        """
        plan, base = self.steps.get("plan"), self.steps.get("bf16_o2")
        peak, baseline = (step.peak_bytes if step else None for step in (plan, base))
        model = self.run.plan.predicted if self.run.plan else None
        if peak is None and baseline is not None and model:
            return model.memory_bytes, baseline, Basis.PREDICTED
        return peak, baseline, Basis.MEASURED

    def title(self, label: str) -> str:
        """Return the name of a step, with what is known of it."""
        return title_of(self.run, label)

    @property
    def compile_advice(self) -> str:
        """What to know before the line that compiles; "" where that is no question."""
        mode = self.run.plan.fingerprint.compile_mode if self.run.plan else EAGER
        plan, every = self.steps.get("plan"), self.steps.values()
        asked = [plan] if plan and plan.basis is Basis.MEASURED else every
        fails = self.run.profile is not None and self.run.profile.compile_problem
        if fails or any(step.note for step in asked):
            return ""  # it does not compile, or what it is predicted from does not
        if mode not in ("", EAGER):
            return "then compile, since the times are compiled ones:"
        if not self.compile_answer:
            return ""
        return "if you compile, do it here, and tune compiled first:"

    @property
    def refuted(self) -> str:
        """The first plan that training refuted before this one, and why; "" where none was."""
        proof = self.run.verification
        said = (note.partition(f"{REFUTED} ") for note in (proof.notes if proof else ()))
        found = [where + what for where, refuted, what in said if refuted]  # on a proxy, maybe
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return clean_text(found[0]) + more if found else ""

    @property
    def passed_over(self) -> str:
        """What ended a process before, and was not run again; "" where nothing did."""
        profile = self.run.profile
        if profile is None:
            return ""
        rows = [row for row in profile.layers if row.ended_process]
        own = {row.names[0]: formats.option(row.option) for row in rows if row.infeasible}
        own |= {row.names[0]: "FP32" for row in rows if row.unknown}
        found = [f"{clean_text(name)} in {option}" for name, option in own.items()]
        left_out = profile.steps_left_out.items()
        found += [f"the step {step_title(x)}" for x, why in left_out if why.startswith(ENDED)]
        named = first_and_more(found, most=2)
        again = "tune without --resume to try again"
        return f"left out, as the process ended in it: {named}; {again}" if found else ""

    @property
    def without(self) -> str:
        """What predicted times of steps leave out; "" where the plan was timed, or nothing is."""
        plan, step = self.run.plan, self.steps.get("plan")
        return predicted_without(plan, step.basis) if plan and step else ""


def summarise_run(run: RunRecords) -> Summary:
    """Return the summary of a run; parts that no stage made are None."""
    plan, layers, speedups = run.plan, layers_frame(run), plan_speedups(run)
    grad_error, vs_fp32 = plan_grad_error(run), speedups.get("fp32")
    extra_steps = None if grad_error is None else max(grad_error.mean, 0.0)
    time_to_loss = vs_fp32.discounted(extra_steps or 0.0) if vs_fp32 and grad_error else None
    starts = (
        "FP8 ",
        "does not fit in memory",
        "--keep costs",
        "BF16 O2 is ",
        "no time is known for",
        "no FP8 option yet",
        "grad_weight stays in BF16",
        "tp=",
    )
    answers, promise = [plan_note(plan, start) for start in starts], Promise.of(run.proof, plan)
    said = map(clean_text, dict.fromkeys(run_remarks(run)))
    return Summary(
        run=run,
        layers=layers,
        counts=formats.precision_counts(plan.options if plan else ()),
        steps=plan_steps(run),
        speedups=speedups,
        ceiling=_ceiling_sentence(run, layers),
        grad_error=grad_error,
        grad_error_basis=plan.grad_error_basis if plan else Basis.UNKNOWN,
        extra_steps=extra_steps,
        time_to_loss=time_to_loss,
        promise=promise,
        bf16_sentence=_bf16_sentence(run, speedups.get("bf16_o2")),
        answer=Answer.of(run, speedups, promise),
        compile_answer=_compile_answer(run),
        memory_answer=answers[1],
        keep_answer=answers[2],
        bf16_answer=answers[3],
        left_out=tuple(filter(None, answers[4:])),
        notes=tuple(text for text in said if text not in answers),  # those are shown apart
    )


def summary_object(run: RunRecords, out: Path | str) -> dict[str, Any]:  # Any: JSON values
    """Return the one object that `tune --json` prints; what is not known is null."""
    found = summarise_run(run)
    steps, speedups, promise = found.steps, found.speedups, found.promise
    labels, values = ("plan", *BASELINES), {x: each.value for x, each in speedups.items()}
    unknown_gap = {"mean": None, "low": None, "high": None, "confidence": None, "seeds": 0}
    return {
        "step_ms": {x: steps[x].ms if x in steps else None for x in labels},
        "step_basis": {x: steps[x].basis.value if x in steps else None for x in labels},
        "step_speedup": {f"vs_{x}": values.get(x) for x in BASELINES},
        "step_speedup_interval": {f"vs_{x}": _interval(speedups.get(x)) for x in BASELINES},
        "grad_error": found.grad_error.mean if found.grad_error else None,
        "grad_error_basis": found.grad_error_basis.value,
        "extra_steps": found.extra_steps,
        "time_to_loss_speedup": found.time_to_loss.value if found.time_to_loss else None,
        "loss_gap": promise.gap.model_dump() if promise.gap else unknown_gap,
        "loss_tolerance": promise.loss_tolerance,
        "verdict": promise.verdict.value,
        "trained_steps": promise.trained_steps,
        "expected_gap": promise.expected.model_dump(mode="json") if promise.expected else None,
        "promise": promise.words,
        "metrics": [metric.model_dump(mode="json") for metric in promise.metrics],
        "as_written_gap": promise.written_gap.model_dump() if promise.written_gap else None,
        "own_forward_gap": promise.own_gap.model_dump() if promise.own_gap else None,
        "proxy": promise.proxy.model_dump() if promise.proxy else None,
        "against_bf16_o2": found.bf16_sentence,
        "layers": {precision.value: count for precision, count in found.counts.items()},
        "answer": found.answer.headline,
        "fp8": found.answer.fp8,
        "memory": found.memory_answer,
        "keep": found.keep_answer,
        "bf16": found.bf16_answer,
        "left_out": list(found.left_out),
        "out": str(out),
        "plan": str(Path(out) / "plan.json") if run.plan else None,
    }


def apply_line(out: Path | str | None) -> str:
    """Return the one line to paste."""
    path = json.dumps((Path(out or ".") / "plan.json").as_posix(), ensure_ascii=False)
    return f"model, optimizer = autoprec.apply({path}, model, optimizer)"


def _ceiling_sentence(run: RunRecords, layers: "pd.DataFrame") -> str:
    """Return the most that FP8 can gain over BF16 O2; "" without FP8 units, or without times.

    That is were all layers that can take FP8 to run at FP8's peak rate, with everything else in the
    step, from attention to the optimizer, as it is without FP8.
    """
    baseline = profile_steps(run).get("bf16_o2")
    if run.profile is None or baseline is None or baseline.ms <= 0.0:
        return ""
    if run.profile.device.kind == "cpu":  # it has no FP8 rate that could be a limit
        return ""
    specs = run.profile.model.layers
    names = [layer.name for layer in specs if layer.takes_fp8]
    part_ms = float(layers.loc[layers["name"].isin(names), "bf16_o2_total_ms"].sum())
    if part_ms <= 0.0:
        return ""
    # Amdahl's law: of a step of 1, `share` gets shorter
    share = min(part_ms / baseline.ms, 1.0)
    limit = 1.0 / (1.0 - share + share / FP8_PEAK_RATIO)
    return (
        f"ceiling: {count_of(len(names), 'FP8-eligible linear')}, {100 * share:.0f} % of the BF16 "
        f"O2 step => FP8 can gain at most {formats.ratio(limit)} (all of them at FP8's peak rate, "
        f"{FP8_PEAK_RATIO:g}x BF16's)"
    )


def _compile_answer(run: RunRecords) -> str:
    """Return what torch.compile did to the steps: failed, or on a GPU its gains; "" if unknown."""
    profile = run.profile
    failed = {label: step.note for label, step in plan_steps(run).items() if step.note}
    if failed:
        names, reason = ", ".join(map(step_title, failed)), next(iter(failed.values()))
        return f"torch.compile: timed eagerly: {names}; {clean_text(reason)}"
    if profile is None or profile.device.kind == "cpu":
        return ""
    has_fp8 = any(row.option.is_fp8 for row in profile.layers)
    if profile.device.compile_mode == EAGER:
        problem = profile.compile_problem
        if not has_fp8:
            return f"all is eager: {problem}" if problem else ""
        way_out = f"it does not work here: {problem}" if problem else "leave --eager out"
        return (
            "FP8 was judged without torch.compile, which fuses its casts: eager FP8 often loses "
            f"where compiled FP8 gains; {way_out}"
        )
    # compiled: both uniform steps both ways, or nothing can be said
    labels = ("eager_bf16_o2", "bf16_o2", "fp8_o1", "eager_fp8_o1")
    known = {step.label: step for step in profile.steps if step.label in labels}
    if len(known) < len(labels):
        return ""
    basis = "" if profile.basis is Basis.MEASURED else f" ({profile.basis})"
    bf16 = known["bf16_o2"]
    if plan_steps(run).get("bf16_o2", bf16) == bf16:
        shown = [f"{formats.ms(known[label].ms)} ms" for label in labels]
        said = "eager BF16 {}, compiled BF16 {}, compiled FP8 everywhere {}; eager FP8 {}"
    else:  # BF16 was timed again, beside the plan: in ms it would be there twice
        shown = [formats.ratio(known[label].ms / bf16.ms) for label in labels if label != "bf16_o2"]
        said = (
            "in times of compiled BF16, eager BF16 takes {}, compiled FP8 everywhere {}; eager "
            "FP8 {}"
        )
    return f"torch.compile: {said.format(*shown)}{basis}"


def _bf16_sentence(run: RunRecords, speedup: Speedup | None) -> str:
    """Return the plan's standing against BF16 O2: at equal steps, and at equal time.

    A plan whose loss stays above BF16's may yet be ahead of it when both trained equally long: with
    a loss that falls as steps^-r (r: `loss_exponent`), a step that is s times as fast is worth
    r log(s) of it, and a gap of g takes exp(g / r) times the steps to close.
    """
    proof = run.verification
    gap = proof.bf16_gap if proof else None
    if proof is None or gap is None or gap.low == gap.high == 0.0:
        return ""
    said = f"against BF16 O2 the loss gap is {formats.gap(gap)} after equal steps: "
    if gap.low > 0.0:
        said += "its final loss is never reached within this run"
    elif gap.high <= 0.0:
        said += "its final loss is reached within this run"
    else:
        said += "whether its final loss is reached within this run is not decided"
    if speedup is None or proof.loss_exponent is None or speedup.value <= 0.0:
        return said
    # the steps that the plan makes beyond BF16's in the same time, by the reference's loss curve
    net = gap.mean - proof.loss_exponent * math.log(speedup.value)
    fast = formats.ratio(speedup.value)
    low, high = speedup.low or speedup.value, speedup.high or speedup.value
    best = gap.low - proof.loss_exponent * math.log(high)
    worst = gap.high - proof.loss_exponent * math.log(low)
    if best < 0.0 < worst:  # neither the speed nor the loss is known well enough to say
        return f"{said}; in equal time, with steps {fast} as fast, it may be ahead or behind"
    side = "ahead" if net < 0.0 else "behind"
    reached = ""
    if proof.loss_exponent > 0.0 and abs(gap.mean) < LONGEST_LOG * proof.loss_exponent:
        time = math.exp(gap.mean / proof.loss_exponent) / speedup.value
        reached = f", and reach BF16's final loss in {formats.ratio(time)} of its time"
    return (
        f"{said}; in equal time, with steps {fast} as fast, it would be "
        f"{formats.share(abs(net))} {side}{reached} (predicted)"
    )


def plan_grad_error(run: RunRecords) -> Estimate | None:
    """Return the plan's gradient error, with its standard error where it was measured jointly."""
    if run.plan is None or run.plan.grad_error is None:
        return None
    for joint in run.sensitivity.joint if run.sensitivity else ():
        if joint.options == run.plan.options and joint.grad_error.mean > 0.0:
            # as plans count it, which is less than was measured
            return joint.grad_error.scaled(run.plan.grad_error / joint.grad_error.mean)
    if run.search and run.search.chosen.options == run.plan.options:
        return Estimate(mean=run.plan.grad_error, stderr=run.search.chosen.grad_error_stderr)
    return Estimate(mean=run.plan.grad_error)


def _interval(speedup: Speedup | None) -> list[float] | None:
    if speedup is None or speedup.low is None or speedup.high is None:
        return None
    return [speedup.low, speedup.high]
