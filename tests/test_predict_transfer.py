import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.errors import RecordError
from autoprec.model.options import grad_weight_in_bf16
from autoprec.predict.family import Place, depth_weights, find_places, role_in_block
from autoprec.predict.transfer import (
    default_locks,
    sensitivity_basis,
    transfer_sensitivity,
    unknown_sensitivity,
)
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    Constraint,
    Estimate,
    LayerSensitivity,
    ModelSpec,
    Option,
    Sensitivity,
)
from autoprec.search import search_plan
from tests.decoder_specs import decoder, linear_layer, model_of
from tests.search_tables import TENSORWISE, profile_of, sensitivity_of, spec_of

OPTIONS = (FP32, BF16_O2, TENSORWISE)


def model(blocks: int, *, structure: str = "1" * 16, head: str = "lm_head") -> ModelSpec:
    layers = [
        linear_layer(f"layers.{block}.{part}.{role}", 64, 64, options=OPTIONS)
        for block in range(blocks)
        for part, role in (("attn", "q_proj"), ("mlp", "down_proj"))
    ]
    spec = model_of(*layers, linear_layer(head, 64, 64, options=OPTIONS))
    return spec.model_copy(update={"structure": structure})


def measured(spec: ModelSpec, grad_error: dict[str, float]) -> Sensitivity:
    """Return a sensitivity with these gradient errors in FP8; BF16 has a hundredth."""
    empty = sensitivity_of(spec, {})
    rows = tuple(
        LayerSensitivity(
            name=layer.name,
            option=option,
            grad_error=Estimate(
                mean=share * grad_error[layer.name], stderr=0.1 * share * grad_error[layer.name]
            ),
        )
        for layer in spec.layers
        for option, share in ((BF16_O2, 0.01), (TENSORWISE, 1.0))
    )
    return empty.model_copy(update={"rows": rows})


def error_of(sensitivity: Sensitivity, name: str, option: Option = TENSORWISE) -> float:
    row = sensitivity.row(name, option)
    assert row is not None
    return row.grad_error.mean


SMALL = model(2, structure="2" * 16)
E = {
    "layers.0.attn.q_proj": 8e-3,
    "layers.1.attn.q_proj": 2e-3,
    "layers.0.mlp.down_proj": 1e-3,
    "layers.1.mlp.down_proj": 1e-3,
    "lm_head": 3e-3,
}


# --- transferred ---------------------------------------------------------------------------------


def test_a_layer_takes_the_error_of_its_role_at_its_depth() -> None:
    large = transfer_sensitivity(measured(SMALL, E), model(3))
    by_depth = [error_of(large, f"layers.{block}.attn.q_proj") for block in range(3)]
    assert by_depth == pytest.approx([8e-3 * 10 / 14, 4e-3 * 10 / 14, 2e-3 * 10 / 14])
    assert error_of(large, "lm_head") == pytest.approx(3e-3)
    assert error_of(large, "lm_head", BF16_O2) == pytest.approx(3e-5)
    assert {row.basis for row in large.rows} == {Basis.TRANSFERRED}
    assert large.structure == model(3).structure
    assert sensitivity_basis(large) is Basis.TRANSFERRED


def test_the_ends_of_a_role_keep_their_own_and_the_others_their_total() -> None:
    spec = model(4, structure="2" * 16)
    own = dict.fromkeys(spec.names, 0.0001)
    own |= {
        f"layers.{block}.attn.q_proj": error for block, error in enumerate((8e-3, 4e-5, 2e-5, 6e-4))
    }
    large = transfer_sensitivity(measured(spec, own), model(10))
    by_depth = [error_of(large, f"layers.{block}.attn.q_proj") for block in range(10)]
    assert (by_depth[0], by_depth[-1]) == pytest.approx((8e-3, 6e-4))
    assert math.fsum(by_depth[1:-1]) == pytest.approx(6e-5)
    assert by_depth[1] / by_depth[8] == pytest.approx(2.0)


