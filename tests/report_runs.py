"""Whole runs made by hand for the report's tests: every number follows from a formula."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from autoprec.predict import load_device_profile, predict_profile
from autoprec.predict.transfer import unknown_sensitivity
from autoprec.records import (
    BF16_O2,
    FP32,
    Assignment,
    Basis,
    Branch,
    CallSpec,
    Certificate,
    Conditions,
    Constraint,
    DeviceFacts,
    Estimate,
    Fingerprint,
    FrontPoint,
    GemmShape,
    JointMeasurement,
    LayerKind,
    LayerSensitivity,
    LayerSpec,
    LayerTiming,
    LossGap,
    ModelSpec,
    Operand,
    OperandStatistics,
    Option,
    ParameterSpec,
    Plan,
    Precision,
    PredictedStep,
    Profile,
    Recipe,
    Refusal,
    Search,
    SearchTrial,
    Sensitivity,
    StepTiming,
    TensorSpec,
    Timing,
    Verdict,
    Verification,
    fp8_option,
)
from autoprec.report import RunRecords
from autoprec.search import build_plan, search_plan
from autoprec.search.costs import make_costs
from autoprec.search.notes import fp8_note
from autoprec.search.problem import make_problem
from tests.decoder_specs import decoder

TENSORWISE = fp8_option(Recipe.TENSORWISE)
ROWWISE = fp8_option(Recipe.ROWWISE)
GW_HP = fp8_option(Recipe.ROWWISE_WITH_GW_HP)
FP8 = (TENSORWISE, ROWWISE, GW_HP)
E_SCALE = {BF16_O2: 0.02, TENSORWISE: 1.0, ROWWISE: 0.7, GW_HP: 0.45}
SOFTWARE = {"python": "3.11.2", "torch": "2.13.0", "torchao": "0.18.0", "autoprec": "0.1.0"}


@dataclass(frozen=True, eq=False)  # as an argument that is remembered
class Machine:
    """Rates in billions of multiply-adds per ms, and what FP8 costs beside its GEMMs."""

    name: str
    kind: str
    rates: Mapping[Option, float]
    cast_ms_per_melement: float
    launch_ms: float


H100 = Machine(
    name="NVIDIA H100 80GB HBM3",
    kind="cuda",
    rates={FP32: 45.0, BF16_O2: 330.0, TENSORWISE: 640.0, ROWWISE: 560.0, GW_HP: 450.0},
    cast_ms_per_melement=0.0022,
    launch_ms=0.006,
)
CPU = Machine(
    name="Intel Xeon (2 cores, avx512_bf16)",
    kind="cpu",
    rates={FP32: 0.084, BF16_O2: 0.21, TENSORWISE: 0.09, ROWWISE: 0.085, GW_HP: 0.08},
    cast_ms_per_melement=2.0,
    launch_ms=0.05,
)


@cache
def make_run(
    *,
    blocks: int = 2,
    machine: Machine = H100,
    M: int = 16384,
    width: int = 2048,
    layers: int | None = None,
    keep: tuple[str, ...] = (),
) -> RunRecords:
    """Return a complete, consistent run of a GPT with that many blocks, or layers."""
    spec = make_spec(blocks=blocks if layers is None else layers // 6 + 1, M=M, width=width)
    if layers is not None:  # the head stays the last one
        cut = (*spec.layers[: layers - 1], spec.layers[-1])
        spec = spec.model_copy(update={"layers": cut})
    profile = make_profile(spec, machine)
    sensitivity = make_sensitivity(spec)
    options = choose_options(profile, sensitivity)
    if keep:  # all that can take it is forced into FP8
        forced = zip(spec.layers, options, strict=True)
        options = tuple(TENSORWISE if TENSORWISE in x.options else own for x, own in forced)
    search = make_search(profile, sensitivity, options)
    plan = make_plan(profile, sensitivity, options)
    constraint = Constraint(loss_tolerance=0.001, grad_error_budget=0.01, keep=keep)
    plan = plan.model_copy(update={"constraint": constraint}) if keep else plan
    problem = make_problem(make_costs(profile, sensitivity), constraint)
    answer = fp8_note(profile, problem, search, options)
    verification = make_verification(plan, profile)
    return RunRecords(
        plan=plan.model_copy(
            update={
                "certificate": Certificate.of(verification),
                "notes": (answer, *plan.notes),
            }
        ),
        profile=profile,
        sensitivity=sensitivity,
        search=search,
        verification=verification,
    )


@cache
def predicted_run(device: str = "h100-sxm", *, memory_gb: float | None = None) -> RunRecords:
    """Return the profile and the plan of a small decoder for a device that is not here."""
    profile = predict_profile(
        decoder(), load_device_profile(device), compiled=True, options=(TENSORWISE, ROWWISE)
    )
    if memory_gb is not None:
        facts = profile.device.model_copy(update={"memory_bytes": int(memory_gb * 1e9)})
        profile = profile.model_copy(update={"device": facts})
    sensitivity = unknown_sensitivity(profile.model)
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=0.0)
    search = search_plan(profile, sensitivity, constraint=constraint, evaluate=None, trials=0)
    plan = build_plan(profile, sensitivity, search, search.chosen, constraint=constraint)
    return RunRecords(profile=profile, sensitivity=sensitivity, search=search, plan=plan)


def with_verdict(run: RunRecords, verdict: Verdict) -> RunRecords:
    """Return the run with another verdict of its verification, and of its plan's certificate."""
    assert run.plan
    assert run.verification
    gaps = {Verdict.REFUTED: (0.0031, 0.0022, 0.004), Verdict.INCONCLUSIVE: (0.0008, 0.0, 0.0016)}
    mean, low, high = gaps[verdict]
    gap = LossGap(mean=mean, low=low, high=high, confidence=0.95, seeds=3)
    proof = run.verification.model_copy(update={"verdict": verdict, "gap": gap})
    plan = run.plan.model_copy(update={"certificate": Certificate.of(proof)})
    return replace(run, plan=plan, verification=proof)


