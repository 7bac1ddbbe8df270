"""The answer of a run: what to do, decided once. Terminal, page, notebook and JSON all render it.

Whole steps decide whether FP8 pays where the plan's and BF16 O2's are known, and the layers of the
search's model only where not: what is said of the layers can then not contradict the steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from autoprec.records import BF16_O2, Basis, Branch, Plan, Verdict, Verification
from autoprec.report import formats
from autoprec.report.formats import clean_text
from autoprec.report.promise import Promise
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import Speedup, title_of
from autoprec.sensitivity.gap import USUAL_EXPONENT

PAYS, LOSES, UNSURE = "FP8 pays", "FP8 is not worth it", "Whether FP8 pays is not certain"
TOO_LARGE = "Too large for the device"
MOST_LEFT_OUT = 0.5  # of the weights: times of fewer layers do not decide what a whole step takes
NO_MASTERS = "what 16-bit parameters without FP32 masters cost in loss is not measured"
LEADS = {
    Verdict.VERIFIED: "Train with",
    Verdict.INCONCLUSIVE: "Not proven yet:",
    Verdict.NOT_RUN: "Not verified:",
}


class Advice(StrEnum):
    """What to do with a plan."""

    TUNE = "tune"  # there is none
    DISCARD = "discard"  # its loss is refuted
    LEAVE = "leave"  # FP32 everywhere: there is nothing to apply
    SLOWER = "slower"  # no faster than what needs no plan, or than BF16 O2 where it has FP8
    APPLY = "apply"


@dataclass(frozen=True)
class Answer:
    """What to do, in one sentence, and what FP8 has to do with it."""

    advice: Advice
    headline: str
    fp8: str = ""
    rival: str = ""  # the label of the step to run in its place, where the advice is SLOWER

    @classmethod
    def of(cls, run: RunRecords, speedups: Mapping[str, Speedup], promise: Promise) -> "Answer":
        """Return the answer of a run's plan."""
        plan = run.plan
        if plan is None:
            return cls(Advice.TUNE, "No plan yet: what is shown was measured so far")
        fp8, rival = _fp8_sentence(plan, speedups.get("bf16_o2")), _rival(run, plan, speedups)
        if rival or promise.verdict is Verdict.REFUTED:  # of what is slow or harmful nothing pays
            fp8 = "" if fp8.startswith(PAYS) else fp8
        if promise.verdict is Verdict.REFUTED:
            said = promise.headline.removeprefix("but ")
            return cls(Advice.DISCARD, f"Do not train with this plan: {said}", fp8)
        if plan.is_fp32:
            return cls(Advice.LEAVE, _fp32_sentence(plan), fp8)
        if rival:
            return cls(Advice.SLOWER, _rival_sentence(run, plan, speedups, rival), fp8, rival)
        return cls(Advice.APPLY, _plan_sentence(run, plan, speedups, promise), fp8)


def _fp32_sentence(plan: Plan) -> str:
    """Return the advice of a plan that changes nothing, with its doubt if times decided it."""
    left_out = plan.predicted.left_out if plan.predicted else 0.0
    if left_out < MOST_LEFT_OUT or not plan_note(plan, "BF16 is not worth it here"):
        return "Train in FP32: there is nothing to apply"
    share = formats.share(left_out)
    return f"Train in FP32 until BF16 is timed: no time is known for {share} of the weights"


def _rival(run: RunRecords, plan: Plan, speedups: Mapping[str, Speedup]) -> str:
    """Return the fastest step that the plan is no faster than, of those to run in its place.

    Those are what is run now, unless the plan is ahead of it in loss, FP32, and BF16 O2 in the
    place of FP8; "" where the plan beats them.
    """
    labels = ["bf16_o2"] if _has_fp8(plan) else []
    if plan.constraint.memory_bytes is None:  # else the others may not fit
        labels += ["fp32"] if _is_ahead_of_now(run, speedups) else [_now(speedups), "fp32"]
    faster = [x for x in labels if x in speedups and not speedups[x].is_faster]
    return min(faster, key=lambda label: speedups[label].value, default="")