@given(small=st.integers(1, 6), large=st.integers(1, 12), data=st.data())
def test_a_role_keeps_its_total(small: int, large: int, data: st.DataObject) -> None:
    spec = model(small, structure="2" * 16)
    shares = st.floats(1e-8, 1.0)
    given = {name: data.draw(shares) for name in spec.names}
    found = transfer_sensitivity(measured(spec, given), model(large))
    for role in ("q_proj", "down_proj", "lm_head"):
        total = math.fsum(grad_error for name, grad_error in given.items() if name.endswith(role))
        rows = [
            r.grad_error.mean
            for r in found.rows
            if r.name.endswith(role) and r.option == TENSORWISE
        ]
        assert math.fsum(rows) == pytest.approx(total)
        assert min(rows) >= 0.0


def test_layers_match_within_their_stage_where_the_stages_are_the_same() -> None:
    def names(*depths: int) -> list[str]:
        return [f"stages.{s}.{b}.up" for s, depth in enumerate(depths) for b in range(depth)]

    places = find_places(names(1, 4, 1), names(1, 2, 1))
    assert places["stages.0.0.up"] == Place(("stages.0.0.up",), 0, 1, is_staged=True)
    peers = ("stages.1.0.up", "stages.1.1.up")
    assert places["stages.1.2.up"] == Place(peers, 2, 4, is_staged=True)
    fewer = find_places(names(1, 4, 1), names(1, 2))  # other stages: by depth alone
    assert fewer["stages.1.2.up"] == Place(tuple(names(1, 2)), 3, 6)


def test_the_ends_of_a_stage_are_as_what_is_between_them() -> None:
    def staged(blocks: int, structure: str) -> ModelSpec:
        names = ("stages.0.0.up", *(f"stages.1.{block}.up" for block in range(blocks)))
        made = model_of(*(linear_layer(name, 64, 64, options=OPTIONS) for name in names))
        return made.model_copy(update={"structure": structure * 16})

    small = staged(3, "2")
    errors = dict.fromkeys(small.names, 1e-3)
    large = transfer_sensitivity(measured(small, errors), staged(6, "1"))
    found = [error_of(large, f"stages.1.{block}.up") for block in range(6)]
    assert found == pytest.approx([5e-4] * 6)


def test_the_same_depth_gives_the_same_table() -> None:
    found = transfer_sensitivity(measured(SMALL, E), model(2))
    assert {row.name: row.grad_error.mean for row in found.rows if row.option == TENSORWISE} == E


def test_names_may_differ_outside_the_role() -> None:
    layers = [
        layer.model_copy(update={"name": f"model.decoder.{layer.name}"})
        for layer in model(4).layers
    ]
    found = transfer_sensitivity(measured(SMALL, E), model_of(*layers))
    by_depth = [8e-3 * 4.0 ** (-block / 3) for block in range(4)]
    share = error_of(found, "model.decoder.layers.0.attn.q_proj") / 10e-3
    assert share == pytest.approx(by_depth[0] / math.fsum(by_depth))


def test_a_layer_without_counterpart_stays_out_of_fp8_and_is_named() -> None:
    found = transfer_sensitivity(measured(SMALL, E), model(2, head="unembed"))
    assert found.row("unembed", TENSORWISE) is None
    row = found.row("unembed", BF16_O2)
    assert row is not None
    assert row.basis is Basis.UNKNOWN
    assert any("unembed" in note for note in found.notes)


def test_another_family_is_refused() -> None:
    small = model_of(linear_layer("conv_stem", 64, 64, options=OPTIONS))
    with pytest.raises(RecordError, match=r"same family.*q_proj, down_proj, lm_head.*conv_stem"):
        transfer_sensitivity(measured(small, {"conv_stem": 1e-3}), model(2))


def test_a_table_without_fp8_in_grad_weight_is_refused_for_a_model_with_it() -> None:
    small = measured(SMALL, E)
    masked = grad_weight_in_bf16(TENSORWISE)
    rows = [r.model_copy(update={"option": masked}) if r.option.is_fp8 else r for r in small.rows]
    with pytest.raises(RecordError, match=r"of 100 %.* no multiple of 16"):
        transfer_sensitivity(small.model_copy(update={"rows": tuple(rows)}), model(2))
    both = small.model_copy(update={"rows": (*small.rows, *(r for r in rows if r.option.is_fp8))})
    assert transfer_sensitivity(both, model(2)).rows == transfer_sensitivity(small, model(2)).rows


def test_budget_and_noise_are_the_small_models() -> None:
    small = measured(SMALL, E)
    found = transfer_sensitivity(small, model(8))
    assert found.loss_curve == small.loss_curve
    assert found.activation_error == small.activation_error
    assert any("transferred by role" in note for note in found.notes)


