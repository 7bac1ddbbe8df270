"""One row per layer: what it is, what it runs in, what that costs, what that does, and why.

Times are ms per step (all calls of the layer, forward and backward), as in the profile. A layer's
`total_ms` is measured as a whole, its GEMMs and casts apart from it; `other_ms` is what is left
(bias, autograd, launches; negative where the parts cost more alone), so that a row adds up.
Savings are against BF16 O2, the baseline, and against FP32, the reference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from autoprec.records import (
    BF16_O2,
    FP32,
    Assignment,
    Basis,
    Estimate,
    LayerKind,
    LayerSensitivity,
    LayerSpec,
    LayerTiming,
    Option,
    Profile,
    Sensitivity,
    Timing,
)
from autoprec.report.formats import joint_basis
from autoprec.report.runs import RunRecords

PARTS = ("output", "grad_input", "grad_weight", "cast")


@dataclass(frozen=True)
class Times:
    """The times of one layer in one option, in ms per step; None where a part does not exist."""

    output_ms: float | None
    grad_input_ms: float | None
    grad_weight_ms: float | None
    cast_ms: float | None
    total_ms: float | None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    rejected: int = 0
    basis: Basis = Basis.MEASURED

    @property
    def parts_ms(self) -> float:
        """The sum of the parts that were timed apart."""
        return _sum((self.output_ms, self.grad_input_ms, self.grad_weight_ms, self.cast_ms))

    @property
    def other_ms(self) -> float | None:
        """The total without its parts; None when either is missing."""
        if self.total_ms is None or self.output_ms is None:
            return None
        return self.total_ms - self.parts_ms


@dataclass(frozen=True)
class OptionRow:
    """One option of one layer: its timing and sensitivity, as far as they were taken."""

    option: Option
    timing: LayerTiming | None
    sensitivity: LayerSensitivity | None

    @property
    def times(self) -> Times | None:
        """The option's times, or None when it was not timed or cannot run."""
        return times_of(self.timing)

    @property
    def memory_bytes(self) -> int | None:
        """Parameters, gradients, optimizer state and saved activations together."""
        row = self.timing
        if row is None:
            return None
        return row.parameter_bytes + row.gradient_bytes + row.optimizer_bytes + row.activation_bytes


@dataclass(frozen=True)
class LayerRow:
    """One layer of the report. `option` is None where there is no plan yet."""

    name: str
    kind: LayerKind
    type_name: str
    shape: str
    calls: int | None
    spec: LayerSpec | None
    option: Option | None
    options: tuple[OptionRow, ...]
    chosen: Times | None
    bf16_o2: Times | None
    fp32: Times | None
    grad_error: Estimate | None
    grad_error_basis: Basis
    grad_error_share: float | None
    reason: str

    @cached_property
    def memory_bytes(self) -> int | None:
        """The memory of the chosen option."""
        chosen = next((row for row in self.options if row.option == self.option), None)
        return chosen.memory_bytes if chosen else None

    @cached_property
    def best_fp8(self) -> OptionRow | None:
        """The fastest FP8 option that was timed, chosen or not."""
        timed = [row for row in self.options if row.option.is_fp8 and row.times is not None]
        return min(timed, key=lambda row: _total(row.times) or 0.0, default=None)

    @property
    def saved_vs_bf16_o2_ms(self) -> float | None:
        """BF16 O2's time minus the chosen option's."""
        return _difference(self.bf16_o2, self.chosen)

    @property
    def saved_vs_fp32_ms(self) -> float | None:
        """FP32's time minus the chosen option's."""
        return _difference(self.fp32, self.chosen)

    @property
    def speedup_vs_bf16_o2(self) -> float | None:
        """BF16 O2's time by the chosen option's."""
        return _quotient(self.bf16_o2, self.chosen)

    @property
    def speedup_vs_fp32(self) -> float | None:
        """FP32's time by the chosen option's."""
        return _quotient(self.fp32, self.chosen)