def _rival_sentence(
    run: RunRecords, plan: Plan, speedups: Mapping[str, Speedup], rival: str
) -> str:
    speedup = speedups[rival]
    if rival == "bf16_o2":
        return f"{LOSES}: {_slower(plan, speedup)}"
    advice = "Keep what you run" if rival == _now(speedups) else "Train in FP32"
    written = run.profile.model.as_written if run.profile and rival == "as_written" else None
    masters = ""
    if written and written.parameters:  # the proof is against FP32 copies of them
        advice, masters = "No gain in time", f"; {written_loss(run) or NO_MASTERS}"
        masters += "; in equal time it may be behind" if _now_ends_above(run) else ""
    basis = _basis(plan, speedup)
    return f"{advice}: this plan is {_fast(speedup)} as {_named(run, rival)} ({basis}){masters}"


def written_loss(run: RunRecords) -> str:
    """Return what the user's own 16-bit parameters without masters end at; "" if not measured."""
    proof, profile = run.verification, run.profile
    written = profile.model.as_written if profile else None
    if proof is None or (written and not written.parameters):  # a proxy's own
        return ""
    where = f"trained as now{' on the proxy' if proof.proxy else ''},"
    if (branch := _diverged_now(proof)) is not None:
        return f"{where} it diverged at step {branch.diverged_at} of {proof.branch_steps}"
    if proof.written_gap is None or proof.gap is None:
        return ""
    gap, own = formats.gap_ends(proof.written_gap), formats.share(proof.gap.mean, sign=True)
    return f"{where} the loss gap to FP32 is {gap}, with the plan {own}"


def masters_sentence(run: RunRecords) -> str:
    """Return what a plan's masters take that 16-bit parameters alone do not; "" of other plans."""
    written = run.profile.model.as_written if run.profile else None
    is_16_bit = run.plan is not None and not run.plan.is_fp32
    if not (is_16_bit and written and written.parameters):
        return ""
    return "4 bytes a parameter beside what is run now, and the optimizer's states in FP32"


def _beside_now(promise: Promise) -> str:
    """Return the loss of a plan that is ahead of the user's own training, beside that, in short."""
    own, now = promise.gap, promise.written_gap
    said = "it diverges" if now is None else formats.share(now.mean, sign=True)
    gap = formats.share(own.mean, sign=True) if own else formats.UNKNOWN
    return f"; its loss gap is {gap}, as now {said} ({promise.badge})"


def _now_ends_above(run: RunRecords) -> bool:
    proof = run.verification
    gap = proof.written_gap if proof and written_loss(run) else None
    return bool(proof and gap and gap.low > proof.loss_tolerance)


def _diverged_now(proof: Verification) -> Branch | None:
    own = (each for each in proof.branches if each.label == "as_written")
    return next((branch for branch in own if branch.diverged_at is not None), None)


def _is_ahead_of_now(run: RunRecords, speedups: Mapping[str, Speedup]) -> bool:
    """Whether a verified plan ends at a lower loss than the user's own training, in equal time too.

    With a loss that falls as steps^-r, a step that takes 1/s as long is worth r log(s) of it.
    """
    proof, now = run.verification, speedups.get("as_written")
    if not written_loss(run) or proof is None or proof.verdict is not Verdict.VERIFIED or not now:
        return False
    gap, own, r = proof.written_gap, proof.gap, proof.loss_exponent
    r = USUAL_EXPONENT if r is None and proof.checkpoint else r  # of a training that nobody saw
    if not _now_ends_above(run) or gap is None or own is None or r is None:
        return _diverged_now(proof) is not None
    slowest = now.value if now.low is None else now.low
    above = 2.0 * own.mean - own.low  # as far as below: jumps that no seed showed may be in both
    return gap.low - above > -r * math.log(min(slowest, 1.0))


def predicted_without(plan: Plan, basis: Basis, *, least: float = 0.0) -> str:
    """Return what share of the weights predicted times leave out; "" of less than `least`."""
    left_out = plan.predicted.left_out if plan.predicted else 0.0
    if basis is Basis.MEASURED or not left_out or left_out < least:
        return ""
    return f"predicted without {formats.share(left_out)} of the weights"


