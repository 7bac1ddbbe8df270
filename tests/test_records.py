import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.common.files import MAX_RECORD_BYTES, file_digest, write_atomically
from autoprec.errors import RecordError
from autoprec.records import (
    BF16_O2,
    FP32,
    Branch,
    Gemm,
    LossGap,
    Option,
    Recipe,
    Verdict,
    Verification,
    fp8_option,
)

RECORD = Verification(
    plan="0123456789abcdef",
    verdict=Verdict.VERIFIED,
    loss_tolerance=1e-3,
    gap=LossGap(mean=1e-4, low=-1e-4, high=3e-4, confidence=0.95, seeds=3),
    control_gap=None,
    seed_spread=0.01,
    predicted_gap=None,
    warmup_steps=40,
    branch_steps=20,
    branches=(Branch(label="plan", seed=0, eval_loss=2.5, diverged_at=None, curve=(3.0, 2.5)),),
    steps=(),
)
masks = st.sets(st.sampled_from(Gemm), max_size=2).map(lambda s: tuple(g for g in Gemm if g in s))
options = st.one_of(
    st.sampled_from([FP32, BF16_O2, fp8_option(Recipe.ROWWISE_WITH_GW_HP)]),
    st.builds(
        lambda recipe, mask: fp8_option(recipe, *mask),
        st.sampled_from([Recipe.TENSORWISE, Recipe.ROWWISE, Recipe.DELAYED]),
        masks,
    ),
)


@given(options)
def test_option_is_its_key(option: Option) -> None:
    assert Option.parse(option.key) == option
    assert Option.model_validate_json(option.model_dump_json()) == option


@pytest.mark.parametrize(
    "key",
    [
        "",
        "bf17",
        "fp8_o1",
        "fp8_o1:",
        "bf16_o2:rowwise",
        "fp8_o1:e4m3",
        "fp8_o1:rowwise-all",
        "fp8_o1:tensorwise-output-grad_input-grad_weight",
        "fp8_o1:tensorwise-output-output",
        "fp8_o1:rowwise_with_gw_hp-output",
        "fp8_o1:tensorwise-grad_input-output",
    ],
)
def test_impossible_option_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Option.parse(key)


def test_record_round_trips_through_its_file(tmp_path: Path) -> None:
    path = RECORD.save(tmp_path / "verification.json")
    assert Verification.load(path) == RECORD
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"version": 99}, "says 99"),
        ({"version": True}, "says True"),
        ({"kind": "profile"}, "kind='verification'"),
        ({"verdict": "maybe"}, "verdict: "),
        ({"tolerance": None}, "tolerance: "),
        ({"warmup_steps": "40; import os"}, "warmup_steps: "),
    ],
)
def test_edited_record_is_one_clear_line(change: dict[str, object], message: str) -> None:
    text = json.dumps({**json.loads(RECORD.to_json()), **change})
    with pytest.raises(RecordError, match=message) as caught:
        Verification.from_json(text, source="x.json")
    assert "\n" not in str(caught.value)


def test_missing_field_is_named() -> None:
    fields = json.loads(RECORD.to_json())
    del fields["branches"]
    with pytest.raises(RecordError, match="branches: Field required"):
        Verification.from_json(json.dumps(fields))


@given(st.integers(min_value=0, max_value=len(RECORD.to_json()) - 3))
def test_truncated_record_is_refused(length: int) -> None:
    with pytest.raises(RecordError, match="complete JSON"):
        Verification.from_json(RECORD.to_json()[:length])


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "null", '{"kind": NaN}'])
def test_nested_or_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(RecordError):
        Verification.from_json(text)


def test_brackets_in_names_are_no_nesting() -> None:
    odd = RECORD.model_copy(update={"advice": "[{" * 500})
    assert Verification.from_json(odd.to_json()) == odd


def test_a_file_of_one_byte_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(MAX_RECORD_BYTES + 1)
    with pytest.raises(RecordError, match="has at most"):
        Verification.load(path)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="No such file"):
        Verification.load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="not UTF-8"):
        Verification.load(tmp_path / "binary.json")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "a.json", "old")

    def fail(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="choose another folder with --out"):
        write_atomically(tmp_path / "absent" / "a.json", "text")


def test_a_file_s_digest_follows_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    found = [file_digest(file)]
    for content in (b"some", b"others", b"some"):  # of one length a file's time tells them apart
        file.write_bytes(content)
        found.append(file_digest(file))
    assert found[0] == ""
    assert found[1] == found[3] != found[2]