# --- unknown -------------------------------------------------------------------------------------


def test_nothing_is_known_of_any_layer() -> None:
    found = unknown_sensitivity(model(2))
    assert sensitivity_basis(found) is Basis.UNKNOWN
    assert len(found.rows) == 2 * len(model(2).layers)
    assert Sensitivity.from_json(found.to_json()) == found


def test_head_and_router_are_locked_and_nothing_else() -> None:
    router = linear_layer("layers.0.moe.gate", 4096, 64)
    named = linear_layer("layers.1.moe.router", 4096, 4096)
    gate = linear_layer("layers.1.mlp.gate", 4096, 14336)
    base = decoder()
    spec = base.model_copy(update={"layers": (router, named, gate, *base.layers)})
    locks = default_locks(spec.layers)
    assert set(locks) == {"layers.0.moe.gate", "layers.1.moe.router", "lm_head"}
    assert "a router" in locks["layers.0.moe.gate"]


def test_a_head_is_known_by_its_tie_or_its_place() -> None:
    base = decoder()
    last = base.layers[-1]
    nameless = last.model_copy(update={"name": "project"})
    assert set(default_locks((*base.layers[:-1], nameless))) == {"project"}
    tied = last.model_copy(update={"name": "project", "tied_to": "embed"})
    assert set(default_locks((tied, *base.layers[:-1]))) == {"project", base.layers[-2].name}


def test_locks_hold_only_while_nothing_is_known() -> None:
    rows = {
        "body": {FP32: (4.0, 0.0), BF16_O2: (2.0, 0.0), TENSORWISE: (1.0, 0.0)},
        "lm_head": {FP32: (4.0, 0.0), BF16_O2: (2.0, 0.0), TENSORWISE: (1.0, 0.0)},
    }
    spec = spec_of(rows)
    profile = profile_of(spec, rows)
    asked = Constraint(loss_tolerance=1e-3, grad_error_budget=None)
    chosen = {
        name: search_plan(
            profile, sensitivity, constraint=asked, evaluate=None, trials=2
        ).chosen.options
        for name, sensitivity in (
            ("unknown", unknown_sensitivity(spec)),
            ("measured", sensitivity_of(spec, rows)),
        )
    }
    assert chosen == {"unknown": (TENSORWISE, BF16_O2), "measured": (TENSORWISE, TENSORWISE)}


# --- roles and places ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.31.self_attn.q_proj", "model.layers.*.self_attn.q_proj"),
        ("vit.layers.3.mlp.fc2", "vit.layers.*.mlp.fc2"),
        ("blocks.3.mlp.0", "blocks.*.mlp.0"),  # of a block's nn.Sequential
        ("layers.0.mlp.experts.12.w1", "layers.*.mlp.experts.*.w1"),
        ("layer2.1.conv3", "layer*.*.conv3"),
        ("4", "*"),  # a plain stack
        ("fc1", "fc*"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_number_is_a_blocks_but_at_the_end_of_a_block(name: str, role: str) -> None:
    assert role_in_block(name, 0) == role


def test_two_linears_of_a_block_are_not_mixed() -> None:
    def mlp(blocks: int) -> ModelSpec:
        return model_of(
            *(
                linear_layer(f"layers.{block}.{name}", 64, 64, options=OPTIONS)
                for block in range(blocks)
                for name in ("fc1", "fc2")
            )
        )

    given = {name: 8e-3 if name.endswith("fc1") else 1e-3 for name in mlp(2).names}
    found = transfer_sensitivity(measured(mlp(2), given), mlp(4))
    assert error_of(found, "layers.1.fc1") == pytest.approx(4e-3)
    assert error_of(found, "layers.1.fc2") == pytest.approx(5e-4)


@given(small=st.integers(1, 9), large=st.integers(1, 40))
def test_weights_of_depth_add_up_and_are_symmetric(small: int, large: int) -> None:
    columns = [0.0] * small
    for index in range(large):
        weights = depth_weights(index, large, small)
        assert math.fsum(weights.values()) == pytest.approx(1.0)
        for at, weight in weights.items():
            columns[at] += weight
    assert columns == pytest.approx(columns[::-1])
    assert min(columns) > 0.0 or large < small
