"""Two runs -> where they differ beyond noise, and what else is not alike.

A time has the noise of its samples, and that of the moment it was taken in: clocks, heat and
neighbours differ between two runs by more than samples within one show. So the log ratio of a time
has the variance

    s^2 = a^2 + 2 b^2   a: both medians' own errors; b: what layer times scatter by beyond those

and b is estimated from all layer times that both runs have: 1.4826 times the median distance of
their log ratios from their median (the robust standard deviation; fewer than half of them may
differ in truth), less their a. It counts twice: for the moment of the one time, and for what shifts
all times of a run alike, which cannot be seen apart from a change and is taken to be no larger. The
plan's speedup over a step of its own run has neither. Samples and layers are few, so Student's
factor is taken at the degrees of freedom of s^2 (Welch and Satterthwaite).

Of n numbers in one table each has its interval at 1 - 0.05 / n (Bonferroni): two equal runs show
any difference in it in at most 5 % of comparisons. Two predictions have no noise.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autoprec.common.grouping import grouped
from autoprec.common.text import first_and_more, percent
from autoprec.errors import RecordError
from autoprec.records import BF16_O2, FP32, Basis, Change, Comparison, DifferenceRow, Estimate
from autoprec.records.cost import BASELINES, FEWEST_SPREAD, WIDEST, Timing, student_factor
from autoprec.report.formats import count_of
from autoprec.report.promise import Promise
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import Speedup, plan_speedups, plan_steps, profile_steps
from autoprec.report.summary import plan_grad_error

ABSENT = "absent"
STAYS = ", FP32 behind it"  # up to the next layer
ALPHA = 0.05  # the share of comparisons of equal runs that a table may show a difference in
ROBUST_SIGMA = 1.4826  # a normal standard deviation over its median absolute deviation
MAD_FREEDOM = 0.37  # degrees of freedom of that per value: its efficiency at a normal
FEWEST_ROWS = 8  # layer times that tell of the noise between runs
SIGMAS_80 = 2.0 * 1.2816  # the width of an 80 % interval, which predictions have
MOST_SCATTER = 0.1  # above it times have outliers that no normal distribution has
MANY = 1e6  # degrees of freedom of what is known well


@dataclass(frozen=True)
class Noise:
    """A standard deviation of a log ratio, and the degrees of freedom that it is known with."""

    sigma: float
    freedom: float = MANY

    def plus(self, other: "Noise") -> "Noise":
        """Return the noise of both together; degrees of freedom by Welch and Satterthwaite."""
        variance = self.sigma**2 + other.sigma**2
        parts = self.sigma**4 / self.freedom + other.sigma**4 / other.freedom
        return Noise(math.sqrt(variance), variance**2 / parts if parts > 0.0 else MANY)

    def width(self, numbers: int) -> float:
        """Return the half-width of a log ratio's interval, one of so many in a table."""
        width = student_factor(self.freedom, 1.0 - ALPHA / max(numbers, 1)) * self.sigma
        return min(width, WIDEST)


@dataclass(frozen=True)
class _Pair:
    """One number of both runs, before it is known of how many; `noise` None: not known."""

    name: str
    before: float
    after: float
    noise: Noise | None
    basis: Basis
    names: tuple[str, ...] = ()
    option: str = ""

    def change(self, numbers: int) -> Change:
        """Return it with its interval, as one of so many in a table."""
        fields = {name: value for name, value in vars(self).items() if name != "noise"}
        if self.before <= 0.0 or self.after < 0.0:
            return Change(**fields, ratio=None, low=None, high=None)
        ratio = self.after / self.before
        spread = math.exp(self.noise.width(numbers)) if self.noise else None
        low, high = (ratio / spread, ratio * spread) if spread else (None, None)
        return Change(**fields, ratio=ratio, low=low, high=high)


