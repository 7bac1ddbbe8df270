"""What checks say: of a machine, of a plan against a model, of one record against another."""

from autoprec.records.base import Record
from autoprec.records.cost import DeviceFacts, Timing


class Check(Record):
    """One thing looked at: `is_good` and what was seen, in words.

    `is_judged` is False of a layer where nothing was seen that could be good or bad.
    """

    name: str
    is_good: bool
    detail: str
    is_judged: bool = True


class Diagnosis(Record):
    """What `doctor` found: facts, checks, and one measured GEMM per precision (ms)."""

    device: DeviceFacts
    checks: tuple[Check, ...]
    gemm: str  # MxKxN of the timed GEMM
    gemm_ms: dict[str, Timing]  # fp32, bf16, fp8 (where it runs)

    @property
    def is_healthy(self) -> bool:
        """Whether every check is good."""
        return all(check.is_good for check in self.checks)


class PlanCheck(Record):
    """Whether a plan is well-formed, fits a model, and is what runs."""

    plan: str
    checks: tuple[Check, ...]

    @property
    def is_good(self) -> bool:
        """Whether every check is good."""
        return all(check.is_good for check in self.checks)


class DifferenceRow(Record):
    """One layer, or one field, that two records disagree on."""

    name: str
    before: str
    after: str


class Difference(Record):
    """What differs between two plans or two sensitivities, row by row; empty when nothing does."""

    before: str
    after: str
    rows: tuple[DifferenceRow, ...]
