"""What a device profile must hold: numbers that fit each other, and texts that can be shown."""

import json
from pathlib import Path
from typing import Any

import pytest

from autoprec.errors import RecordError
from autoprec.predict import list_device_profiles
from autoprec.predict.registry import profiles_folder
from autoprec.records.devices import CONSTANTS, DeviceProfile


def written(
    folder: Path, *, of: str = "h100-sxm", constants: dict[str, Any] | None = None, **fields: Any
) -> Path:
    """Write a shipped profile with some constants' values and some fields changed."""
    found = json.loads((profiles_folder() / f"{of}.json").read_text())
    for name, value in (constants or {}).items():
        found["constants"][name]["value"] = value
    path = folder / "mine.json"
    path.write_text(json.dumps(found | fields))
    return path


@pytest.mark.parametrize(
    ("constant", "value", "words"),
    [
        ("bf16_peak_tflops", True, "value: Input should be a valid number, but it is True"),
        ("fp8_peak_tflops", 19790, "fp8_peak_tflops must be 1 to 4 times bf16_peak_tflops"),
        ("fp32_peak_tflops", 1000, "bf16_peak_tflops must not be below fp32_peak_tflops"),
        ("tf32_peak_tflops", 4945, "bf16_peak_tflops must not be below tf32_peak_tflops"),
        ("bf16_fraction", 0.06, "fp8_fraction must make FP8 GEMMs at most 4 times as fast"),
        ("devices_per_node", 7.5, "devices_per_node must be whole, but it is 7.5;"),
        ("time_error", 1.5, "time_error must be between 0 and 1, but it is 1.5;"),
        ("memory_bandwidth_tbs", 1792, "between 0.02 and 50 TB/s, but it is 1792;"),
    ],
)
def test_an_absurd_constant_is_one_line_without_a_dump(
    constant: str, value: object, words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecordError) as caught:
        DeviceProfile.load(written(tmp_path, constants={constant: value}))
    assert words in str(caught.value)
    assert "{" not in str(caught.value)
    assert "Value error" not in str(caught.value)


def test_a_constant_without_a_unit_is_told_so(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace('"unit": "1"', '"unit": "SMs"'))
    with pytest.raises(RecordError, match=r"has no unit \('1'\), but the file says SMs"):
        DeviceProfile.load(path)


def test_a_range_is_told_with_a_unit_where_there_is_one() -> None:
    assert CONSTANTS["time_error"].span == "between 0 and 1"
    assert CONSTANTS["memory_bandwidth_tbs"].span == "between 0.02 and 50 TB/s"


def test_a_card_older_than_bf16_may_be_slower_in_it_than_in_fp32(tmp_path: Path) -> None:
    peaks = {"fp32_peak_tflops": 15.7, "tf32_peak_tflops": 0.0, "bf16_peak_tflops": 14.0}
    path = written(tmp_path, of="a100", constants=peaks, capability="7.0")
    assert DeviceProfile.load(path).value("bf16_peak_tflops") == 14.0
    path = written(tmp_path, of="a100", constants=peaks, capability="8.0")
    with pytest.raises(RecordError, match=r"below fp32_peak_tflops, but they are 14 and 15\.7"):
        DeviceProfile.load(path)


@pytest.mark.parametrize("name", ["../../x y\n", "", "a b", "a/b", "-x", "x" * 101, "a\n"])
def test_a_name_is_one_that_a_file_could_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"mine\.json: name: String should"):
        DeviceProfile.load(written(tmp_path, name=name))


@pytest.mark.parametrize("field", ["title", "capability", "fp8_reason", "architecture"])
def test_a_text_that_is_printed_is_one_printable_line(field: str, tmp_path: Path) -> None:
    forged: dict[str, Any] = {field: "a\nautoprec: error: forged"}
    with pytest.raises(RecordError, match=f"{field}: must be one line of printable text"):
        DeviceProfile.load(written(tmp_path, **forged))


def test_a_missing_field_is_told_without_the_rest_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path)
    fields = json.loads(path.read_text())
    del fields["title"]
    path.write_text(json.dumps(fields))
    with pytest.raises(RecordError, match=r"mine\.json: title: Field required; fix"):
        DeviceProfile.load(path)


def test_a_byte_order_mark_is_no_part_of_a_profile(tmp_path: Path) -> None:
    path = written(tmp_path)
    plain = DeviceProfile.load(path)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert DeviceProfile.load(path) == plain


def test_every_shipped_profile_comes_back_the_same() -> None:
    for profile in list_device_profiles():
        assert DeviceProfile.from_json(profile.to_json()) == profile
