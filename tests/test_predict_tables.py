"""Tables of linears: whatever is wrong with a row or a name, the others keep their answers."""

from pathlib import Path

import pytest

from autoprec.errors import DeviceError
from autoprec.predict import load_device_profile
from autoprec.predict.tables import ADDED, added_names, predict_table

HEADER = "device,M,K,N\n"
GOOD = "h200,8192,4096,4096\n"


def refusals(text: str, *, device: str = "") -> list[str]:
    table = predict_table(HEADER + text, source="rows.csv", device=device)
    return [str(row.refusal) if row.profile == "" else "" for row in table.itertuples()]


def test_a_row_that_fails_in_any_way_keeps_the_others(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    rows = {
        GOOD: "",
        "/nowhere/mine.json,8192,4096,4096\n": "must be readable",
        f"{damaged},8192,4096,4096\n": "complete JSON",
        "h200,8,192,4096,4096\n": "at most the header's 4 cells, but it has 5",
        ",8192,4096,4096\n": "name its device",
        f"{'x' * 5000},8192,4096,4096\n": "a device must be",
        "h200,8192,4096,4096,,\n": "",  # spreadsheets write such commas
        "h200,8192,4096\n": "N must be a positive whole number",
    }
    for found, words in zip(refusals("".join(rows)), rows.values(), strict=True):
        assert words in found
        assert bool(found) is bool(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("device,M,K,N,m\nh200,16,16,16,16\n", "two called M"),
        (HEADER + GOOD + '"h200,16,16,16\n' + GOOD, "is not at line"),
        (HEADER + "x" * 200_000 + "\n", "is not at line"),
        ("", "lacks device"),
    ],
)
def test_a_file_that_cannot_be_told_into_rows_is_one_line(text: str, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        predict_table(text, source="rows.csv")


def test_added_names_are_new_whatever_the_header_has() -> None:
    assert added_names(("device", "M")) == ADDED
    header = ("Speedup ", "predicted_speedup", "refusal")
    added = added_names(header)
    assert "predicted_predicted_speedup" in added
    assert "predicted_refusal" in added
    assert "gemm_speedup" in added
    assert not {name.strip().lower() for name in header} & set(added)


@pytest.mark.parametrize("wrong", ["x" * 5000, "a\x00b", "\u00e9" * 90])
def test_a_name_that_no_file_can_have_is_one_short_line(wrong: str) -> None:
    with pytest.raises(DeviceError, match="a device must be") as caught:
        load_device_profile(wrong)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("h100-sxn", "h100-sxm"),
        ("H100 80GB 700W SXM", "h100-sxm"),
        ("H100 SXM 450W", "h100-sxm"),
        ("H100 PCIe 300W", "h100-pcie"),
        ("RTX 4080", "rtx-4090"),
        ("RTX PRO 5000 Blackwell", "rtx-pro-6000"),
        ("B300 NVL72", "b300"),
    ],
)
def test_the_nearest_name_comes_first(wrong: str, near: str) -> None:
    with pytest.raises(DeviceError, match=f"nearest: {near}(,|$)"):
        load_device_profile(wrong)
