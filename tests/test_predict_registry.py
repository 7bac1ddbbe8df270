"""Device profiles by name, spelling and path; recipes and modes as people write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from autoprec.common.recipes import Recipe
from autoprec.errors import DeviceError, RecordError
from autoprec.predict import list_device_profiles, load_device_profile, parse_recipe, registry
from autoprec.predict.registry import profiles_folder
from autoprec.predict.spelling import has_own_casts, parse_compiled
from autoprec.records.devices import CONSTANTS, DeviceProfile

NAMES = (
    *("a100", "h100-sxm", "h100-sxm-500w", "h100-pcie", "h800", "h20", "h200", "b200", "b300"),
    *("l4", "l40s", "rtx-4090", "rtx-5090", "rtx-pro-6000", "mi300x"),
)


def edited(tmp_path: Path, change: dict[str, Any], *, drop: str = "") -> Path:
    """Write the H100's profile with one constant changed or dropped."""
    fields = json.loads((profiles_folder() / "h100-sxm.json").read_text())
    for name, parts in change.items():
        fields["constants"][name] |= parts
    fields["constants"].pop(drop, None)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(fields))
    return path


def test_every_promised_device_is_there() -> None:
    assert {profile.name for profile in list_device_profiles()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_has_a_source_and_a_kind(name: str) -> None:
    profile = load_device_profile(name)
    assert profile.name == name
    assert set(profile.constants) == set(CONSTANTS)
    assert all(len(constant.source) > 3 for constant in profile.constants.values())
    kinds = {constant.kind.value for constant in profile.constants.values()}
    assert {"datasheet", "published", "fitted"} <= kinds


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("H100", "h100-sxm"),
        ("H100 SXM", "h100-sxm"),
        ("H100 SXM5", "h100-sxm"),
        ("h100_sxm", "h100-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("H100 (presumed)", "h100-sxm"),
        ("H100 80GB", "h100-sxm"),
        ("H100 (Meta)", "h100-sxm-500w"),
        ("H100 SXM (Meta 500 W/2.4 TB/s presumed)", "h100-sxm-500w"),
        ("H100 96GB 2.4TB/s 500W", "h100-sxm-500w"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("H800", "h800"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("B200 (power limited)", "b200"),
        ("SM100 (B200 class)", "b200"),
        ("B300 SXM6", "b300"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("RTX 5090", "rtx-5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_usual_spelling_finds_its_device(spelling: str, name: str) -> None:
    assert load_device_profile(spelling).name == name


@pytest.mark.parametrize("spelling", ["H100 NVL", "RTX 5090 D v2", "MI325X", "V100", "", "../x"])
def test_another_device_is_no_match(spelling: str) -> None:
    with pytest.raises(DeviceError, match="a device must be a profile's name"):
        load_device_profile(spelling)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("h100-sxn", "h100-sxm"),
        ("rtx4090", "rtx-4090"),
        ("b20", "b200"),
        ("H100 80GB 700W SXM", "h100-sxm"),
    ],
)
def test_an_unknown_name_offers_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(DeviceError, match=f"nearest: .*{near}"):
        load_device_profile(wrong)


def test_a_bare_name_with_variants_says_what_it_was_read_as(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry._tell_variants.cache_clear()
    assert load_device_profile("H100").name == "h100-sxm"
    assert load_device_profile("H100").name == "h100-sxm"
    assert "'H100' is read as h100-sxm" in caplog.text
    assert "h100-pcie, h100-sxm-500w" in caplog.text
    assert len(caplog.records) == 1
    load_device_profile("H800")
    load_device_profile("h100-pcie")
    assert len(caplog.records) == 1


def test_a_users_own_file_is_read_and_comes_back_the_same(tmp_path: Path) -> None:
    profile = load_device_profile(edited(tmp_path, {"sm_count": {"value": 100.0}}))
    assert profile.value("sm_count") == 100
    assert DeviceProfile.load(profile.save(tmp_path / "again.json")) == profile


def test_a_bandwidth_a_thousand_times_too_big_is_an_error(tmp_path: Path) -> None:
    path = edited(tmp_path, {"memory_bandwidth_tbs": {"value": 1792.0}})
    with pytest.raises(RecordError, match="memory_bandwidth_tbs must be between"):
        load_device_profile(path)


def test_a_constant_in_another_unit_is_an_error(tmp_path: Path) -> None:
    path = edited(tmp_path, {"memory_bandwidth_tbs": {"unit": "GB/s"}})
    with pytest.raises(RecordError, match="is in TB/s, but the file says GB/s"):
        load_device_profile(path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("bf16_peak_tflops", True, "valid number"),
        ("bf16_peak_tflops", "989", "valid number"),
        ("fp8_peak_tflops", 100.0, "must be 1 to 4 times bf16_peak_tflops"),
        ("bf16_peak_tflops", 10.0, "must not be below tf32_peak_tflops, but they are 10 and"),
        ("sm_count", 1.5, "must be whole"),
        ("speedup_error_low", -1.5, "must be between -0.7 and 0, but it is -1.5"),
    ],
)
def test_an_absurd_constant_is_an_error(
    tmp_path: Path, name: str, value: float | str, words: str
) -> None:
    with pytest.raises(RecordError, match=words) as caught:
        load_device_profile(edited(tmp_path, {name: {"value": value}}))
    assert "aliases" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "../../x", "two\nlines", "x" * 101])
def test_a_name_that_could_be_a_path_is_an_error(tmp_path: Path, name: str) -> None:
    fields = json.loads(edited(tmp_path, {}).read_text())
    path = tmp_path / "named.json"
    path.write_text(json.dumps({**fields, "name": name}))
    with pytest.raises(RecordError, match="name"):
        load_device_profile(path)


def test_a_mark_before_the_json_is_passed_over(tmp_path: Path) -> None:
    path = edited(tmp_path, {})
    path.write_text("\ufeff" + path.read_text())
    assert load_device_profile(path).name == "h100-sxm"


def test_a_missing_constant_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="'bf16_fraction' is missing"):
        load_device_profile(edited(tmp_path, {}, drop="bf16_fraction"))


def test_a_file_without_software_assumes_a_fresh_install(tmp_path: Path) -> None:
    path = edited(tmp_path, {})
    fields = json.loads(path.read_text())
    del fields["software"]
    path.write_text(json.dumps(fields))
    assert str(load_device_profile(path).software) == "torch 2.11, CUDA 13.0, torchao 0.18"


@pytest.mark.parametrize("version", ["thirteen", "13", "13.0\n", ""])
def test_a_version_is_written_with_its_dot(tmp_path: Path, version: str) -> None:
    path = edited(tmp_path, {})
    fields = json.loads(path.read_text()) | {"software": {"cuda": version}}
    path.write_text(json.dumps(fields))
    with pytest.raises(RecordError, match="cuda"):
        load_device_profile(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="must be readable"):
        load_device_profile(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("wording", "recipe"),
    [
        ("tensorwise", Recipe.TENSORWISE),
        ("Tensorwise dynamic", Recipe.TENSORWISE),
        ("TE tensorwise current", Recipe.TENSORWISE),
        ("tensorwise delayed", Recipe.DELAYED),
        ("TE fp8 (delayed)", Recipe.DELAYED),
        ("delayed", Recipe.DELAYED),
        ("rowwise dynamic", Recipe.ROWWISE),
        ("rowwise(axiswise) dynamic", Recipe.ROWWISE),
        ("channelwise (noquant)", Recipe.ROWWISE),
        ("rowwise_with_gw_hp", Recipe.ROWWISE_WITH_GW_HP),
        ("rowwise gw_hp", Recipe.ROWWISE_WITH_GW_HP),
        ("blockwise", Recipe.BLOCKWISE),
        ("blockwise (1x128 act, 128x128 wt)", Recipe.BLOCKWISE),
        ("mxfp8_cublas", Recipe.MXFP8),
        ("MXFP8", Recipe.MXFP8),
        ("float8", Recipe.TENSORWISE),
    ],
)
def test_a_recipe_is_known_by_any_usual_wording(wording: str, recipe: Recipe) -> None:
    assert parse_recipe(wording) is recipe


@pytest.mark.parametrize("wording", ["nvfp4", "int8", "bf16", "", "fastest"])
def test_another_recipe_is_an_error_that_lists_those_there_are(wording: str) -> None:
    with pytest.raises(DeviceError, match="must be one of tensorwise, rowwise"):
        parse_recipe(wording)


def test_modes_are_read_as_people_write_them() -> None:
    assert parse_compiled("yes", default=False)
    assert parse_compiled("True", default=False)
    assert parse_compiled("yes (PyTorch arm only)", default=False)
    assert not parse_compiled("no (TE, CUDA events)", default=True)
    assert not parse_compiled("0", default=True)
    assert parse_compiled("", default=True)
    with pytest.raises(DeviceError, match="must be yes or no"):
        parse_compiled("perhaps", default=True)


def test_transformer_engine_has_casts_of_its_own() -> None:
    assert has_own_casts("TE delayed")
    assert not has_own_casts("tensorwise")
