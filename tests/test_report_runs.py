from dataclasses import replace
from pathlib import Path

import pytest

from autoprec.errors import RecordError
from autoprec.report import load_run
from autoprec.report.runs import FILES, RunRecords, consistent_run
from tests.report_runs import make_run


def save(run: RunRecords, folder: Path) -> None:
    for name in FILES:
        record = getattr(run, name)
        if record is not None:
            record.save(folder / f"{name}.json")


def test_load_run_reads_what_the_stages_wrote(tmp_path: Path) -> None:
    run = make_run(blocks=1)
    save(run, tmp_path)
    assert run == load_run(tmp_path)


def test_stages_that_did_not_run_are_none(tmp_path: Path) -> None:
    save(replace(make_run(blocks=1), search=None, verification=None, plan=None), tmp_path)
    run = load_run(tmp_path)
    assert run.profile
    assert run.search is None
    assert run.notes == ()


def test_an_empty_folder_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"has none; give the folder that `autoprec tune"):
        load_run(tmp_path)


def test_a_broken_file_is_an_error(tmp_path: Path) -> None:
    save(make_run(blocks=1), tmp_path)
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(RecordError, match=r"search\.json"):
        load_run(tmp_path)


def test_a_record_of_another_model_is_set_aside_with_a_note() -> None:
    run = make_run(blocks=1)
    assert run.sensitivity
    stale = run.sensitivity.model_copy(update={"structure": "another"})
    found = consistent_run(replace(run, sensitivity=stale))
    assert found.sensitivity is None
    assert found.profile == run.profile
    assert len(found.notes) == 1
    assert "sensitivity.json is of another model (another)" in found.notes[0]


def test_a_verification_of_another_plan_is_set_aside_with_a_note() -> None:
    run = make_run(blocks=1)
    assert run.verification
    other = run.verification.model_copy(update={"plan": "0" * 16})
    found = consistent_run(replace(run, verification=other))
    assert found.verification is None
    assert "run `autoprec verify` again" in found.notes[0]


def test_the_run_is_about_the_plan_s_model() -> None:
    run = make_run(blocks=1)
    assert run.profile
    model = run.profile.model.model_copy(update={"structure": "older"})
    older = run.profile.model_copy(update={"model": model})
    found = consistent_run(replace(run, profile=older))
    assert found.profile is None
    assert found.plan == run.plan


def test_an_empty_run_is_about_no_model() -> None:
    assert RunRecords().structures == {}
