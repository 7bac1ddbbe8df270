"""Whole training steps and what follows from them: times, speedups, and what they are worth.

Only times of one interleaved set are shown and compared: those of the verification (plan and
baselines in turn) when it timed the plan; else those of the profile, with the search's model of the
plan against its model of the same uniform plan, so that the model's own error cancels. Each speedup
says which. What the other set alone has is said as a ratio to its own BF16 O2.

The interval of a measured speedup is the 95 % one of a ratio of two medians
(`records.cost.ratio_error`).

The interval of a predicted speedup is that of the plan's step, narrowed to what differs from the
baseline: layers that are in BF16 in both, and all that lies outside the layers, are off by the same
factor in both. A plan that is the baseline has no interval.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from autoprec.records import BF16_O2, Basis, LayerKind, Profile, Verification
from autoprec.records.cost import BASELINES, StepTiming, Timing, ratio_error
from autoprec.report import formats
from autoprec.report.formats import STEP_TITLES, step_title
from autoprec.report.runs import RunRecords

NOTHING = 0.005  # what is printed as 1.00x
DRIFT = 1.2  # between two sets of the same step, from which it is worth a word


@dataclass(frozen=True)
class Speedup:
    """How much faster the plan's step is than a baseline's; > 1 is faster."""

    value: float
    low: float | None
    high: float | None
    basis: Basis

    def __str__(self) -> str:
        """Return `1.28x (1.26x to 1.30x)`."""
        low, high = (None, None) if self.low == self.high else (self.low, self.high)
        interval = formats.interval(low, high, formats.ratio)
        return formats.ratio(self.value) + (f" ({interval})" if interval else "")

    @property
    def is_faster(self) -> bool:
        """Whether the plan is faster, as far as is known: to two places, without an interval."""
        return self.value >= 1.0 + NOTHING if self.low is None else self.value > 1.0

    @property
    def is_gain(self) -> bool:
        """Whether the plan is faster beyond doubt: by the whole interval."""
        return self.is_faster if self.low is None else self.low > 1.0

    @property
    def is_loss(self) -> bool:
        """Whether the plan is slower beyond doubt."""
        return self.value <= 1.0 - NOTHING if self.high is None else self.high < 1.0

    def discounted(self, extra_steps: float) -> "Speedup":
        """Return the time-to-loss speedup: the same steps take longer, or more are needed.

        It is predicted even from measured parts: that a gradient error costs steps is theory.
        """
        factor = 1.0 + extra_steps
        low, high = (None if side is None else side / factor for side in (self.low, self.high))
        return Speedup(self.value / factor, low, high, _joint_basis(self.basis, Basis.PREDICTED))


def spread_title(steps: Iterable[StepTiming]) -> str:
    """Return the name of the range p20 to p80: of samples, of a prediction, of both."""
    sampled = {x.timing.samples > 0 for x in steps if x.timing.p20_ms < x.timing.p80_ms}
    if sampled == {False}:
        return "80 % interval"
    return "spread" if len(sampled) > 1 else "p20..p80"


def title_of(run: RunRecords, label: str) -> str:
    """Return the name of a step, with what the user's own one is, and where FP32 is TF32."""
    profile, details = run.profile, []
    if label == "as_written" and profile and (written := profile.model.as_written):
        details += [f"autocast {written.autocast}"] if written.autocast else []
        details += [f"FSDP gathers {written.gathered}"] if written.gathered else []
        details += [f"{dtype} parameters" for dtype in written.parameters]
        details += ["compiled"] if written.is_compiled and _ran_compiled(run, label) else []
    if label == "fp32" and profile and (parts := _tf32_parts(profile)):
        details.append(f"TF32 {' and '.join(parts)}")
    return f"{step_title(label)} ({', '.join(details)})" if details else step_title(label)


def _ran_compiled(run: RunRecords, label: str) -> bool:
    """Whether a step was not timed eagerly, as far as that is known."""
    steps = [step for record in (run.verification, run.profile) if record for step in record.steps]
    return all(step.is_compiled is not False for step in steps if step.label == label)


def _tf32_parts(profile: Profile) -> list[str]:
    """Return the parts of an FP32 step in TF32; a CPU has none, whatever torch's settings say."""
    device = profile.device
    if device.kind == "cpu":
        return []
    has_convolutions = any(layer.kind is LayerKind.CONV for layer in profile.model.layers)
    parts = ["GEMMs"] if device.allow_tf32 else []
    return parts + (["convolutions"] if device.allow_tf32_conv and has_convolutions else [])


def plan_steps(run: RunRecords) -> dict[str, StepTiming]:
    """Return the steps of one set by label, the plan's among them if anything is known of it."""
    timed = _measured(run.verification)
    steps = timed if "plan" in timed else _certified(run) or profile_steps(run)
    return {label: steps[label] for label in (*STEP_TITLES, *steps) if label in steps}


def profile_steps(run: RunRecords) -> dict[str, StepTiming]:
    """Return the steps that were timed with the layers, and the model's of the plan."""
    predicted = {label: step for label, step in _model_steps(run).items() if label == "plan"}
    return _measured(run.profile) | predicted


