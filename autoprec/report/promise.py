"""What is promised of a plan's loss: the verdict, what was trained for it, and what is expected.

Every place that shows a verdict takes its words from here, so that none leaves out how far it
reaches: `verified over 75 steps (50 in FP32, 25 with the plan)`.
"""

from dataclasses import dataclass, fields

from autoprec.records import Certificate, Estimate, Plan
from autoprec.records.verification import (
    ExpectedGap,
    HorizonGap,
    LossGap,
    MetricGap,
    Proxy,
    Verdict,
    Verification,
)
from autoprec.report import formats
from autoprec.report.formats import clean_text, count_of

HEADLINES = {
    Verdict.VERIFIED: "its {} verified",
    Verdict.REFUTED: "but its {} refuted",
    Verdict.INCONCLUSIVE: "its {} not decided yet",
    Verdict.NOT_RUN: "its {} not verified",
}


@dataclass(frozen=True)
class Promise:
    """A verdict, its reach and what goes with it; the fields of a proof under their names."""

    verdict: Verdict = Verdict.NOT_RUN
    loss_tolerance: float | None = None
    gap: LossGap | None = None
    proxy: Proxy | None = None
    warmup_steps: int = 0
    branch_steps: int = 0
    advice: str = ""
    expected: ExpectedGap | None = None
    metrics: tuple[MetricGap, ...] = ()
    own_gap: LossGap | None = None
    written_gap: LossGap | None = None
    horizons: tuple[HorizonGap, ...] = ()
    growth: Estimate | None = None
    has_gap: bool = False  # whether a plan is there that differs from FP32

    @classmethod
    def of(cls, proof: Verification | Certificate | None, plan: Plan | None) -> "Promise":
        """Return the promise of a proof, in whole or in short, and of the plan that it is of."""
        has_gap = plan is not None and not plan.is_fp32
        if proof is None or proof.verdict is Verdict.NOT_RUN:
            tolerance = plan.constraint.loss_tolerance if plan else None
            expected = plan.expected_gap if plan else None
            return cls(loss_tolerance=tolerance, expected=expected, has_gap=has_gap)
        # a certificate has fewer of them
        known = type(proof).model_fields.keys()
        told = {each.name: getattr(proof, each.name) for each in fields(cls) if each.name in known}
        expected = proof.expected_gap or (plan.expected_gap if plan else None)
        return cls(**told, expected=expected, has_gap=has_gap or plan is None)

    @property
    def steps(self) -> int:
        """How long the branches trained."""
        return self.warmup_steps + self.branch_steps

    @property
    def reach(self) -> str:
        """How long the branches trained, `over 75 steps`; "" where none did."""
        return "" if self.verdict is Verdict.NOT_RUN else f"over {count_of(self.steps, 'step')}"

    @property
    def trained_steps(self) -> dict[str, int] | None:
        """The steps of a branch before the plan and with it; None where none trained."""
        if self.verdict is Verdict.NOT_RUN:
            return None
        return {"fp32": self.warmup_steps, "plan": self.branch_steps}

    @property
    def badge(self) -> str:
        """The verdict in a few words."""
        is_open = self.verdict is Verdict.NOT_RUN
        return "not verified" if is_open else self._reaching(self.verdict.value)

    @property
    def headline(self) -> str:
        """The verdict as the end of a sentence."""
        names = [clean_text(metric.name) for metric in self.metrics if metric.tolerance]
        what = "loss gap is"
        if names:  # the verdict is the worst of all
            what = f"{', '.join(['loss gap', *names[:-1]])} and {names[-1]} are"
        return self._reaching(HEADLINES[self.verdict].format(what))

    def _reaching(self, said: str) -> str:
        where = " on a proxy" if self.proxy else ""
        return f"{said}{where} {self.reach}".rstrip() + self._restriction

    @property
    def _restriction(self) -> str:
        """What takes a part back: a verified proof has `advice` only if its branches were idle."""
        is_idle = self.verdict is Verdict.VERIFIED and self.advice
        return ", in branches that learned less than the tolerance" if is_idle else ""

    @property
    def words(self) -> str:
        """The verdict, the model that trained if it was not the plan's own, and for how long."""
        return f"{self._trained}{self._restriction}"

    @property
    def _trained(self) -> str:
        if self.verdict is Verdict.NOT_RUN:
            return "not verified"
        model = ""
        if self.proxy:
            small = formats.parameters(self.proxy.parameters)
            large = formats.parameters(self.proxy.model_parameters).removesuffix(" parameters")
            model = f" on a proxy of {small} (for {large})"
        steps = f"{self.warmup_steps:,} in FP32, {self.branch_steps:,} with the plan"
        return f"{self.verdict}{model} {self.reach} ({steps})"

    @property
    def sentence(self) -> str:
        """The verdict and the measured gap."""
        if self.verdict is Verdict.NOT_RUN:
            return f"{self.words}: no training was compared; run `autoprec verify`"
        known = f"the loss gap to FP32 is {formats.gap(self.gap)}" if self.gap else ""
        tolerance = f"the tolerance is {formats.share(self.loss_tolerance)}"
        metrics = [f"{clean_text(m.name)} is {m.verdict}" for m in self.metrics if m.tolerance]
        said = (known or "no loss gap is known", tolerance, clean_text(self.advice), *metrics)
        return f"{self._trained}: {'; '.join(part for part in said if part)}"

    @property
    def expectation(self) -> str:
        """What is expected of the gap further on; "" without a plan that could have one."""
        expected, tolerance = self.expected, self.loss_tolerance
        if not self.has_gap:
            return ""
        if expected is None:
            unknown = "what the gap is after more steps is not known; --run-steps N predicts it"
            return f"{self._furthest}{unknown}"
        after = f"after {count_of(expected.steps, 'step')} with the plan"
        if expected.mean is None or expected.low is None or expected.high is None:
            reason = f": {clean_text(expected.reason)}" if expected.reason else ""
            return f"{after} the gap is not known{reason}"
        mean, low, high = (
            formats.share(each, sign=True) for each in (expected.mean, expected.low, expected.high)
        )
        if expected.low == expected.high:
            return f"{after} a gap of {mean} is expected"
        by = f" {clean_text(expected.reason)}" if expected.reason else ""
        said = (
            f"{after} a gap of {mean} is expected ({100 * expected.confidence:.0f} % interval "
            f"{low} to {high}, {expected.basis}{by})"
        )
        if self.gap and self.gap.low > expected.high and self.branch_steps <= expected.steps:
            return f"{said}; what was measured over fewer is more, so it is not to be relied on"
        if tolerance is None or expected.high <= tolerance:
            return said
        above = "which is" if expected.low > tolerance else "which may be"
        return f"{said}, {above} above the tolerance"

    @property
    def _furthest(self) -> str:
        """The gap over the longest length that was trained, where that is not the proof's own."""
        rung = max(self.horizons, key=lambda rung: rung.steps, default=None)
        if rung is None or rung.gap is None or rung.steps <= self.steps:
            return ""
        mean = formats.with_stderr(rung.gap.mean, rung.stderr)
        return f"over {count_of(rung.steps, 'step')} the gap is {mean} (measured); "

    @property
    def measured(self) -> list[str]:
        """The user's metrics, and the loss through the plan's own forward, a sentence for each."""
        found = [_metric_sentence(metric) for metric in self.metrics]
        if self.own_gap and self.gap and self.own_gap != self.gap:
            own = formats.gap_ends(self.own_gap)
            found.append(f"through the plan's own forward the gap is {own}")
        if self.horizons:
            found.append(self._by_length)
        return found

    @property
    def _by_length(self) -> str:
        gaps = ", ".join(
            f"{formats.with_stderr(rung.gap.mean, rung.stderr) if rung.gap else 'diverged'} over "
            f"{count_of(rung.steps, 'step')}"
            for rung in self.horizons
        )
        growth = "how it grows is lost in the noise"
        if self.growth and self.growth.stderr is not None:
            growth = f"it grows as steps^{self.growth.mean:.2f} (+- {self.growth.stderr:.2f})"
        return f"by length the gap is {gaps}; {growth}"


def _metric_sentence(metric: MetricGap) -> str:
    said = f"{clean_text(metric.name)} is {metric.reference:.4g} in FP32"
    if metric.gap is not None:
        ends = (metric.gap.mean, metric.gap.low, metric.gap.high)
        said += ", {:+.2g} with the plan (interval {:+.2g} to {:+.2g})".format(*ends)
    if metric.tolerance is None:
        return f"{said}; not tested"
    low, high = metric.tolerance.at_least, metric.tolerance.at_most
    allowed = " and ".join(f"{end:+g}" for end in (low, high) if end is not None)
    return f"{said}; allowed {allowed}: {metric.verdict}"
