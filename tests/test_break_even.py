"""From what size FP8 would pay: asked of the constants that the profile was predicted with."""

from pathlib import Path

import pytest

from autoprec.predict import (
    Parallel,
    break_even_tokens,
    load_device_profile,
    predict_linear,
    predict_profile,
)
from autoprec.predict.breakeven import find_break_evens
from autoprec.predict.transfer import unknown_sensitivity
from autoprec.records import Constraint, GemmShape, ModelSpec, Option, Plan, Profile, Recipe
from autoprec.records.devices import DeviceProfile
from autoprec.records.model import fp8_option
from autoprec.search import build_plan, search_plan
from tests.decoder_specs import linear_layer, model_of

H100 = load_device_profile("h100-sxm")
ROWWISE = fp8_option(Recipe.ROWWISE)
CASTS = {"rowwise_cast_bytes": 1.5}


def with_constants(factors: dict[str, float], **changed: str) -> DeviceProfile:
    """Return the H100's profile with some constants multiplied, and some fields replaced."""
    constants = {
        name: c.model_copy(update={"value": c.value * factors.get(name, 1.0)})
        for name, c in H100.constants.items()
    }
    return H100.model_copy(update={"constants": constants, **changed})


def model(K: int, N: int, *, tokens: int) -> ModelSpec:
    return model_of(linear_layer("fc", K, N, shape=(tokens,)))


def predicted(device: DeviceProfile, spec: ModelSpec, option: Option = ROWWISE) -> Profile:
    return predict_profile(spec, device, compiled=True, options=[option])


def planned(profile: Profile) -> Plan:
    sensitivity = unknown_sensitivity(profile.model)
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=0.0)
    search = search_plan(profile, sensitivity, constraint=constraint, evaluate=None, trials=0)
    return build_plan(profile, sensitivity, search, search.chosen, constraint=constraint)


def size_note(profile: Profile) -> str:
    found = [note for note in planned(profile).notes if "FP8 would pay" in note or "from:" in note]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", ["h100-sxm", "my-measured-card"])
def test_a_users_own_profile_is_asked_and_not_the_shipped_one_of_its_name(
    tmp_path: Path, name: str
) -> None:
    path = with_constants(CASTS, name=name).save(tmp_path / "mine.json")
    own = load_device_profile(path)
    tokens = break_even_tokens(own, 16384, 16384, recipe=Recipe.ROWWISE)
    assert tokens is not None
    assert tokens != break_even_tokens(H100, 16384, 16384, recipe=Recipe.ROWWISE)
    here = tokens // 2 // 16 * 16
    profile = predicted(own, model(16384, 16384, tokens=here))
    path.unlink()
    saved = Profile.load(profile.save(tmp_path / "profile.json"))
    expected = f"fc (K=16384 N=16384): {tokens} tokens a step with rowwise, here {here}"
    assert size_note(saved) == f"where FP8 does not pay on {name} it would from: {expected}"


def test_two_profiles_of_one_name_are_told_apart() -> None:
    spec = model(64, 256, tokens=128)
    digests = {
        planned(predicted(device, spec)).fingerprint.device_digest
        for device in (H100, with_constants(CASTS))
    }
    assert len(digests) == 2
    assert "" not in digests


def test_a_profile_from_before_says_that_it_has_no_sizes() -> None:
    old = predicted(H100, model(64, 256, tokens=128)).model_copy(update={"break_evens": ()})
    assert "not in this profile.json" in size_note(old)


def test_where_no_size_of_the_layer_pays_a_wide_weight_is_named() -> None:
    profile = predicted(H100, model(64, 256, tokens=128))
    (row,) = profile.break_evens
    assert (row.tokens, row.width) == (None, None)
    assert row.wide is not None
    assert row.wide.K == row.wide.N >= 4096
    for M, pays in ((row.wide.M, True), (row.wide.M - 16, False)):
        found = predict_linear(H100, M, row.wide.K, row.wide.N, recipe=Recipe.ROWWISE).speedup
        assert found is not None
        assert (found.value >= 1) is pays
    said = f"K=N={row.wide.K} would from {row.wide.M} tokens a step with rowwise"
    assert f"no number of tokens and at 128 tokens no width ({said})" in size_note(profile)


def test_a_device_that_never_gains_says_so() -> None:
    slow = ("fp8_fraction", "fp8_slow_fraction", "fp8_rowwise_fraction")
    device = with_constants(dict.fromkeys(slow, 0.1))
    note = size_note(predicted(device, model(64, 256, tokens=128)))
    assert note.endswith("FP8 never gains here, nor at K=N=16384")


def test_another_width_is_named_where_one_pays() -> None:
    note = size_note(predicted(H100, model(64, 256, tokens=16384)))
    assert "no number of tokens (at 16384 tokens, width K=N=" in note


def test_tokens_that_are_no_multiple_of_16_are_asked_for_the_whole_recipe() -> None:
    profile = predicted(H100, model(1024, 1024, tokens=1000))
    assert all(option.gemms_hp for option in profile.model.layers[0].options if option.is_fp8)
    (row,) = profile.break_evens
    assert row.recipe is Recipe.ROWWISE
    assert row.tokens == break_even_tokens(H100, 1024, 1024, recipe=Recipe.ROWWISE)


def test_a_layer_that_loses_by_its_place_in_the_step_does_not_contradict_itself() -> None:
    profile = predicted(H100, model(64, 256, tokens=128))
    row = profile.break_evens[0].model_copy(update={"tokens": 112})
    note = size_note(profile.model_copy(update={"break_evens": (row,)}))
    assert "112 tokens a step with rowwise, here 128, by its own GEMMs and casts; what the" in note


def test_shapes_are_those_of_one_device() -> None:
    layer = linear_layer("attn.k_proj", 4096, 1024).model_copy(update={"options": (ROWWISE,)})
    (row,) = find_break_evens(H100, [layer], Parallel(tp=8), compiled=True)
    assert row.gemm == GemmShape(M=4096, K=4096, N=128)