def compare_runs(
    before: RunRecords, after: RunRecords, *, names: tuple[str, str] = ("before", "after")
) -> Comparison:
    """Return where two runs differ; what both have is compared, layers by their names.

    Raises:
        RecordError: they have no layer in common, or no record of one kind.
    """
    # what both have, by name: without a layer in common no time and no error means the same
    layers = [_layer_names(run) for run in (before, after)]
    options = [_decisions(run) for run in (before, after)]
    either = {**options[0], **options[1]} if all(options) else {}
    shared = [name for name in layers[0] if name in set(layers[1])]
    if all(layers) and not shared:
        raise RecordError(
            f"runs are compared layer by layer, but {names[0]} and {names[1]} have no layer of one "
            "name; give two runs of one model"
        )
    old, new = before.proof, after.proof
    timed = _Times.of(before, after)
    facts = [_facts(run) for run in (before, after)]
    notes = () if either else tuple(_layers_apart(layers, names))
    errors = _changes(_error_pairs(before, after))
    found = Comparison(
        before=names[0],
        after=names[1],
        facts=_differences(facts, [name for name in facts[0] if name in facts[1]]),
        steps=timed.steps,
        speedup=timed.speedup,
        grad_error=_plan_error(before, after),
        verdicts=(old.verdict, new.verdict) if old and new else None,
        reaches=(Promise.of(old, before.plan).reach, Promise.of(new, after.plan).reach),
        gaps=(old.gap if old else None, new.gap if new else None),
        decisions=_differences(options, either),
        layers_compared=len(shared) if either else 0,
        layer_times=_different(timed.layers),
        times_compared=len(timed.layers),
        layer_errors=_different(errors),
        errors_compared=len(errors),
        noise_between=timed.between,
        notes=(*notes, *timed.notes),
    )
    # layers of one name in records of different kinds: nothing to compare after all
    is_there = (found.steps, timed.layers, errors, found.layers_compared, found.verdicts)
    if not any(is_there):
        raise RecordError(
            f"runs are compared by what both have, but {names[0]} and {names[1]} have no record of "
            "one kind; give two run folders, two plans or two sensitivities"
        )
    return found


@dataclass(frozen=True)
class _Times:
    """All times that two runs have in common; `between` is the noise between the runs."""

    steps: tuple[Change, ...] = ()
    layers: tuple[Change, ...] = ()
    speedup: Change | None = None
    between: float | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, before: RunRecords, after: RunRecords) -> "_Times":
        """Compare steps and layers; a prediction is compared with a prediction only."""
        predicted = _is_predicted(before)
        if predicted is not _is_predicted(after):
            return cls(notes=("times of one are measured, of the other predicted: not compared",))
        layers = list(_layer_pairs(before, after))
        steps = list(_step_pairs(before, after))
        one_device = _facts(before).get("device") == _facts(after).get("device")
        between = _noise_between(layers) if one_device and not predicted else None
        scatter = between.sigma / math.sqrt(2.0) if between else None
        changes = _changes(layers, between)
        notes = []
        if scatter is None and not predicted and (layers or steps):
            notes.append(
                "noise between the runs is not known, which takes "
                f"{FEWEST_ROWS} layer times of one device: intervals are those of the samples"
            )
        if scatter is not None and scatter > MOST_SCATTER:
            notes.append(
                f"layer times scatter by {percent(scatter)} between the runs, as on a machine that "
                "did other work: no single layer is told apart; run both on a quiet one"
            )
            changes = tuple(c.model_copy(update={"low": None, "high": None}) for c in changes)
        faster = _speedup(before, after)
        return cls(_changes(steps, between), changes, faster, scatter, tuple(notes))


def _changes(pairs: Sequence[_Pair], between: Noise | None = None) -> tuple[Change, ...]:
    """Return the numbers of one table, with the noise between the runs on those that have any."""
    more = [
        replace(pair, noise=pair.noise.plus(between)) if between and pair.noise else pair
        for pair in pairs
    ]
    return tuple(pair.change(len(pairs)) for pair in more)


def _different(changes: Sequence[Change]) -> tuple[Change, ...]:
    """Return those beyond noise, what changes a step the most first."""
    found = [change for change in changes if change.is_beyond_noise]
    return tuple(sorted(found, key=lambda c: -abs(c.after - c.before) * len(c.names)))


def _noise_between(pairs: Sequence[_Pair]) -> Noise | None:
    """Return what equal times differ by between the runs, beyond their own noise.

    None where too few layers were measured in both.
    """
    known = [(math.log(p.after / p.before), p.noise.sigma) for p in pairs if p.noise and p.after]
    if len(known) < FEWEST_ROWS:
        return None
    middle = statistics.median(ratio for ratio, _ in known)
    spread = ROBUST_SIGMA * statistics.median(abs(ratio - middle) for ratio, _ in known)
    own = statistics.median(sigma for _, sigma in known)
    scatter = math.sqrt(max(spread**2 - own**2, 0.0))
    return Noise(math.sqrt(2.0) * scatter, MAD_FREEDOM * (len(known) - 1))


