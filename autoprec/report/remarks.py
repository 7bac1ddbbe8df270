"""What a run's numbers do not cover, sentence by sentence."""

from collections import Counter
from collections.abc import Iterator

from autoprec.common.text import first_and_more
from autoprec.model.options import FP8_MULTIPLE
from autoprec.records import Basis, Profile, StepTiming
from autoprec.report.formats import count_of, step_title
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import apart_notes

EAGER = "eager"  # the compile mode of records that were timed without torch.compile
MOST_NAMED = 8  # parameters or layers in one sentence
MISSING = {
    "profile": "times per layer were not measured",
    "sensitivity": "the effect on loss and gradient was not measured",
    "search": "alternatives to the plan are not known",
    "plan": "nothing was chosen yet",
    "verification": "no training was compared",
}


def profile_notes(profile: Profile) -> Iterator[str]:
    """Yield what a profile does not cover."""
    model = profile.model
    if model.uncovered:
        stacks = dict.fromkeys(model.loose_stacks, " (stacked, as experts are)")
        named = (p.name + stacks.get(p.name, "") for p in model.uncovered)
        names = first_and_more(named, most=MOST_NAMED)
        yield f"outside any layer, in the plan's activation dtype or in FP32: {names}"
    forward = {layer.name for layer in model.layers if layer.forward_calls}
    if alone := [name for name in model.uncalled if name in forward]:
        names = first_and_more(alone, most=MOST_NAMED)
        yield f"under no_grad alone in the captured step, so timed in whole steps only: {names}"
    if uncalled := [name for name in model.uncalled if name not in forward]:
        yield (
            "not called in the captured step, so not timed: "
            f"{first_and_more(uncalled, most=MOST_NAMED)}"
        )
    if len(model.mix) > 1:
        yield _mix_note(profile)
    yield from _timing_notes(profile)
    for fact, reason in profile.device.missing:
        yield f"{fact} is not known: {reason}"
    if profile.basis is not Basis.MEASURED:
        yield f"all times are {profile.basis}: {profile.device.name} is not the machine at hand"
    elif profile.device.compile_mode not in ("", EAGER):
        yield (
            "times are those of torch.compile; sensitivity and verification train eagerly, whose "
            "numbers differ in the order of sums"
        )


def _mix_note(profile: Profile) -> str:
    """Return which token counts the batches have, and of which one the times are."""
    mix = profile.model.mix
    batches = sum(each.batches for each in mix)
    mean = sum(each.tokens * each.batches for each in mix) / batches
    most = first_and_more((f"{x.tokens} in {x.batches}" for x in mix), most=MOST_NAMED)
    uneven = sum(each.batches for each in mix if each.tokens % FP8_MULTIPLE)
    parts = "layers" if profile.basis is Basis.MEASURED else "layers and steps"
    own = mix[0].tokens
    said = (
        f"batches differ: of the first {batches}, M (tokens of the largest linear) is {most}; "
        f"times of {parts} are those of the first one's {own}, "
        f"{own / max(mean, 1.0):.2f} of the mean"
    )
    if not uneven:
        return said
    return (
        f"{said}; {uneven} of them have an M that is no multiple of {FP8_MULTIPLE}, so that FP8 "
        "layers keep grad_weight in BF16, and rows of zeros fill up whatever else comes"
    )


def _timing_notes(profile: Profile) -> Iterator[str]:
    """Yield what was not timed, or not as it should be, and how far layers and steps agree."""
    infeasible = Counter(row.infeasible for row in profile.layers if row.infeasible)
    for reason, count in infeasible.most_common():
        yield f"{count_of(count, 'option')} could not run: {reason}"
    eager = Counter(row.note for row in profile.layers if row.note)
    for reason, count in eager.most_common():
        yield f"{count_of(count, 'option')} timed eagerly: {reason}"
    if profile.compile_problem and profile.device.kind == "cpu":  # on a GPU the answer says it
        yield f"all is timed eagerly: {profile.compile_problem}"
    if between := sorted({name for row in profile.layers for name in row.beside}):
        yield (
            f"compiled FP8 layers were timed between their neighbours ({', '.join(between)}), "
            "whose own time is taken off"
        )
    for label, reason in profile.steps_left_out.items():
        yield f"the step {step_title(label)!r} is not timed: {reason}"
    for step in profile.steps:
        yield from _step_notes(step)
    if check := profile.sum_check:
        layers, steps = (f"{ms:+.3g} ms" for ms in (check.layers_ms, check.steps_ms))
        yield f"FP8 everywhere against BF16 O2: {layers} by its layers, {steps} by whole steps"


def _step_notes(step: StepTiming) -> Iterator[str]:
    """Yield what a step's time is not: compiled, or the device's own."""
    if step.note:
        yield f"the step {step_title(step.label)!r} was timed eagerly: {step.note}"
    if step.is_host_bound:
        yield (
            f"the host bounds the step {step_title(step.label)!r}: it queues work no faster than "
            "the device does it, so that faster GEMMs gain little; compile, or give larger batches"
        )


def run_remarks(run: RunRecords) -> Iterator[str]:
    """Yield, sentence by sentence, what the run's numbers do not cover."""
    yield from run.notes
    yield from (f"no {n}.json: {said}" for n, said in MISSING.items() if getattr(run, n) is None)
    if run.profile:
        yield from profile_notes(run.profile)
        yield from apart_notes(run)
    if run.sensitivity:
        yield from run.sensitivity.notes
        if run.sensitivity.batches == 1:
            yield "sensitivity used a single batch: its standard errors are unknown"
    for step in run.verification.steps if run.verification else ():
        yield from _step_notes(step)
    for record in (run.verification, run.plan):
        yield from record.notes if record else ()
