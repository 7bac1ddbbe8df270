"""`autoprec compare`: two folders or files of records -> what differs, and whether that may be."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from autoprec.common.text import shown_value
from autoprec.errors import SettingsError
from autoprec.records import Change, Check, Comparison, Verdict
from autoprec.report import load_run
from autoprec.report.compare import compare_runs
from autoprec.report.compare_views import change_text
from autoprec.report.formats import count_of
from autoprec.tuning.parsing import parse_fraction

WORSE = (Verdict.REFUTED, Verdict.INCONCLUSIVE, Verdict.NOT_RUN, Verdict.VERIFIED)


class FailIf(StrEnum):
    """What a comparison can be asked not to show."""

    SLOWER = "slower"  # the plan's step takes longer by more than the limit
    SPEEDUP = "speedup"  # its speedup over a step of the same run is less by more than the limit
    GRAD_ERROR = "grad-error"  # its gradient error is more by more than the limit
    VERDICT = "verdict"  # what was proven is not any more
    PLAN = "plan"  # a layer has another option


LIMITED = (FailIf.SLOWER, FailIf.SPEEDUP, FailIf.GRAD_ERROR)


class Condition(NamedTuple):
    """Something to fail for, and the relative change that is allowed."""

    kind: FailIf
    limit: float
    text: str  # as it was written


def compare_paths(before: Path, after: Path, *, fail_if: Sequence[str] = ()) -> Comparison:
    """Compare two run folders, or files of them, and check the conditions of `fail_if`.

    A condition fails where the whole interval is beyond its limit.

    Raises:
        SettingsError: a condition cannot be read, or the runs do not tell.
        RecordError: a record cannot be read, or the runs have nothing in common.
    """
    conditions = [parse_condition(text) for text in fail_if]
    found = compare_runs(load_run(before), load_run(after), names=(str(before), str(after)))
    checks = tuple(_check(found, condition) for condition in conditions)
    return found.model_copy(update={"checks": checks})


def parse_condition(text: str) -> Condition:
    """Return a condition of `--fail-if`.

    >>> parse_condition("slower=2%").limit
    0.02
    """
    name, is_given, limit = text.partition("=")
    try:
        kind = FailIf(name.strip())
        if bool(is_given) is not (kind in LIMITED):
            raise ValueError
        allowed = parse_fraction(limit.strip()) if is_given else 0.0
    except (ValueError, SettingsError) as error:
        raise SettingsError(
            "--fail-if must be slower=2%, speedup=2%, grad-error=10% (or other limits), verdict or "
            f"plan, but it is {shown_value(text)}; correct it"
        ) from error
    return Condition(kind, allowed, text.strip())


def _check(found: Comparison, condition: Condition) -> Check:
    """Return whether a condition holds; one that cannot be judged is an error, no silent pass."""
    limit = condition.limit
    what, judged = {
        FailIf.SLOWER: ("the plan's step time, with its noise,", _is_below(found.step, limit)),
        FailIf.SPEEDUP: ("the plan's speedup, with its noise,", _is_above(found.speedup, limit)),
        FailIf.GRAD_ERROR: (
            "the plan's gradient error, with its noise,",
            _is_below(found.grad_error, limit),
        ),
        FailIf.VERDICT: ("a verdict", _is_kept(found)),
        FailIf.PLAN: ("a plan", _is_same_plan(found)),
    }[condition.kind]
    if judged is None:
        raise SettingsError(
            f"--fail-if {condition.kind} needs {what} in both runs, measured alike, but "
            f"{found.before} and {found.after} do not both have it; leave the condition out, or "
            "run the stages that make it (`autoprec tune` with verification)"
        )
    is_good, detail = judged
    return Check(name=f"fail if {condition.text}", is_good=is_good, detail=detail)


def _is_below(change: Change | None, limit: float) -> tuple[bool, str] | None:
    """Whether a number has not risen by more than the limit; None where that is not known."""
    if change is None:
        return None
    if not change.ratio:
        return change.after <= 0.0, f"{change.before:g} -> {change.after:g}"
    if change.low is None:
        return None
    return change.low <= 1.0 + limit, change_text(change)


def _is_above(change: Change | None, limit: float) -> tuple[bool, str] | None:
    """Whether a number has not fallen by more than the limit; None where that is not known."""
    if change is None or change.high is None:
        return None
    return change.high >= 1.0 - limit, change_text(change)


def _is_kept(found: Comparison) -> tuple[bool, str] | None:
    """Whether the proof is no weaker; a plan that was not verified is better than a refuted one."""
    if found.verdicts is None:
        return None
    old, new = found.verdicts
    undecided = (Verdict.INCONCLUSIVE, Verdict.NOT_RUN)
    is_good = WORSE.index(new) >= WORSE.index(old) or (old in undecided and new in undecided)
    return is_good, f"{old} -> {new}"


def _is_same_plan(found: Comparison) -> tuple[bool, str] | None:
    """Whether all layers that both plans have, and no others, have the same options."""
    if not found.layers_compared:
        return None
    changed = len(found.decisions)
    return not changed, f"{changed} of {count_of(found.layers_compared, 'layer')} decided otherwise"
