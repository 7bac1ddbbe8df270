"""A plan as people handle it: read, look, change a layer, compare, export, apply.

It is the record of `autoprec.records` with verbs; a file of one is a file of the other.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from autoprec import records
from autoprec.errors import PlanMismatchError
from autoprec.records import Assignment, Basis, Comparison, LayerKind, Option

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from autoprec.runtime.apply import AnyOptimizer, Model


class Plan(records.Plan):
    """The precision of every layer of one model.

    Example:
        >>> import torch, autoprec
        >>> from autoprec.runtime import uniform_plan
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
        >>> plan = autoprec.Plan.of(uniform_plan(model, "fp8_o1:tensorwise"))
        >>> changed = plan.with_layer("1", "bf16_o2")  # and changed.save("plan.json")
        >>> plan["1"].precision.value, changed["1"].precision.value
        ('fp8_o1', 'bf16_o2')
        >>> [(row.name, row.before, row.after) for row in plan.diff(changed).decisions]
        [('1', 'fp8_o1:tensorwise', 'bf16_o2')]
        >>> with changed.applied(model):
        ...     model[1].weight.dtype
        torch.bfloat16
        >>> model[1].weight.dtype
        torch.float32
    """

    @classmethod
    def of(cls, record: records.Plan) -> Self:
        """Return a record of a plan as a plan with verbs."""
        return cls(**dict(record))

    def __getitem__(self, name: str) -> Assignment:
        """Return the assignment of a layer.

        Raises:
            PlanMismatchError: no layer has that name.
        """
        return self.layers[self._position(name)]

    def with_layer(self, name: str, option: Option | str) -> Self:
        """Return a plan in which one layer has another option, e.g. `bf16_o2` or `fp8_o1:rowwise`.

        Times, gradient error, notes and certificate were those of the old plan: the new has none.

        Raises:
            PlanMismatchError: no layer has that name, the option cannot be read, or it is FP8 and
                the layer no linear.
        """
        at = self._position(name)
        old = self.layers[at]
        try:
            chosen = Option.parse(str(option))
        except ValueError as error:
            raise PlanMismatchError(
                "an option must be fp32, bf16_o2 or fp8_o1:RECIPE, but it is "
                f"{option!r}; write e.g. fp8_o1:tensorwise"
            ) from error
        if chosen.is_fp8 and old.kind is not LayerKind.LINEAR:
            raise PlanMismatchError(
                f"FP8 is for nn.Linear, but {name!r} is a layer of kind {old.kind}; "
                "choose bf16_o2 or fp32"
            )
        kept = old.model_dump(include={"name", "kind", "shapes", "baseline_ms", "basis"})
        new = Assignment(**kept, **dict(chosen), reason="set by hand")
        return self.model_copy(
            update={
                "layers": (*self.layers[:at], new, *self.layers[at + 1 :]),
                "grad_error": None,
                "grad_error_basis": Basis.UNKNOWN,
                "predicted": None,
                "certificate": None,
                "notes": (),  # "FP8 pays on 8 of 10 layers" was true of the old plan
            }
        )

    def diff(self, other: records.Plan) -> Comparison:
        """Return where another plan differs, its `decisions` among that; see `autoprec compare`."""
        from autoprec.report.compare import compare_runs
        from autoprec.report.runs import RunRecords

        return compare_runs(RunRecords(plan=self), RunRecords(plan=other))

    def export(self, to: str) -> str:
        """Return the plan in the words of another framework, e.g. `megatron`.

        Raises:
            PlanMismatchError: that framework cannot express the plan exactly.
        """
        from autoprec.integrations.export import export_plan

        return export_plan(self, to)

    def apply(
        self,
        model: "Model",
        optimizer: "AnyOptimizer" = None,  # type: ignore[assignment]  # the variable's default
    ) -> "tuple[Model, AnyOptimizer]":
        """Make a model run as the plan says, see `autoprec.apply`."""
        from autoprec.runtime import apply

        return apply(self, model, optimizer)

    @contextmanager
    def applied(self, model: "Model", optimizer: "Optimizer | None" = None) -> "Iterator[Model]":
        """Apply the plan while the context is open, and undo it at its end.

        Raises:
            PlanMismatchError: the plan does not fit the model.
        """
        from autoprec.runtime import apply, undo

        apply(self, model, optimizer)
        try:
            yield model
        finally:
            undo(model, optimizer)

    def __str__(self) -> str:
        """Return the plan in a few lines."""
        from autoprec.report import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from autoprec.report import RunRecords, run_html

        return run_html(RunRecords(plan=self))

    def _position(self, name: str) -> int:
        names = [layer.name for layer in self.layers]
        if name in names:
            return names.index(name)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
        raise PlanMismatchError(
            f"every layer must be one of the plan's, but {name!r} is not; the nearest are "
            f"{', '.join(near)}"
        )