@dataclass(frozen=True)
class Totals:
    """The sums of the rows' columns; `untimed` layers are in none of the times."""

    layers: int
    untimed: int
    chosen_ms: float
    bf16_o2_ms: float
    fp32_ms: float
    saved_vs_bf16_o2_ms: float
    saved_vs_fp32_ms: float
    grad_error: float
    memory_bytes: int


def layer_rows(run: RunRecords) -> tuple[LayerRow, ...]:
    """Return one row per layer, in model order."""
    timings = _timings_by_layer(run.profile)
    effects = _effects_by_layer(run.sensitivity)
    specs = {layer.name: layer for layer in run.profile.model.layers} if run.profile else {}
    assignments = {layer.name: layer for layer in run.plan.layers} if run.plan else {}
    names = dict.fromkeys((*specs, *assignments, *effects))
    reference = run.sensitivity.reference if run.sensitivity else FP32
    rows = [
        _Sources(
            name=name,
            spec=specs.get(name),
            assignment=assignments.get(name),
            timings=timings.get(name, {}),
            effects=effects.get(name, {}),
            reference=reference,
        )
        for name in names
    ]
    grad_error_sum = sum(row.grad_error.mean for row in rows if row.grad_error is not None)
    return tuple(_layer_row(row, grad_error_sum) for row in rows)


def table_totals(rows: Iterable[LayerRow]) -> Totals:
    """Return the sums of the rows."""
    rows = tuple(rows)
    return Totals(
        layers=len(rows),
        untimed=sum(_total(row.chosen or row.bf16_o2) is None for row in rows),
        chosen_ms=_sum(_total(row.chosen) for row in rows),
        bf16_o2_ms=_sum(_total(row.bf16_o2) for row in rows),
        fp32_ms=_sum(_total(row.fp32) for row in rows),
        saved_vs_bf16_o2_ms=_sum(row.saved_vs_bf16_o2_ms for row in rows),
        saved_vs_fp32_ms=_sum(row.saved_vs_fp32_ms for row in rows),
        grad_error=_sum(row.grad_error.mean for row in rows if row.grad_error is not None),
        memory_bytes=sum(row.memory_bytes or 0 for row in rows),
    )


def times_of(row: LayerTiming | None) -> Times | None:
    """Return a profile row's times; None when there is none or the option cannot run."""
    if row is None or row.total is None:
        return None
    return Times(
        output_ms=_median(row.output),
        grad_input_ms=_median(row.grad_input),
        grad_weight_ms=_median(row.grad_weight),
        cast_ms=_median(row.cast),
        total_ms=row.total.median_ms,
        p20_ms=row.total.p20_ms,
        p80_ms=row.total.p80_ms,
        samples=row.total.samples,
        rejected=row.total.rejected,
        basis=row.total.basis,
    )


def sum_times(times: Sequence[Times]) -> Times:
    """Return the sum of several layers' times in one option; a part is there if one has it."""
    return Times(
        output_ms=_sum_known(each.output_ms for each in times),
        grad_input_ms=_sum_known(each.grad_input_ms for each in times),
        grad_weight_ms=_sum_known(each.grad_weight_ms for each in times),
        cast_ms=_sum_known(each.cast_ms for each in times),
        total_ms=_sum_known(each.total_ms for each in times),
        samples=sum(each.samples for each in times),
        rejected=sum(each.rejected for each in times),
        basis=joint_basis(*(each.basis for each in times)),
    )


def option_rows(
    options: Iterable[Option],
    timings: Mapping[Option, LayerTiming],
    effects: Mapping[Option, LayerSensitivity],
) -> tuple[OptionRow, ...]:
    """Return what is known of each option: those of the layer, and any that was measured."""
    known = dict.fromkeys((*options, *timings, *effects))
    return tuple(OptionRow(option, timings.get(option), effects.get(option)) for option in known)