# --- times --------------------------------------------------------------------------------------


def _layer_pairs(before: RunRecords, after: RunRecords) -> Iterator[_Pair]:
    """Yield every time of a layer in an option that both runs have; shared measurements once."""
    if before.profile is None or after.profile is None:
        return
    others = {(name, row.option): row for row in after.profile.layers for name in row.names}
    for row in before.profile.layers:
        known = (name for name in row.names if (name, row.option) in others)
        # those that share the other run's measurement too
        together = grouped((id(others[name, row.option]), name) for name in known)
        for names in together.values():
            own, new = row.total, others[names[0], row.option].total
            if own is None or new is None or own.basis is not new.basis or not own.median_ms:
                continue
            noise = _timing_noise(own, new)
            times = (own.median_ms, new.median_ms)
            yield _Pair(names[0], *times, noise, own.basis, tuple(names), row.option.key)


def _timing_noise(before: Timing, after: Timing) -> Noise | None:
    """Return the noise of the samples of two times; predicted ones have none."""
    if before.basis is Basis.PREDICTED:
        return Noise(0.0)
    fewer = min(before.samples, after.samples)
    if fewer < FEWEST_SPREAD:
        return None
    return Noise(math.hypot(before.relative_error, after.relative_error), fewer - 1)


def _step_pairs(before: RunRecords, after: RunRecords) -> Iterator[_Pair]:
    """Yield the whole steps that both runs have, measured or predicted in both."""
    own = [(plan_steps(run), profile_steps(run)) for run in (before, after)]
    steps, others = (beside | apart | beside for beside, apart in own)  # the plan's come first
    is_predicted = _is_predicted(before)
    for label, old in steps.items():
        new = others.get(label)
        if new is None or new.basis is not old.basis or old.ms <= 0.0:
            continue
        noises = [Noise(0.0) if is_predicted else _step_noise(x.timing) for x in (old, new)]
        noise = noises[0].plus(noises[1]) if noises[0] and noises[1] else None
        yield _Pair(label, old.ms, new.ms, noise, old.basis)


def _step_noise(timing: Timing) -> Noise | None:
    """Return the noise of a step's samples, or of a sum of measured layers by its interval."""
    if timing.samples >= FEWEST_SPREAD:
        return Noise(timing.relative_error, timing.samples - 1)
    if timing.samples or not 0.0 < timing.p20_ms < timing.p80_ms:
        return None  # a single sample
    return Noise(math.log(timing.p80_ms / timing.p20_ms) / SIGMAS_80)


def _speedup(before: RunRecords, after: RunRecords) -> Change | None:
    """Return the plan's speedup over what users run otherwise, timed in turn within each run."""
    old, new = plan_speedups(before), plan_speedups(after)
    label = next((label for label in BASELINES if label in old and label in new), None)
    if label is None or old[label].basis is not new[label].basis:
        return None
    noise: Noise | None = Noise(0.0)
    if not _is_predicted(before):
        noise = _speedup_noise(old[label], new[label])
    return _Pair(label, old[label].value, new[label].value, noise, old[label].basis).change(1)


def _speedup_noise(before: Speedup, after: Speedup) -> Noise | None:
    """Return the noise of both, by their 95 % intervals."""
    if not (before.low and before.high and after.low and after.high):
        return None
    widths = math.log(before.high / before.low), math.log(after.high / after.low)
    return Noise(math.hypot(*widths) / (2.0 * student_factor(MANY)))


def _is_predicted(run: RunRecords) -> bool:
    """Whether a run's times are those of a device that was not there."""
    if run.profile is not None:
        return run.profile.basis is Basis.PREDICTED
    return run.plan is not None and run.plan.fingerprint.time_basis is Basis.PREDICTED


# --- gradient errors and the proof --------------------------------------------------------------


def _plan_error(before: RunRecords, after: RunRecords) -> Change | None:
    """Return the plan's gradient error in both; its noise is that of the batches."""
    old, new = plan_grad_error(before), plan_grad_error(after)
    if old is None or new is None:
        return None
    noise = _estimate_noise(old, new, _batches(before, after))
    basis = after.plan.grad_error_basis if after.plan else Basis.UNKNOWN
    return _Pair("plan", max(old.mean, 0.0), max(new.mean, 0.0), noise, basis).change(1)