@cache
def answers() -> dict[str, RunRecords]:
    """Return a run of every kind of answer."""
    run, cpu = make_run(), {"machine": CPU, "M": 2048, "width": 256}
    return {
        "FP8 pays": run,
        "FP8 does not pay": make_run(**cpu),  # two settings, one dict
        "forced and slower": make_run(keep=("*=fp8_o1",), **cpu),  # same
        "refuted": with_verdict(run, Verdict.REFUTED),
        "inconclusive": with_verdict(run, Verdict.INCONCLUSIVE),
        "predicted, too large": predicted_run(memory_gb=2.0),
    }


def uncertified(run: RunRecords) -> RunRecords:
    """Return the run with the verification's certificate taken off its plan."""
    assert run.plan
    return replace(run, plan=run.plan.model_copy(update={"certificate": None}))


def renamed(run: RunRecords, names: Mapping[str, str]) -> RunRecords:
    """Return the run with some layers renamed wherever they are named."""

    def text(value: str) -> str:
        return names.get(value, value)

    assert run.plan
    assert run.profile
    assert run.sensitivity
    layers = tuple(a.model_copy(update={"name": text(a.name)}) for a in run.plan.layers)
    specs = tuple(s.model_copy(update={"name": text(s.name)}) for s in run.profile.model.layers)
    timings = tuple(
        t.model_copy(update={"names": tuple(text(n) for n in t.names)}) for t in run.profile.layers
    )
    model = run.profile.model.model_copy(update={"layers": specs})
    rows = tuple(r.model_copy(update={"name": text(r.name)}) for r in run.sensitivity.rows)
    statistics = tuple(
        s.model_copy(update={"name": text(s.name)}) for s in run.sensitivity.statistics
    )
    plan = run.plan.model_copy(update={"layers": layers})
    verification = run.verification
    return replace(
        run,
        plan=plan,
        profile=run.profile.model_copy(update={"model": model, "layers": timings}),
        sensitivity=run.sensitivity.model_copy(update={"rows": rows, "statistics": statistics}),
        verification=verification.model_copy(update={"plan": plan.digest})
        if verification
        else None,
    )


# --- the model ----------------------------------------------------------------------------------