@dataclass(frozen=True)
class _Sources:
    """All that the records say about one layer."""

    name: str
    spec: LayerSpec | None
    assignment: Assignment | None
    timings: Mapping[Option, LayerTiming]
    effects: Mapping[Option, LayerSensitivity]
    reference: Option

    @cached_property
    def option(self) -> Option | None:
        return self.assignment.option if self.assignment else None

    @cached_property
    def effect(self) -> LayerSensitivity | None:
        return self.effects.get(self.option) if self.option else None

    @cached_property
    def grad_error(self) -> Estimate | None:
        if self.effect is not None:
            return self.effect.grad_error
        if self.option is None:
            return None
        if self.effects and self.option == self.reference:
            return Estimate(mean=0.0, stderr=0.0)  # by definition: it is the reference
        given = self.assignment.grad_error if self.assignment else None
        return None if given is None else Estimate(mean=given)

    @property
    def grad_error_basis(self) -> Basis:
        if self.effect is not None:
            return self.effect.basis
        return self.assignment.grad_error_basis if self.assignment else Basis.UNKNOWN

    def times(self, option: Option) -> Times | None:
        """The option's times: from the profile, else what the plan itself says."""
        if option in self.timings:
            return times_of(self.timings[option])
        if self.assignment is None:
            return None
        if option == self.option:
            return _bare_times(self.assignment.layer_ms, self.assignment.basis)
        if option == BF16_O2:
            return _bare_times(self.assignment.baseline_ms, self.assignment.basis)
        return None


def _layer_row(sources: _Sources, grad_error_sum: float) -> LayerRow:
    spec, assignment, grad_error = sources.spec, sources.assignment, sources.grad_error
    kind = spec.kind if spec else (assignment.kind if assignment else LayerKind.OTHER)
    return LayerRow(
        name=sources.name,
        kind=kind,
        type_name=spec.type_name.rpartition(".")[2] if spec else "",
        shape=_shape(spec, assignment),
        calls=spec.calls_per_step if spec else None,
        spec=spec,
        option=sources.option,
        options=option_rows(spec.options if spec else (), sources.timings, sources.effects),
        chosen=sources.times(sources.option) if sources.option else None,
        bf16_o2=sources.times(BF16_O2),
        fp32=sources.times(FP32),
        grad_error=grad_error,
        grad_error_basis=sources.grad_error_basis,
        grad_error_share=grad_error.mean / grad_error_sum
        if grad_error is not None and grad_error_sum > 0
        else None,
        reason=assignment.reason if assignment else "",
    )


def _timings_by_layer(profile: Profile | None) -> dict[str, dict[Option, LayerTiming]]:
    found: dict[str, dict[Option, LayerTiming]] = {}
    for row in profile.layers if profile else ():
        for name in row.names:
            found.setdefault(name, {})[row.option] = row
    return found


def _effects_by_layer(sensitivity: Sensitivity | None) -> dict[str, dict[Option, LayerSensitivity]]:
    found: dict[str, dict[Option, LayerSensitivity]] = {}
    for row in sensitivity.rows if sensitivity else ():
        if row.basis is not Basis.UNKNOWN:
            found.setdefault(row.name, {})[row.option] = row
    return found


def _shape(spec: LayerSpec | None, assignment: Assignment | None) -> str:
    """Return MxKxN for a called linear, else the shapes of the parameters."""
    if spec is not None and spec.gemm is not None:
        return str(spec.gemm)
    if spec is not None:
        shapes = tuple(parameter.shape for parameter in spec.parameters)
    else:
        shapes = assignment.shapes if assignment else ()
    return " ".join("x".join(str(size) for size in shape) or "1" for shape in shapes)


def _bare_times(total_ms: float | None, basis: Basis) -> Times | None:
    return None if total_ms is None else Times(None, None, None, None, total_ms, basis=basis)


def _median(timing: Timing | None) -> float | None:
    return None if timing is None else timing.median_ms


def _total(times: Times | None) -> float | None:
    return None if times is None else times.total_ms


def _difference(before: Times | None, after: Times | None) -> float | None:
    first, second = _total(before), _total(after)
    return None if first is None or second is None else first - second


def _quotient(before: Times | None, after: Times | None) -> float | None:
    first, second = _total(before), _total(after)
    return first / second if first is not None and second else None


def _sum_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _sum(values: Iterable[float | None]) -> float:
    return sum(value for value in values if value is not None)