def _error_pairs(before: RunRecords, after: RunRecords) -> list[_Pair]:
    """Return the gradient errors of layers and options that both runs measured.

    Few batches make some spreads small by chance, so each noise is at least the median one; that is
    an estimate of all rows together and needs no Student's factor.
    """
    if before.sensitivity is None or after.sensitivity is None:
        return []
    others = {row.cell: row for row in after.sensitivity.rows}
    found = []
    for row in before.sensitivity.rows:
        other = others.get(row.cell)
        if other is None or Basis.UNKNOWN in (row.basis, other.basis):
            continue
        old, new = row.grad_error, other.grad_error
        noise = _estimate_noise(old, new, _batches(before, after))
        means = (max(old.mean, 0.0), max(new.mean, 0.0))
        if all(means):
            found.append(_Pair(row.name, *means, noise, row.basis, (row.name,), row.option.key))
    if known := [pair.noise.sigma for pair in found if pair.noise]:
        least = statistics.median(known)
        found = [
            replace(pair, noise=Noise(max(pair.noise.sigma, least))) if pair.noise else pair
            for pair in found
        ]
    return found


def _estimate_noise(old: Estimate, new: Estimate, batches: int) -> Noise | None:
    if old.stderr is None or new.stderr is None or batches < FEWEST_SPREAD:
        return None
    if old.mean <= 0.0 or new.mean <= 0.0:
        return None
    return Noise(math.hypot(old.stderr / old.mean, new.stderr / new.mean), batches - 1)


def _batches(before: RunRecords, after: RunRecords) -> int:
    """Return the batches that the standard errors of gradient errors are known by."""
    return min(run.sensitivity.batches if run.sensitivity else 0 for run in (before, after))


# --- what is not alike --------------------------------------------------------------------------


def _facts(run: RunRecords) -> dict[str, str]:
    """Return what a run was made with, by name, as far as its records say."""
    found: dict[str, str] = {}
    if run.sensitivity:
        found = {"model": run.sensitivity.structure, **run.sensitivity.software}
    if run.plan:
        made = run.plan.fingerprint
        found |= {"device": made.device, "model": made.structure, "parallel": made.parallel}
        found |= {"compile mode": made.compile_mode, "tokens per step": str(made.tokens_per_step)}
        found |= {"loss tolerance": percent(run.plan.constraint.loss_tolerance), **made.software}
        found |= {"--keep": ", ".join(run.plan.constraint.keep) or "nothing"}
    if run.profile:
        device, model = run.profile.device, run.profile.model
        tf32 = "allowed" if device.allow_tf32 else "off"
        found |= {"device": device.name, "model": model.structure, "driver": device.driver}
        found |= {"compile mode": device.compile_mode, "TF32": tf32, **device.software}
        found |= {"optimizer": model.optimizer, "tokens per step": str(model.tokens_per_step)}
    return found


def _decisions(run: RunRecords) -> dict[str, str]:
    if run.plan is None:
        return {}
    kept, is_fp32 = run.plan.fp32_outputs, run.plan.is_fp32
    outside = {x: (FP32 if is_fp32 or x in kept else BF16_O2).key for x in run.plan.uncovered}
    return outside | {x.name: x.option.key + STAYS * (x.name in kept) for x in run.plan.layers}


def _differences(
    both: Sequence[Mapping[str, str]], names: Iterable[str]
) -> tuple[DifferenceRow, ...]:
    """Return of which names two runs say otherwise, or only one says anything."""
    told = ((name, *(each.get(name, ABSENT) for each in both)) for name in names)
    return tuple(DifferenceRow(name=x, before=old, after=new) for x, old, new in told if old != new)


def _layer_names(run: RunRecords) -> list[str]:
    """Return the names of a run's layers, by whichever record has them."""
    if run.plan:
        return [layer.name for layer in run.plan.layers]
    if run.profile:
        return list(run.profile.model.names)
    return list(dict.fromkeys(row.name for row in run.sensitivity.rows)) if run.sensitivity else []


def _layers_apart(layers: Sequence[Sequence[str]], names: tuple[str, str]) -> Iterator[str]:
    """Yield which layers only one of the runs has."""
    for own, other, name in zip(layers, reversed(layers), names, strict=True):
        missing = [layer for layer in own if layer not in set(other)]
        if missing and other:
            yield f"{count_of(len(missing), 'layer')} in {name} only: {first_and_more(missing)}"
