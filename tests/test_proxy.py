"""A plan for a model that does not fit is carried to a small one and proven there."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import autoprec
from autoprec.cli.main import main
from autoprec.errors import AutoprecError, RecordError, SettingsError, WorkloadError
from autoprec.predict.carry import carry_plan
from autoprec.predict.family import check_proxy
from autoprec.predict.transfer import transfer_sensitivity
from autoprec.records import (
    BF16_O2,
    FP32,
    Assignment,
    Basis,
    Constraint,
    Fingerprint,
    Island,
    LayerKind,
    ModelSpec,
    Option,
    Plan,
    Sensitivity,
    Verdict,
    Verification,
)
from autoprec.report import load_run, render_html
from tests import proxy_models
from tests.decoder_specs import linear_layer, model_of, plain_layer
from tests.examples import examples
from tests.search_tables import ROWWISE, TENSORWISE, sensitivity_of

MODELS = Path(proxy_models.__file__)
ON_H100: dict[str, Any] = {"meta": True, "target": "h100-sxm", "recipes": "tensorwise", "trials": 0}
SHORT: dict[str, Any] = {"seeds": 2, "warmup_steps": 8, "branch_steps": 4, "loss_tolerance": 0.5}
OPTIONS = (FP32, BF16_O2, TENSORWISE, ROWWISE)
Errors = dict[str, dict[Option, float]]


def stack(blocks: int, *, tied: bool = False) -> ModelSpec:
    layers = [
        linear_layer(f"layers.{block}.{name}", 64, 64, options=OPTIONS)
        for block in range(blocks)
        for name in ("up", "down")
    ]
    head = linear_layer("head", 64, 64, options=OPTIONS)
    if tied:
        head = head.model_copy(update={"tied_to": "layers.0.up"})
    return model_of(*layers, head).model_copy(update={"structure": f"{blocks:016d}"})


def table(spec: ModelSpec, errors: Errors) -> Sensitivity:
    rows = {
        name: {o: (1.0, e) for o, e in {**own, FP32: 0.0}.items()} for name, own in errors.items()
    }
    return sensitivity_of(spec, rows)


def plan_of(spec: ModelSpec, options: dict[str, Option], sensitivity: Sensitivity) -> Plan:
    """Return a plan whose gradient error is the sum of a transferred table."""
    rows = {(r.name, r.option): r.grad_error.mean for r in sensitivity.rows}
    is_fp32 = set(options.values()) == {FP32}
    errors = [rows.get((name, option), 0.0) for name, option in options.items()]
    layers = tuple(Assignment.of(layer, options[layer.name]) for layer in spec.layers)
    return Plan(
        layers=layers,
        uncovered=(),
        constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=None),
        fingerprint=Fingerprint(
            structure=spec.structure,
            device="a card",
            capability="",
            software={},
            compile_mode="",
            tokens_per_step=64,
        ),
        grad_error=math.fsum(errors) + (0.0 if is_fp32 else sensitivity.activation_error.mean),
        grad_error_basis=Basis.TRANSFERRED,
        predicted=None,
    )


def even(spec: ModelSpec, error: float = 1e-3) -> Errors:
    return {name: {BF16_O2: 1e-5, TENSORWISE: error, ROWWISE: error / 2} for name in spec.names}


def options_of(plan: Plan) -> dict[str, Option]:
    return {layer.name: layer.option for layer in plan.layers}


# --- the rule ------------------------------------------------------------------------------------


def test_a_uniform_plan_is_the_same_on_the_proxy_and_hurts_the_same() -> None:
    small, large = stack(2), stack(8)
    measured = table(small, even(small))
    plan = plan_of(
        large, dict.fromkeys(large.names, TENSORWISE), transfer_sensitivity(measured, large)
    )
    carried = carry_plan(plan, small, measured)
    assert set(options_of(carried).values()) == {TENSORWISE}
    assert carried.grad_error == pytest.approx(plan.grad_error)
    assert carried.fingerprint.structure == small.structure


@pytest.mark.parametrize("is_between", [True, False])
def test_a_plan_pays_on_the_proxy_for_what_it_has_not_in_fp32_between_layers(
    is_between: bool,
) -> None:
    small, large = stack(2), stack(8)
    island = Island(outputs=small.names, grad_error=0.02)
    measured = table(small, even(small)).model_copy(update={"islands": (island,)})
    transferred = transfer_sensitivity(measured, large)
    assert transferred.is_fp32_between
    if not is_between:
        transferred = transferred.without_fp32_between()
    plan = plan_of(large, dict.fromkeys(large.names, TENSORWISE), transferred)
    plan = plan.model_copy(update={"fp32_outputs": large.names if is_between else ()})
    carried = carry_plan(plan, small, measured)
    assert carried.fp32_outputs == (small.names if is_between else ())
    assert carried.grad_error == pytest.approx(plan.grad_error)


def test_a_part_of_the_depth_is_the_same_part_on_the_proxy() -> None:
    """Blocks 0 to 7 of 16 in FP8: on four blocks, the first two."""
    small, large = stack(4), stack(16)
    measured = table(small, even(small))
    options = {
        name: TENSORWISE if name != "head" and int(name.split(".")[1]) < 8 else BF16_O2
        for name in large.names
    }
    plan = plan_of(large, options, transfer_sensitivity(measured, large))
    carried = options_of(carry_plan(plan, small, measured))
    assert {name for name, option in carried.items() if option.is_fp8} == {
        f"layers.{block}.{name}" for block in (0, 1) for name in ("up", "down")
    }


def test_a_minority_in_fp8_is_not_lost() -> None:
    """Three of eight blocks have no majority anywhere, but their error has to be shown."""
    small, large = stack(1), stack(8)
    measured = table(small, even(small))
    options = {
        name: TENSORWISE if name.startswith(("layers.0", "layers.4", "layers.7")) else BF16_O2
        for name in large.names
    }
    plan = plan_of(large, options, transfer_sensitivity(measured, large))
    carried = carry_plan(plan, small, measured)
    assert carried.grad_error is not None
    assert carried.grad_error >= (plan.grad_error or 1.0) * (1 - 1e-9)
    # one of the two is enough: no more is shown than has to be
    assert [layer.option.is_fp8 for layer in carried.layers].count(True) == 1


def test_tied_layers_share_their_storage_on_the_proxy() -> None:
    small, large = stack(2, tied=True), stack(4)
    measured = table(small, even(small))
    options = dict.fromkeys(large.names, FP32) | {"head": BF16_O2}
    plan = plan_of(large, options, transfer_sensitivity(measured, large))
    carried = options_of(carry_plan(plan, small, measured))
    assert carried["head"] == carried["layers.0.up"] == BF16_O2
    assert carried["layers.1.up"] == FP32


@examples(40)
@given(
    small=st.integers(1, 5),
    large=st.integers(1, 12),
    data=st.data(),
    is_tied=st.booleans(),
)
def test_the_proxy_shows_no_less_error_than_the_plan_has(
    small: int, large: int, data: st.DataObject, *, is_tied: bool
) -> None:
    proxy, model = stack(small, tied=is_tied), stack(large)
    shares = st.floats(1e-8, 1.0)
    errors = {
        name: {
            BF16_O2: data.draw(shares) / 100,
            TENSORWISE: data.draw(shares),
            ROWWISE: data.draw(shares),
        }
        for name in proxy.names
    }
    measured = table(proxy, errors)
    options = {name: data.draw(st.sampled_from(OPTIONS)) for name in model.names}
    plan = plan_of(model, options, transfer_sensitivity(measured, model))
    carried = carry_plan(plan, proxy, measured)
    own, shown = plan.grad_error or 0.0, carried.grad_error or 0.0
    most = math.fsum(
        max([0.0, *(e for o, e in own.items() if o in options.values())]) for own in errors.values()
    )
    assert shown >= min(own, most) * (1 - 1e-6)
    assert set(options_of(carried).values()) <= {*options.values(), BF16_O2}
    assert carry_plan(plan, proxy, measured) == carried


# --- the run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> autoprec.Run:
    return autoprec.tune(
        f"{MODELS}:large",
        proxy=f"{MODELS}:small",
        out=tmp_path_factory.mktemp("proxy"),
        run_steps=500,
        **SHORT,
        **ON_H100,
    )


def test_the_plan_is_for_the_model_and_proven_on_the_proxy(run: autoprec.Run) -> None:
    proof, folder = run.verification, run.settings.out
    assert proof is not None
    assert proof.verdict is Verdict.VERIFIED
    assert proof.plan == run.plan.digest
    assert proof.steps == ()  # times of the proxy say nothing
    assert proof.proxy is not None
    sizes = (proof.proxy.parameters, proof.proxy.model_parameters)
    own = [2 * (w * 2 * w) + 3 * w + 2 * w for w in (32, 4096)]
    assert sizes == (2 * own[0] + 32 * 33, 3 * own[1] + 4096 * 4097)
    assert proof.proxy.model_structure == run.plan.fingerprint.structure
    assert proof.proxy.shows_enough
    assert run.plan.certificate is not None
    assert run.plan.certificate.proxy == proof.proxy
    assert sum(layer.option.is_fp8 for layer in run.plan.layers) > 0
    assert run.exit_code == 0
    # the gap that the budget holds is the one that the proof tells
    assert proof.expected_gap is not None
    assert run.plan.expected_gap is not None
    assert proof.expected_gap.mean == pytest.approx(run.plan.expected_gap.mean)
    # the proxy's folder is a run's
    carried = Plan.load(folder / "proxy" / "plan.json")
    assert carried.digest == proof.proxy.plan
    assert carried.fingerprint.structure == proof.proxy.structure
    assert carried.certificate is not None
    render_html(load_run(folder / "proxy"))


def test_a_finished_run_is_resumed_without_training(
    run: autoprec.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("nothing is trained again")

    monkeypatch.setattr("autoprec.verification.verify_plans", fail)
    monkeypatch.setattr("autoprec.sensitivity.measure.measure_sensitivity", fail)
    given = {**ON_H100, **SHORT, "proxy": f"{MODELS}:small", "run_steps": 500, "resume": True}
    again = autoprec.tune(f"{MODELS}:large", out=run.settings.out, **given)
    assert again.plan == run.plan


def test_every_report_says_that_it_was_a_proxy(
    run: autoprec.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.settings.out
    said = "verified on a proxy of 9,568 parameters"
    assert said in " ".join(str(run).split())
    assert said in " ".join(render_html(load_run(folder)).split())
    for command in (["plan", "show"], ["plan", "check"]):
        with pytest.raises(SystemExit):
            main([*command, str(folder / "plan.json")])
        assert said in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["report", str(folder), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["proxy"]["parameters"] == 9568


def test_a_refuted_proof_is_the_models_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[Plan] = []

    def refute(_: object, plans: list[Plan], **terms: Any) -> Verification:
        tried.extend(plans)
        return Verification(
            plan=plans[-1].digest,
            verdict=Verdict.REFUTED,
            loss_tolerance=terms["loss_tolerance"],
            gap=None,
            control_gap=None,
            seed_spread=None,
            predicted_gap=None,
            warmup_steps=1,
            branch_steps=1,
            branches=(),
            steps=(),
            refuted_plans=tuple(plan.options for plan in plans[:-1]),
        )

    monkeypatch.setattr("autoprec.verification.verify_plans", refute)
    words = [f"{MODELS}:large", "--meta", "--target", "h100-sxm", "--recipes", "tensorwise"]
    words += ["--proxy", f"{MODELS}:small", "--out", str(tmp_path), "--loss-tolerance", "50%"]
    with pytest.raises(SystemExit) as ended:
        main(["tune", *words, "--trials", "0", "--warmup-steps", "8"])
    assert ended.value.code == 1
    assert "refuted on a proxy" in " ".join(capsys.readouterr().out.split())
    proof = Verification.load(tmp_path / "verification.json")
    assert all(len(plan.layers) == 7 for plan in tried)
    assert all(len(options) == 10 for options in proof.refuted_plans)  # the model's
    assert proof.plan == Plan.load(tmp_path / "plan.json").digest
    assert len(tried) == len({plan.digest for plan in tried})


@pytest.mark.slow
def test_a_fault_that_sets_in_late_is_refuted_by_the_proxys_training(tmp_path: Path) -> None:
    run = autoprec.tune(
        proxy_models.late_large,
        proxy=proxy_models.late_small,
        out=tmp_path,
        loss_tolerance=0.001,
        seeds="3:4",
        **ON_H100,
    )
    proof = run.verification
    assert proof is not None
    assert proof.proxy is not None
    (before,) = proof.refuted_plans
    assert sum(o.is_fp8 for o in before) > sum(o.is_fp8 for o in run.plan.options)
    assert proof.notes[0].startswith("on the proxy, refuted before: ")


@pytest.mark.slow
def test_live_functions_are_a_proxy_too(tmp_path: Path) -> None:
    run = autoprec.tune(
        proxy_models.large,
        proxy=proxy_models.small,
        out=tmp_path,
        verify=False,
        warmup_steps=8,
        **ON_H100,
    )
    assert {row.basis for row in run.sensitivity.rows} == {Basis.TRANSFERRED}
    assert (tmp_path / "proxy" / "sensitivity.json").exists()


@pytest.mark.slow
def test_a_proxy_may_stand_for_a_model_that_fits(tmp_path: Path) -> None:
    """Times are the model's own; what FP8 does to the loss is the proxy's."""
    run = autoprec.tune(
        proxy_models.Family(64, 3, 32),
        proxy=proxy_models.small,
        out=tmp_path,
        target="h100-sxm",
        recipes="tensorwise",
        trials=0,
        **SHORT,
    )
    assert run.verification is not None
    assert run.verification.proxy is not None
    assert len(run.plan.layers) == 10


@pytest.mark.slow
def test_a_model_without_fp8_layers_gets_a_bf16_plan_that_is_proven(tmp_path: Path) -> None:
    model = proxy_models.Family(1000, 2, 64)  # 1000 is no multiple of 16
    run = autoprec.tune(model, proxy=proxy_models.small, out=tmp_path, **SHORT, **ON_H100)
    assert {layer.option for layer in run.plan.layers} <= {BF16_O2, FP32}
    assert run.verification is not None
    assert run.verification.verdict is Verdict.VERIFIED


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (
            {"proxy": f"{MODELS}:other"},
            RecordError,
            r"family.* head \(the proxy has unembed\)",
        ),
        ({"proxy": f"{MODELS}:odd"}, RecordError, r"in FP8.* where 100 %.*fc1, head: K=20"),
        (
            {"proxy": proxy_models.Family(32, 2, 30)},
            RecordError,
            r"in FP8.* where 100 %.*fc1.* more: M=30 is not a multiple of 16",
        ),
        ({"proxy": "none.py"}, WorkloadError, "none.py is not there"),
        (
            {"proxy": {"build_model": proxy_models.small.build_model}},
            WorkloadError,
            "train_batches",
        ),
        ({"proxy": "a.py", "sensitivity": "b.json"}, SettingsError, "leave one of them out"),
    ],
)
def test_a_proxy_that_cannot_stand_for_the_model_ends_the_run_at_once(
    given: dict[str, Any], error: type[AutoprecError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        autoprec.tune(f"{MODELS}:large", out=tmp_path / "out", **ON_H100, **given)
    assert not list(tmp_path.iterdir())


def test_blocks_with_other_norms_are_another_familys() -> None:
    """A Llama for a Gemma, say: the linears are the same."""

    def normed(blocks: int, *names: str) -> ModelSpec:
        norms = [
            plain_layer(f"layers.{block}.{name}", LayerKind.NORM, (64,), (1, 64))
            for block in range(blocks)
            for name in ("norm", *names)
        ]
        return model_of(*stack(blocks).layers, *norms)

    check_proxy(normed(3), normed(2))
    with pytest.raises(
        RecordError, match=r"model have none .* in it: \*.q_norm \(the proxy has no"
    ):
        check_proxy(normed(3, "q_norm"), normed(2))
    with pytest.raises(RecordError, match=r"role that the model has none of: \*.q_norm; build"):
        check_proxy(normed(3), normed(2, "q_norm"))


def test_a_proxy_that_is_no_smaller_is_refused(tmp_path: Path) -> None:
    small = proxy_models.small
    with pytest.raises(RecordError, match="9,568 parameters and the model 9,568"):
        autoprec.tune(small, proxy=small, out=tmp_path, target="h100-sxm")
    assert not list(tmp_path.glob("*.json"))


def test_a_proxy_is_for_tune(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "--proxy" not in capsys.readouterr().out
