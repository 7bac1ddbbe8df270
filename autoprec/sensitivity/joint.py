"""The gradient error of whole assignments, all layers at once."""

import math
from collections.abc import Collection, Mapping, Sequence

from autoprec.device.random_state import random_state_kept
from autoprec.records.model import BF16_O2, FP32, ModelSpec, Option
from autoprec.records.sensitivity import Estimate, Island, LayerSensitivity, fp32_outputs
from autoprec.sensitivity.estimates import Squares
from autoprec.sensitivity.islands import find_islands
from autoprec.sensitivity.reference import Reference


class JointMeter:
    """Measures whole assignments against one set of reference gradients, kept on the CPU.

    Costs one pass per batch for each new assignment and nothing for one seen before.
    """

    def __init__(self, reference: Reference, *, islands: Sequence[Island] = ()) -> None:
        """Take a reference that is warmed up, and the sensitivity's islands."""
        self.reference = reference
        self.islands = tuple(islands)
        self._measured: dict[tuple[tuple[Option, ...], int], Estimate] = {}

    def measure(self, options: tuple[Option, ...], batches: int) -> Estimate:
        """Return the joint gradient error of `options`, in the order of the spec's layers.

        On so many batches, or on all that there are.

        Raises:
            PlanMismatchError: a layer cannot run its option.
        """
        if (options, batches) not in self._measured:
            by_name = dict(zip(self.reference.spec.names, options, strict=True))
            found = self._measure(by_name, batches=range(batches), islands=self.islands)
            self._measured[options, batches] = found.estimate
        return self._measured[options, batches]

    def measure_activations(
        self, rows: Sequence[LayerSensitivity], joint: Squares
    ) -> tuple[Estimate, tuple[Island, ...]]:
        """Return the cost of uniform BF16 beyond its layers: the error of BF16 activations.

        With it come the islands where BF16 is too coarse, whose part is theirs; what is measured
        from here on has FP32 between their layers where these are FP32. They are looked for on the
        batch that has most of the error.

        `rows` are measured with FP32 activations. Taken from `joint`, that of uniform BF16, the
        activations' part makes the table add up where most plans are, in deep models too: there,
        the errors of layers and activations are not independent (25 blocks: 40 % of the joint
        error of small subsets).
        """
        worst, whole = [joint.largest], joint.estimate.mean
        # what is left of that one counts in proportion: bars and budgets are of all batches
        part = whole / joint.of(*worst).mean if whole > 0.0 else 1.0
        self.islands, left = find_islands(
            self.reference,
            rows,
            whole,
            lambda islands: part * self.measure_bf16(islands, worst).estimate.mean,
            lambda names, islands: part * self._measure_low(names, islands, worst).estimate.mean,
        )
        others = [index for index in range(len(joint.errors)) if index not in worst]
        if self.islands and left > 0.0 and others:
            found = self.measure_bf16(self.islands, others)
            scale = joint.gradients[joint.largest]
            errors = [*found.errors, left / part * scale]
            left = Squares(errors, [*found.gradients, scale]).estimate.mean
        inside = {name for island in self.islands for name in island.names}
        bf16 = [row for row in rows if row.option == BF16_O2 and row.name not in inside]
        error = max(left - math.fsum(row.grad_error.mean for row in bf16), 0.0)
        return Estimate(mean=error), self.islands

    def measure_bf16(
        self, islands: Sequence[Island] = (), batches: Sequence[int] | None = None
    ) -> Squares:
        """Return the joint gradient error of uniform BF16 but for islands, on all batches."""
        spec = self.reference.spec
        fp32 = tied_with(spec, [name for island in islands for name in island.names])
        options = {**spec.bf16_options, **dict.fromkeys(fp32, FP32)}
        every = range(len(self.reference.batches))
        return self._measure(options, batches=batches or every, islands=islands)

    def _measure_low(
        self, names: Sequence[str], islands: Sequence[Island], batches: Sequence[int]
    ) -> Squares:
        """Return the joint gradient error of these layers in BF16 and all others in FP32."""
        spec = self.reference.spec
        low = {name: spec.bf16_options[name] for name in tied_with(spec, names)}
        options = {**dict.fromkeys(spec.names, FP32), **low}
        return self._measure(options, batches=batches, islands=islands)

    @random_state_kept()
    def _measure(
        self, options: Mapping[str, Option], *, batches: Sequence[int], islands: Sequence[Island]
    ) -> Squares:
        is_longer = len(batches) > len(self.reference.batches)
        reference = self.reference.longer if is_longer else self.reference
        kept = fp32_outputs(islands, options)
        batches = batches[: len(reference.batches)]
        return reference.measure_joint(options, batches=batches, fp32_outputs=kept)


def tied_with(spec: ModelSpec, names: Collection[str]) -> list[str]:
    """Return layers and all that share a parameter with one of them, which share its storage."""
    owners = {layer.tied_to or layer.name for layer in spec.layers if layer.name in names}
    return [layer.name for layer in spec.layers if (layer.tied_to or layer.name) in owners]