def plan_note(plan: Plan | None, start: str) -> str:
    """Return the plan's note that starts so; "" where it has none."""
    notes = plan.notes if plan else ()
    return next((clean_text(note) for note in notes if note.startswith(start)), "")


def _plan_sentence(
    run: RunRecords, plan: Plan, speedups: Mapping[str, Speedup], promise: Promise
) -> str:
    """Return what the plan is and gains against what is run now, and how far it is proven."""
    count, lead = sum(option.is_fp8 for option in plan.options), LEADS[promise.verdict]
    is_bf16 = set(plan.options) == {BF16_O2} and not plan.fp32_outputs
    what = f"{'BF16 O2' if is_bf16 else 'BF16, FP32'} and no FP8"
    if count:
        what = f"FP8 in {count} of {formats.count_of(len(plan.options), 'layer')}"
        bf16 = speedups.get("bf16_o2")
        lead = f"{UNSURE}:" if bf16 and not bf16.is_gain else lead
    if plan_note(plan, "does not fit in memory"):  # a proxy may have verified it
        is_open = lead.endswith(":")
        lead = f"{lead[:-1]}, and {TOO_LARGE.lower()}:" if is_open else f"{TOO_LARGE}:"
    now, loss = _now(speedups), ""
    if now in speedups and not speedups[now].is_gain:
        if _is_ahead_of_now(run, speedups):
            loss = _beside_now(promise)
            lead = "For its loss, train with" if lead == LEADS[Verdict.VERIFIED] else lead
        else:
            lead = f"No certain gain over {_named(run, now)}:"
    gains = [label for label in (now, "bf16_o2") if label in speedups]
    gains = [label for label in gains if not (is_bf16 and label == "bf16_o2")]
    said = [f"{lead} {what}", *(f"{_fast(speedups[x])} as {_named(run, x)}" for x in gains)]
    basis = {
        "" if speedups[x].basis is Basis.MEASURED else f" ({_basis(plan, speedups[x])})"
        for x in gains
    }
    proof = "" if lead.startswith(LEADS[Verdict.NOT_RUN][:-1]) else f"; {promise.headline}"
    return f"{', '.join(said)}{max(basis, default='')}{loss or proof}"


def _fp8_sentence(plan: Plan, bf16: Speedup | None) -> str:
    """Return whether FP8 pays: by whole steps where they are known, else by the search's layers."""
    note = plan_note(plan, "FP8 ")
    if not _has_fp8(plan):
        return "" if note.startswith(PAYS) else note
    if bf16 is None:
        return note
    if not bf16.is_faster:
        return f"{LOSES} here: {_slower(plan, bf16)}"
    if not bf16.is_gain:
        return f"FP8 may pay here: the plan's speedup over BF16 O2 is {bf16}"
    return note if note.startswith(PAYS) else f"{PAYS} here: the plan is {_fast(bf16)} as BF16 O2"


def _now(speedups: Mapping[str, Speedup]) -> str:
    """Return the label of what the user runs now; FP32 where that is not known to be another."""
    return "as_written" if "as_written" in speedups else "fp32"


def _named(run: RunRecords, label: str) -> str:
    return title_of(run, label).replace("as written", "now")


def _slower(plan: Plan, bf16: Speedup) -> str:
    forced = any("fp8" in keep.rpartition("=")[2] for keep in plan.constraint.keep)
    return (
        f"the {'forced ' if forced else ''}plan is {_fast(bf16)} as BF16 O2 ({_basis(plan, bf16)})"
    )


def _basis(plan: Plan, speedup: Speedup) -> str:
    """Return the basis of a speedup, with what it leaves out where that is most of the weights."""
    without = predicted_without(plan, speedup.basis, least=MOST_LEFT_OUT)
    return without or speedup.basis.value


def _fast(speedup: Speedup) -> str:
    """Return `1.28x as fast`, with the interval where that has both sides of 1 in it."""
    is_sure = speedup.is_gain or speedup.is_loss
    return f"{formats.ratio(speedup.value) if is_sure else speedup} as fast"


def _has_fp8(plan: Plan) -> bool:
    return any(option.is_fp8 for option in plan.options)