def make_spec(*, blocks: int, M: int, width: int) -> ModelSpec:
    layers = [embedding("token", 50304, width)]
    for index in range(blocks):
        block = f"blocks.{index}"
        layers += [
            norm(f"{block}.norm1", M, width),
            linear(f"{block}.qkv", M, width, 3 * width),
            linear(f"{block}.proj", M, width, width),
            norm(f"{block}.norm2", M, width),
            linear(f"{block}.fc1", M, width, 4 * width),
            linear(f"{block}.fc2", M, 4 * width, width),
        ]
    layers += [linear("router", M, width, 10), linear("head", M, width, 50304)]
    return ModelSpec(
        layers=tuple(layers),
        uncovered=(parameter("class_token", 1, 1, width),),
        uncalled=("unused.adapter",),
        structure="5f2a90c1d4e7b836",
        tokens_per_step=M,
        optimizer="AdamW",
        optimizer_state_numel_ratio=2.0,
        has_randomness=False,
        is_deterministic=True,
        loss=10.82,
        device="cuda:0",
    )


def parameter(name: str, *shape: int) -> ParameterSpec:
    return ParameterSpec(name=name, shape=shape, dtype="float32", is_trainable=True)


def linear(name: str, M: int, K: int, N: int) -> LayerSpec:
    odd = next((f"{axis}={n}" for axis, n in (("K", K), ("N", N)) if n % 16), None)
    reason = f"{odd} is not a multiple of 16, which FP8 GEMMs need"
    return LayerSpec(
        name=name,
        kind=LayerKind.LINEAR,
        type_name="torch.nn.modules.linear.Linear",
        settings=f"in_features={K}, out_features={N}, bias=True",
        parameters=(parameter(f"{name}.weight", N, K), parameter(f"{name}.bias", N)),
        gemm=GemmShape(M=M, K=K, N=N),
        calls=(call(M, K),),
        is_frozen=False,
        tied_to=None,
        options=(FP32, BF16_O2) if odd else (FP32, BF16_O2, *FP8),
        refusals=(Refusal(precision=Precision.FP8_O1, reason=reason),) if odd else (),
    )


def norm(name: str, M: int, width: int) -> LayerSpec:
    return other(name, LayerKind.NORM, "normalization.LayerNorm", (width,), call(M, width))


def embedding(name: str, rows: int, width: int) -> LayerSpec:
    return other(name, LayerKind.EMBEDDING, "sparse.Embedding", (rows, width), call(8, 2048))


def other(
    name: str, kind: LayerKind, type_name: str, shape: tuple[int, ...], how: CallSpec
) -> LayerSpec:
    return LayerSpec(
        name=name,
        kind=kind,
        type_name=f"torch.nn.modules.{type_name}",
        settings="",
        parameters=(parameter(f"{name}.weight", *shape),),
        gemm=None,
        calls=(how,),
        is_frozen=False,
        tied_to=None,
        options=(FP32, BF16_O2),
        refusals=(
            Refusal(
                precision=Precision.FP8_O1,
                reason=f"PyTorch has no FP8 {kind.value}; FP8 is for nn.Linear",
            ),
        ),
    )


def call(M: int, K: int) -> CallSpec:
    tensor = TensorSpec(shape=(M, K), stride=(K, 1), dtype="float32", requires_grad=True)
    return CallSpec(inputs=(tensor,), count=1)


# --- time ---------------------------------------------------------------------------------------


def timing(ms: float, *, samples: int = 20, spread: float = 0.01, rejected: int = 0) -> Timing:
    return Timing(
        median_ms=ms,
        p20_ms=ms * (1 - spread),
        p80_ms=ms * (1 + spread),
        samples=samples,
        rejected=rejected,
    )


def make_profile(spec: ModelSpec, machine: Machine) -> Profile:
    rows = [
        layer_timing(layer, option, machine) for layer in spec.layers for option in layer.options
    ]
    fixed, fixed_bf16 = 0.6, 0.45
    share = {"fp32": (FP32,), "bf16_o2": (BF16_O2,), "fp8_o1": (TENSORWISE, BF16_O2)}
    totals = {
        label: sum(_first(rows, layer.name, options) for layer in spec.layers)
        for label, options in share.items()
    }
    scale = totals["fp32"]
    steps = {
        "fp32": totals["fp32"] + fixed * scale,
        "bf16_o2": totals["bf16_o2"] + fixed_bf16 * totals["bf16_o2"],
        "fp8_o1": totals["fp8_o1"] + 0.5 * totals["bf16_o2"],
        "autocast_bf16": 1.58 * totals["bf16_o2"],
    }
    return Profile(
        model=spec,
        device=device_facts(machine),
        basis=Basis.MEASURED,
        layers=tuple(rows),
        steps=tuple(step(label, ms, machine) for label, ms in steps.items()),
        boundary_cast_ms_per_melement=0.004,
        fixed_ms=fixed * scale,
        fixed_bf16_ms=fixed_bf16 * totals["bf16_o2"],
        step_equivalents=41.5,
        compile_s=12.4,
        recompiles=0,
    )


