"""Profiles and sensitivities from a handful of numbers, for the tests of the search."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import optuna

from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    CallSpec,
    Estimate,
    LayerSensitivity,
    LayerSpec,
    LayerTiming,
    ModelSpec,
    Option,
    Profile,
    Recipe,
    Sensitivity,
    TensorSpec,
    fp8_option,
)
from tests.report_runs import CPU, SOFTWARE, device_facts, linear, timing

TENSORWISE = fp8_option(Recipe.TENSORWISE)
ROWWISE = fp8_option(Recipe.ROWWISE)

Row = Mapping[Option, tuple[float, float]]  # option -> (ms, e)
TYPICAL: Row = {
    FP32: (4.0, 0.0),
    BF16_O2: (2.0, 1e-5),
    TENSORWISE: (1.0, 1e-3),
    ROWWISE: (1.2, 6e-4),
}
M = 32


def spec_of(
    rows: Mapping[str, Row],
    *,
    tied: Mapping[str, str] | None = None,
    uncalled: Sequence[str] = (),
) -> ModelSpec:
    """Return a model of 32x32 linears with these options."""
    layers = tuple(
        linear(name, M, 32, 32).model_copy(
            update={
                "options": tuple(row),
                "tied_to": (tied or {}).get(name),
                "calls": () if name in uncalled else linear(name, M, 32, 32).calls,
            }
        )
        for name, row in rows.items()
    )
    return ModelSpec(
        layers=layers,
        uncovered=(),
        uncalled=tuple(uncalled),
        structure="0123456789abcdef",
        tokens_per_step=M,
        optimizer="AdamW",
        optimizer_state_numel_ratio=2.0,
        has_randomness=False,
        is_deterministic=True,
        loss=3.0,
        device="cpu",
    )


def profile_of(
    spec: ModelSpec,
    rows: Mapping[str, Row],
    *,
    fixed_ms: float = 3.0,
    fixed_bf16_ms: float = 2.0,
    cast_ms: float = 0.0,
    basis: Basis = Basis.MEASURED,
) -> Profile:
    """Return a profile with one row per layer and option."""
    return Profile(
        model=spec,
        device=device_facts(CPU),
        basis=basis,
        layers=tuple(
            layer_timing(name, option, ms)
            for name, row in rows.items()
            for option, (ms, _) in row.items()
        ),
        steps=(),
        boundary_cast_ms_per_melement=cast_ms,
        fixed_ms=fixed_ms,
        fixed_bf16_ms=fixed_bf16_ms,
        step_equivalents=1.0,
    )


def layer_timing(name: str, option: Option, ms: float) -> LayerTiming:
    size = 4 if option == FP32 else 2
    return LayerTiming(
        names=(name,),
        option=option,
        output=None,
        grad_input=None,
        grad_weight=None,
        cast=None,
        total=timing(ms, spread=0.1),
        parameter_bytes=1000 * size,
        gradient_bytes=0,
        optimizer_bytes=0,
        activation_bytes=0,
    )


def sensitivity_of(
    spec: ModelSpec, rows: Mapping[str, Row], *, activation_error: float = 0.0
) -> Sensitivity:
    """Return a sensitivity with one row per layer and option other than FP32."""
    return Sensitivity(
        structure=spec.structure,
        reference=FP32,
        method="layerwise",
        preconditioner="adam",
        batches=2,
        passes=1,
        step_equivalents=1.0,
        warmup_steps=20,
        checkpoint="",
        seed=0,
        rows=tuple(
            LayerSensitivity(
                name=name,
                option=option,
                grad_error=Estimate(mean=grad_error),
            )
            for name, row in rows.items()
            for option, (_, grad_error) in row.items()
            if option != FP32
        ),
        activation_error=Estimate(mean=activation_error),
        floor=Estimate(mean=0.0),
        statistics=(),
        joint=(),
        loss_curve=tuple((step, 4.0 - 0.1 * step**0.5) for step in range(1, 21)),
        software=SOFTWARE,
    )  # fmt: skip


def tables_of(
    rows: Mapping[str, Row],
    *,
    tied: Mapping[str, str] | None = None,
    uncalled: Sequence[str] = (),
    activation_error: float = 0.0,
    cast_ms: float = 0.0,
) -> tuple[Profile, Sensitivity]:
    """Return both tables of a model."""
    spec = spec_of(rows, tied=tied, uncalled=uncalled)
    return profile_of(spec, rows, cast_ms=cast_ms), sensitivity_of(
        spec, rows, activation_error=activation_error
    )


def replaced_layer(profile: Profile, layer: LayerSpec) -> Profile:
    """Return the profile with the spec of one layer exchanged."""
    layers = tuple(layer if old.name == layer.name else old for old in profile.model.layers)
    return profile.model_copy(update={"model": profile.model.model_copy(update={"layers": layers})})


def tensor(*shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(shape=shape, stride=(1,) * len(shape), dtype=dtype, requires_grad=False)


def called(*inputs: TensorSpec, count: int = 1) -> tuple[CallSpec, ...]:
    return (CallSpec(inputs=inputs, count=count),)


@contextmanager
def opened(url: str) -> Iterator[optuna.storages.RDBStorage]:
    """Open a study's database as any user of Optuna does."""
    database = optuna.storages.RDBStorage(url)
    try:
        yield database
    finally:  # Optuna leaves its connections to the garbage collector
        database.remove_session()
        database.engine.dispose()
