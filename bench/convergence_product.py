"""A planted fault through the product: sensitivity from scratch -> search -> plan -> verification.

Times are an H100's for the same model WIDER times as wide on as many more tokens: at the width that
trains here in seconds FP8 pays nowhere.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autoprec.model.context import Context
from autoprec.predict import load_device_profile, predict_profile
from autoprec.records import (
    BF16_O2,
    CallSpec,
    Constraint,
    Estimate,
    FrontPoint,
    LayerSpec,
    ModelSpec,
    Option,
    Plan,
    Profile,
    Recipe,
    TensorSpec,
    fp8_option,
)
from autoprec.search import build_plan, search_plan
from autoprec.sensitivity.gap import fit_loss_line
from autoprec.sensitivity.joint import JointMeter
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import prepare_reference
from autoprec.verification.gate import gather_evidence
from autoprec.verification.session import Session
from autoprec.workload.functions import Workload

CPU = torch.device("cpu")
DEVICE = "h100-sxm"
WIDER = 32
RECIPES = (Recipe.TENSORWISE, Recipe.ROWWISE, Recipe.ROWWISE_WITH_GW_HP)


@dataclass(frozen=True)
class Verdict:
    """What verification said of a plan, and the gaps it saw."""

    label: str
    verdict: str
    gaps: list[float]
    diverged: bool


@dataclass(frozen=True)
class ProductRun:
    """What the search chose; `out` are the linears that could take FP8 and do not."""

    grad_error_budget: float
    early_slope: float
    chosen_e: float
    out: list[str]
    reasons: dict[str, str]
    fp8_layers: int
    step_equivalents: float
    verdicts: list[Verdict]


class TimedMeter(JointMeter):
    """A joint meter that adds up what its measurements took."""

    spent_s = 0.0

    @property
    def step_equivalents(self) -> float:
        """The time of all measurements so far, in FP32 training steps."""
        return self.spent_s / self.reference.step_s

    def measure(self, options: tuple[Option, ...], batches: int | None = None) -> Estimate:
        started = time.perf_counter()
        found = super().measure(options, batches)
        self.spent_s += time.perf_counter() - started
        return found


def run_product(
    workload: Workload, spec: ModelSpec, session: Session, *, tolerance: float
) -> ProductRun:
    """Search plans from a sensitivity measured from scratch, and verify them and all-FP8."""
    reference = prepare_reference(Context(workload, CPU), spec)
    profile = wide_profile(spec)
    sensitivity = measure_sensitivity(reference)
    meter = TimedMeter(reference)
    constraint = Constraint(loss_tolerance=tolerance, grad_error_budget=None)
    search = search_plan(profile, sensitivity, constraint=constraint, evaluate=meter.measure)
    plan = build_plan(profile, sensitivity, search, search.chosen, constraint=constraint)
    out = [
        layer
        for layer, spec_layer in zip(plan.layers, profile.model.layers, strict=True)
        if not layer.option.is_fp8 and any(option.is_fp8 for option in spec_layer.options)
    ]
    plans = {"chosen": plan}
    for recipe in RECIPES[:2]:
        options = everywhere(profile.model, fp8_option(recipe))
        point = FrontPoint(options=options, step_ms=0.0, grad_error=0.0)
        plans[f"FP8 {recipe} everywhere"] = build_plan(
            profile, sensitivity, search, point, constraint=constraint
        )
    line = fit_loss_line(sensitivity.loss_curve)
    return ProductRun(
        grad_error_budget=search.grad_error_budget,
        early_slope=line.slope if line else 0.0,
        chosen_e=search.chosen.grad_error_measured or search.chosen.grad_error,
        out=[layer.name for layer in out],
        reasons={layer.name: layer.reason for layer in out},
        fp8_layers=sum(layer.option.is_fp8 for layer in plan.layers),
        step_equivalents=sensitivity.step_equivalents + meter.step_equivalents,
        verdicts=[verdict(session, label, plan) for label, plan in plans.items()],
    )


def wide_profile(spec: ModelSpec) -> Profile:
    """Return the predicted times of the model WIDER times as wide on DEVICE."""
    return predict_profile(
        wider(spec, WIDER),
        load_device_profile(DEVICE),
        compiled=True,
        options=[fp8_option(recipe) for recipe in RECIPES],
        gemms_hp=True,
    )


def verdict(session: Session, label: str, plan: Plan) -> Verdict:
    """Verify a plan; branches that were trained before are taken from the session."""
    evidence = gather_evidence(session, plan)
    found = Verdict(
        label=label,
        verdict=evidence.verdict.value,
        gaps=evidence.gaps("plan"),
        diverged=bool(evidence.diverged("plan")),
    )
    gaps = " ".join(f"{gap:+.3%}" for gap in found.gaps)
    print(f"  {label:32s} {found.verdict}  {gaps}", flush=True)
    return found


def everywhere(spec: ModelSpec, option: Option) -> tuple[Option, ...]:
    """Return the plan with the option wherever it goes, BF16 elsewhere."""
    return tuple(option if option in layer.options else BF16_O2 for layer in spec.layers)


def wider(spec: ModelSpec, factor: int) -> ModelSpec:
    """Return the spec of the same model with every dimension of its linears `factor` times as big.

    The structure's digest stays, so that the sensitivity of the small one goes with it.
    """
    return spec.model_copy(
        update={
            "layers": tuple(_wider_layer(layer, factor) for layer in spec.layers),
            "tokens_per_step": spec.tokens_per_step * factor,
        }
    )


def _wider_layer(layer: LayerSpec, factor: int) -> LayerSpec:
    if layer.gemm is None:
        return layer
    gemm = layer.gemm
    return layer.model_copy(
        update={
            "gemm": gemm.model_copy(
                update={"M": gemm.M * factor, "K": gemm.K * factor, "N": gemm.N * factor}
            ),
            "parameters": tuple(
                p.model_copy(update={"shape": tuple(size * factor for size in p.shape)})
                for p in layer.parameters
            ),
            "calls": tuple(_wider_call(call, factor) for call in layer.calls),
        }
    )


def _wider_call(call: CallSpec, factor: int) -> CallSpec:
    return call.model_copy(update={"inputs": tuple(_wider_input(t, factor) for t in call.inputs)})


def _wider_input(tensor: TensorSpec, factor: int) -> TensorSpec:
    first, *middle, last = tensor.shape
    shape = (first * factor, *middle, last * factor)
    return tensor.model_copy(update={"shape": shape, "stride": _strides(shape)})


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