def _first(rows: list[LayerTiming], name: str, options: tuple[Option, ...]) -> float:
    for option in options:
        for row in rows:
            if row.names == (name,) and row.option == option and row.total:
                return row.total.median_ms
    raise KeyError(name)


def step(label: str, ms: float, machine: Machine, *, samples: int = 20) -> StepTiming:
    on_gpu = machine.kind == "cuda"
    return StepTiming(
        label=label,
        timing=timing(ms, samples=samples, spread=0.012, rejected=1 if label == "fp32" else 0),
        peak_bytes=int(ms * 4e8) if on_gpu else None,
        conditions=conditions(machine),
    )


def conditions(machine: Machine) -> Conditions | None:
    if machine.kind != "cuda":
        return None
    return Conditions(
        sm_clock_mhz=1755,
        memory_clock_mhz=2619,
        power_w=612.0,
        power_limit_w=700.0,
        temperature_c=61,
        throttle_reasons=("sw_power_cap",),
    )


def layer_timing(layer: LayerSpec, option: Option, machine: Machine) -> LayerTiming:
    numel = sum(p.numel for p in layer.parameters)
    half = option != FP32
    output, backward, cast = _parts(layer, option, machine)
    return LayerTiming(
        names=(layer.name,),
        option=option,
        output=timing(output),
        grad_input=timing(backward),
        grad_weight=timing(backward * 1.04),
        cast=timing(cast) if option.is_fp8 else None,
        total=timing(output + 2.04 * backward + cast + machine.launch_ms, rejected=2),
        parameter_bytes=numel * (2 if half else 4),
        gradient_bytes=numel * (2 if half else 4),
        optimizer_bytes=numel * (12 if half else 8),
        activation_bytes=8_000_000 if half else 16_000_000,
        kernels=("aten::_scaled_mm",) if option.is_fp8 else ("aten::mm",),
        conditions=conditions(machine),
    )


def _parts(layer: LayerSpec, option: Option, machine: Machine) -> tuple[float, float, float]:
    if layer.gemm is None:
        ms = (0.05 if option == FP32 else 0.03) * (1.0 if machine.kind == "cuda" else 20.0)
        return ms, 1.5 * ms, 0.0
    M, K, N = layer.gemm.M, layer.gemm.K, layer.gemm.N
    gemm_ms = M * K * N / 1e9 / machine.rates[option]
    cast_ms = 2e-6 * (M * K + N * K + M * N) * machine.cast_ms_per_melement
    return gemm_ms, gemm_ms * 1.02, cast_ms


def device_facts(machine: Machine) -> DeviceFacts:
    on_gpu = machine.kind == "cuda"
    return DeviceFacts(
        name=machine.name,
        kind=machine.kind,
        capability="9.0" if on_gpu else "avx512f avx512_bf16",
        memory_bytes=80 * 1024**3 if on_gpu else 24 * 1024**3,
        driver="570.86.15" if on_gpu else "",
        threads=16 if on_gpu else 2,
        allow_tf32=False,
        compile_mode="eager",
        software=SOFTWARE,
        fp8_recipes=("tensorwise", "rowwise", "rowwise_with_gw_hp"),
        fp8_reason="",
        missing=() if on_gpu else (("power", "NVML needs an NVIDIA GPU"),),
    )


# --- loss ---------------------------------------------------------------------------------------


def layer_grad_error(position: int, option: Option) -> float:
    return E_SCALE[option] * 0.003 / math.pow(1 + position, 1.3)


