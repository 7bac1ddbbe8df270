"""The trace of a profile is one by the rules of the Trace Event Format, and says what was timed."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoprec.cli.main import main
from autoprec.errors import RecordError
from autoprec.records import BF16_O2
from autoprec.report import RunRecords
from autoprec.report.timeline import trace_text
from tests.report_runs import ROWWISE, make_run, predicted_run, renamed

Event = dict[str, Any]  # Any: JSON values
METADATA = {  # of the format's metadata events, and the argument that each has
    "process_name": ("name", str),
    "process_labels": ("labels", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


def trace_problems(text: str) -> list[str]:
    """Return what breaks the Trace Event Format (its JSON Object Format), event by event."""
    trace = json.loads(text, parse_constant=lambda name: pytest.fail(f"JSON has no {name}"))
    found = [] if trace.get("displayTimeUnit", "ms") in ("ms", "ns") else ["displayTimeUnit"]
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in trace["traceEvents"]:
        problems = _event_problems(event)
        found += [f"{problem}: {event}" for problem in problems]
        if event["ph"] == "X" and not problems:
            tracks[event["pid"], event["tid"]].append(event)
    for track in tracks.values():
        found += [f"not nested: {event}" for event in _not_nested(track)]
    return found


def _event_problems(event: Event) -> list[str]:
    phase, found = event.get("ph"), []
    if phase not in ("X", "M", "i"):
        found.append("a phase that is not used here")
    if not isinstance(event.get("name"), str) or not event["name"]:
        found.append("no name")
    if not all(type(event.get(key)) is int for key in ("pid", "tid")):
        found.append("pid and tid are integers")
    if not _is_time(event.get("ts")) or (phase == "X" and not _is_time(event.get("dur"))):
        found.append("a time is a number of us from 0")
    if phase == "M":
        key, kind = METADATA.get(event.get("name", ""), ("", object))
        if not isinstance(event.get("args", {}).get(key), kind):
            found.append("a metadata event has its argument")
    if phase == "i" and event.get("s", "t") not in ("g", "p", "t"):
        found.append("the scope of an instant is g, p or t")
    return found


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0  # type: ignore[arg-type,operator]  # a number, by the test before


def _not_nested(track: list[Event]) -> list[Event]:
    """Return the complete events that reach out of the one they began in, be it by a ns.

    Perfetto drops those; it takes times in whole ns, cut off.
    """
    open_until: list[int] = []
    found = []
    for event in sorted(track, key=lambda each: (each["ts"], -each["dur"])):
        begin = int(event["ts"] * 1e3)
        end = begin + int(event["dur"] * 1e3)
        while open_until and open_until[-1] <= begin:
            open_until.pop()
        if open_until and end > open_until[-1]:
            found.append(event)
        open_until.append(end)
    return found


def tracks_of(run: RunRecords) -> dict[str, list[Event]]:
    """Return the slices and instants by the name of their track."""
    events = json.loads(trace_text(run))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return {
        name: [e for e in events if e["tid"] == tid and e["ph"] != "M"]
        for tid, name in names.items()
    }


@pytest.mark.parametrize("run", [make_run(), predicted_run()], ids=["measured", "predicted"])
def test_a_trace_keeps_the_format(run: RunRecords) -> None:
    assert trace_problems(trace_text(run)) == []


def test_the_checker_finds_what_is_wrong() -> None:
    good = {"name": "a", "ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 2.0}
    wrong: list[Event] = [
        {"ts": -1},
        {"ts": "0"},
        {"dur": None},
        {"pid": "1"},
        {"ph": "Q"},
        {"name": ""},
        {"ph": "M", "name": "thread_name"},
        {"ph": "i", "s": "x"},
    ]
    for change in wrong:
        assert trace_problems(json.dumps({"traceEvents": [good | change]})), change
    crossing = {**good, "ts": 1}
    assert trace_problems(json.dumps({"traceEvents": [good, crossing]}))
    assert trace_problems(json.dumps({"traceEvents": [good, {**good, "ts": 2.0}]})) == []


def test_there_is_a_track_for_every_arm_with_all_layers_in_order() -> None:
    run = make_run()
    assert run.profile
    tracks = tracks_of(run)
    assert [name.partition(",")[0] for name in tracks] == [
        "FP32",
        "BF16 O2",
        "this plan",
        "fp8_o1 tensorwise",
        "fp8_o1 rowwise",
        "fp8_o1 rowwise_with_gw_hp",
    ]
    for events in tracks.values():
        layers = [event["name"] for event in events if event["cat"] == "layer"]
        assert layers == list(run.profile.model.names)


def test_slices_have_the_times_of_the_profile() -> None:
    run = make_run()
    assert run.profile
    bf16 = next(events for name, events in tracks_of(run).items() if name.startswith("BF16 O2"))
    layer = next(e for e in bf16 if e["name"] == "head")
    row = run.profile.timing("head", BF16_O2)
    assert row
    assert row.total
    assert row.output
    assert layer["dur"] == pytest.approx(row.total.median_ms * 1000.0, abs=1 / 8)
    assert layer["args"]["ms"] == row.total.median_ms
    assert (layer["args"]["basis"], layer["args"]["shape"]) == ("measured", "16384x2048x50304")
    inside = [e for e in bf16 if layer["ts"] <= e["ts"] < layer["ts"] + layer["dur"]][1:]
    assert [e["name"] for e in inside] == ["output", "grad_input", "grad_weight"]
    assert inside[0]["args"]["ms"] == row.output.median_ms
    step = run.profile.step("bf16_o2")
    assert step
    assert bf16[-1]["name"] == "outside the layers"
    whole = sum(e["dur"] for e in bf16 if e["cat"] in ("layer", "outside"))
    assert whole == pytest.approx(bf16[-1]["args"]["step_ms"] * 1000.0, abs=1 / 8)


def test_a_layer_without_a_time_is_an_instant_that_says_why() -> None:
    run = make_run()
    assert run.profile
    rows = tuple(
        row.model_copy(update={"total": None, "infeasible": "no such kernel"})
        if (row.names, row.option) == (("head",), ROWWISE)
        else row
        for row in run.profile.layers
    )
    unknown = replace(run, profile=run.profile.model_copy(update={"layers": rows}))
    assert trace_problems(trace_text(unknown)) == []
    track = next(events for name, events in tracks_of(unknown).items() if name.endswith("rowwise"))
    head = next(event for event in track if event["name"] == "head")
    assert (head["ph"], head["args"]["no time"]) == ("i", "no such kernel")


def test_parts_that_take_longer_alone_are_drawn_within_their_layer() -> None:
    run = make_run()
    assert run.profile
    rows = []
    for row in run.profile.layers:
        total = row.total and row.total.model_copy(update={"median_ms": row.total.median_ms / 2})
        rows.append(row.model_copy(update={"total": total}))
    halved = replace(run, profile=run.profile.model_copy(update={"layers": tuple(rows)}))
    assert trace_problems(trace_text(halved)) == []
    gemm = next(e for e in next(iter(tracks_of(halved).values())) if e["cat"] == "gemm")
    assert gemm["args"]["drawn_at"] < 1.0
    shorter = gemm["args"]["ms"] * 1000.0 * gemm["args"]["drawn_at"]
    assert gemm["dur"] == pytest.approx(shorter, abs=1 / 8)


def test_a_run_without_a_profile_has_no_trace() -> None:
    with pytest.raises(RecordError, match="the run has no profile"):
        trace_text(RunRecords(plan=make_run().plan))


def test_report_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = renamed(make_run(), {"head": "he\nad\u202e"})
    assert run.profile
    run.profile.save(tmp_path / "profile.json")
    with pytest.raises(SystemExit) as leaving:
        main(["report", str(tmp_path), "--trace", str(tmp_path / "trace.json"), "--json"])
    assert not leaving.value.code
    assert json.loads(capsys.readouterr().out)["plan"] is None
    text = (tmp_path / "trace.json").read_text()
    assert trace_problems(text) == []
    assert "he\\\\nad" in text or "he\\\\x0aad" in text
