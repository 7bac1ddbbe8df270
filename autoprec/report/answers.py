"""What a run says in sentences: whether FP8 pays here, the ceiling, the verdict, what is missing.

Whether FP8 pays is the search's sentence, among the plan's notes: shown as the answer, it is in no
other list, so that a report cannot say two things.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoprec.common.text import first_and_more
from autoprec.records import FP32, Basis, Profile, Verdict
from autoprec.report import formats
from autoprec.report.formats import clean_text, count_of
from autoprec.report.layer_frame import takes_fp8
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import Step, plan_steps

if TYPE_CHECKING:
    import pandas as pd

MOST_NAMED = 8  # parameters or layers in one sentence
FP8_PEAK_RATIO = 2.0  # FP8 against BF16 dense peak rate of tensor cores: H100, B200, MI300X sheets
MISSING = {
    "profile": "no profile.json: times per layer were not measured",
    "sensitivity": "no sensitivity.json: the effect on loss and gradient was not measured",
    "search": "no search.json: alternatives to the plan are not known",
    "plan": "no plan.json: nothing was chosen yet",
    "verification": "no verification.json: no training was compared",
}


@dataclass(frozen=True)
class Ceiling:
    """How far FP8 can shorten a BF16 O2 step: `share` of it is in layers that can take FP8.

    `at_peak` is the speedup were these to run at FP8's peak rate (None where the device has no FP8
    units, as a CPU), `at_zero` were they to take no time at all. Everything else in the step, from
    attention to the optimizer, is the same with FP8 as without.
    """

    baseline: Step
    layers: int
    share: float
    at_peak: float | None
    at_zero: float

    @property
    def limit(self) -> float:
        """The speedup that no plan can pass."""
        return self.at_peak or self.at_zero

    @property
    def sentence(self) -> str:
        """The ceiling in words."""
        how = (
            f"all of them at FP8's peak rate, {FP8_PEAK_RATIO:g}x BF16's"
            if self.at_peak
            else "were they to take no time at all"
        )
        return (
            f"ceiling: {count_of(self.layers, 'FP8-eligible linear')}, {100 * self.share:.0f} % of "
            f"the BF16 O2 step => FP8 can gain at most {formats.ratio(self.limit)} ({how})"
        )


def fp8_ceiling(run: RunRecords, layers: "pd.DataFrame", options: "pd.DataFrame") -> Ceiling | None:
    """Return what FP8 can gain over BF16 O2 at most, or None when no layer or step was timed."""
    eligible = layers[layers["name"].isin(options.loc[takes_fp8(options), "name"])]
    part_ms = float(eligible["bf16_o2_total_ms"].sum())
    baseline = plan_steps(run).get("bf16_o2")
    if run.profile is None or baseline is None or min(part_ms, baseline.ms) <= 0.0:
        return None
    # Amdahl's law: of a step of 1, `share` gets shorter
    share = min(part_ms / baseline.ms, 1.0)
    has_fp8_units = run.profile.device.kind != "cpu"
    return Ceiling(
        baseline=baseline,
        layers=len(eligible),
        share=share,
        at_peak=1.0 / (1.0 - share * (1.0 - 1.0 / FP8_PEAK_RATIO)) if has_fp8_units else None,
        at_zero=1.0 / (1.0 - share) if share < 1.0 else float("inf"),
    )


def fp8_answer(run: RunRecords) -> str:
    """Return the plan's note of whether FP8 pays here; "" where it has none."""
    return _plan_note(run, "FP8 ")


def memory_answer(run: RunRecords) -> str:
    """Return the plan's note that it does not fit into memory; "" where it has none."""
    return _plan_note(run, "does not fit in memory")


def verdict_sentence(run: RunRecords) -> str:
    """Return what is proven of the plan's loss."""
    proof = run.verification or (run.plan.certificate if run.plan else None)
    if proof is None or proof.verdict is Verdict.NOT_RUN:
        return "not verified: no training was compared; run `autoprec verify`"
    gap = f"the loss gap to FP32 is {formats.gap(proof.gap)}" if proof.gap else ""
    said = [
        gap or "no loss gap is known",
        f"the tolerance is {formats.share(proof.loss_tolerance)}",
    ]
    if run.verification and run.verification.advice:
        said.append(clean_text(run.verification.advice))
    return f"{proof.verdict}: {'; '.join(said)}"


def unmeasured(run: RunRecords) -> list[str]:
    """Return, sentence by sentence, what the run's numbers do not cover."""
    said = [*run.notes, *(text for name, text in MISSING.items() if getattr(run, name) is None)]
    if run.profile:
        said += profile_notes(run.profile)
    if run.sensitivity:
        said += run.sensitivity.notes
        if run.sensitivity.batches == 1:
            said.append("sensitivity used a single batch: its standard errors are unknown")
    if run.verification:
        said += run.verification.notes
    if run.plan:
        said += run.plan.notes
    answers = (fp8_answer(run), memory_answer(run))  # shown apart
    return [text for text in map(clean_text, dict.fromkeys(said)) if text not in answers]


def profile_notes(profile: Profile) -> Iterator[str]:
    """Yield what a profile does not cover."""
    model = profile.model
    if model.uncovered:
        names = first_and_more((p.name for p in model.uncovered), most=MOST_NAMED)
        yield f"outside any layer, in the plan's activation dtype: {names}"
    if model.uncalled:
        names = first_and_more(model.uncalled, most=MOST_NAMED)
        yield f"not called in the captured step, so not timed: {names}"
    infeasible = Counter(row.infeasible for row in profile.layers if row.infeasible)
    for reason, count in infeasible.most_common():
        yield f"{count_of(count, 'option')} could not run: {reason}"
    for fact, reason in profile.device.missing:
        yield f"{fact} is not known: {reason}"
    if profile.basis is not Basis.MEASURED:
        yield f"all times are {profile.basis}: {profile.device.name} is not the machine at hand"


def is_all_fp32(run: RunRecords) -> bool:
    """Whether the plan leaves everything in FP32."""
    return run.plan is not None and all(option == FP32 for option in run.plan.options)


def _plan_note(run: RunRecords, start: str) -> str:
    notes = run.plan.notes if run.plan else ()
    return next((clean_text(note) for note in notes if note.startswith(start)), "")