def make_sensitivity(spec: ModelSpec) -> Sensitivity:
    rows = [
        LayerSensitivity(
            name=layer.name,
            option=option,
            grad_error=Estimate(
                mean=layer_grad_error(position, option),
                stderr=0.1 * layer_grad_error(position, option),
            ),
        )
        for position, layer in enumerate(spec.layers)
        for option in layer.options
        if option != FP32
    ]
    linears = [layer for layer in spec.layers if layer.kind is LayerKind.LINEAR]
    uniform = tuple(BF16_O2 for _ in spec.layers)
    return Sensitivity(
        structure=spec.structure,
        reference=FP32,
        method="layerwise",
        preconditioner="adam",
        batches=4,
        passes=4 * (1 + len(rows)),
        step_equivalents=0.7 * (1 + len(rows)),
        warmup_steps=20,
        checkpoint="",
        seed=0,
        rows=tuple(rows),
        activation_error=Estimate(mean=2.1e-5, stderr=2e-6),
        floor=Estimate(mean=0.0, stderr=0.0),
        statistics=tuple(
            statistics_of(layer.name, operand) for layer in linears for operand in Operand
        ),
        joint=(
            JointMeasurement(
                label="bf16_o2",
                options=uniform,
                grad_error=Estimate(mean=3.1e-4, stderr=2e-5),
                predicted_grad_error=2.9e-4,
            ),
        ),
        loss_curve=tuple((index, 10.8 - 0.3 * index) for index in range(20)),
        software=SOFTWARE,
    )


def statistics_of(name: str, operand: Operand) -> OperandStatistics:
    gradient = operand is Operand.GRAD_OUTPUT
    return OperandStatistics(
        name=name,
        operand=operand,
        amax=2.4e-4 if gradient else 11.0,
        underflow={"tensorwise": 0.031 if gradient else 0.004, "rowwise": 0.002},
        outlier_channels=(7, 129) if operand is Operand.INPUT else (),
        channels=2048,
    )


# --- choice -------------------------------------------------------------------------------------


def total_ms(profile: Profile, name: str, option: Option) -> float:
    row = profile.timing(name, option)
    assert row is not None
    assert row.total is not None
    return row.total.median_ms


def total_grad_error(
    sensitivity: Sensitivity, names: tuple[str, ...], options: tuple[Option, ...]
) -> float:
    found = (sensitivity.row(n, o) for n, o in zip(names, options, strict=True))
    return (
        math.fsum(row.grad_error.mean for row in found if row) + sensitivity.activation_error.mean
    )


def choose_options(profile: Profile, sensitivity: Sensitivity) -> tuple[Option, ...]:
    """The fastest option of each layer, the three most sensitive linears in BF16."""
    chosen = []
    linears = [x.name for x in profile.model.layers if x.kind is LayerKind.LINEAR]
    for layer in profile.model.layers:
        allowed = [o for o in layer.options if not (o.is_fp8 and layer.name in linears[:1])]
        chosen.append(min(allowed, key=lambda option: total_ms(profile, layer.name, option)))
    return tuple(chosen)


def plan_ms(profile: Profile, options: tuple[Option, ...]) -> float:
    names = profile.model.names
    layers = sum(total_ms(profile, n, o) for n, o in zip(names, options, strict=True))
    half = any(option != FP32 for option in options)
    return layers + (profile.fixed_bf16_ms if half else profile.fixed_ms)


def make_plan(profile: Profile, sensitivity: Sensitivity, options: tuple[Option, ...]) -> Plan:
    uniform = tuple(BF16_O2 for _ in options)
    predicted = plan_ms(profile, options)
    return Plan(
        layers=tuple(
            assignment(profile, sensitivity, layer, option)
            for layer, option in zip(profile.model.layers, options, strict=True)
        ),
        uncovered=("class_token",),
        constraint=Constraint(loss_tolerance=0.001, grad_error_budget=0.01, keep=("head=bf16_o2",)),
        fingerprint=Fingerprint(
            structure=profile.model.structure,
            device=profile.device.name,
            capability=profile.device.capability,
            software=SOFTWARE,
            compile_mode="eager",
            tokens_per_step=profile.model.tokens_per_step,
        ),
        grad_error=1.08 * total_grad_error(sensitivity, profile.model.names, options),
        grad_error_basis=Basis.MEASURED,
        predicted=PredictedStep(
            plan_ms=predicted,
            fp32_ms=plan_ms(profile, tuple(FP32 for _ in options)),
            bf16_o2_ms=plan_ms(profile, uniform),
            low_ms=0.95 * predicted,
            high_ms=1.05 * predicted,
        ),
        notes=("tied layers share one storage",),
    )


def assignment(
    profile: Profile, sensitivity: Sensitivity, layer: LayerSpec, option: Option
) -> Assignment:
    row = sensitivity.row(layer.name, option)
    ms, baseline = (total_ms(profile, layer.name, o) for o in (option, BF16_O2))
    fp8 = min((total_ms(profile, layer.name, o) for o in layer.options if o.is_fp8), default=ms)
    return Assignment.of(
        layer,
        option,
        layer_ms=ms,
        baseline_ms=baseline,
        grad_error=row.grad_error.mean if row else None,
        reason=reason_of(layer, option, baseline / fp8),
    )


