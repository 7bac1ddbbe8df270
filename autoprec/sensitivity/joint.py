"""The measured gradient error of a whole assignment, as it would run: all layers at once."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from autoprec.device.random_state import random_state_kept
from autoprec.errors import PlanMismatchError
from autoprec.records import BF16_O2, Estimate, LayerSensitivity, Option, Precision
from autoprec.runtime import install_options
from autoprec.sensitivity.reference import Reference

JOINT_BATCHES = 2  # of these, for each assignment: the search measures a dozen
ACTIVATION_BATCHES = 1  # the activations' own error is far smaller than that of any FP8 plan


class JointMeter:
    """Measures whole assignments against one set of reference gradients, kept on the CPU.

    Costs one pass per batch for each new assignment and nothing for one seen before.
    """

    def __init__(self, reference: Reference, *, batches: int = JOINT_BATCHES) -> None:
        """Take a reference that is warmed up, and how many of its batches to measure on."""
        self.reference = reference
        self.batches = batches
        self._measured: dict[tuple[Option, ...], Estimate] = {}

    def measure(self, options: tuple[Option, ...]) -> Estimate:
        """Return the joint gradient error of `options`, in the order of the spec's layers.

        Raises:
            PlanMismatchError: not one option per layer, or a layer cannot run its option.
        """
        names = self.reference.spec.names
        if len(options) != len(names):
            raise PlanMismatchError(
                f"an assignment has one option per layer, {len(names)}, but {len(options)} came; "
                "give them in the order of the model spec"
            )
        if options not in self._measured:
            by_name = dict(zip(names, options, strict=True))
            self._measured[options] = self._measure(by_name, batches=self.batches)
        return self._measured[options]

    def measure_activations(self, rows: Sequence[LayerSensitivity]) -> Estimate:
        """Return what uniform BF16 costs beyond its layers: the error of BF16 activations.

        `rows` are measured with FP32 activations. Taken from the joint error of uniform BF16, the
        activations' part makes the table add up where most plans are, in deep models too: there,
        the errors of layers and activations are not independent (25 blocks: 40 % of the joint
        error of small subsets).
        """
        joint = self._measure(self.reference.spec.bf16_options, batches=ACTIVATION_BATCHES)
        layers = math.fsum(row.grad_error.mean for row in rows if row.option == BF16_O2)
        return joint.model_copy(update={"mean": max(joint.mean - layers, 0.0)})

    @random_state_kept()
    def _measure(self, options: Mapping[str, Option], *, batches: int) -> Estimate:
        reference = self.reference
        is_16_bit = any(o.precision is not Precision.FP32 for o in options.values())
        uncovered = [p.name for p in reference.spec.uncovered] if is_16_bit else []
        installed = partial(install_options, reference.model, options, uncovered=uncovered)
        return reference.measure_errors({"joint": installed}, batches=batches)["joint"]
