"""What is said while a command works: stages, what they are at, and what they wait for."""

import os
import sys

import pytest
from rich.progress import Progress as Bars

from autoprec.cli.console import Drawn, Lines, Waits, drawn_progress
from autoprec.common.progress import NOW


class Told:
    """Lines that were written, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now, self.lines = 0.0, list[str]()
        self.show = Lines(self.lines.append, lambda: self.now)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    made = Told()
    monkeypatch.setattr("autoprec.common.progress.time.monotonic", lambda: made.now)
    monkeypatch.setattr(NOW, "waiting", [])
    monkeypatch.setattr(NOW, "measures", "")
    return made


def test_without_a_terminal_a_stage_says_every_few_seconds_how_long_it_will_take(
    told: Told,
) -> None:
    for done in range(41):
        told.show("layers", done, 40)
        told.now += 1.0
    told.show("steps", 0, 3)
    told.show("steps", 1, 3)  # no time has passed: no line
    assert told.lines[:3] == [
        "layers ...",
        "layers: 5 of 40 (12 %), 5 s, about 35 s left",
        "layers: 10 of 40 (25 %), 10 s, about 30 s left",
    ]
    assert told.lines[-2:] == ["layers: 40 of 40 (100 %), 40 s", "steps ..."]


def test_a_stage_that_goes_on_where_it_stood_counts_from_there(told: Told) -> None:
    told.show("layers", 30, 40)
    told.now = 10.0
    told.show("layers", 35, 40)
    assert told.lines[-1] == "layers: 35 of 40 (88 %), 10 s, about 10 s left"


@pytest.mark.parametrize("first", [0, 25])
def test_a_stage_that_starts_over_does_not_count_the_time_since_it_ended(
    told: Told, first: int
) -> None:
    for done in (1, 25):  # a branch of the proof, and its like at a longer horizon
        told.show("verify: plan, seed 2", done, 25)
    told.show("verify: plan, seed 3", 1, 25)
    told.now = 600.0
    for done in range(first + 1, first + 8):
        told.show("verify: plan, seed 2", done, first + 25)
        told.now += 1.0
    assert told.lines[-2:] == [
        "verify: plan, seed 2 ...",
        f"verify: plan, seed 2: {first + 6} of {first + 25} ({100 * (first + 6) // (first + 25)} %)"
        ", 5 s, about 19 s left",
    ]


def test_a_terminal_has_one_bar_and_a_line_for_each_stage_that_ended() -> None:
    bars, lines, now = Bars(), list[str](), [0.0]
    drawn = Drawn(bars, lines.append, lambda: now[0])
    ends = [("layers", 25), ("verify: seed 1", 25), ("verify: seed 2", 3), ("verify: seed 1", 1)]
    for label, done in ends:
        drawn(label, done, 25)
        now[0] += 10.0
    (bar,) = bars.tasks
    assert (bar.description, bar.completed, bar.visible) == ("verify: seed 1", 1, True)
    drawn.end_for()
    assert (bar.visible, lines) == (False, ["layers: 10 s", "verify: 30 s"])


def test_a_layer_that_takes_long_is_said_though_nothing_is_reported(told: Told) -> None:
    told.show("layers", 0, 4)
    told.now = 2.0
    told.show("layers", 1, 4)
    NOW.measures = "head in fp8_o1:rowwise"
    for told.now in range(3, 50):
        told.show.beat()
        if told.now == 40.0:
            NOW.measures = "head in bf16_o2"
    of = "layers: 1 of 4 (25 %)"
    assert told.lines[1:] == [  # ever less often, until there is something new
        f"{of}, 5 s, about 15 s left: head in fp8_o1:rowwise",
        f"{of}, 15 s, about 45 s left: head in fp8_o1:rowwise",
        f"{of}, 35 s, about 105 s left: head in fp8_o1:rowwise",
        f"{of}, 41 s, about 123 s left: head in bf16_o2",
    ]
    told.show("layers", 4, 4)
    said = len(told.lines)
    told.now += 60.0
    told.show.beat()
    assert len(told.lines) == said  # the stage is over


def test_what_the_users_code_waits_for_is_said_after_a_few_seconds_and_ever_less_often() -> None:
    lines: list[str] = []
    waits, now = Waits(lines.append), [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoprec.common.progress.time.monotonic", lambda: now[0])
        patch.setattr(NOW, "waiting", [])
        NOW.waits("train_batches(seed=0)")
        for now[0] in range(1, 30):
            waits.beat()
        assert lines == [f"waiting for train_batches(seed=0) since {s} s" for s in (5, 10, 20)]
        NOW.goes_on()
        waits.beat()
        NOW.waits("build_model()")
        now[0] = 35
        waits.beat()
    assert lines[3:] == ["waiting for build_model() since 6 s"]


def test_a_line_in_a_pipe_is_one_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    label = "layers of a name that is longer than a terminal of eighty columns would be " * 2
    with drawn_progress() as show:
        show(label.strip(), 0, 3)
    assert capsys.readouterr().err == f"{label.strip()} ...\n"


def test_what_the_users_code_prints_is_no_result(capfd: pytest.CaptureFixture[str]) -> None:
    with drawn_progress():
        sys.stdout.write("number of parameters: 10.65M\n")
        os.write(1, b"NCCL INFO\n")  # as libraries and other processes do
    sys.stdout.write("{}\n")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("{}\n", "number of parameters: 10.65M\nNCCL INFO\n")