def reason_of(layer: LayerSpec, option: Option, speedup: float) -> str:
    if option.is_fp8:
        return f"{option.recipe} is {speedup:.2f}x faster than BF16 and adds little error"
    return layer.refusal(Precision.FP8_O1) or (
        f"FP8 is {1 / speedup:.2f}x slower than BF16 at M={layer.gemm.M if layer.gemm else 0}"
        if speedup < 1
        else "dominates the gradient error"
    )


def make_search(profile: Profile, sensitivity: Sensitivity, options: tuple[Option, ...]) -> Search:
    points = front_points(profile, sensitivity, options)
    chosen = points[-1]
    return Search(
        structure=profile.model.structure,
        grad_error_budget=0.01,
        front=points,
        exact=chosen,
        bound_ms=0.995 * chosen.step_ms,
        chosen=chosen,
        ranked=points[::-1],
        trials=tuple(
            SearchTrial(
                number=number,
                source=source,
                options=point.options,
                step_ms=point.step_ms * (1.0 + 0.004 * number),
                grad_error=point.grad_error * 1.1,
                time_to_loss_ms=point.step_ms * (1 + point.grad_error),
                feasible=number != 3,
            )
            for number, (source, point) in enumerate(
                [("uniform", points[0]), *[("exact", p) for p in points], ("sampler", chosen)]
            )
        ),
        seed=0,
        step_equivalents=18.0,
        duplicates_skipped=2,
    )


def front_points(
    profile: Profile, sensitivity: Sensitivity, options: tuple[Option, ...]
) -> tuple[FrontPoint, ...]:
    """From all BF16 to the chosen options, a fifth of the layers at a time."""
    names = profile.model.names
    count = len(names)
    points = []
    for cut in dict.fromkeys(round(count * fifth / 5) for fifth in range(6)):
        mixed = tuple(options[i] if i >= count - cut else BF16_O2 for i in range(count))
        grad_error = total_grad_error(sensitivity, names, mixed)
        points.append(
            FrontPoint(
                options=mixed,
                step_ms=plan_ms(profile, mixed),
                grad_error=grad_error,
                grad_error_measured=1.08 * grad_error if cut == count else None,
            )
        )
    return tuple(points)


# --- proof --------------------------------------------------------------------------------------


def make_verification(plan: Plan, profile: Profile) -> Verification:
    assert plan.predicted
    machine = H100 if profile.device.kind == "cuda" else CPU
    ms = {
        label: timing_ms.timing.median_ms * 1.005
        for label in ("fp32", "bf16_o2", "autocast_bf16")
        if (timing_ms := profile.step(label))
    }
    ms["plan"] = plan.predicted.plan_ms * 1.03
    return Verification(
        plan=plan.digest,
        verdict=Verdict.VERIFIED,
        loss_tolerance=0.001,
        gap=LossGap(mean=0.00021, low=-0.00012, high=0.00054, confidence=0.95, seeds=3),
        control_gap=LossGap(mean=0.00012, low=-0.0001, high=0.00034, confidence=0.95, seeds=3),
        seed_spread=0.0041,
        predicted_gap=0.00017,
        warmup_steps=50,
        branch_steps=25,
        branches=make_branches(),
        steps=tuple(step(label, value, machine, samples=12) for label, value in ms.items()),
        software=SOFTWARE,
        eval_stderr=0.00008,
        floor=0.0,
    )


def make_branches() -> tuple[Branch, ...]:
    gaps = {"reference": (0.0, 0.0, 0.0), "bf16_o2": (4e-5, 2.2e-4, 1e-4)}
    gaps["plan"] = (1e-4, 3.6e-4, 1.7e-4)
    return tuple(
        Branch(
            label=label,
            seed=1 + index,
            eval_loss=3.21 * (1 + 0.004 * index) * (1 + gap),
            diverged_at=None,
            curve=tuple(
                3.9 - 0.5 * (1 - 0.87**at) + 0.03 * ((at * 7 + index * 3) % 5 - 2) + gap
                for at in range(25)
            ),
        )
        for index in range(3)
        for label, by_seed in gaps.items()
        for gap in (by_seed[index],)
    )
