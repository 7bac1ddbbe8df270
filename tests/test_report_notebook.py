from html.parser import HTMLParser

from autoprec.records import Precision
from autoprec.report import RunRecords, plan_text, run_html
from autoprec.tuning.plan import Plan
from tests.report_runs import make_run, predicted_run, renamed


class Tags(HTMLParser):
    """The tags of a fragment, with the names of their attributes, and the texts in between."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_plan_reads_in_at_most_15_lines() -> None:
    plan = make_run(blocks=33).plan
    assert plan
    lines = plan_text(plan).splitlines()
    assert len(lines) <= 15
    assert lines[0].startswith("Train with FP8 in 132 of 201 layers, ")
    fp8 = plan.count(Precision.FP8_O1)
    assert lines[1] == f"201 layers: {fp8} in fp8_o1 tensorwise, {201 - fp8} in bf16_o2"
    assert any("blocks.{0-32}.fc1 (x33)" in line for line in lines)


def test_an_edited_plan_says_nothing_of_the_old_one() -> None:
    made = make_run(blocks=1).plan
    assert made
    assert "FP8 pays on 4 of 6 linear layers" in plan_text(made)
    edited = plan_text(Plan.from_json(made.to_json()).with_layer("head", "bf16_o2"))
    assert "9 layers: 6 in bf16_o2, 3 in fp8_o1 tensorwise" in edited
    assert "FP8 pays" not in edited


def test_every_layer_is_counted_in_a_plan_s_text() -> None:
    plan = predicted_run().plan
    assert plan
    text = plan_text(plan)
    assert f"{len(plan.layers)} layers: " in text
    assert "not verified: no training was compared" in text


def test_the_fragment_has_a_row_per_group_of_layers_and_nothing_that_runs() -> None:
    plan = make_run(blocks=33).plan
    assert plan
    page = Tags(run_html(RunRecords(plan=plan)))
    assert {tag for tag, _ in page.tags} <= {
        "div",
        "b",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert {name for _, names in page.tags for name in names} <= {"style"}
    assert "blocks.{0-32}.fc1 (x33)" in page.texts


def test_hostile_names_stay_text() -> None:
    run = make_run(blocks=1)
    names = {"head": "</td><script>alert(1)</script>", "router": "a\x1b[31m\u202eb"}
    page = Tags(run_html(renamed(run, names)))
    assert "</td><script>alert(1)</script>" in page.texts
    assert "a\\x1b[31m\\u202eb" in page.texts
    assert page.tags == Tags(run_html(renamed(run, {"head": "x", "router": "y"}))).tags
    plan = renamed(run, names).plan
    assert plan
    assert "\x1b" not in plan_text(plan)


def test_a_run_without_a_plan_is_a_fragment_too() -> None:
    assert "No plan yet" in run_html(RunRecords())
    assert "No plan yet" in run_html(RunRecords(profile=make_run().profile))
