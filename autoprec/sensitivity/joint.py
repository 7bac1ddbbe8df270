"""The measured e of a whole assignment, as it would run: all layers at once, in the plan's flow."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from autoprec.common.progress import Progress, report_nothing
from autoprec.errors import PlanMismatchError
from autoprec.records import (
    BF16_O2,
    FP32,
    Estimate,
    JointMeasurement,
    LayerSensitivity,
    ModelSpec,
    Option,
    Precision,
)
from autoprec.runtime import install_options
from autoprec.sensitivity.estimates import ratio_estimate
from autoprec.sensitivity.gemm import fast_fp8_gemms
from autoprec.sensitivity.reference import (
    DEFAULT_WARMUP_STEPS,
    Reference,
    prepare_reference,
)
from autoprec.workload.functions import Workload

JOINT_BATCHES = 2  # of these, for each assignment: the search measures a dozen
FLOW_BATCHES = 1  # e of the flow is far smaller than that of any FP8 plan


class JointMeter:
    """Measures whole assignments against one set of reference gradients, kept on the CPU.

    Costs one pass per batch for each new assignment and nothing for one seen before.
    """

    def __init__(
        self,
        workload: Workload,
        spec: ModelSpec,
        *,
        device: torch.device,
        batches: int = JOINT_BATCHES,
        warmup_steps: int = DEFAULT_WARMUP_STEPS,
        checkpoint: Path | None = None,
        seed: int = 0,
        progress: Progress = report_nothing,
        reference: Reference | None = None,
    ) -> None:
        """Warm the reference up, or take one that is warm already."""
        self.spec = spec
        self.batches = batches
        self.reference = reference or prepare_reference(
            workload,
            spec,
            device=device,
            batches=batches,
            warmup_steps=warmup_steps,
            checkpoint=checkpoint,
            seed=seed,
            progress=progress,
        )
        self._measured: dict[tuple[Option, ...], JointMeasurement] = {}
        self._scale: dict[int, float] = {}
        self._spent_s = 0.0

    @property
    def step_equivalents(self) -> float:
        """What all measurements so far took, in FP32 training steps (warm-up left out)."""
        return self._spent_s / self.reference.step_s

    def measure(self, options: tuple[Option, ...]) -> Estimate:
        """Return the joint e of `options`, given in the order of the spec's layers."""
        return self.measure_joint(options).grad_error

    def measure_joint(
        self, options: tuple[Option, ...], *, label: str = "", predicted_grad_error: float = 0.0
    ) -> JointMeasurement:
        """Return the joint e beside a prediction to compare with.

        Raises:
            PlanMismatchError: not one option per layer, or a layer cannot run its option.
        """
        if len(options) != len(self.spec.layers):
            raise PlanMismatchError(
                f"an assignment has one option per layer, {len(self.spec.layers)}, but "
                f"{len(options)} came; give them in the order of the model spec"
            )
        if options not in self._measured:
            started = time.perf_counter()
            self._measured[options] = self._measure(options)
            self._spent_s += time.perf_counter() - started
        found = self._measured[options]
        return found.model_copy(
            update={"label": label, "predicted_grad_error": predicted_grad_error}
        )

    def measure_flow(self, rows: Sequence[LayerSensitivity]) -> Estimate:
        """Return what uniform BF16 costs beyond its layers: the e of the flow between them.

        `rows` are measured in an FP32 flow. Taken from the joint e of uniform BF16, the flow's
        part makes the table add up where most plans are, in deep models too: there, errors of
        layers and flow are not independent (25 blocks: 40 % of the joint e of small subsets).
        """
        options = {
            layer.name: BF16_O2 if BF16_O2 in layer.options else FP32 for layer in self.spec.layers
        }
        used = range(min(FLOW_BATCHES, len(self.reference.batches)))
        samples = [self._sample(index, options) for index in used]
        joint = ratio_estimate(samples, [self._scale[i] for i in used])
        layers = math.fsum(row.grad_error.mean for row in rows if row.option == BF16_O2)
        return joint.model_copy(update={"mean": max(joint.mean - layers, 0.0)})

    def _measure(self, options: Sequence[Option]) -> JointMeasurement:
        by_name = dict(zip(self.spec.names, options, strict=True))
        used = range(min(self.batches, len(self.reference.batches)))
        samples = [self._sample(index, by_name) for index in used]
        scale = [self._scale[index] for index in used]
        return JointMeasurement(
            label="",
            options=tuple(options),
            grad_error=ratio_estimate(samples, scale),
            predicted_grad_error=0.0,
        )

    def _sample(self, index: int, options: dict[str, Option]) -> float:
        baseline = self.reference.baseline(index)
        self._scale[index] = baseline.squared
        is_16_bit = any(o.precision is not Precision.FP32 for o in options.values())
        uncovered = [p.name for p in self.spec.uncovered] if is_16_bit else []
        installed = install_options(self.reference.model, options, uncovered=uncovered)
        with installed, fast_fp8_gemms(self.reference.device):
            return self.reference.squared_error(index, baseline)