def apart_notes(run: RunRecords) -> Iterator[str]:
    """Yield what was timed with the layers and not beside the plan, in BF16 O2's time then."""
    beside, apart = plan_steps(run), _measured(run.profile)
    now, then = beside.get("bf16_o2"), apart.get("bf16_o2")
    if now is None or then is None or now == then:
        return
    others = [label for label in STEP_TITLES if label in apart and label not in beside]
    ratios = [
        f"{step_title(x)} {formats.ratio(apart[x].ms / then.ms)} ({apart[x].basis})" for x in others
    ]
    if ratios:
        yield f"timed with the layers, in times of BF16 O2's step there: {', '.join(ratios)}"
    if not 1.0 / DRIFT < then.ms / now.ms < DRIFT:
        took = formats.ratio(then.ms / now.ms)
        yield f"a step in BF16 O2 took {took} as long when the layers were timed as beside the plan"


def plan_speedups(run: RunRecords) -> dict[str, Speedup]:
    """Return the plan's speedup over each baseline that it can be compared with."""
    steps = plan_steps(run)
    plan = steps.get("plan")
    if plan is None or plan.ms <= 0.0:
        return {}
    shared_ms: dict[str, float] = {}
    if plan.basis is Basis.PREDICTED:
        steps |= _model_steps(run)
        shared_ms = dict.fromkeys(_bf16_baselines(run), _shared_ms(run))
    return {
        label: _speedup(steps[label], plan, shared_ms.get(label, 0.0))
        for label in BASELINES
        if label in steps
    }


def _bf16_baselines(run: RunRecords) -> tuple[str, ...]:
    """Return the baselines whose layers run in BF16."""
    written = run.profile.model.as_written if run.profile else None
    is_bf16 = written is not None and not written.is_fp32
    return ("bf16_o2", "autocast_bf16", *(["as_written"] if is_bf16 else []))


def _shared_ms(run: RunRecords) -> float:
    """Return the part of a predicted plan's step that is the same in a BF16 baseline."""
    plan = run.plan
    if plan is None or plan.predicted is None or plan.fingerprint.time_basis is Basis.MEASURED:
        return 0.0
    others = math.fsum(layer.layer_ms or 0.0 for layer in plan.layers if layer.option != BF16_O2)
    return max(plan.predicted.plan_ms - others, 0.0)


def _speedup(base: StepTiming, plan: StepTiming, shared_ms: float) -> Speedup:
    value = base.ms / plan.ms
    basis = _joint_basis(base.basis, plan.basis)
    if base.timing == plan.timing:  # one step, timed once: a plan that is uniform
        return Speedup(1.0, 1.0, 1.0, basis)
    error = ratio_error(base.timing, plan.timing)
    if error is not None:
        spread = math.exp(error)
        return Speedup(value, value / spread, value * spread, basis)
    differs = max(plan.ms - shared_ms, 0.0) / plan.ms
    ends = (plan.timing.p20_ms, plan.timing.p80_ms)
    if plan.timing.samples or not 0.0 < ends[0] < ends[1] or differs == 0.0:
        return Speedup(value, None, None, basis)
    # of a prediction: the plan's interval, narrowed to the part that the baseline does not share
    low, high = (plan.ms + differs * (end - plan.ms) for end in ends)
    return Speedup(value, base.ms / high, base.ms / low, basis)


def _joint_basis(*bases: Basis) -> Basis:
    """Return the basis of a number made of others: measured only if all of them are."""
    weakest_first = (Basis.UNKNOWN, Basis.PREDICTED, Basis.TRANSFERRED)
    return next((basis for basis in weakest_first if basis in bases), Basis.MEASURED)


def _measured(record: Profile | Verification | None) -> dict[str, StepTiming]:
    """Return the steps that a record timed."""
    return {step.label: step for step in (record.steps if record else ())}


def _certified(run: RunRecords) -> dict[str, StepTiming]:
    """Return the steps of a plan's own certificate: medians without their spread."""
    times = run.plan.certificate.step_ms if run.plan and run.plan.certificate else {}
    steps = {label: _step(label, ms, Basis.MEASURED) for label, ms in times.items()}
    return steps if "plan" in steps else {}


def _model_steps(run: RunRecords) -> dict[str, StepTiming]:
    """Return the steps that the search's model gives: of the plan and of the uniform plans."""
    model = run.plan.predicted if run.plan else None
    if model is None:
        return {}
    uniform = {"fp32": model.fp32_ms, "bf16_o2": model.bf16_o2_ms}
    plan = _step("plan", model.plan_ms, Basis.PREDICTED, model.low_ms, model.high_ms)
    return {"plan": plan} | {x: _step(x, ms, Basis.PREDICTED) for x, ms in uniform.items()}


def _step(
    label: str, ms: float, basis: Basis, low: float | None = None, high: float | None = None
) -> StepTiming:
    """Return a step that was not timed here; without an interval its ends are the time."""
    ends = {"p20_ms": ms if low is None else low, "p80_ms": high or ms}
    timing = Timing(median_ms=ms, **ends, samples=0, basis=basis)
    return StepTiming(label=label, timing=timing, peak_bytes=None)
