from autoprec.cli.console import progress_lines


def test_without_a_terminal_a_stage_says_every_few_seconds_how_long_it_will_take() -> None:
    now = [0.0]
    lines: list[str] = []
    show = progress_lines(lines.append, lambda: now[0])
    for done in range(41):
        show("layers", done, 40)
        now[0] += 1.0
    show("steps", 0, 3)
    show("steps", 1, 3)  # no time has passed: no line
    assert lines[:3] == [
        "layers ...",
        "layers: 5 of 40 (12 %), about 35 s left",
        "layers: 10 of 40 (25 %), about 30 s left",
    ]
    assert lines[-2:] == ["layers: 40 of 40 (100 %)", "steps ..."]


def test_a_stage_that_goes_on_where_it_stood_counts_from_there() -> None:
    now = [0.0]
    lines: list[str] = []
    show = progress_lines(lines.append, lambda: now[0])
    show("layers", 30, 40)
    now[0] = 10.0
    show("layers", 35, 40)
    assert lines[-1] == "layers: 35 of 40 (88 %), about 10 s left"
